"""Holds every method to its contract on each encoder family, and on the picture model.

A whole module trains beside the adapters: an encoder's head, the picture model's last layer.
"""
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from nets import OVER, inject_named, same, snapshot
from torch.utils.checkpoint import checkpoint

from diffusion import PictureConfig, PictureModel
from encoder import Encoder, EncoderConfig
from methods import METHODS, adapters, contract, count, load, merge, param_groups, save, unmerge

TINY = EncoderConfig(vocab_size=20, d_model=8, n_layers=2, n_heads=2, d_ff=12, max_positions=30,
                     dropout=0.0, attention_dropout=0.0, head_dropout=0.0)
V3 = replace(TINY, model_type="deberta-v2", pad=0, has_positions=False, buckets=4, reach=8,
             distance_terms=("c2p", "p2c"), norm_distances=True)
FAMILIES = {"bert": replace(TINY, model_type="bert", pad=0, n_types=2), "roberta": TINY,
            "deberta": replace(V3, model_type="deberta", buckets=0, own_distance_layers=True,
                               norm_distances=False),
            "deberta-v3": V3,
            "pictures": PictureConfig(n_words=20, caption=3, side=8, patch=4, d_model=8, n_layers=2,
                                      n_heads=2, d_ff=12, smooth=2)}
TARGETS = ["q", "k", "v", "o", "up", "down"]
WHOLE = {"pictures": "last"}
STEPS = 12
# DoRA over each method is slow; test_methods.py has a quick one.
ALL = [*METHODS, *(pytest.param(name, marks=pytest.mark.slow) for name in OVER)]
# v3 is the quick one: its q and k are called twice in a forward.
families = pytest.mark.parametrize("family", [
    family if family == "deberta-v3" else pytest.param(family, marks=pytest.mark.slow)
    for family in FAMILIES])


def empty(config):
    return (PictureModel(config).init_weights() if isinstance(config, PictureConfig) else
            Encoder(config).init_weights().add_head(2))


def pretrained(family, dtype=torch.float64):
    torch.manual_seed(0)
    model = empty(replace(FAMILIES[family])).to(dtype)
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.dim() == 1), std=0.4)
    return model


def injected(family, method, dtype=torch.float64, **more):
    torch.manual_seed(1)
    targets = TARGETS + ["pos_q", "pos_k"] * (family == "deberta")
    return inject_named(pretrained(family, dtype), method, targets,
                        **dict(rank=2, alpha=4, whole=[WHOLE.get(family, "head")]) | more)


def batch(family, n=6, T=9):
    """Makes the inputs of a model, and what it is to learn."""
    generator = torch.Generator().manual_seed(2)
    if family == "pictures":
        z, target = (torch.randn(n, 3, 8, 8, generator=generator).double() for _ in range(2))
        words = torch.randint(20, (n, 3), generator=generator)
        return (z, torch.rand(n, generator=generator).double(), words), target
    tokens = torch.randint(3, 20, (n, T), generator=generator)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, T // 2:] = False
    return (tokens, mask), torch.randint(2, (n,), generator=generator)


def loss_of(model, inputs, target):
    out = model(*inputs).float()
    return F.mse_loss(out, target.float()) if out.dim() == 4 else F.cross_entropy(out, target)


def train(family, model, steps=STEPS):
    """Trains as train.py does."""
    method, layers = contract(model)
    optimizer = torch.optim.AdamW(param_groups(model, 0.01))
    for step in range(steps):
        (loss_of(model, *batch(family)) + method.extra_loss(layers)).backward()
        optimizer.step()
        method.on_step(layers, step, steps)
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("method", ALL)
@families
def test_it_starts_at_the_pretrained_model_and_trains_what_it_says_alone(family, method):
    inputs, _ = batch(family)
    model, before = injected(family, method), pretrained(family)
    assert torch.allclose(model(*inputs), before(*inputs), atol=1e-12)
    start = snapshot(model)
    train(family, model)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, start[name])}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert moved <= trained
    # AdaLoRA may have pruned all of a layer; for full, the bias of k changes no softmax.
    still = {name for name in trained - moved if not name.endswith((".lam", "k.bias"))}
    assert not still and (method != "adalora" or any(name.endswith(".lam") for name in moved))
    numbers = count(model)
    assert numbers["whole"] == (8 * 32 + 32 if family == "pictures" else 8 * 8 + 8 + 8 * 2 + 2)
    assert numbers["trainable"] == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("method", ALL[1:])
