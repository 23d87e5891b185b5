import pytest
import torch
import torch.nn.functional as F
from parity import assert_follows, gradients
from torch import nn

from lora import LoRALinear
from lora_dash import LoRADashLinear, last_prelaunch_step
from support.errors import UserError


def dash(n_in, n_out, rank=3, alpha=4.0, dtype=None, dashing=True, **kwargs):
    """Makes a layer as in the middle of training."""
    layer = LoRADashLinear(nn.Linear(n_in, n_out, dtype=dtype), rank, alpha, **kwargs)
    nn.init.normal_(layer.B)
    if dashing:
        layer.launch()
        nn.init.normal_(layer.coords)
    return layer


def naive(layer, x):
    """Computes section 4 in plain autograd, one direction after the other."""
    W = layer.base.weight + layer.alpha / len(layer.A) * layer.B @ layer.A
    for i in range(len(layer.coords)):
        W = W + layer.coords[i] * torch.outer(layer.U[:, i], layer.Vt[i])
    return F.linear(x, W, layer.base.bias)


def test_a_hand_worked_2x2_layer_gives_these_numbers():
    layer = LoRADashLinear(nn.Linear(2, 2), rank=1, alpha=2, directions=1)     # scale = 2
    with torch.no_grad():
        layer.base.weight.copy_(torch.tensor([[4., 0.], [0., 1.]]))     # sigma = 4, 1; u = v = axes
        layer.base.bias.copy_(torch.tensor([10., 20.]))
        layer.A.copy_(torch.tensor([[1., 1.]]))
        layer.B.copy_(torch.tensor([[3.], [1.]]))
    # dW = 2 [[3, 3], [1, 1]] = [[6, 6], [2, 2]]: rates |6| / 4 = 1.5 and |2| / 1 = 2
    assert layer.change_rates()[1].tolist() == [1.5, 2]
    layer.launch()                                                      # takes the second axis
    with torch.no_grad():
        layer.coords.fill_(5)                                           # not times alpha/r
    assert layer.delta_weight().tolist() == [[6, 6], [2, 2 + 5]]
    y, dx, dA, dB, dc = gradients(layer, layer, torch.tensor([1., 2.]), torch.tensor([1., 3.]))
    assert y.tolist() == [10 + 12 + 10, 2 + 16 + 20]                    # W' = [[10, 6], [2, 8]]
    assert dx.tolist() == [16, 30]                                      # g W'
    assert dc.tolist() == [6]                                           # (u'g)(v'x) = 3 * 2
    assert dB.tolist() == [[6], [18]] and dA.tolist() == [[12, 24]]     # LoRA's: 2 g (Ax), 2 B'g x'


@pytest.mark.parametrize("shape", [(11, 17), (17, 11)])
def test_output_and_all_gradients_equal_the_naive_definition_in_float64(shape):
    layer = dash(*shape, dtype=torch.float64)
    x, g = torch.randn(2, 7, shape[0]).double(), torch.randn(2, 7, shape[1]).double()
    assert_follows(layer, naive, x, g)


def test_before_the_dash_it_is_lora_to_the_bit_and_coords_get_no_gradient_at_all():
    layer = dash(11, 17, dashing=False)
    twin = LoRALinear(layer.base, 3, 4.0)
    twin.load_state_dict({"A": layer.A, "B": layer.B}, strict=False)
    x, g = torch.randn(5, 11), torch.randn(5, 17)
    for forward in (layer, lambda x: F.linear(x, layer.merged_weight())):
        layer.zero_grad()
        forward(x).backward(g)
        assert layer.coords.grad is None and layer.A.grad.any()
    assert torch.equal(layer(x), twin(x))
    assert torch.equal(layer.merged_weight(), twin.merged_weight())


def test_in_the_dash_it_is_a_lora_of_rank_r_plus_s():
    layer = dash(11, 17, dtype=torch.float64, directions=4)
    twin = LoRALinear(layer.base, 7, 7.0)                               # scale 1
    with torch.no_grad():
        twin.A.copy_(torch.cat([layer.A, layer.Vt]))
        twin.B.copy_(torch.cat([layer.scale * layer.B, layer.U * layer.coords], 1))
    x = torch.randn(3, 11).double()
    assert torch.allclose(layer(x), twin(x))


