import copy
import math

import pytest
import torch
import torch.nn.functional as F
from parity import gradients
from torch import nn

from lora import AdapterLinear, LoRALinear
from methods import inject, load, save, state
from support.errors import UserError


def filled(base, rank=4, alpha=8.0, **kwargs):
    """Makes a layer as in the middle of training: B is not zero."""
    layer = LoRALinear(base, rank, alpha, **kwargs)
    nn.init.normal_(layer.B)
    return layer


def test_a_hand_worked_2x2_layer_gives_these_numbers():
    base = nn.Linear(2, 2)
    layer = LoRALinear(base, rank=1, alpha=3)                  # scale = 3/1 = 3
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[1., 0.], [0., 1.]]))
        base.bias.copy_(torch.tensor([10., 20.]))
        layer.A.copy_(torch.tensor([[1., 2.]]))
        layer.B.copy_(torch.tensor([[1.], [-1.]]))
    # 3 B A = 3 [[1, 2], [-1, -2]] = [[3, 6], [-3, -6]];  W' = [[4, 6], [-3, -5]]
    assert layer.delta_weight().tolist() == [[3, 6], [-3, -6]]
    assert layer.merged_weight().tolist() == [[4, 6], [-3, -5]]
    y, dx, dA, dB = gradients(layer, layer, torch.tensor([1., 1.]), torch.tensor([1., 2.]))
    assert y.tolist() == [4 + 6 + 10, -3 - 5 + 20]
    assert dB.tolist() == [[9], [18]]                          # 3 g (A x)' = 3 [1, 2] * 3
    assert dA.tolist() == [[-3, -3]]                           # 3 (B' g) x' = 3 (1 - 2) [1, 1]
    assert dx.tolist() == [-2, -4]                             # g W' = [4 - 6, 6 - 10]


