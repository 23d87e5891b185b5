import copy

import pytest
import torch
import torch.nn.functional as F
from parity import assert_follows, gradients
from torch import nn

from dora import DoRALinear


def dora(n_in, n_out, rank=3, alpha=4.0, dtype=None, bias=True, **kwargs):
    """Makes a layer as in the middle of training: B is not zero, magnitude is not ||W0||."""
    layer = DoRALinear(nn.Linear(n_in, n_out, bias, dtype=dtype), rank, alpha, **kwargs)
    with torch.no_grad():
        layer.B.normal_()
        layer.magnitude.mul_(torch.rand(n_out) + 0.5)
    return layer


def naive(layer, x):
    """Computes equation 5 as it stands, in plain autograd."""
    W = layer.base.weight + layer.alpha / len(layer.A) * layer.B @ layer.A
    norm = W.norm(dim=1, keepdim=True)
    W = layer.magnitude[:, None] * W / (norm if layer.norm_gradient else norm.detach())
    return F.linear(x, W, layer.base.bias)


def hand_worked(**kwargs):
    layer = DoRALinear(nn.Linear(2, 2), rank=1, alpha=2, **kwargs)      # scale = 2
    with torch.no_grad():
        layer.base.weight.copy_(torch.tensor([[3., 4.], [0., 2.]]))
        layer.base.bias.copy_(torch.tensor([10., 20.]))
    layer = DoRALinear(layer.base, rank=1, alpha=2, **kwargs)
    with torch.no_grad():
        layer.A.copy_(torch.tensor([[3., 4.]]))
        layer.B.copy_(torch.tensor([[0.5], [0.]]))
        layer.magnitude[0] = 20
    return layer


def test_a_hand_worked_2x2_layer_gives_these_numbers():
    layer = hand_worked()
    # W = [[3, 4], [0, 2]] + 2 [[1.5, 2], [0, 0]] = [[6, 8], [0, 2]];  ||W|| = [10, 2]; m = [20, 2]
    assert layer.squared_norm().tolist() == [100, 4]
    assert layer.merged_weight().tolist() == [[12, 16], [0, 2]]
    assert layer.delta_weight().tolist() == [[3, 4], [0, 0]]
    x, g = torch.tensor([1., 1.]), torch.tensor([1., 1.])
    y, dx, dA, dB, dm = gradients(layer, layer, x, g)
    assert y.tolist() == [28 + 10, 2 + 20]                  # the bias is not scaled
    assert dx.tolist() == [12, 18]                          # g W'
    assert torch.allclose(dm, torch.tensor([1.4, 1.]))      # g W x / ||W|| = [14 / 10, 2 / 2]
    # the norm is a constant: dW = m / ||W|| g x' = [[2, 2], [1, 1]]
    assert dB.tolist() == [[28], [14]]                      # 2 dW A'
    assert dA.tolist() == [[2, 2]]                          # 2 B' dW


def test_the_full_gradient_of_the_hand_worked_layer_is_at_right_angles_to_w():
    layer = hand_worked(norm_gradient=True)
    _, _, dA, dB, dm = gradients(layer, layer, torch.ones(2), torch.ones(2))
    # dW = m / ||W|| (g x' - v v' g x'), v = W / ||W||: 2 ([1, 1] - 1.4 [.6, .8]) = [.32, -.24]
    # in row 0, [1, 1] - [0, 1] = [1, 0] in row 1
    assert torch.allclose(dA, torch.tensor([[0.32, -0.24]]), atol=1e-6)
    assert torch.allclose(dB, torch.tensor([[0.], [6.]]), atol=1e-5)     # A is parallel to W's row
    assert torch.allclose(dm, torch.tensor([1.4, 1.]))


