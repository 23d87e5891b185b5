import math
import subprocess
import sys
from copy import deepcopy
from statistics import fmean

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SHARED, needs
from parity import assert_follows, gradients
from torch import nn
from torch.utils.checkpoint import checkpoint

from data.scoring import score_targets
from data.task import Sequence
from dual_lora import DualLoRALinear
from formats.checkpoint import load_pretrained
from generate import generate
from lora import AdapterLinear
from methods import inject, merge, param_groups, unmerge
from support.errors import UserError


class NaiveSign(torch.autograd.Function):
    """Computes the paper's Sign in another way than dual_lora.py."""

    @staticmethod
    def forward(ctx, x, clip):
        ctx.clip = clip
        return torch.where(x > 0, torch.ones_like(x), -torch.ones_like(x))

    @staticmethod
    def backward(ctx, grad):
        one = torch.ones_like(grad)
        return torch.maximum(torch.minimum(grad, one), -one) if ctx.clip else grad, None


def naive(layer, x):
    """Computes section 3 as it stands, in plain autograd."""
    r1, r2 = len(layer.A), len(layer.C)
    W = layer.base.weight + layer.warmup * (layer.alpha / math.sqrt(r1 * r2)) * (
        torch.relu(layer.B @ layer.A) * NaiveSign.apply(layer.D @ layer.C, layer.clip))
    return F.linear(x, W, layer.base.bias)


def dual(n_in, n_out, rank=4, alpha=8.0, dtype=None, bias=True, **kwargs):
    """Makes a layer as in the middle of training, past the warm-up of its update."""
    kwargs = dict(update_warmup=0, init_std=0.5) | kwargs
    return DualLoRALinear(nn.Linear(n_in, n_out, bias, dtype=dtype), rank, alpha, **kwargs)


def parameters(layer):
    return [layer.A, layer.B, layer.C, layer.D]


def test_a_hand_worked_2x2_layer_gives_these_numbers():
    layer = dual(2, 2, rank=2, alpha=2)                   # r1 = r2 = 1: scale = 2/sqrt(1) = 2
    with torch.no_grad():
        layer.base.weight.copy_(torch.tensor([[1., 0.], [0., 1.]]))
        layer.base.bias.copy_(torch.tensor([10., 20.]))
        layer.A.copy_(torch.tensor([[1., -1.]]))
        layer.B.copy_(torch.tensor([[2.], [-1.]]))        # B A = [[2, -2], [-1, 1]]
        layer.C.copy_(torch.tensor([[1., 1.]]))           # ReLU: M = [[2, 0], [0, 1]], two are off
        layer.D.copy_(torch.tensor([[1.], [0.]]))         # D C = [[1, 1], [0, 0]]
    # Sign(0) = -1: S = [[1, 1], [-1, -1]];  2 M (.) S = [[4, 0], [0, -2]];  W' = [[5, 0], [0, -1]]
    assert layer.delta_weight().tolist() == [[4, 0], [0, -2]]
    x, g = torch.tensor([1., 2.]), torch.tensor([1., 0.1])
    y, dx, dA, dB, dC, dD = gradients(layer, layer, x, g)
    assert y.tolist() == [15, 18]                         # [5 + 10, -2 + 20]
    assert torch.allclose(dx, torch.tensor([5., -0.1]))   # g W'
    # dW' = g' x = [[1, 2], [.1, .2]]
    # dM = 2 dW' (.) S = [[2, 4], [-.2, -.4]], of which ReLU lets [[2, 0], [0, -.4]] through
    assert torch.allclose(dB, torch.tensor([[2.], [0.4]]))     # dM A'
    assert torch.allclose(dA, torch.tensor([[4., 0.4]]))       # B' dM
    # dS = 2 dW' (.) M = [[4, 0], [0, .4]]; the clip binds at 4: [[1, 0], [0, .4]]
    assert torch.allclose(dC, torch.tensor([[1., 0.]]))        # D' dS
    assert torch.allclose(dD, torch.tensor([[1.], [0.4]]))     # dS C'


