"""Checks Transformer against transformers on random checkpoints of every family, and by hand."""
import json
import math

import pytest
import torch
from conftest import SHARED, needs
from reference import CONFIGS, VOCAB, checkpoint, random_model, some_tokens

from formats.checkpoint import load_pretrained
from generate import generate
from model import Config, Transformer, rope_frequencies, rotate

families = pytest.mark.parametrize("family", CONFIGS)


def small(**changes) -> Transformer:
    shape = dict(vocab_size=VOCAB, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=4,
                 d_ff=24, max_positions=64, eos=[2])
    return Transformer(Config(**shape | changes)).init_weights(torch.Generator().manual_seed(0))


@families
def test_logits_equal_transformers(family):
    theirs, _, ours = checkpoint(family)
    tokens = some_tokens()
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-5, rtol=0)


@families
def test_gradients_equal_transformers(family):
    theirs, folder, _ = checkpoint(family)
    ours, _ = load_pretrained(folder)
    tokens = some_tokens()
    ours(tokens).square().mean().backward()
    theirs.zero_grad()
    theirs(tokens).logits.square().mean().backward()
    for mine, his in [(ours.embed, theirs.get_input_embeddings()),
                      (ours.layers[0].attn_norm, getattr(theirs.base_model, "layers", None)
                       and theirs.base_model.layers[0].input_layernorm
                       or theirs.base_model.h[0].ln_1)]:
        torch.testing.assert_close(mine.weight.grad, his.weight.grad, atol=1e-5, rtol=1e-4)


def test_gpt2_equals_transformers_in_float64():
    # Of the LLaMAs transformers computes norms and angles in fp32 whatever the dtype.
    theirs, folder, _ = checkpoint("gpt2")
    ours, _ = load_pretrained(folder, dtype=torch.float64)
    tokens = some_tokens()
    with torch.no_grad():
        expected = random_model("gpt2").double()(tokens).logits
        torch.testing.assert_close(ours(tokens), expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.06), (torch.float16, 0.01)])
@pytest.mark.parametrize("family", ["gpt2", "llama 3.1", "qwen2 with yarn", "qwen3"])
def test_half_precision_stays_close_to_full(family, dtype, tolerance):
    _, folder, full = checkpoint(family)
    half, _ = load_pretrained(folder, dtype=dtype)
    tokens = some_tokens()
    with torch.no_grad():
        expected, found = full(tokens), half(tokens)
    assert found.dtype == dtype
    assert (found.float() - expected).norm() < tolerance * expected.norm()


@families
def test_left_padded_equals_unpadded(family):
    _, _, ours = checkpoint(family)
    tokens, pad = some_tokens(2, 12), 5
    padded = torch.cat((torch.zeros(2, pad, dtype=torch.long), tokens), dim=1)
    mask = torch.arange(pad + 12).expand(2, -1) >= pad
    with torch.no_grad():
        torch.testing.assert_close(ours(padded, mask)[:, pad:], ours(tokens), atol=1e-5, rtol=0)
        assert ours(padded, mask).isfinite().all()
        torch.testing.assert_close(ours(padded, mask.long()), ours(padded, mask))


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_right_padding_does_not_reach_back(family):
    _, _, ours = checkpoint(family)
    tokens = some_tokens(2, 12)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, 9:] = False
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens, mask)[0, :9], ours(tokens[:1, :9])[0],
                                   atol=1e-5, rtol=0)


@families
@pytest.mark.parametrize("pieces", [[12], [7, 1, 1, 1, 1, 1], [1, 4, 7], [5, 1, 6]])
def test_cached_equals_uncached(family, pieces):
    _, _, ours = checkpoint(family)
    tokens = some_tokens(2, 12)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, :4] = False
    with torch.no_grad():
        for seen in (None, mask):
            cache, found = ours.make_cache(2, 12), []
            for piece in tokens.split(pieces, dim=1):
                end = cache.used + piece.shape[1]
                found.append(ours(piece, None if seen is None else seen[:, :end], cache))
            expected = ours(tokens, seen)
            start = 0 if seen is None else 4                # padding's own logits mean nothing
            torch.testing.assert_close(torch.cat(found, 1)[:, start:], expected[:, start:],
                                       atol=3e-5, rtol=0)


def test_no_token_sees_a_later_one():
    _, _, ours = checkpoint("llama")
    tokens = some_tokens(1, 12)
    changed = tokens.clone()
    changed[0, 8:] = 3
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens)[:, :8], ours(changed)[:, :8], atol=1e-6, rtol=0)
        assert not torch.allclose(ours(tokens)[:, 8:], ours(changed)[:, 8:])


