"""Checks DoRA's magnitude over each method's update; test_methods.py has the common properties."""
import copy

import pytest
import torch
import torch.nn.functional as F
from nets import ADAPTED, data, injected, net, train
from parity import gradients
from torch import nn

from dora import DoRALinear, MagnitudeLinear, dora_over
from hira import HiRALinear
from methods import METHODS, adapters, inject
from support.errors import UserError

OVER = [method for method in ADAPTED if method not in ("lora", "lora+", "dora")]


def over(method, n_in=11, n_out=17, dtype=torch.float64, bias=True, **kwargs):
    """Makes a layer as in the middle of training: no parameter is at its start."""
    torch.manual_seed(0)
    layer = dora_over(METHODS[method].layer)(nn.Linear(n_in, n_out, bias, dtype=dtype), 4, 8.0,
                                             **kwargs)
    with torch.no_grad():
        for p in (p for p in layer.parameters() if p.requires_grad):
            p.add_(torch.rand_like(p) * 0.3)
    for name in ("warmup", "dashing"):
        if hasattr(layer, name):
            getattr(layer, name).fill_(0.7)
    for name in ("U", "Vt"):
        if hasattr(layer, name):
            getattr(layer, name).normal_()
    return layer


def test_a_hand_worked_layer_over_hira_gives_these_numbers():
    base = nn.Linear(2, 1)
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[3., 2.]]))
        base.bias.copy_(torch.tensor([10.]))
    layer = dora_over(HiRALinear)(base, 1, 1.0)
    with torch.no_grad():
        layer.A.copy_(torch.tensor([[1., 3.]]))
        layer.B.copy_(torch.tensor([[1.]]))
        layer.magnitude.fill_(20)
    # W = [3 + 3, 2 + 6] = [6, 8], of length 10: W' = 2 [6, 8]
    assert layer.squared_norm().tolist() == [100] and layer.delta_weight().tolist() == [[3, 6]]
    assert layer.merged_weight().tolist() == [[12, 16]]
    y, dx, dA, dB, dm = gradients(layer, layer, torch.tensor([1., 1.]), torch.tensor([1.]))
    assert y.tolist() == [28 + 10] and dx.tolist() == [12, 16]
    assert dm.item() == pytest.approx(1.4)                  # g W x / ||W||
    # The norm is a constant: dW = m / ||W|| g x' = [2, 2]; HiRA's part: times W0, [6, 4]
    assert dB.tolist() == [[6 + 12]] and dA.tolist() == [[6, 4]]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("method", OVER)
def test_output_and_gradients_equal_the_definition_with_the_norm_held(method, bias):
    layer = over(method, bias=bias)
    x, g = torch.randn(2, 7, 11).double(), torch.randn(2, 7, 17).double()

    def naive(x):
        W = layer.W0 + layer.delta_weight()
        W = layer.magnitude[:, None] * W / W.detach().norm(dim=1, keepdim=True)
        return F.linear(x, W, layer.base.bias)

    assert torch.allclose(layer.squared_norm(),
                          (layer.W0 + layer.delta_weight()).pow(2).sum(1))
    right = gradients(layer, naive, x, g)
    merged = gradients(layer, lambda x: F.linear(x, layer.merged_weight(), layer.base.bias), x, g)
    for mine, other, expected in zip(gradients(layer, layer, x, g), merged, right):
        assert torch.allclose(mine, expected, rtol=1e-9, atol=1e-11)
        assert torch.allclose(other, expected, rtol=1e-9, atol=1e-11)


def test_over_dual_lora_the_gradients_equal_finite_differences_with_the_norm_held():
    layer = over("dual", 5, 6)
    held = layer.squared_norm()
    layer.squared_norm = lambda: held           # C and D move only signs: their slope is 0

    def of(x, A, B, magnitude):
        return torch.func.functional_call(layer, {"A": A, "B": B, "magnitude": magnitude}, x)

    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(of, (x, layer.A, layer.B, layer.magnitude))


