"""Measures weights and updates, without runs or pictures.

W0 and W' (out, in) are a layer's weight before and after training, dW = W' - W0. sigma (k,) are
singular values, the largest first, k = min(out, in). W0 = sum_i sigma_i u_i v_i^T.
"""
import math

import torch
import torch.nn.functional as F


def normalised(sigma):
    """Divides singular values by the largest. Zeros stay zeros."""
    return sigma / sigma.max().clamp_min(torch.finfo(sigma.dtype).tiny)


def numerical_rank(sigma) -> int:
    """Counts the singular values above 1 % of the largest."""
    return int((sigma > 0.01 * sigma.max()).sum())


def effective_rank(sigma) -> float:
    """Returns exp(-sum_i p_i ln p_i), p = sigma / sum sigma (Roy and Vetterli, 2007).

    It is n for n equal values, less the more they differ, and 0 for an update of 0.
    """
    if not sigma.any():
        return 0.0
    return torch.special.entr(sigma / sigma.sum()).sum().exp().item()


def magnitude_change(W, W0) -> float:
    """Averages | ||w'|| - ||w0|| | over rows: delta-M of the DoRA paper (section 4.1).

    The paper's columns are our rows.
    """
    return (W.norm(dim=1) - W0.norm(dim=1)).abs().mean().item()


def direction_change(W, W0) -> float:
    """Averages 1 - cos(w', w0) over rows: delta-D of the DoRA paper (section 4.1)."""
    return (1 - F.cosine_similarity(W, W0, dim=1)).mean().item()


def change_rates(dW, U, sigma, Vt):
    """Returns the change rates |u_i^T dW v_i| / sigma_i (k,) of LoRA-Dash, section 3.

    A rate is how far dW moves W0 along one of W0's own directions, relative to what is there.
    U (out, k), Vt (k, in).
    """
    return ((U.t() @ dW) * Vt).sum(1).abs() / sigma


def null_rates(dW, sigma):
    """Returns the rates (k,) to expect of a Gaussian matrix of dW's Frobenius norm.

    Such a matrix G knows nothing of W0. For any unit vectors u and v, u' G v has the standard
    deviation of G's entries, ||dW|| / sqrt(out in); and E|N(0, 1)| = sqrt(2/pi).
    """
    return math.sqrt(2 / math.pi / dW.numel()) * dW.norm() / sigma


def top(rates, s: int) -> set[int]:
    """Returns the indices of the s highest rates."""
    return set(rates.topk(s).indices.tolist())


def indices_of(U, among) -> set[int]:
    """Finds the columns of U (out, s) in `among` (out, k), up to their signs."""
    return set((among.t() @ U).abs().argmax(0).tolist())


def overlap(found: set[int], true: set[int]) -> float:
    """Returns the share of `true` that was found."""
    return len(found & true) / len(true)


def switched_off(magnitude) -> float:
    """Returns the share of entries that ReLU makes 0."""
    return (magnitude <= 0).double().mean().item()


def flipped(direction, before) -> float:
    """Returns the share of entries whose Sign has changed. Sign(0) = -1."""
    return ((direction > 0) != (before > 0)).double().mean().item()