def test_a_reordered_cache_holds_what_a_new_one_would():
    ours, tokens = small(), some_tokens(2, 9)
    rows = torch.tensor([1, 0, 3, 3])                       # two beams each of two prompts
    with torch.no_grad():
        cache = ours.make_cache(2, 9)
        ours(tokens[:, :6], None, cache)
        cache.repeat(2)
        new = torch.tensor([[10], [11], [12], [13]])
        ours(new, None, cache)
        cache.reorder(rows, start=6)
        next_token = torch.tensor([[20], [21], [22], [23]])
        found = ours(next_token, None, cache)
        text = torch.cat((tokens[:, :6].repeat_interleave(2, 0), new[rows], next_token), dim=1)
        torch.testing.assert_close(found, ours(text)[:, -1:], atol=1e-6, rtol=0)


# ---- rotary positions

def test_rotation_by_hand():
    # (1, 0) and (0, 1) as pairs (i, i + D/2), turned by 90 and 180 degrees.
    x = torch.tensor([1.0, 0.0, 0.0, 1.0])                  # pairs (1, 0) and (0, 1)
    cos, sin = torch.tensor([0.0, -1.0]), torch.tensor([1.0, 0.0])
    turned = rotate(x, torch.cat((cos, cos)), torch.cat((-sin, sin)))
    torch.testing.assert_close(turned, torch.tensor([0.0, 0.0, 1.0, -1.0]))


def test_only_the_distance_of_two_tokens_counts():
    speed = rope_frequencies(small().config, "cpu")
    q, k = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))

    def product(at_q, at_k):
        rope = [torch.tensor(float(at)) * speed for at in (at_q, at_k)]
        q_turned, k_turned = (rotate(x, torch.cat((a.cos(), a.cos())),
                                     torch.cat((-a.sin(), a.sin()))) for x, a in zip((q, k), rope))
        return q_turned @ k_turned
    torch.testing.assert_close(product(7, 3), product(27, 23))
    assert abs(product(7, 3) - product(7, 4)) > 1e-3


# ---- shape and start

def test_each_family_has_the_parameters_of_its_layout():
    names = {name for name, _ in small(tied=False, qk_norm=True).named_parameters()}
    assert {"embed.weight", "norm.weight", "head.weight", "layers.1.attn.q.weight",
            "layers.1.attn.q_norm.weight", "layers.0.mlp.gate.weight"} <= names
    assert not any(name.endswith("bias") for name in names)
    gpt2 = small(model_type="gpt2", n_kv_heads=4, qkv_bias=True, o_bias=True, mlp_bias=True)
    names = {name for name, _ in gpt2.named_parameters()}
    assert {"positions.weight", "layers.0.attn.q.bias", "layers.0.mlp.down.bias",
            "layers.0.attn_norm.bias"} <= names
    assert not any("gate" in name or "head" in name for name in names)


def test_a_new_model_starts_near_uniform():
    # Small weights give almost equal logits: the loss is close to log of the vocabulary's size.
    ours, tokens = small(), some_tokens()
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(ours(tokens[:, :-1]).flatten(0, 1),
                                                 tokens[:, 1:].flatten())
    assert abs(loss.item() - math.log(VOCAB)) < 0.05


def test_the_same_generator_starts_the_same_model():
    for a, b in zip(small().parameters(), small().parameters()):
        assert torch.equal(a, b)


# ---- a real trained model that nobody in the project wrote

stories = needs(SHARED / "stories260K")


@stories
def test_stories260k_gives_the_logits_of_an_independent_implementation():
    oracle = json.loads((SHARED / "stories260K" / "oracle.json").read_text())
    ours, _ = load_pretrained(SHARED / "stories260K")
    with torch.no_grad():
        found = ours(torch.tensor([oracle["probe_ids"]]))[0, -1]
    torch.testing.assert_close(found, torch.tensor(oracle["probe_logits_last"]), atol=2e-4, rtol=0)


@stories
def test_stories260k_writes_its_authors_story():
    oracle = json.loads((SHARED / "stories260K" / "oracle.json").read_text())
    ours, tokenizer = load_pretrained(SHARED / "stories260K")
    expected = oracle["greedy_ids"]
    found = generate(ours, [expected[:1]], len(expected) - 1, eos=[])
    assert found == [expected[1:]]
    assert tokenizer.decode(found[0]).strip() == oracle["greedy_text"].strip()
