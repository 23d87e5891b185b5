"""Measures calls: their time side by side, their memory, their multiply-adds; prints tables."""
import ctypes
import random
import statistics
import time
import weakref
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterator

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from tqdm import tqdm


# ---- time
def race(contenders: dict[str, list[Callable]], rounds: int, device: str) -> dict[str, list]:
    """Times every contender once a round, in another order each round; the first does not count.

    A contender is a list of calls, run one after the other. The result has for each name and round
    the seconds from the start to the end of each call.
    """
    times: dict[str, list] = {name: [] for name in contenders}
    order = list(contenders)
    for n in tqdm(range(rounds + 1), leave=False, unit="round"):
        random.Random(n).shuffle(order)
        for name in order:
            seconds = timed(contenders[name], device)
            if n > 0:
                times[name].append(seconds)
    return times


def timed(calls: list[Callable], device: str) -> list[float]:
    """Measures the seconds from before the first call to the end of each call."""
    if not device.startswith("cuda"):
        begin, marks = time.perf_counter(), []
        for call in calls:
            call()
            marks.append(time.perf_counter() - begin)
        return marks
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
    events[0].record()
    for call, event in zip(calls, events[1:]):
        call()
        event.record()
    torch.cuda.synchronize()
    return [events[0].elapsed_time(event) / 1000 for event in events[1:]]


def median_and_spread(values: list[float]) -> tuple[float, float]:
    """Computes the median and half the distance between the quartiles."""
    low, median, high = statistics.quantiles(values, n=4)
    return median, (high - low) / 2


# ---- multiply-adds
def flops(call: Callable) -> int:
    """Counts the floating-point operations of a call's matrix products, as torch counts them."""
    aten = torch.ops.aten           # torch has no count for these three

    def addmm_(total, a, b, **_):
        return 2 * a[0] * a[1] * b[1]

    def attention(q, k, v, *_, **__):
        return sdpa_flop_count(q, k, v)

    def attention_backward(grad, q, k, v, *_, **__):
        return sdpa_backward_flop_count(grad, q, k, v)

    with FlopCounterMode(display=False, custom_mapping={
            aten.addmm_: addmm_, aten._scaled_dot_product_flash_attention_for_cpu: attention,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    }) as counter:
        call()
    return counter.get_total_flops()


# ---- memory
def addresses(module: nn.Module, *tensors) -> set[int]:
    """Lists where the storages of a module and of further tensors begin."""
    return {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers(),
                                                     *tensors)}


def kept_for_backward(forward: Callable, owned: set[int]) -> int:
    """Counts the bytes that autograd holds between forward and backward, each storage once.

    owned: addresses to leave out, since they are there anyway: parameters, buffers, the input.
    """
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            storages[storage.data_ptr()] = storage          # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in storages.values())


class TensorMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that live inside it and are not `owned`.

    The count is exact. The memory of the process depends on what the allocator keeps.
    """

    def __init__(self, owned: set[int]):
        super().__init__()
        self.known, self.now, self.peak = set(owned), 0, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                address, size = storage.data_ptr(), storage.nbytes()
                if size and address not in self.known:
                    self.known.add(address)
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.free, address, size)
        return result

    def free(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.now -= size


def peak_bytes(call: Callable, owned: set[int], device: str) -> int:
    """Measures how far the memory of tensors rises above that of `owned`."""
    if device.startswith("cuda"):
        one = torch.ones(1, 1, device=device, requires_grad=True)
        one.mm(one).backward()          # makes cuBLAS's workspaces for forward and backward
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with TensorMemory(owned) as memory:
        call()
    return memory.peak


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Makes glibc keep what is freed inside, as torch does on a GPU.

    Otherwise glibc returns large blocks to the system and gets them again, page by page, in the
    next step. This cost belongs to no method. It hits those whose peak is just above what the
    process still holds.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):    # not glibc
        mallopt = lambda *_: None                   # noqa: E731
    mmap_max, trim_threshold = -4, -1               # their numbers in malloc.h
    mallopt(mmap_max, 0)                            # no block gets pages of its own
    mallopt(trim_threshold, -1)                     # never trim
    try:
        yield
    finally:
        mallopt(mmap_max, 65536)                    # glibc's own values
        mallopt(trim_threshold, 128 * 1024)


def peak_resident_bytes(call: Callable) -> int | None:
    """Measures how far the memory of this process rises; None if the system does not tell."""
    status, refs = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def kilobytes(name: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines()
                    if line.startswith(name))

    try:
        refs.write_text("5")            # only Linux lets a process reset its peak
    except OSError:
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)      # glibc's
    if trim is not None:
        trim(0)                         # returns freed memory, whose reuse would not be seen
    refs.write_text("5")
    before = kilobytes("VmRSS")
    call()
    return 1024 * (kilobytes("VmHWM") - before)


# ---- tables
def print_table(title: str, rows: list[dict[str, str]]) -> None:
    """Prints rows under their columns, the first to the left, the others to the right."""
    cells = [list(rows[0]), *[list(row.values()) for row in rows]]
    widths = [max(map(len, column)) for column in zip(*cells)]
    print(f"\n{title}")
    for row in cells:
        print("  ".join(cell.ljust(width) if i == 0 else cell.rjust(width)
                        for i, (cell, width) in enumerate(zip(row, widths))))


def megabytes(n: int) -> str:
    return f"{n / 2**20:.1f}"
