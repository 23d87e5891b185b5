import parity
import pytest
import torch
from parity import gradients
from torch import nn

from adalora import AdaLoRALinear, budget
from methods import adapters, inject
from support.errors import UserError


def ada(n_in=6, n_out=5, rank=2, alpha=4.0, **kwargs):
    """Makes a layer as in the middle of training: lam is not zero."""
    layer = AdaLoRALinear(nn.Linear(n_in, n_out), rank, alpha, **kwargs)
    for p in (layer.P, layer.lam, layer.Q):
        nn.init.normal_(p)
    return layer


def run(layers, steps, after=lambda step: None):
    """Trains with random gradients."""
    optimizer = torch.optim.AdamW([p for layer in layers for p in (layer.P, layer.lam, layer.Q)],
                                  lr=0.01)
    AdaLoRALinear.start(layers, steps)
    for step in range(steps):
        for layer in layers:
            for p in (layer.P, layer.lam, layer.Q):
                p.grad = torch.randn_like(p)
        optimizer.step()
        AdaLoRALinear.on_step(layers, step, steps)
        after(step)
        optimizer.zero_grad()


def kept(layers):
    return [(layer.lam != 0).tolist() for layer in layers]


def count(layers):
    return sum(map(sum, kept(layers)))


# ---- the update
def test_a_hand_worked_2x2_layer_gives_these_numbers():
    layer = AdaLoRALinear(nn.Linear(2, 2), rank=1, alpha=4, init_rank=2)   # scale = 4/2.00001
    layer.scale = 2.0
    with torch.no_grad():
        layer.base.weight.copy_(torch.tensor([[1., 0.], [0., 1.]]))
        layer.base.bias.copy_(torch.tensor([10., 20.]))
        layer.P.copy_(torch.tensor([[1., 2.], [0., 1.]]))
        layer.lam.copy_(torch.tensor([3., -1.]))
        layer.Q.copy_(torch.tensor([[1., 1.], [0., 2.]]))
    # 2 (3 [[1, 1], [0, 0]] - [[0, 4], [0, 2]]) = [[6, -2], [0, -4]];  W' = [[7, -2], [0, -3]]
    assert layer.delta_weight().tolist() == [[6, -2], [0, -4]]
    y, dx, dP, dlam, dQ = gradients(layer, layer, torch.tensor([1., 2.]), torch.tensor([1., 0.]))
    assert y.tolist() == [7 - 4 + 10, -6 + 20]
    assert dx.tolist() == [7, -2]                   # g W'
    assert dlam.tolist() == [6, 16]                 # 2 (P'g) (Q x) = 2 [1, 2] [3, 4]
    assert dP.tolist() == [[18, -8], [0, 0]]        # 2 g (lam Q x)' = 2 [9, -4]
    assert dQ.tolist() == [[6, 12], [-4, -8]]       # 2 (lam P'g) x' = 2 [3, -2] [1, 2]'


def test_the_scale_divides_by_the_first_rank_as_the_official_code_does():
    assert ada(rank=2, alpha=4.0, init_rank=5).scale == pytest.approx(4 / 5.00001, rel=1e-12)


def test_it_starts_with_small_gaussian_vectors_and_zero_singular_values():
    layer = AdaLoRALinear(nn.Linear(400, 300), 8, 16)
    assert (layer.P.shape, layer.lam.shape, layer.Q.shape) == ((300, 12), (12,), (12, 400))
    assert layer.P.std().item() == pytest.approx(0.02, rel=0.05) and not layer.lam.any()
    assert layer.Q.std().item() == pytest.approx(0.02, rel=0.05)