def test_over_dual_lora_c_and_d_get_the_written_straight_through_gradient():
    layer = over("dual", 5, 6)
    x, g = torch.randn(7, 5).double(), 30 * torch.randn(7, 6).double()
    dC, dD = gradients(layer, layer, x, g)[4:6]
    size = 0.7 * layer.scale
    M, norm = torch.relu(layer.B @ layer.A), layer.squared_norm().sqrt()
    dW = (layer.magnitude / norm)[:, None] * (g.t() @ x)    # of W, through the held norm
    dDC = (size * dW * M).clamp(-1, 1)
    assert (dDC.abs() == 1).any() and (dDC.abs() < 1).any()
    assert torch.allclose(dC, layer.D.t() @ dDC) and torch.allclose(dD, dDC @ layer.C.t())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("method", OVER)
def test_it_starts_at_the_lengths_of_w0_to_the_bit(method, dtype):
    layer = dora_over(METHODS[method].layer)(nn.Linear(40, 700, dtype=dtype), 4, 8.0)
    expected = layer.base.weight.double().pow(2).sum(1).sqrt()
    assert torch.allclose(layer.magnitude.double(), expected, rtol=1e-6)
    assert torch.equal(layer.ratio(layer.squared_norm()), torch.ones_like(layer.magnitude))


@pytest.mark.parametrize("method", OVER)
def test_dropout_spares_only_the_first_pass_through_the_pretrained_weight(method):
    layer = over(method, dropout=0.5)
    x = torch.randn(7, 11).double()
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    dropped, W0, dW = F.dropout(x, 0.5), layer.base.weight, layer.delta_weight()
    ratio = layer.magnitude / (W0 + dW).norm(dim=1)
    expected = (F.linear(x, W0) + (ratio - 1) * F.linear(dropped, W0)
                + ratio * F.linear(dropped, dW) + layer.base.bias)
    assert torch.allclose(y, expected)


@pytest.mark.parametrize("method", OVER)
def test_what_the_method_does_beside_the_product_goes_on(method):
    kind, own = dora_over(METHODS[method].layer), METHODS[method].layer
    assert kind.start.__func__ is own.start.__func__
    assert kind.on_step.__func__ is own.on_step.__func__
    assert kind.extra_loss.__func__ is own.extra_loss.__func__
    assert kind.options == own.options and kind.lr_ratio_parameters == own.lr_ratio_parameters


def test_dora_over_lora_is_dora():
    assert dora_over(METHODS["lora"].layer) is DoRALinear
    model = injected("lora", dora=True)
    assert model.injected == injected("dora").injected
    assert type(adapters(injected("lora+", dora=True))["q"]) is DoRALinear


@pytest.mark.parametrize("method", ["full", "dora"])
def test_where_there_is_no_update_or_a_magnitude_already_it_is_refused(method):
    with pytest.raises(UserError, match=f"not over {method}"):
        inject(net(), method, ["q"], dora=True)


def test_the_full_gradient_of_the_norm_is_for_lora_alone():
    assert inject(net(), "lora", ["q"], dora=True, norm_gradient=True)
    with pytest.raises(UserError, match="no option norm_gradient"):
        inject(net(), "dual", ["q"], dora=True, norm_gradient=True)


def test_a_copy_is_of_the_same_class():
    layer = over("dual")
    twin = copy.deepcopy(layer)
    assert type(twin) is type(layer) and isinstance(twin, MagnitudeLinear)
    assert torch.equal(twin.merged_weight(), layer.merged_weight())


@pytest.mark.parametrize("how", ["lora --dora", "dora"])
def test_pissa_under_a_magnitude_starts_at_w0_and_learns(how):
    method, _, flag = how.partition(" ")
    model = injected(method, ab_init="pissa", dora=bool(flag))
    tokens, targets = data()
    before = F.cross_entropy(net()(tokens), targets).item()
    assert torch.equal(adapters(model)["q"].merged_weight(), net().q.weight)
    assert F.cross_entropy(train(model, 60)(tokens), targets).item() < before - 0.2
