"""Multiplies by a weight that is built for the product alone; splits a weight into thin factors."""
import contextlib
from typing import Callable, Iterable

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


def full_precision(x):
    """Returns a context without autocast, to build in float32; the meta device has no autocast."""
    device = x.device.type
    known = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if known else contextlib.nullcontext()


def low_precision(x) -> bool:
    """Says whether x would be multiplied in bf16 or fp16."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device).itemsize < 4
    return x.dtype.itemsize < 4


def rebuilt(x, weight: Callable, blocks: Iterable[slice] = (slice(None),), bias=None):
    """Returns x W^T + bias: (..., in) -> (..., out), where weight(rows) builds rows of W.

    Backward builds each block of rows again. So autograd keeps x and what weight() reads, but
    nothing of W, and one block is there at a time.
    """
    def product(x, rows):
        with full_precision(x):
            W = weight(rows)                                        # (n, in)
        return F.linear(x, W.to(x.dtype), None if bias is None else bias[rows])

    parts = [checkpoint(product, x, rows, use_reentrant=False, preserve_rng_state=False)
             for rows in blocks]                    # preserve_rng_state: nothing here is random
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


_from_file = False


@contextlib.contextmanager
def values_from_file():
    """Tells the layers that are made inside the block that a file brings their values."""
    global _from_file
    _from_file = True
    try:
        yield
    finally:
        _from_file = False


def values_follow() -> bool:
    """Says whether a layer can leave out its own start, since a file brings its values."""
    return _from_file


def best_factors(W, rank: int):
    """Returns A (rank, in) and B (out, rank): B A is the nearest to W (out, in) of that rank.

    With W = U diag(S) V^T, A is S^(1/2) V^T and B is U S^(1/2), both cut to the largest S.
    """
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    root = S[:rank].sqrt()
    return root[:, None] * Vt[:rank], U[:, :rank] * root