def test_the_penalty_of_a_hand_worked_layer_and_its_gradient():
    layers = [ada(2, 2, rank=2, init_rank=2, gamma=0.5) for _ in range(2)]
    with torch.no_grad():
        for layer in layers:
            layer.P.copy_(torch.eye(2))
            layer.Q.copy_(torch.eye(2))
    assert AdaLoRALinear.extra_loss(layers).item() == 0
    AdaLoRALinear.extra_loss(layers).backward()             # no NaN where the norm is 0
    assert not layers[0].P.grad.any()
    with torch.no_grad():
        layers[0].P.copy_(torch.tensor([[2., 0.], [0., 1.]]))    # P'P - I = [[3, 0], [0, 0]]
        layers[1].Q.copy_(torch.tensor([[1., 1.], [0., 1.]]))    # QQ' - I = [[1, 1], [1, 0]]
    loss = AdaLoRALinear.extra_loss(iter(layers))
    # gamma * (3 + sqrt 3) / (2 matrices x 2 layers): the norms are not squared
    assert loss.item() == pytest.approx(0.5 * (3 + 3 ** 0.5) / 4)
    layers[0].P.grad = None
    loss.backward()
    # d||P'P - I|| = 2 P (P'P - I) / ||P'P - I|| = [[4, 0], [0, 0]]
    assert torch.allclose(layers[0].P.grad, torch.tensor([[0.5, 0.], [0., 0.]]))


# ---- the importance
def test_the_importance_of_one_hand_worked_direction_after_two_steps():
    layer = ada(2, 2, rank=1, init_rank=1, beta1=0.5, beta2=0.75)
    with torch.no_grad():
        layer.P.copy_(torch.tensor([[1.], [-2.]]))
        layer.lam.copy_(torch.tensor([3.]))
        layer.Q.copy_(torch.tensor([[0.5, 4.]]))
    layer.P.grad = torch.tensor([[1.], [1.]])           # I = [1, 2]
    layer.lam.grad = torch.tensor([-2.])                # I = [6]
    layer.Q.grad = torch.tensor([[4., 1.]])             # I = [2, 4]
    with torch.no_grad():
        layer.learn_importance()
        # Ibar = I / 2; Ubar = |I - I/2| / 4 = I / 8; s = I^2 / 16
        assert layer.Ibar_P.tolist() == [[0.5], [1]] and layer.Ubar_P.tolist() == [[1 / 8], [1 / 4]]
        # 36/16 + mean(1, 4)/16 + mean(4, 16)/16
        assert layer.importance().item() == pytest.approx((36 + 2.5 + 10) / 16)
        layer.lam.grad.zero_()
        layer.P.grad, layer.Q.grad = None, None         # no gradient counts as one of zero
        layer.learn_importance()
    # I = 0: Ibar = I0 / 4; Ubar = 3/4 * I0/8 + 1/4 * I0/4 = 5/32 I0; s = 5/128 I0^2
    assert layer.Ubar_lam.item() == pytest.approx(6 * 5 / 32)
    assert layer.importance().item() == pytest.approx((36 + 2.5 + 10) * 5 / 128)


def test_the_importance_is_the_gradient_of_the_step_times_the_weight_after_it():
    layer = ada()
    weight = layer.lam.detach().clone()
    layer(torch.randn(3, 6)).pow(2).sum().backward()
    gradient = layer.lam.grad.clone()
    torch.optim.SGD([layer.lam], lr=0.1).step()
    assert not torch.equal(layer.lam, weight)
    AdaLoRALinear.on_step([layer], 0, 100)
    assert torch.allclose(layer.Ibar_lam, 0.15 * (layer.lam * gradient).abs())


# ---- the budget
def test_the_budget_at_its_corners():
    def at(step):
        return budget(step, total_steps=100, start=120, target=80, t_init=10, t_final=30)

    assert [at(0), at(10)] == [120, 120]                # everything, t_init included
    assert at(11) == 118                                # 80 + 40 (59/60)^3 = 118.03
    assert at(25) == 96                                 # 80 + 40 (3/4)^3 = 96.875, cut off
    assert at(40) == 85                                 # 80 + 40 / 8
    assert [at(69), at(70), at(99), at(500)] == [80] * 4
    assert [budget(s, 4, 3, 1, 0, 1) for s in range(4)] == [3, 1, 1, 1]     # 1 + 2 (2/3)^3 = 1.59


def test_shares_of_the_run_become_steps_rounded_down():
    layer = ada(t_init=0.29, t_final=0.3)
    assert layer.phases(100) == (29, 30) and layer.phases(7) == (2, 2)
    assert ada(t_init=0, t_final=0).phases(50) == (0, 1)       # the last step prunes to the target
    assert ada(t_init=4, t_final=6).phases(100) == (4, 6)
    assert [ada(9, 9, rank=rank).init_rank for rank in (1, 2, 3, 4, 5)] == [2, 3, 5, 6, 8]