@pytest.mark.parametrize("shape", [(11, 17), (17, 11)])
@pytest.mark.parametrize("ab_init", ["kaiming", "pissa"])
def test_change_rates_and_directions_follow_their_definition(shape, ab_init):
    layer = dash(*shape, dtype=torch.float64, dashing=False, directions=4, ab_init=ab_init)
    dW = layer.delta_weight()
    U, sigma, Vt = torch.linalg.svd(layer.base.weight)
    rates = torch.stack([(U[:, i] @ dW @ Vt[i]).abs() / sigma[i] for i in range(11)])
    assert torch.allclose(layer.change_rates()[1], rates)
    layer.launch()
    for i, k in enumerate(rates.argsort(descending=True)[:4]):          # up to a common sign
        assert torch.allclose(torch.outer(layer.U[:, i], layer.Vt[i]), torch.outer(U[:, k], Vt[k]))


def test_directions_are_chosen_after_step_prelaunch_minus_1_and_stay():
    layer = dash(11, 17, dashing=False, prelaunch=3)
    for step in range(6):
        for _ in range(3):              # evaluation and micro-batches are no steps
            layer(torch.randn(4, 11))
        layer.eval()(torch.randn(4, 11))
        LoRADashLinear.on_step([layer.train()], step, 6)
        assert bool(layer.dashing) == (step >= 2)
        if step == 2:
            chosen = layer.U.clone()
        nn.init.normal_(layer.B)
    assert torch.equal(layer.U, chosen) and chosen.any()
    assert not any(buffer.requires_grad for buffer in layer.buffers())


def test_a_loop_that_missed_the_step_chooses_at_the_next():
    layer = dash(11, 17, dashing=False, prelaunch=3)
    LoRADashLinear.on_step([layer], 4, 10)
    assert layer.dashing


def test_adam_s_state_of_the_coordinates_starts_with_the_dash():
    layer = dash(11, 17, dashing=False, prelaunch=3)
    optimizer = torch.optim.AdamW([layer.A, layer.B, layer.coords], lr=0.01)
    for step in range(4):
        layer(torch.randn(4, 11)).pow(2).sum().backward()
        optimizer.step()
        LoRADashLinear.on_step([layer], step, 4)
        optimizer.zero_grad()
        assert layer.coords.any() == (step == 3)
    assert optimizer.state[layer.coords]["step"] == 1 and optimizer.state[layer.A]["step"] == 4
    # Adam's first step is lr in size, whatever the gradient
    assert torch.allclose(layer.coords.abs(), torch.full((8,), 0.01), rtol=1e-3)


def test_a_run_too_short_for_its_prelaunch_dashes_after_its_first_quarter():
    assert [last_prelaunch_step(n, 100) for n in (2, 4, 12, 100, 101, 300)] == [0, 0, 2, 24, 99, 99]
    with pytest.raises(UserError, match="at least 2 steps"):
        LoRADashLinear.start([], 1)
    assert LoRADashLinear.start([dash(6, 5, prelaunch=7)], 20) == (
        "plain LoRA up to step 6, then the dash")


@pytest.mark.parametrize("kind", ["zero", "one direction"])
def test_a_weight_that_lacks_directions_gives_no_nan(kind):
    layer = dash(6, 5, dashing=False, directions=2)
    with torch.no_grad():
        layer.base.weight.zero_()
        if kind == "one direction":
            layer.base.weight[2, 3] = 7
    layer.launch()
    assert layer.U.isfinite().all() and layer(torch.randn(2, 6)).isfinite().all()
    if kind == "one direction":         # a change along a direction of size 0: the highest rate
        assert layer.change_rates()[1].isinf().any()
    nn.init.zeros_(layer.B)             # no change at all: 0 / 0
    assert not layer.change_rates()[1].isnan().any()


def test_a_layer_narrower_than_the_directions_uses_all_it_has():
    layer = dash(5, 3, rank=2, directions=8)
    assert (layer.U.shape, layer.Vt.shape, layer.coords.shape) == ((3, 3), (3, 5), (3,))


def test_a_bf16_base_is_decomposed_in_float32():
    layer = dash(40, 30, dtype=torch.bfloat16, dashing=False)
    layer.launch()
    U = torch.linalg.svd(layer.base.weight.float(), full_matrices=False)[0]
    assert layer.U.dtype == torch.float32
    assert all(any(torch.equal(u, v) for v in U.t()) for u in layer.U.t())


def test_long_work_shows_a_progress_line_and_short_work_none(capsys, monkeypatch):
    monkeypatch.setattr(LoRADashLinear, "launch", lambda layer: None)
    for width, shown in ((64, False), (2200, True)):
        layer = LoRADashLinear(nn.Linear(width, width), 2, 4, prelaunch=1)
        LoRADashLinear.on_step([layer], 0, 10)
        assert ("SVD" in capsys.readouterr().err) == shown


@pytest.mark.parametrize("wrong", [dict(directions=0), dict(directions=1.5), dict(prelaunch=0)])
def test_wrong_arguments_are_refused_by_name(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        dash(6, 5, dashing=False, **wrong)
