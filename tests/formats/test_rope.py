"""Rotary positions for longer texts: as transformers computes them, up to where they may end."""
import math

import pytest
import torch
from checkpoints import refusal
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import LLAMA3_ROPE, LONGROPE, YARN, checkpoint, random_model, some_tokens
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from formats.checkpoint import save_pretrained
from formats.rope import parse_rope
from model import Config, rope_frequencies, rotations

OLD = "original_max_position_embeddings"
SHAPE = dict(hidden_size=64, num_attention_heads=4, max_position_embeddings=256)     # D = 16


def ours_and_theirs(rope: dict, **outside):
    """Returns speeds and attention factor, ours and those of transformers, for one config.json."""
    theirs = LlamaConfig(**SHAPE, rope_parameters=dict(rope), **outside)
    theta, scaling = parse_rope(SHAPE | {"rope_parameters": rope} | outside, head_dim=16)
    config = Config(1, 64, 1, 4, 4, 16, 1, 256, rope_theta=theta, rope_scaling=scaling)
    ours = rope_frequencies(config, "cpu"), (scaling or {}).get("attention_factor", 1.0)
    return ours, ROPE_INIT_FUNCTIONS[rope["rope_type"]](theirs, "cpu")


def assert_same(ours, theirs) -> None:
    torch.testing.assert_close(ours[0], theirs[0], atol=0, rtol=1e-6)
    assert ours[1] == pytest.approx(theirs[1])


@pytest.mark.parametrize("rope", [
    LLAMA3_ROPE, LLAMA3_ROPE | {OLD: 8192}, {"rope_type": "linear", "factor": 2.5},
    {"rope_type": "dynamic", "factor": 3.3}, YARN, YARN | {"truncate": False},
    YARN | {"rope_theta": 1e6, "factor": 40}, YARN | {"beta_fast": 4, "beta_slow": 2.0},
    YARN | {"beta_fast": 4.0, "beta_slow": 4.0, "truncate": False},
    YARN | {"beta_fast": None, "finetuned": True}, YARN | {"beta_slow": 0},
    YARN | {"attention_factor": 0.7}, YARN | {"mscale": 0.7, "mscale_all_dim": 1.3},
    YARN | {"mscale": 0.7, "mscale_all_dim": 0}, YARN | {"factor": 0.5}, YARN | {"factor": None},
    {"rope_type": "yarn", "factor": 2.0},
    *(LONGROPE | {"short_factor": [1 + i / 4 for i in range(8)], "long_factor": 8 * [9.0]} | more
      for more in ({}, {"attention_factor": 1.4}, {"factor": None}, {"factor": 0.5})),
])
def test_speeds_and_attention_factor_equal_transformers(rope):
    assert_same(*ours_and_theirs(rope))


@pytest.mark.parametrize("rope", [LLAMA3_ROPE, YARN])
def test_the_length_of_the_pretraining_may_stand_outside(rope):
    # transformers copies it inside when it computes the speeds, over what is there.
    assert_same(*ours_and_theirs(rope, **{OLD: 32}))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["llama3", "yarn", "linear"]), st.floats(1.5, 1e7), st.floats(0.5, 64),
       st.integers(2, 10 ** 5), st.floats(0.1, 60), st.floats(1.1, 9), st.booleans())
def test_any_options_give_the_speeds_of_transformers(kind, theta, factor, old, low, times, whole):
    rope = {"rope_type": kind, "rope_theta": theta, "factor": factor}
    if kind == "llama3":
        rope |= {OLD: old, "low_freq_factor": low, "high_freq_factor": low * times}
    if kind == "yarn":
        rope |= {OLD: old, "beta_slow": low, "beta_fast": low * times, "truncate": whole}
    ours, theirs = ours_and_theirs(rope)
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-7, rtol=1e-4)
    assert ours[1] == pytest.approx(theirs[1])