@pytest.mark.parametrize("steps", [2, 3, 5, 12, 40])
@pytest.mark.parametrize("delta_t", [1, 3])
def test_with_default_phases_the_kept_directions_end_at_the_budget_exactly(steps, delta_t):
    layers = [ada(rank=2, delta_t=delta_t), ada(9, 8, rank=2, delta_t=delta_t)]    # init_rank 3
    run(layers, steps)
    assert count(layers) == 4
    for layer in layers:
        assert layer.P.any(0).all() and layer.Q.any(1).all()      # the vectors of the pruned stay


def test_prunings_are_at_multiples_of_delta_t_and_at_every_step_of_the_last_phase():
    own = dict(rank=4, init_rank=6, t_init=3, t_final=7, delta_t=5)
    layers, counts = [ada(**own), ada(**own)], []
    run(layers, 30, lambda step: counts.append(count(layers)))
    for step in (5, 10, 15, 20, *range(23, 30)):
        assert counts[step] == budget(step, 30, 12, 8, 3, 7), step
    assert counts[:5] == [12] * 5                # a multiple of 5 counts from 0, not from t_init
    for step in (6, 11, 16, 21, 22):             # the pruned ones have moved off 0 again
        assert counts[step] == 12


def test_ranks_differ_between_layers_since_the_budget_is_one_for_the_model():
    strong, weak = ada(rank=2, init_rank=4), ada(rank=2, init_rank=4)

    def weaken(step):
        weak.Ibar_lam.mul_(0)
        weak.Ibar_P.mul_(0)
        weak.Ibar_Q.mul_(0)

    run([strong, weak], 20, weaken)
    assert count([strong]) > count([weak]) and count([strong, weak]) == 4


def test_a_pruned_direction_can_come_back_until_the_last_phase_freezes_the_mask():
    layers = [ada(rank=3, init_rank=6)]
    seen = []
    run(layers, 60, lambda step: seen.append(kept(layers)[0]))
    pruning, last = seen[7:42], seen[42:]
    assert any(after[i] and not before[i] for before, after in zip(pruning, pruning[1:])
               for i in range(6))
    assert all(mask == last[0] for mask in last) and sum(last[0]) == 3


def test_importances_rest_in_the_last_phase():
    layer, states = ada(), []
    run([layer], 20, lambda step: states.append(layer.importance().clone()))
    assert not torch.equal(states[12], states[13])
    assert all(torch.equal(states[13], state) for state in states[14:])      # t_final = 6 of 20


def test_equal_importances_still_leave_exactly_the_budget():
    layers = [ada(rank=2, init_rank=4) for _ in range(3)]
    optimizer = torch.optim.SGD([layer.lam for layer in layers], lr=0.0)
    for step in range(12):
        for layer in layers:
            for p in (layer.P, layer.lam, layer.Q):
                p.grad = torch.zeros_like(p)               # every importance is 0
        optimizer.step()
        AdaLoRALinear.on_step(layers, step, 12)
    assert count(layers) == 6


def test_with_nothing_to_prune_nothing_is_pruned():
    layer = ada(rank=3, init_rank=3, t_init=0.5, t_final=0.6)
    run([layer], 12)
    assert count([layer]) == 3


@pytest.mark.parametrize("phases, steps", [((4, 6), 10), ((0.5, 0.5), 10), ((0, 0), 1),
                                           ((100, 0.3), 12)])
def test_a_schedule_that_leaves_no_step_to_prune_in_is_refused_before_the_first(phases, steps):
    layer = ada(t_init=phases[0], t_final=phases[1])
    layer.lam.grad = torch.ones(3)
    for call in (lambda: AdaLoRALinear.start([layer], steps),
                 lambda: AdaLoRALinear.on_step([layer], 0, steps)):
        with pytest.raises(UserError, match="t_init .* t_final"):
            call()