def test_a_starts_uniform_within_one_over_the_root_of_in_and_b_at_zero():
    layer = LoRALinear(nn.Linear(400, 300), 8, 16)
    assert layer.A.shape == (8, 400) and layer.B.shape == (300, 8) and not layer.B.any()
    assert layer.A.abs().max() <= 1 / math.sqrt(400)
    assert layer.A.std().item() == pytest.approx(1 / math.sqrt(3 * 400), rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_parameters_are_float32_or_float64_and_the_output_has_the_dtype_of_the_base(dtype):
    layer = filled(nn.Linear(6, 5, dtype=dtype))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert layer.A.dtype == layer.B.dtype == layer.merged_weight().dtype == wide
    y = layer(torch.randn(2, 3, 6, dtype=dtype))
    assert y.dtype == dtype and y.shape == (2, 3, 5)
    y.sum().backward()
    assert layer.A.grad.dtype == wide and layer.A.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_casts_the_adapter_like_any_weight(dtype):
    layer = filled(nn.Linear(64, 64, dtype=dtype))
    x = torch.randn(5, 64, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, W = layer(x), layer.merged_weight()
    assert y.dtype == torch.bfloat16 and W.dtype == torch.float32
    assert torch.allclose(y.float(), F.linear(x.float(), W, layer.base.bias.float()), rtol=0.05,
                          atol=0.1)


def test_a_meta_layer_costs_no_memory_and_tells_its_shapes():
    layer = LoRALinear(nn.Linear(4096, 11008, device="meta"), 32, 64)
    assert layer.A.is_meta and layer.merged_weight().shape == (11008, 4096)
    assert layer(torch.empty(2, 7, 4096, device="meta")).shape == (2, 7, 11008)


@pytest.mark.parametrize("wrong", [
    dict(rank=0), dict(rank=10_001), dict(rank=2.0), dict(rank=-1), dict(alpha=0), dict(alpha=-1.0),
    dict(alpha=math.nan), dict(dropout=1.0), dict(dropout=-0.1), dict(dropout=math.nan)])
def test_wrong_arguments_are_refused_by_name(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        LoRALinear(nn.Linear(5, 9), **dict(rank=2, alpha=4.0) | wrong)


def test_only_a_linear_layer_can_be_the_base():
    with pytest.raises(UserError, match="Conv1d"):
        LoRALinear(nn.Conv1d(4, 4, 1), 2, 4)


def test_a_method_needs_only_delta_weight():
    class Shift(AdapterLinear):
        """Adds one number to every weight: the smallest method."""

        def __init__(self, *args):
            super().__init__(*args)
            self.shift = nn.Parameter(self.empty().fill_(2.0))

        def delta_weight(self):
            return self.shift.expand_as(self.base.weight)

    layer = Shift(nn.Linear(3, 2, bias=False), 1, 1)
    x = torch.ones(4, 3)
    assert torch.allclose(layer(x), layer.base(x) + 6)
    assert Shift.extra_loss([layer]) == 0 and Shift.on_step([layer], 0, 10) is None


def test_rslora_divides_by_the_root_of_the_rank():
    layer = LoRALinear(nn.Linear(2, 2, bias=False), rank=4, alpha=6, scaling="rslora")
    with torch.no_grad():
        layer.base.weight.zero_()
        layer.A.copy_(torch.tensor([[1., 2.]] + 3 * [[0., 0.]]))
        layer.B.copy_(torch.tensor([[1., 0, 0, 0], [-1., 0, 0, 0]]))
    assert layer.scale == 3                                    # 6 / sqrt(4)
    assert layer.merged_weight().tolist() == [[3, 6], [-3, -6]]
    assert layer(torch.tensor([1., 1.])).tolist() == [9, -9]


def pissa(*shape, rank=3, alpha=6, dtype=None, device=None, **kwargs):
    return LoRALinear(nn.Linear(*shape, dtype=dtype, device=device), rank, alpha, ab_init="pissa",
                      **kwargs)


def test_pissa_on_a_hand_worked_2x2_layer_starts_at_its_largest_singular_value():
    base = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[12., 0.], [0., 1.]]))
    layer = LoRALinear(base, rank=1, alpha=3, ab_init="pissa")     # scale = 3
    assert layer.A.abs().tolist() == [[2, 0]] and layer.B.abs().tolist() == [[2], [0]]
    assert (layer.B @ layer.A).tolist() == [[4, 0], [0, 0]]         # W0's largest part / scale
    with torch.no_grad():
        layer.A.copy_(torch.tensor([[2., 1.]]) * layer.A[0, 0].sign())
    # dW = 3 (B A - B0 A0) = 3 [[4 - 4, 2], [0, 0]]
    assert layer.delta_weight().tolist() == [[0, 6], [0, 0]]
    assert layer(torch.tensor([1., 1.])).tolist() == [12 + 6, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_pissa_starts_at_w0_to_the_bit_and_at_its_best_part_of_that_rank(dtype):
    layer, x = pissa(40, 30, dtype=dtype), torch.randn(7, 40, dtype=dtype)
    assert torch.equal(layer(x), layer.base(x))
    assert torch.equal(layer.merged_weight().to(dtype), layer.base.weight)
    U, S, Vt = torch.linalg.svd(layer.base.weight.double())
    best = (U[:, :3] * S[:3]) @ Vt[:3]
    assert torch.allclose((layer.scale * layer.B @ layer.A).double(), best, atol=1e-5)


def test_pissa_s_frozen_copies_are_saved_and_are_no_parameters():
    layer = pissa(5, 4)
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"A", "B"}
    assert {"A0", "B0"} <= layer.state_dict().keys()
    assert "A0" not in LoRALinear(nn.Linear(5, 4), 3, 6).state_dict()


def test_pissa_refuses_a_weight_that_is_not_finite_by_name():
    model = nn.Sequential(nn.Linear(5, 4))
    model[0].weight.data[1, 2] = math.nan
    with pytest.raises(UserError, match="0: W0, .*NaN"):
        inject(model, "lora", ["0"], rank=2, ab_init="pissa")


def test_loading_pissa_computes_no_singular_values(monkeypatch, tmp_path):
    model = inject(nn.Sequential(nn.Linear(5, 4)), "lora", ["0"], rank=2, ab_init="pissa")
    base = copy.deepcopy(model[0].base)
    save(model, tmp_path / "adapter.safetensors")
    monkeypatch.setattr(torch.linalg, "svd", None)
    loaded = load(nn.Sequential(base), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(state(loaded).values(), state(model).values()))


def test_pissa_needs_no_numbers_on_the_meta_device():
    layer = pissa(5, 4, device="meta")
    assert layer.A.is_meta and layer.A0.shape == (3, 5)


def test_pissa_needs_as_many_singular_values_as_its_rank():
    with pytest.raises(UserError, match="pissa.* to 4, not 5"):
        pissa(9, 4, rank=5)


@pytest.mark.parametrize("option", ["scaling", "ab_init"])
def test_an_option_that_is_none_of_its_choices_is_refused(option):
    with pytest.raises(UserError, match=f"{option} must be one of .*, not 'other'"):
        LoRALinear(nn.Linear(5, 4), 3, 6, **{option: "other"})
