"""Dual LoRA without its parts differs from it, and from LoHa, in what it says."""
import pytest
import torch
from nets import data, net, train
from runs import refused
from torch import nn

from dual_lora import DualLoRALinear
from experiments import dual_parts
from experiments.dual_parts import PARTS, DualPartsLinear, add_parts
from loha import LoHaLinear
from methods import METHODS, inject
from support.errors import UserError


@pytest.fixture(autouse=True)
def listed(monkeypatch):
    for name in PARTS:
        monkeypatch.setitem(METHODS, name, None)            # taken out again after the test
    add_parts()


def layer_of(kind, width=6, **own):
    torch.manual_seed(0)
    layer = kind(nn.Linear(width, width, dtype=torch.float64), 4, 8.0, **own)
    if hasattr(layer, "warmup"):
        layer.warmup.fill_(1)
    return layer


def test_each_computes_what_its_name_says():
    for kind, f, g in ((PARTS["dual-no-relu"], lambda x: x, torch.sign),
                       (PARTS["dual-no-sign"], torch.relu, lambda x: x),
                       (PARTS["dual-neither"], lambda x: x, lambda x: x)):
        layer = layer_of(kind)
        expected = layer.scale * f(layer.B @ layer.A) * g(layer.D @ layer.C)
        assert torch.allclose(layer.delta_weight(), expected)
        assert torch.equal(layer.delta_weight(slice(1, 3)), layer.delta_weight()[1:3])


@pytest.mark.parametrize("clip", [True, False])
def test_without_relu_the_gradient_goes_straight_through_sign(clip):
    layer = layer_of(PARTS["dual-no-relu"], clip=clip)
    G, dW = 3000 * torch.randn(6, 6, dtype=torch.float64), layer.delta_weight()
    (dW * G).sum().backward()
    magnitude = layer.scale * layer.B @ layer.A
    through = G * magnitude                             # dL/dSign
    assert (through.abs() > 1).any()
    through = through.clamp(-1, 1) if clip else through
    assert torch.allclose(layer.D.grad, through @ layer.C.T)
    assert torch.allclose(layer.C.grad, layer.D.T @ through)


def test_they_take_dual_lora_s_rates():
    for name in PARTS:
        assert (METHODS[name].lr, METHODS[name].large_lr) == (METHODS["dual"].lr,
                                                              METHODS["dual"].large_lr)


@pytest.mark.parametrize("kind", [DualLoRALinear, *PARTS.values()])
@pytest.mark.parametrize("own, share", [({}, 0.01), (dict(init_share=0.03), 0.03),
                                        (dict(init_std=0.2, r1=3), None)])
def test_the_untrained_update_has_dual_lora_s_share_of_the_weight(kind, own, share):
    layer = layer_of(kind, 512, **own)
    measured = (layer.delta_weight().norm() / layer.W0.norm()).item()
    assert measured == pytest.approx(layer.start_share, rel=0.15)
    assert share is None or layer.start_share == share


def test_without_both_it_is_loha_but_for_the_start_the_warm_up_and_the_rate():
    mine, loha = layer_of(DualPartsLinear), layer_of(LoHaLinear)
    with torch.no_grad():
        for name in "ABCD":
            loha.get_parameter(name).copy_(mine.get_parameter(name))
    assert torch.allclose(mine.delta_weight(), loha.delta_weight())
    mine, loha = DualPartsLinear(nn.Linear(6, 6), 4, 8.0), LoHaLinear(nn.Linear(6, 6), 4, 8.0)
    assert mine.warmup == 0 and mine.C.any() and not loha.C.any()
    assert (mine.lr_factor("C"), loha.lr_factor("C")) == (0.3, 1.0)


@pytest.mark.parametrize("method", PARTS)
def test_it_starts_at_the_pretrained_model_and_learns(method):
    model = inject(net(), method, ["q", "v"], rank=4, alpha=8)
    tokens, targets = data()
    start = nn.functional.cross_entropy(net()(tokens), targets)
    assert torch.allclose(model(tokens), net()(tokens), atol=1e-6)
    assert nn.functional.cross_entropy(train(model, 60)(tokens), targets) < start - 0.2


def test_a_command_that_it_does_not_have_is_refused(capsys):
    assert "give train or ablate" in refused(capsys, "other", main=dual_parts.main)


def test_help_says_what_there_is(capsys):
    dual_parts.main(["--help"])
    assert "dual-neither" in capsys.readouterr().out


def test_without_sign_there_is_nothing_to_clip():
    assert "clip" in PARTS["dual-no-relu"].options
    for name in ("dual-no-sign", "dual-neither"):
        with pytest.raises(UserError, match="no option clip"):
            inject(net(), name, ["q"], rank=4, clip=False)


def test_a_start_too_small_for_float32_is_no_division_by_zero():
    assert layer_of(PARTS["dual-no-sign"], init_std=1e-200).start_share == 0


@pytest.mark.slow
def test_a_sweep_of_it_runs(tmp_path):
    dual_parts.main(["ablate", "--methods", "dual,dual-neither", "--lrs", "x1", "--out",
                     str(tmp_path / "sweep"), "--steps", "4", "--max-eval", "20", "--skip-before"])
    table = (tmp_path / "sweep" / "table.md").read_text()
    assert "| dual-neither | 8 |" in table and "| dual | 8 |" in table