def test_the_plan_says_what_will_happen():
    assert AdaLoRALinear.start(iter([ada(rank=2), ada(rank=2)]), 100) == (
        "6 directions, pruned to 4 in steps 11 to 70")
    assert AdaLoRALinear.start([ada(rank=2, init_rank=2)], 100) == ""


def test_a_step_that_overflowed_tells_nothing():
    layer = ada()
    run([layer], 20)
    for bad in (float("inf"), float("nan")):
        layer.P.grad = torch.full_like(layer.P, bad)
        with torch.no_grad():
            layer.learn_importance()
        assert layer.importance().isfinite().all()


def test_a_loop_that_clears_the_gradients_first_is_told():
    layer = ada()
    with pytest.raises(UserError, match="before zero_grad"):
        AdaLoRALinear.on_step([layer], 0, 20)


def test_a_layer_that_the_loss_did_not_reach_counts_as_one_without_gradient():
    used, unused = ada(), ada()
    for p in (used.P, used.lam, used.Q):
        p.grad = torch.ones_like(p)
    AdaLoRALinear.on_step(iter([used, unused]), 0, 20)
    assert used.importance().all() and not unused.importance().any()


def test_autocast_does_not_reach_the_penalty():
    layer = ada(64, 64, rank=4)
    nn.init.orthogonal_(layer.P)
    nn.init.orthogonal_(layer.Q)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert AdaLoRALinear.extra_loss([layer]) < 1e-6


@pytest.mark.parametrize("wrong", [
    dict(init_rank=1), dict(init_rank=20_001), dict(init_rank=2.5), dict(t_init=-1),
    dict(t_init=float("nan")), dict(t_final=1.5), dict(delta_t=0), dict(beta1=0.0),
    dict(beta2=1.0), dict(gamma=-0.1)])
def test_wrong_arguments_are_refused_by_name(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        ada(**wrong)


# ---- beside peft
def test_a_run_of_30_steps_keeps_the_directions_that_peft_keeps():
    peft = pytest.importorskip("peft")
    config = peft.AdaLoraConfig(init_r=6, target_r=4, tinit=4, tfinal=6, deltaT=2, total_step=30,
                                lora_alpha=8, orth_reg_weight=0.1, target_modules=["q", "v"])
    allocations = set()
    for step, ours in parity.trains_as_peft_does(
            config, parity.ADALORA, "adalora", 30, lambda model, i: model.update_and_allocate(i),
            rank=4, alpha=8, init_rank=6, t_init=4, t_final=6, delta_t=2, gamma=0.1):
        layers = list(adapters(ours).values())
        pattern = config.rank_pattern          # what peft keeps since its last allocation
        if step > 4 and step % 2 == 0:
            theirs = [pattern[f"{path}.lora_E.default"] for path in ("q", "v")]
            assert kept(layers) == theirs and count(layers) == budget(step, 30, 12, 8, 4, 6)
            allocations.add(str(theirs))
    assert len(allocations) > 3 and count(layers) == 8


def test_ten_steps_equal_peft_s_with_dropout():
    peft = pytest.importorskip("peft")
    config = peft.AdaLoraConfig(init_r=6, target_r=4, tinit=1, tfinal=2, deltaT=1, total_step=10,
                                lora_alpha=8, orth_reg_weight=0.5, target_modules=["q", "v"],
                                lora_dropout=0.3, beta1=0.7, beta2=0.6)
    for _ in parity.trains_as_peft_does(
            config, parity.ADALORA, "adalora", 10, lambda model, i: model.update_and_allocate(i),
            rank=4, alpha=8, dropout=0.3, init_rank=6, t_init=1, t_final=2, gamma=0.5, beta1=0.7,
            beta2=0.6):
        pass


def test_a_model_whose_layers_differ_in_shape_shares_one_penalty_and_one_budget():
    model = inject(nn.ModuleDict({"a": nn.Linear(9, 4), "b": nn.Linear(3, 12)}), "adalora",
                   ["a", "b"], rank=3)
    layers = list(adapters(model).values())
    AdaLoRALinear.extra_loss(layers).backward()
    assert all(layer.P.grad.any() and layer.Q.grad.any() for layer in layers)
    run(layers, 12)
    assert count(layers) == 6
