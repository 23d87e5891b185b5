"""Holds every method to its contract on each encoder family, with a head that trains beside it."""
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from nets import OVER, inject_named, same, snapshot
from torch.utils.checkpoint import checkpoint

from encoder import Encoder, EncoderConfig
from methods import METHODS, adapters, contract, count, load, merge, param_groups, save, unmerge

TINY = EncoderConfig(vocab_size=20, d_model=8, n_layers=2, n_heads=2, d_ff=12, max_positions=30,
                     dropout=0.0, attention_dropout=0.0, head_dropout=0.0)
V3 = replace(TINY, model_type="deberta-v2", pad=0, has_positions=False, buckets=4, reach=8,
             distance_terms=("c2p", "p2c"), norm_distances=True)
FAMILIES = {"bert": replace(TINY, model_type="bert", pad=0, n_types=2), "roberta": TINY,
            "deberta": replace(V3, model_type="deberta", buckets=0, own_distance_layers=True,
                               norm_distances=False),
            "deberta-v3": V3}
TARGETS = ["q", "k", "v", "o", "up", "down"]
STEPS = 12
# DoRA over each method is slow; test_methods.py has a quick one.
ALL = [*METHODS, *(pytest.param(name, marks=pytest.mark.slow) for name in OVER)]
# v3 is the quick one: its q and k are called twice in a forward.
families = pytest.mark.parametrize("family", [
    family if family == "deberta-v3" else pytest.param(family, marks=pytest.mark.slow)
    for family in FAMILIES])


def pretrained(family, dtype=torch.float64):
    torch.manual_seed(0)
    model = Encoder(replace(FAMILIES[family])).init_weights().add_head(2).to(dtype)
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.dim() == 1), std=0.4)
    return model


def injected(family, method, dtype=torch.float64, **more):
    torch.manual_seed(1)
    targets = TARGETS + ["pos_q", "pos_k"] * (family == "deberta")
    return inject_named(pretrained(family, dtype), method, targets,
                        **dict(rank=2, alpha=4, whole=["head"]) | more)


def texts(n=6, T=9):
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(3, 20, (n, T), generator=generator)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, T // 2:] = False
    return tokens, mask, torch.randint(2, (n,), generator=generator)


def loss_of(model, tokens, mask, labels):
    return F.cross_entropy(model(tokens, mask).float(), labels)


def train(model, steps=STEPS):
    """Trains as train.py does."""
    method, layers = contract(model)
    optimizer = torch.optim.AdamW(param_groups(model, 0.01))
    for step in range(steps):
        (loss_of(model, *texts()) + method.extra_loss(layers)).backward()
        optimizer.step()
        method.on_step(layers, step, steps)
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("method", ALL)
@families
def test_it_starts_at_the_pretrained_model_and_trains_adapters_and_head_alone(family, method):
    tokens, mask, _ = texts()
    model, before = injected(family, method), pretrained(family)
    assert torch.allclose(model(tokens, mask), before(tokens, mask), atol=1e-12)
    start = snapshot(model)
    train(model)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, start[name])}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert moved <= trained
    # AdaLoRA may have pruned all of a layer; for full, the bias of k changes no softmax.
    still = {name for name in trained - moved if not name.endswith((".lam", "k.bias"))}
    assert not still and (method != "adalora" or any(name.endswith(".lam") for name in moved))
    assert sum(p.numel() for p in before.head.parameters()) == 8 * 8 + 8 + 8 * 2 + 2
    numbers = count(model)
    assert numbers["whole"] == 90
    assert numbers["trainable"] == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("method", ALL[1:])
@families
def test_merging_keeps_the_output_and_unmerging_gives_back_the_bits(family, method):
    tokens, mask, _ = texts()
    model = train(injected(family, method)).eval()
    before, start = model(tokens, mask), snapshot(model)
    assert not torch.allclose(before, pretrained(family)(tokens, mask), atol=1e-3)
    merge(model)
    assert not adapters(model)
    assert torch.allclose(model(tokens, mask), before, atol=1e-10)
    assert same(snapshot(merge(model)), snapshot(model))
    assert same(snapshot(unmerge(model)), start)
    plain = pretrained(family).eval()
    plain.load_state_dict(merge(model).state_dict())
    assert torch.equal(plain(tokens, mask), model(tokens, mask))


@pytest.mark.parametrize("method", ALL)
@families
def test_a_saved_model_comes_back_head_included(family, method, tmp_path):
    tokens, mask, _ = texts()
    model = train(injected(family, method)).eval()
    save(model, tmp_path / "file")
    again = load(pretrained(family), tmp_path / "file").eval()
    assert torch.equal(again(tokens, mask), model(tokens, mask))
    assert not torch.equal(again.head.out.weight, pretrained(family).head.out.weight)


@pytest.mark.parametrize("method", ALL)
@families
def test_evaluation_changes_no_state_and_equal_seeds_give_equal_runs(family, method):
    tokens, mask, _ = texts()
    one, two = (train(injected(family, method, dropout=0.1)) for _ in range(2))
    assert same(snapshot(one), snapshot(two))
    start = snapshot(one)
    with torch.no_grad():
        one.eval()(tokens, mask)
    assert same(snapshot(one), start)


@pytest.mark.parametrize("method", ALL)
@families
def test_micro_batches_and_checkpointing_give_the_same_gradients(family, method):
    model = train(injected(family, method), 3)
    tokens, mask, labels = texts()

    def gradients(parts):
        model.zero_grad()
        for part in zip(*(t.chunk(parts) for t in (tokens, mask, labels))):
            (loss_of(model, *part) / parts).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    whole, split = gradients(1), gradients(3)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(whole, split))
    model.checkpointing = True
    assert all(torch.equal(a, b) for a, b in zip(whole, gradients(1)))
    out = checkpoint(model, tokens, mask, use_reentrant=False)
    assert torch.equal(out, model(tokens, mask))


@pytest.mark.parametrize("method", ALL[1:])
@families
def test_adapters_stay_float32_on_a_bf16_encoder_and_train_with_autocast(family, method):
    model = injected(family, method, torch.bfloat16, whole=())
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    start = snapshot(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        train(model, 3)
    assert not same(snapshot(model), start)
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("method", ALL[1:])
@families
def test_nothing_of_a_weight_s_size_is_kept_but_the_weights(family, method):
    """As on a decoder: a base that is dequantised must not be held for backward."""
    config = replace(FAMILIES[family], d_model=64, d_ff=64, n_heads=2)
    model = inject_named(Encoder(config).init_weights().add_head(2), method, ["q", "k"], rank=2)
    own, large = {p.data_ptr() for p in model.parameters()}, set()

    def pack(tensor):
        if tensor.numel() == 64 * 64 and tensor.data_ptr() not in own:
            large.add(tuple(tensor.shape))
        return tensor

    tokens, mask = torch.randint(3, 20, (1, 5)), torch.ones(1, 5, dtype=torch.bool)
    kind = type(next(iter(adapters(model).values())))
    for step in range(4):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(tokens, mask).square().sum()
        loss.backward()
        kind.on_step(list(adapters(model).values()), step, 4)
    assert not large