def test_llama_3_1_speeds_by_hand():
    # D = 8, theta = 16: plain speeds 1, 1/2, 1/4, 1/8 radians per token. An old context of 8 pi
    # tokens holds 4, 2, 1, 1/2 turns of them (the config wants whole tokens, the formula not).
    # With low = 1, high = 3, factor = 2: 4 turns >= 3 are kept; 2 turns are half way between,
    # 1/2 * (1/2 + 1/2 * 1/2) = 3/8; 1 and 1/2 turns are halved: 1/8 and 1/16.
    config = Config(1, 8, 1, 1, 1, 8, 1, 1, rope_theta=16.0, rope_scaling={
        "rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0,
        OLD: 8 * math.pi})
    expected = torch.tensor([1, 3 / 8, 1 / 8, 1 / 16])
    torch.testing.assert_close(rope_frequencies(config, "cpu"), expected)


def test_yarn_by_hand():
    # The same speeds and turns. Pair i turns 4 / 2^i times: 4 turns are pair 0's, 1 turn is pair
    # 2's. Pair 1 is half way, 1/2 * (1/2 + 1/2 * 1/2) = 3/8; pairs 2 and 3 are halved. All
    # products of q and k grow by (0.1 ln 2 + 1)^2.
    _, scaling = parse_rope({"max_position_embeddings": 50, "rope_scaling": YARN}, 8)
    scaling |= {"beta_fast": 4, "beta_slow": 1, "truncate": False, OLD: 8 * math.pi}
    config = Config(1, 8, 1, 1, 1, 8, 1, 50, rope_theta=16.0, rope_scaling=scaling)
    expected = torch.tensor([1, 3 / 8, 1 / 8, 1 / 16])
    torch.testing.assert_close(rope_frequencies(config, "cpu"), expected)
    cos, sin = rotations(config, torch.arange(9), torch.float32)
    torch.testing.assert_close((cos ** 2 + sin ** 2).sqrt(),
                               torch.full((9, 8), 0.1 * math.log(2) + 1))


@pytest.mark.parametrize("rope, said", [
    ({"rope_type": "linear"}, "factor"), ({"rope_type": "linear", "factor": 0}, "factor"),
    (YARN | {"truncate": None}, "truncate"), (YARN | {"beta_fast": "32"}, "beta_fast"),
    (YARN | {"attention_factor": 0}, "attention_factor"), (YARN | {"rope_theta": 1}, "rope_theta"),
    (YARN | {"mscale": [1], "mscale_all_dim": 1}, "mscale"), (YARN | {OLD: None}, OLD),
    (YARN | {"attn_factor": 1.0}, "with attn_factor"), (LONGROPE | {OLD: 1}, OLD),
    (LONGROPE | {"short_factor": [1.0]}, "short_factor must be a list of 4 numbers"),
    (LONGROPE | {"long_factor": [1.0, 1.0, None, 1.0]}, "long_factor"),
    (LONGROPE | {"short_factor": 1.0}, "short_factor"),
    ({"rope_type": "proportional", "factor": 2.0}, "proportional"),
    ({"rope_type": {}}, "rope of type"), ({"rope_type": None}, "None"),
])
def test_options_that_are_missing_or_absurd_are_refused(rope, said):
    assert said in refusal(parse_rope, {"max_position_embeddings": 9, "rope_parameters": rope}, 8)


# ---- where positions end before the model changes

CAPPED = {"llama with dynamic rope": 128, "llama with longrope": 64, "mistral with a window": 64,
          "qwen3 with a window": 48}


@torch.no_grad()
@pytest.mark.parametrize("family", CAPPED)
def test_logits_are_transformers_up_to_the_last_position_and_not_beyond(family):
    theirs, (_, _, ours), end = random_model(family), checkpoint(family), CAPPED[family]
    assert ours.config.max_positions == end
    tokens = some_tokens(2, end + 20)
    torch.testing.assert_close(ours(tokens[:, :end]), theirs(tokens[:, :end]).logits,
                               atol=1e-4, rtol=0)
    assert (ours(tokens) - theirs(tokens).logits).abs().max() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("family", set(CAPPED) | {"qwen2 with yarn"})
def test_a_saved_model_computes_longer_texts_as_the_original(family, tmp_path):
    save_pretrained(checkpoint(family)[2], tmp_path)
    again, theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval(), random_model(family)
    assert again.config.max_position_embeddings == 128
    tokens = some_tokens(2, 140)
    torch.testing.assert_close(again(tokens).logits, theirs(tokens).logits, atol=1e-5, rtol=0)
