"""What the figures measure: functions of weights and updates, without runs or pictures.

W0 and W' (out, in) are a layer's weight before and after, dW = W' - W0; sigma (k,) are singular
values, the largest first, k = min(out, in). W0 = sum_i sigma_i u_i v_i'.
"""
import math

import torch
import torch.nn.functional as F


def normalised(sigma):
    """sigma / sigma_1; zeros stay zeros."""
    return sigma / sigma.max().clamp_min(torch.finfo(sigma.dtype).tiny)


def numerical_rank(sigma) -> int:
    """How many singular values are above 1 % of the largest."""
    return int((sigma > 0.01 * sigma.max()).sum())


def effective_rank(sigma) -> float:
    """exp(-sum_i p_i ln p_i), p = sigma / sum sigma (Roy and Vetterli, 2007): n for n equal values,
    less the more they differ; 0 for an update of 0."""
    if not sigma.any():
        return 0.0
    return torch.special.entr(sigma / sigma.sum()).sum().exp().item()


def magnitude_change(W, W0) -> float:
    """Mean over rows of | ||w'|| - ||w0|| |: delta-M of the DoRA paper (section 4.1), whose columns
    are our rows."""
    return (W.norm(dim=1) - W0.norm(dim=1)).abs().mean().item()


def direction_change(W, W0) -> float:
    """Mean over rows of 1 - cos(w', w0): delta-D of the DoRA paper."""
    return (1 - F.cosine_similarity(W, W0, dim=1)).mean().item()


def change_rates(dW, U, sigma, Vt):
    """|u_i' dW v_i| / sigma_i (k,): how far dW moves W0 along W0's own directions, relative to what
    is there (LoRA-Dash, section 3). U (out, k), Vt (k, in)."""
    return ((U.t() @ dW) * Vt).sum(1).abs() / sigma


def null_rates(dW, sigma):
    """The rates (k,) to expect of a Gaussian matrix of dW's Frobenius norm, which knows nothing of
    W0: u' G v has the standard deviation of G's entries, ||dW|| / sqrt(out in), whatever the unit
    vectors u and v are; and E|N(0, 1)| = sqrt(2/pi)."""
    return math.sqrt(2 / math.pi / dW.numel()) * dW.norm() / sigma


def top(rates, s: int) -> set[int]:
    """The indices of the s highest."""
    return set(rates.topk(s).indices.tolist())


def indices_of(U, among) -> set[int]:
    """Which columns of `among` (out, k) the columns of U (out, s) are, up to their signs."""
    return set((among.t() @ U).abs().argmax(0).tolist())


def overlap(found: set[int], true: set[int]) -> float:
    """Which share of `true` was found."""
    return len(found & true) / len(true)


def switched_off(magnitude) -> float:
    """The share of entries that ReLU makes 0."""
    return (magnitude <= 0).double().mean().item()


def flipped(direction, before) -> float:
    """The share of entries whose Sign is another; Sign(0) = -1."""
    return ((direction > 0) != (before > 0)).double().mean().item()