@families
def test_merging_keeps_the_output_and_unmerging_gives_back_the_bits(family, method):
    inputs, _ = batch(family)
    model = train(family, injected(family, method)).eval()
    before, start = model(*inputs), snapshot(model)
    assert not torch.allclose(before, pretrained(family)(*inputs), atol=1e-3)
    merge(model)
    assert not adapters(model)
    assert torch.allclose(model(*inputs), before, atol=1e-10)
    assert same(snapshot(merge(model)), snapshot(model))
    assert same(snapshot(unmerge(model)), start)
    plain = pretrained(family).eval()
    plain.load_state_dict(merge(model).state_dict())
    assert torch.allclose(plain(*inputs), model(*inputs), rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ALL)
@families
def test_a_saved_model_comes_back_whole_modules_included(family, method, tmp_path):
    inputs, _ = batch(family)
    model = train(family, injected(family, method)).eval()
    save(model, tmp_path / "file")
    again = load(pretrained(family), tmp_path / "file").eval()
    assert torch.equal(again(*inputs), model(*inputs))
    whole = again.injected["whole"][0] if method != "full" else "layers"
    assert not same(snapshot(again.get_submodule(whole)),
                    snapshot(pretrained(family).get_submodule(whole)))


@pytest.mark.parametrize("method", ALL)
@families
def test_evaluation_changes_no_state_and_equal_seeds_give_equal_runs(family, method):
    inputs, _ = batch(family)
    one, two = (train(family, injected(family, method, dropout=0.1)) for _ in range(2))
    assert same(snapshot(one), snapshot(two))
    start = snapshot(one)
    with torch.no_grad():
        one.eval()(*inputs)
    assert same(snapshot(one), start)


@pytest.mark.parametrize("method", ALL)
@families
def test_micro_batches_and_checkpointing_give_the_same_gradients(family, method):
    model = train(family, injected(family, method), 3)
    inputs, target = batch(family)

    def gradients(parts):
        model.zero_grad()
        for *part, gold in zip(*(t.chunk(parts) for t in (*inputs, target))):
            (loss_of(model, part, gold) / parts).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    whole, split = gradients(1), gradients(3)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(whole, split))
    model.checkpointing = True
    assert all(torch.equal(a, b) for a, b in zip(whole, gradients(1)))
    out = checkpoint(model, *inputs, use_reentrant=False)
    assert torch.equal(out, model(*inputs))


@pytest.mark.parametrize("method", ALL[1:])
@families
def test_adapters_stay_float32_on_a_bf16_model_and_train_with_autocast(family, method):
    model = injected(family, method, torch.bfloat16, whole=())
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    start = snapshot(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        train(family, model, 3)
    assert not same(snapshot(model), start)
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("method", ALL[1:])
@families
def test_nothing_of_a_weight_s_size_is_kept_but_the_weights(family, method):
    """As on a decoder: a base that is dequantised must not be held for backward."""
    config = replace(FAMILIES[family], d_model=64, d_ff=64, n_heads=2)
    model = inject_named(empty(config), method, ["q", "k"], rank=2)
    own, large = {p.data_ptr() for p in model.parameters()}, set()

    def pack(tensor):
        if tensor.numel() == 64 * 64 and tensor.data_ptr() not in own:
            large.add(tuple(tensor.shape))
        return tensor

    inputs, _ = batch(family, 2, 5)
    kind = type(next(iter(adapters(model).values())))
    for step in range(4):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(*inputs).square().sum()
        loss.backward()
        kind.on_step(list(adapters(model).values()), step, 4)
    assert not large
