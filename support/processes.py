"""Several processes, one run: what torch.distributed needs from us.

    torchrun --nproc-per-node 2 train.py --method dual
torchrun starts the same command N times and tells each its place by environment variables. Every
process holds the whole model, works on its slice of each batch, and torch's
DistributedDataParallel sums the gradients, so that all take the same step. Process 0 writes the
files. Without torchrun there is one process, and everything here does nothing.
"""
import os
from contextlib import nullcontext
from functools import reduce

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from support.errors import UserError


def start(device: str) -> None:
    """Meets the other processes; on "cuda" each takes a GPU of its own."""
    if dist.is_initialized() or not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE",
                                     "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        return
    if device.startswith("cuda:"):
        raise UserError(f"--device {device}: each process takes a GPU of its own, give cuda")
    if device == "cuda":
        here, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if here > gpus:
            raise UserError(f"--device cuda: {here} processes here, and {gpus} GPUs")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")


def rank() -> int:
    """The place of this process: 0 writes the files and talks to the user."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def everyones(value) -> list:
    """The value of every process, in order of rank."""
    values = [value] * world()
    if world() > 1:
        dist.all_gather_object(values, value)
    return values


def summed(numbers: list[float], device: str) -> list[float]:
    """Each number's sum over the processes."""
    if world() == 1:
        return numbers
    sums = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return sums.tolist()


def completed(items: list) -> list:
    """The list of which each process has filled in its own places and left None in the others."""
    return [next((item for item in place if item is not None), None)
            for place in zip(*everyones(items))]


def parallel(loss: nn.Module, idle: bool) -> nn.Module:
    """`loss`, so that each backward leaves the sum of all processes' gradients in its parameters.

    idle: some parameters may be without gradient for a time.
    """
    if world() == 1:
        return loss
    loss = DistributedDataParallel(loss, forward_sync_buffers=False,
                                   find_unused_parameters=idle)
    loss.register_comm_hook(None, add_up)
    return loss


def meeting(loss: nn.Module, last: bool):
    """A context for a backward: after the last of a step the processes add up their gradients."""
    return nullcontext() if last or world() == 1 else loss.no_sync()


def add_up(_, bucket: dist.GradBucket):
    """Instead of DDP's average, which would need a loss N times as large, whose gradients Dual
    LoRA's clip would cut elsewhere: it is not linear. And in order of rank, as one process adds up
    its micro-batches: all_reduce has an order of its own, and where a gradient is nearly 0 Adam
    makes whole steps of the rounding. That costs N buckets instead of 2 on their way."""
    parts = [torch.empty_like(bucket.buffer()) for _ in range(world())]
    work = dist.all_gather(parts, bucket.buffer(), async_op=True)
    return work.get_future().then(lambda _: reduce(torch.Tensor.add_, parts))