@pytest.mark.parametrize("shape", [(5, 3), (40, 600), (300, 1100)])   # (in, out): 1 to 3 blocks
@pytest.mark.parametrize("size", [1e-3, 30.0])                        # the clip binds never; often
@pytest.mark.parametrize("bias, clip", [(True, True), (False, True), (True, False)])
def test_output_and_all_gradients_equal_the_naive_definition_in_float64(shape, size, bias, clip):
    layer = dual(*shape, rank=3, dtype=torch.float64, bias=bias, clip=clip)
    layer.warmup.fill_(0.37)
    x, g = torch.randn(2, 7, shape[0]).double(), size * torch.randn(2, 7, shape[1]).double()
    clipped = (g.flatten(0, 1).T @ x.flatten(0, 1)).abs() * layer.delta_weight().abs() > 1
    assert clipped.any() == (size > 1)
    assert_follows(layer, naive, x, g)


def test_the_direction_has_a_learning_rate_of_its_own():
    model = inject(nn.ModuleDict({"q": nn.Linear(6, 5)}), "dual", ["q"], rank=4, direction_lr=0.3)
    groups = param_groups(model, 0.01, lr_ratio=2)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert [rates[id(p)] for p in parameters(model["q"])] == pytest.approx(
        [0.01, 0.02, 0.003, 0.006])


def test_gradients_equal_finite_differences_where_the_layer_has_a_derivative():
    layer = dual(5, 6, dtype=torch.float64)     # C and D move only signs: their slope is 0

    def of(x, A, B):
        return torch.func.functional_call(layer, {"A": A, "B": B}, x)

    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(of, (x, layer.A, layer.B))


def test_a_layer_used_twice_in_one_graph_gets_both_gradients():
    layer = dual(6, 6, dtype=torch.float64)
    x, g = torch.randn(3, 6).double(), 0.01 * torch.randn(3, 6).double()
    twice = gradients(layer, lambda x: layer(torch.tanh(layer(x))), x, g)
    right = gradients(layer, lambda x: naive(layer, torch.tanh(naive(layer, x))), x, g)
    assert all(torch.allclose(*pair, rtol=1e-10) for pair in zip(twice, right))


def test_an_input_without_gradient_an_empty_one_and_a_vector_are_served():
    layer = dual(6, 5)
    layer(torch.randn(4, 6)).sum().backward()
    assert all(p.grad.any() for p in parameters(layer))
    layer(torch.zeros(0, 6)).sum().backward()
    assert layer(torch.zeros(2, 0, 6)).shape == (2, 0, 5) and layer(torch.zeros(6)).shape == (5,)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_first_step_sees_the_pretrained_layer_to_the_bit(dtype, bias):
    layer = dual(70, 600, dtype=dtype, bias=bias, update_warmup=20)
    x = torch.randn(9, 70, dtype=dtype)
    y = layer(x)
    assert torch.equal(y, layer.base(x))
    y.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in parameters(layer))
    if dtype != torch.float64:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(layer(x.float()), layer.base(x.float()))


def test_a_bf16_base_keeps_float32_parameters_and_builds_the_weight_in_float32():
    layer = dual(300, 600, dtype=torch.bfloat16)
    assert {t.dtype for t in (*parameters(layer), layer.warmup)} == {torch.float32}
    x, g = torch.randn(50, 300).bfloat16(), 0.01 * torch.randn(50, 600).bfloat16()
    mine = gradients(layer, layer, x, g)
    right = gradients(layer, lambda x: AdapterLinear.forward(layer, x), x, g)
    assert mine[0].dtype == mine[1].dtype == torch.bfloat16 and mine[2].dtype == torch.float32
    for a, b in zip(mine, right):
        assert (a - b).abs().max() <= 0.01 * b.abs().max()


def test_autocast_does_not_reach_the_signs():
    layer = dual(300, 600)
    x, g = torch.randn(50, 300), 0.01 * torch.randn(50, 600)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, W = layer(x), layer.merged_weight()
        inside = gradients(layer, layer, x, g.bfloat16())     # backward, too, under autocast
    assert y.dtype == torch.bfloat16 and torch.equal(W, layer.merged_weight())
    assert (y - F.linear(x, W, layer.base.bias)).abs().max() <= 0.02 * y.abs().max()
    for low, right in zip(inside, gradients(layer, layer, x, g)):
        assert (low - right).norm() <= 0.02 * right.norm()


