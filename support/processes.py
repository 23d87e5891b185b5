"""Lets several processes train one model together, by torch.distributed; hears requests to stop.

    torchrun --nproc-per-node 2 train.py --method dual
torchrun starts the same command N times. Environment variables tell each process its number. Every
process holds the whole model and works on its share of each batch. sum_gradients() then gives all
of them the same gradients, so they take the same step. Process 0 writes the files. Without torchrun
there is one process, and the functions here change nothing.
"""
import os
import signal
from contextlib import contextmanager
from typing import Callable, Iterable, Iterator

import torch
import torch.distributed as dist
from torch import nn

from support.errors import UserError

VARIABLES = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
BUCKET = 2 ** 24        # gradients that are sent at once, as numbers


def join_processes(device: str) -> None:
    """Connects with the other processes of torchrun; on "cuda" each takes a GPU of its own.

    Raises UserError if the device names one GPU, or there are fewer GPUs than processes.
    """
    if dist.is_initialized() or not VARIABLES <= os.environ.keys():
        return
    if device.startswith("cuda:"):
        raise UserError(f"--device {device}: each process takes a GPU of its own, give cuda")
    if device == "cuda":
        here, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if here > gpus:
            raise UserError(f"--device cuda: {here} processes here, and {gpus} GPUs")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")


def process_number() -> int:
    """Returns this process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def process_count() -> int:
    """Returns the number of processes of this run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Says whether this process writes the files and talks to the user."""
    return process_number() == 0


def gathered(value) -> list:
    """Returns every process's `value`, in order of their numbers; all must call it."""
    values = [value] * process_count()
    if process_count() > 1:
        dist.all_gather_object(values, value)
    return values


def summed(numbers: list[float], device: str) -> list[float]:
    """Returns each number's sum over the processes."""
    if process_count() == 1:
        return numbers
    sums = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return sums.tolist()


def joined(items: list) -> list:
    """Merges the processes' lists: each has filled in its own items and left None elsewhere."""
    return [next((item for item in column if item is not None), None)
            for column in zip(*gathered(items))]


def own_parts(batch: list, parts: int) -> list[list]:
    """Cuts a batch into `parts` slices for each process; returns those of this process.

    The slices keep the batch's order. Their lengths differ by at most one.
    """
    n = parts * process_count()
    cuts = [i * len(batch) // n for i in range(n + 1)]
    slices = [batch[a:b] for a, b in zip(cuts, cuts[1:])]
    return slices[parts * process_number():parts * (process_number() + 1)]


@torch.no_grad()
def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Gives every process the sum of all processes' gradients; None where no process has one.

    DistributedDataParallel takes the average. That would need a loss N times as large, and Dual
    LoRA's clip would then cut at another size. The gradients are added in the order of the
    processes, as one process adds up its micro-batches. all_reduce adds in another order, which
    rounds differently. If a gradient is nearly 0, Adam turns such a rounding into a full step.
    """
    if process_count() == 1:
        return
    bucket = []
    for p in parameters:
        bucket.append(p)
        if sum(p.numel() for p in bucket) > BUCKET:
            sum_bucket(bucket)
            bucket = []
    if bucket:
        sum_bucket(bucket)


def sum_bucket(parameters: list[nn.Parameter]) -> None:
    """Sums the gradients of some parameters, sent as one flat tensor.

    It begins with a mark for each parameter: 1 if the process has a gradient for it, else 0.
    """
    marks = parameters[0].new_tensor([p.grad is not None for p in parameters])
    flat = torch.cat([marks, *(torch.zeros_like(p).flatten() if p.grad is None else
                               p.grad.flatten() for p in parameters)])
    parts = [torch.empty_like(flat) for _ in range(process_count())]
    dist.all_gather(parts, flat)
    total = parts[0]
    for part in parts[1:]:
        total += part
    marks, numbers = total[:len(parameters)].tolist(), total[len(parameters):]
    sizes = [p.numel() for p in parameters]
    for p, there, gradient in zip(parameters, marks, numbers.split(sizes)):
        p.grad = gradient.view_as(p).to(p.dtype, copy=True) if there else None


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether Ctrl-C or SIGTERM (a scheduler's) has come.

    So a run can stop between two steps. A second request ends the program at once.
    """
    came = []

    def note(number, frame):
        came.append(number)
        signal.signal(number, usual[number])

    usual = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