@pytest.mark.parametrize("norm_gradient", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_output_and_all_gradients_equal_the_naive_definition_in_float64(norm_gradient, bias):
    layer = dora(11, 17, dtype=torch.float64, bias=bias, norm_gradient=norm_gradient)
    x, g = torch.randn(2, 7, 11).double(), torch.randn(2, 7, 17).double()
    right = assert_follows(layer, naive, x, g)
    other = copy.copy(layer)
    other.norm_gradient = not norm_gradient
    assert not torch.allclose(gradients(other, other, x, g)[2], right[2], rtol=0.01)


def test_the_full_gradient_equals_finite_differences():
    layer = dora(5, 6, dtype=torch.float64, norm_gradient=True)

    def of(x, A, B, magnitude):
        return torch.func.functional_call(layer, {"A": A, "B": B, "magnitude": magnitude}, x)

    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(of, (x, layer.A, layer.B, layer.magnitude))


def test_the_full_gradient_keeps_no_graph_where_none_is_wanted():
    layer, lengths = dora(5, 6, norm_gradient=True), []
    squared_norm = layer.squared_norm
    layer.squared_norm = lambda: lengths.append(squared_norm()) or lengths[-1]
    with torch.no_grad():
        layer(torch.randn(3, 5))
    layer(torch.randn(3, 5))
    assert [squared.requires_grad for squared in lengths] == [False, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_magnitude_starts_at_the_row_lengths_of_the_weights_that_are_loaded(dtype):
    base = nn.Linear(300, 20, dtype=dtype)
    nn.init.normal_(base.weight, std=3)
    layer = DoRALinear(base, 3, 6)
    expected = base.weight.double().pow(2).sum(1).sqrt()
    assert torch.allclose(layer.magnitude.double(), expected, rtol=1e-6)
    assert torch.equal(layer.ratio(layer.squared_norm()), torch.ones_like(layer.magnitude))


def test_the_norm_by_expansion_is_the_norm_of_the_sum():
    layer = dora(64, 32)
    expected = (layer.base.weight + layer.scale * layer.B @ layer.A).pow(2).sum(1)
    assert torch.allclose(layer.squared_norm(), expected, rtol=1e-5)


def test_an_update_that_cancels_the_weight_gives_no_nan():
    layer = dora(6, 6, rank=6, bias=False)
    with torch.no_grad():
        layer.A.copy_(torch.eye(6))
        layer.B.copy_(-layer.base.weight / layer.scale)       # ||W||^2 is 0, or -1e-9 by rounding
    assert layer.squared_norm().abs().max() < 1e-6
    y = layer(torch.randn(4, 6))
    y.sum().backward()
    assert y.isfinite().all() and layer.magnitude.grad.isfinite().all()


def test_a_tiny_row_keeps_its_scale():
    base = nn.Linear(6, 5, bias=False)
    with torch.no_grad():
        base.weight[0] *= 1e-5
    layer, x = DoRALinear(base, 2, 4), torch.randn(3, 6)
    assert torch.allclose(layer(x), base(x), rtol=1e-5, atol=0)


@pytest.mark.parametrize("how", ["copied", "assigned", "from meta"])
def test_loading_other_weights_into_the_layer_measures_them_anew(how):
    source, x = dora(6, 5), torch.randn(3, 6)
    if how == "from meta":
        layer = DoRALinear(nn.Linear(6, 5, device="meta"), 3, 4.0).to_empty(device="cpu")
    else:
        layer = dora(6, 5)
    layer.load_state_dict(source.state_dict(), assign=how == "assigned")
    assert torch.equal(layer(x), source(x))


def test_dropout_spares_only_the_first_pass_through_the_pretrained_weight():
    layer = dora(6, 5, dropout=0.5, dtype=torch.float64)
    x = torch.randn(7, 6).double()
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    dropped, W0 = F.dropout(x, 0.5), layer.base.weight
    BA = layer.scale * layer.B @ layer.A
    ratio = layer.magnitude / (W0 + BA).norm(dim=1)
    expected = (F.linear(x, W0) + (ratio - 1) * F.linear(dropped, W0)
                + ratio * F.linear(dropped, BA) + layer.base.bias)
    assert torch.allclose(y, expected)
    assert torch.allclose(layer.eval()(x), naive(layer, x))


@pytest.mark.parametrize("norm_gradient", [False, True])
@pytest.mark.parametrize("rows", [1, 5])
def test_rows_of_zeros_give_no_nan_and_stay_zero(rows, norm_gradient):
    base = nn.Linear(6, 5)
    with torch.no_grad():
        base.weight[:rows] = 0
    layer = DoRALinear(base, 2, 4, norm_gradient=norm_gradient)
    optimizer = torch.optim.AdamW([layer.A, layer.B, layer.magnitude], lr=0.1)
    for _ in range(3):
        layer(torch.randn(4, 6)).pow(2).sum().backward()
        assert all(p.grad.isfinite().all() for p in (layer.A, layer.B, layer.magnitude))
        optimizer.step()
        optimizer.zero_grad()
    W = layer.merged_weight()
    assert W.isfinite().all() and not W[:rows].any()
    assert rows == 5 or (W[rows:] - base.weight[rows:]).abs().max() > 0.01


def test_a_bf16_base_gets_its_length_and_bias_in_float32_and_is_rounded_once():
    layer, x = dora(64, 32, dtype=torch.bfloat16), torch.randn(50, 64).bfloat16()
    h = F.linear(x, layer.base.weight) + layer.update(x)
    exact = layer.ratio(layer.squared_norm()) * h.float() + layer.base.bias.float()
    assert torch.equal(layer(x), exact.bfloat16())


def test_autocast_does_not_reach_the_norm():
    layer, x = dora(64, 64), torch.randn(5, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        norm, W, y = layer.squared_norm(), layer.merged_weight(), layer(x)
    assert norm.dtype == torch.float32 and torch.equal(norm, layer.squared_norm())
    assert torch.equal(W, layer.merged_weight()) and y.dtype == torch.bfloat16
    assert (y - layer(x)).abs().max() < 0.02 * y.abs().max()


def test_the_state_holds_what_trains_and_not_what_follows_from_the_base():
    assert set(dora(6, 5).state_dict()) == {"A", "B", "magnitude", "base.weight", "base.bias"}