def test_with_dropout_too_the_first_step_sees_the_pretrained_layer():
    layer, x = dual(6, 5, dropout=0.5, update_warmup=20), torch.randn(7, 6)
    assert torch.equal(layer(x), layer.base(x))


def test_the_warm_up_is_a_line_that_a_short_run_shortens():
    assert [warm_up(step, 100, 4) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert [warm_up(step, 12, 20) for step in range(4)] == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert warm_up(0, 1, 20) == warm_up(0, 100, 0) == 1


def warm_up(step, total_steps, update_warmup):
    layer = dual(6, 5, update_warmup=update_warmup)
    DualLoRALinear.on_step([layer], step, total_steps)
    return layer.warmup.item()


def test_on_step_raises_every_layer():
    layers = [dual(6, 5, update_warmup=2), dual(6, 5, update_warmup=4), dual(6, 5)]
    DualLoRALinear.on_step(layers, 0, 100)
    assert [layer.warmup.item() for layer in layers] == [0.5, 0.25, 1]


def test_a_loop_that_never_calls_on_step_is_told_at_the_next_forward():
    layer = dual(6, 5, update_warmup=20)
    optimizer = torch.optim.AdamW(parameters(layer))
    for _ in range(3):     # micro-batches do not count: three backwards, one step
        layer(torch.randn(4, 6)).sum().backward()
    optimizer.step()
    with torch.no_grad():
        layer(torch.randn(4, 6))       # nor does scoring
    with pytest.raises(UserError, match="on_step"):
        layer(torch.randn(4, 6))


def test_a_right_loop_is_left_alone_also_when_it_begins_again():
    layer = dual(6, 5, update_warmup=20)
    start = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    optimizer = torch.optim.AdamW(parameters(layer))
    for run in range(2):
        layer.load_state_dict(start)                    # to warm-up 0 again
        for step in range(3):
            for _ in range(2):
                checkpoint(layer, torch.randn(4, 6), use_reentrant=False).sum().backward()
            optimizer.step()
            DualLoRALinear.on_step([layer], step, 100)
            optimizer.zero_grad()


def test_merging_and_another_optimizer_s_steps_are_left_alone():
    model, head = inject(nn.ModuleDict({"q": nn.Linear(6, 5)}), "dual", ["q"], 4), nn.Linear(5, 1)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    for _ in range(3):
        head(model["q"](torch.randn(4, 6))).sum().backward()
        optimizer.step()
        unmerge(merge(model))


def test_importing_the_file_changes_nothing_of_torch_and_stays_light():
    code = ("import dual_lora, sys; from torch.optim import optimizer as o; "
            "assert not o._global_optimizer_post_hooks and not o._global_optimizer_pre_hooks; "
            "assert 'torch._dynamo' not in sys.modules")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# ---- the start's size
@pytest.mark.parametrize("width, rank, split, std, dtype", [
    (64, 2, {}, 0.01, None), (64, 32, {}, 0.2, None), (256, 8, {}, 0.05, torch.bfloat16),
    (256, 8, dict(r1=2), 0.01, None), (1024, 8, dict(r1=6), 0.02, None),
    (1024, 32, {}, 0.2, torch.bfloat16)])
def test_the_untrained_update_is_the_asked_share_of_the_weight(width, rank, split, std, dtype):
    base = nn.Linear(width, 2 * width, dtype=dtype)
    nn.init.normal_(base.weight, std=std)
    shares = []
    for seed in range(20):
        torch.manual_seed(seed)
        layer = DualLoRALinear(base, rank, 2 * rank, update_warmup=0, init_share=0.03, **split)
        shares.append((layer.delta_weight().norm() / base.weight.float().norm()).item())
    assert fmean(shares) == pytest.approx(0.03, rel=0.05)
    assert layer.start_share == pytest.approx(0.03)


def test_an_explicit_std_overrides_the_share_and_the_header_warns_of_a_large_start():
    layer = dual(64, 64, rank=8, init_std=0.3, init_share=0.01)
    assert layer.std == 0.3
    measured = (layer.delta_weight().norm() / layer.base.weight.norm()).item()
    assert layer.start_share == pytest.approx(measured, rel=0.3) and measured > 0.2
    small = dual(64, 64, init_std=None, init_share=0.02, update_warmup=3)
    assert DualLoRALinear.start([small], 100) == (
        "the update grows to full size over 3 steps; untrained it has at most 2 % of W0's size")
    assert "warning" in DualLoRALinear.start([small, layer], 100)


def test_a_std_of_each_layer_is_not_recorded_as_one_number():
    model = nn.ModuleDict({"q": nn.Linear(64, 64), "v": nn.Linear(8, 64)})
    inject(model, "dual", ["q", "v"])
    assert model["q"].std != model["v"].std
    assert model.injected["init_std"] is None and model.injected["init_share"] == 0.01


def test_a_zero_weight_is_refused_by_the_name_of_its_layer():
    model = nn.ModuleDict({"q": nn.Linear(64, 64), "v": nn.Linear(8, 64)})
    nn.init.zeros_(model["v"].weight)
    with pytest.raises(UserError, match="^v: W0 .*init_std"):
        inject(model, "dual", ["q", "v"])
    inject(model, "dual", ["q", "v"], init_std=0.01)


STORIES = SHARED / "stories260K"


@needs(STORIES)
@pytest.mark.parametrize("rank", [8, 32])
def test_the_untrained_update_at_full_size_hardly_moves_a_real_model(rank):
    model, tokenizer = load_pretrained(STORIES)
    texts = generate(model, [[tokenizer.bos]] * 8, 250, temperature=1.0, eos=[], seed=0)

    def loss(model):
        sequences = [Sequence([tokenizer.bos, *text], 1) for text in texts]
        return fmean(score.loss / score.tokens for score in score_targets(model, sequences, 8))

    before, rises = loss(model), []
    for seed in range(5):
        torch.manual_seed(seed)
        adapted = inject(deepcopy(model), "dual", ["q", "k", "v", "up", "down"], rank, 2 * rank,
                         update_warmup=0)
        rises.append(loss(adapted) / before - 1)
    assert fmean(rises) < 0.02 and max(rises) < 0.04


def test_the_rank_is_split_and_the_scale_follows_the_split():
    layer = dual(20, 30, rank=5, alpha=6.0)
    assert [tuple(p.shape) for p in parameters(layer)] == [(2, 20), (30, 2), (3, 20), (30, 3)]
    assert layer.scale == pytest.approx(6 / math.sqrt(6))
    assert sum(p.numel() for p in parameters(layer)) == 5 * (20 + 30)     # what LoRA has
    assert len(dual(20, 30, rank=8, r1=6).C) == 2 and len(dual(20, 30, rank=8, r2=6).A) == 2
    assert len(dual(20, 30, rank=8, r1=3, r2=4).C) == 4


@pytest.mark.parametrize("wrong, name", [
    (dict(rank=1), "rank"), (dict(r1=0), "r1"), (dict(r1=4), "r2"), (dict(r2=9), "r1"),
    (dict(r1=1, r2=10_001), "r2"), (dict(r2=1.5), "r1"), (dict(update_warmup=-1), "update_warmup"),
    (dict(update_warmup=0.5), "update_warmup"), (dict(init_std=0.0), "init_std"),
    (dict(init_std=math.nan), "init_std"),
    (dict(init_std=None, init_share=0.0), "init_share"), (dict(direction_lr=0.0), "direction_lr")])
def test_wrong_arguments_are_refused_by_name(wrong, name):
    with pytest.raises(UserError, match=name):
        dual(5, 9, **wrong)


def test_all_four_start_gaussian_and_on_the_base_s_device():
    layer = dual(400, 300, rank=16, init_std=0.06)
    assert all(p.std().item() == pytest.approx(0.06, rel=0.1) for p in parameters(layer))
    meta = DualLoRALinear(nn.Linear(40, 30, device="meta"), 4, 8)
    assert all(t.is_meta for t in (*parameters(meta), meta.warmup, meta.merged_weight()))
    assert meta.start_share == 0


def test_the_update_has_a_far_higher_rank_than_lora_s():
    assert torch.linalg.matrix_rank(dual(64, 64, rank=8).delta_weight()) > 32
