"""Checks what the figures measure, by hand, and how their labels are kept apart."""
import pytest
import torch

from experiments.measures import (change_rates, direction_change, effective_rank, flipped,
                                  indices_of, magnitude_change, normalised, null_rates,
                                  numerical_rank, overlap, switched_off, top)
from experiments.plots import label_ends, moved_apart, plt


def test_change_rates_of_a_diagonal_weight_are_the_diagonal_of_the_update_over_sigma():
    U, sigma, Vt = torch.linalg.svd(torch.diag(torch.tensor([4.0, 2.0, 1.0])))
    dW = torch.tensor([[1.0, 9, 9], [9, -1, 9], [9, 9, 3]])
    assert change_rates(dW, U, sigma, Vt).tolist() == [0.25, 0.5, 3.0]


def test_null_rates_are_those_of_gaussian_updates():
    W0 = torch.randn(30, 40, dtype=torch.float64)
    svd = torch.linalg.svd(W0, full_matrices=False)
    G = torch.randn(2000, 30, 40, dtype=torch.float64)
    measured = torch.stack([change_rates(g, *svd) for g in G]).mean(0)
    torch.testing.assert_close(null_rates(G[0], svd[1]), measured, rtol=0.1, atol=0)


def test_ranks_by_hand():
    assert effective_rank(torch.ones(7)) == pytest.approx(7)
    assert effective_rank(torch.tensor([5.0, 0, 0])) == pytest.approx(1)
    assert effective_rank(torch.tensor([2.0, 1, 1])) == pytest.approx(2 ** 1.5)     # 1.5 bits
    assert numerical_rank(torch.tensor([100.0, 1.01, 1, 0])) == 2
    assert effective_rank(torch.zeros(3)) == numerical_rank(torch.zeros(3)) == 0
    assert normalised(torch.tensor([4.0, 1])).tolist() == [1, 0.25]
    assert normalised(torch.zeros(2)).tolist() == [0, 0]


def test_a_scaled_row_changes_magnitude_and_a_turned_row_direction():
    W0 = torch.tensor([[3.0, 4], [1, 0]])
    scaled, turned = W0 * torch.tensor([[2.0], [1]]), torch.tensor([[3.0, 4], [0, 1]])
    assert magnitude_change(scaled, W0) == 2.5          # 5 and 0
    assert direction_change(scaled, W0) == pytest.approx(0, abs=1e-6)
    assert magnitude_change(turned, W0) == 0
    assert direction_change(turned, W0) == pytest.approx(0.5)           # 0 and 1
    assert direction_change(-W0, W0) == pytest.approx(2)


def test_directions_are_told_by_their_vectors_whatever_the_sign():
    U = torch.linalg.qr(torch.randn(6, 4))[0]
    assert indices_of(-U[:, [3, 1]], U) == {1, 3}
    assert top(torch.tensor([5.0, 1, 7, 6]), 2) == {2, 3}
    assert overlap({1, 2, 3}, {3, 4}) == 0.5


def test_shares_of_entries_by_hand():
    assert switched_off(torch.tensor([[1.0, -1], [0, 2]])) == 0.5
    assert flipped(torch.tensor([1.0, 0, -1, 3]), torch.tensor([-1.0, -2, 5, 1])) == 0.5


def test_labels_that_would_overlap_are_moved_apart_and_the_others_stay():
    assert moved_apart([0.9, 0.2], 0.1) == [0.9, 0.2]
    assert moved_apart([0.5, 0.5, 0.1], 0.1) == pytest.approx([0.45, 0.55, 0.1])
    assert moved_apart([0.0, 0.5, 0.52, 0.54], 0.1) == pytest.approx([0.0, 0.42, 0.52, 0.62])
    assert moved_apart([0.3, 0.3, 0.38], 0.1) == pytest.approx([0.2266667, 0.3266667, 0.4266667])
    assert moved_apart([], 0.1) == []


def test_every_named_line_is_labelled_at_its_end():
    figure, axes = plt.subplots(layout="constrained")
    axes.plot([1, 2], [3, 4], label="rises")
    axes.errorbar([1, 2], [3, 3], [0.1, 0.1], label="stays")
    axes.axhline(3, label="lies")
    axes.plot([1, 2], [1, 1])
    label_ends([axes])
    assert {text.get_text(): text.xy for text in axes.texts} == {
        "rises": (2, 4), "stays": (2, 3), "lies": (1, 3)}
    plt.close(figure)
