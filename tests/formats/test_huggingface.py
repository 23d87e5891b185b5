"""config.json is read as transformers reads it, or refused in one line."""
import json

import pytest
import torch
from checkpoints import edit, families, refusal, same_logits
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import LLAMA3_ROPE, LONGROPE, checkpoint, some_tokens
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.activations import ACT2FN

from formats.checkpoint import load_pretrained, save_pretrained
from formats.decoders import APPLIED, FAMILIES
from formats.huggingface import parse_config
from formats.rope import OLD
from model import Transformer
from support.errors import UserError

# ---- accepted

@families
def test_both_dialects_of_config_mean_the_same(family, folder):
    # transformers 5 wrote the file: rope_parameters and dtype. Older ones: rope_theta beside
    # rope_scaling, and torch_dtype.
    place = folder(family)
    raw = json.loads((place / "config.json").read_text())
    rope = raw.get("rope_parameters")
    assert "dtype" in raw and (rope is not None or "gpt2" in family)
    edit(place / "config.json", dtype=..., torch_dtype=raw["dtype"])
    if rope is not None:
        theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
        olds = [rope | {"type": kind}, rope | {"rope_type": kind}] if rope else [None]
        for old in olds:
            edit(place / "config.json", rope_parameters=..., rope_theta=theta, rope_scaling=old)
            assert load_pretrained(place)[0].config == checkpoint(family)[2].config
    same_logits(load_pretrained(place)[0], family)


def test_absent_keys_mean_what_transformers_assumes(folder):
    for family in ("gpt2", "llama 1", "qwen2"):
        place = folder(family)
        raw = json.loads((place / "config.json").read_text())
        needed = {"model_type", "vocab_size", "hidden_size", "intermediate_size", "n_embd",
                  "n_layer", "n_head", "num_hidden_layers", "num_attention_heads",
                  "num_key_value_heads", "tie_word_embeddings", "n_positions"}
        if family == "llama 1":
            needed.remove("num_key_value_heads")
        if family == "gpt2":
            needed.remove("tie_word_embeddings")
        (place / "generation_config.json").unlink()
        edit(place / "config.json", **{key: ... for key in raw if key not in needed})
        theirs = AutoModelForCausalLM.from_pretrained(place).eval()
        ours, _ = load_pretrained(place)
        with torch.no_grad():
            torch.testing.assert_close(ours(some_tokens()), theirs(some_tokens()).logits,
                                       atol=1e-4, rtol=0)
        eos = theirs.config.eos_token_id
        assert ours.config.eos == ([] if eos is None else [eos])
        assert ours.config.bos == theirs.config.bos_token_id


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_of_defaults_is_transformers_own(family):
    theirs = AutoConfig.for_model(family)
    derived = {"head_dim", "num_key_value_heads"}           # transformers fills these in at once
    for key, value in FAMILIES[family].defaults.items():
        if not (value is None and key in derived or key in FAMILIES[family].fixed):
            assert getattr(theirs, key, value) == value, key


def test_rotating_all_of_a_head_may_be_spelt_out_and_rotating_a_part_is_refused(folder):
    place = folder("llama 1")
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
    edit(place / "config.json", rope_parameters=rope)
    same_logits(load_pretrained(place)[0], "llama 1")
    edit(place / "config.json", rope_parameters=rope | {"partial_rotary_factor": 0.5})
    assert "partial_rotary_factor" in refusal(load_pretrained, place)


@pytest.mark.parametrize("config, generation, expected", [
    (7, ..., [7]), ([7, 8], ..., [7, 8]), (None, ..., []), (-1, ..., []),
    (7, [7, 9], [7, 9]),                                    # LLaMA-3 instruct
    (7, None, [7]), (None, 9, [9]), ([7, 8], [9, 8], [7, 8, 9]),
])
def test_generation_stops_at_the_ends_of_both_files(config, generation, expected, folder):
    place = folder("llama", eos_token_id=config)
    edit(place / "generation_config.json", eos_token_id=generation)
    assert load_pretrained(place)[0].config.eos == expected


def test_generation_config_may_be_absent(folder):
    place = folder("llama", eos_token_id=[5, 6], bos_token_id=None, pad_token_id=-1)
    (place / "generation_config.json").unlink()
    config = load_pretrained(place)[0].config
    assert (config.bos, config.eos, config.pad) == (None, [5, 6], None)


@pytest.mark.parametrize("family, change", [
    ("mistral", dict(sliding_window=None)),
    ("mistral", dict(sliding_window=128)),
    ("mistral", dict(sliding_window=4096)),
    ("mistral", dict(hidden_act="swish")),
    ("qwen2", dict(use_sliding_window=False, sliding_window=64)),
    ("qwen2", dict(use_sliding_window=True, sliding_window=64, max_window_layers=2,
                   layer_types=...)),
    ("qwen2", dict(use_sliding_window=True, sliding_window=128, max_window_layers=0,
                   layer_types=...)),
    ("qwen2", dict(use_sliding_window=True, sliding_window=None, max_window_layers=0,
                   layer_types=...)),
    ("qwen2", dict(use_sliding_window=True, sliding_window=64, max_window_layers=0)),
    ("llama", dict(sliding_window=64)),                     # LLaMA has no such option
    ("llama", dict(pretraining_tp=2)),                      # the same sum in two parts
    ("llama", dict(rope_scaling=None)),
    ("gpt2", dict(reorder_and_upcast_attn=True)),
    ("gpt2", dict(attn_pdrop=0.5, summary_type="mean")),
    *(("gpt2", dict(activation_function=name)) for name in APPLIED["activation_function"]),
])
def test_an_option_that_changes_nothing_is_accepted(family, change, folder, capsys):
    ours, _ = load_pretrained(folder(family, **change))
    same_logits(ours, family, atol=1e-5)
    assert ours.config.max_positions == 128
    assert ours.config.beyond.get("sliding_window", 128) >= 128     # kept for what we save
    assert capsys.readouterr().err == ""


def test_the_names_of_an_activation_are_transformers_own():
    x = torch.linspace(-9, 9, 999)
    for name in APPLIED["hidden_act"]:
        torch.testing.assert_close(ACT2FN[name](x), torch.nn.functional.silu(x))
    for name in APPLIED["activation_function"]:
        torch.testing.assert_close(ACT2FN[name](x),
                                   torch.nn.functional.gelu(x, approximate="tanh"))


@torch.no_grad()
@pytest.mark.parametrize("family, change, end", [
    ("mistral", dict(sliding_window=64), 64),
    ("mistral", dict(sliding_window=127), 127),
    ("qwen2", dict(use_sliding_window=True, sliding_window=64, max_window_layers=1,
                   layer_types=...), 64),
    ("qwen2", dict(use_sliding_window=True, sliding_window=64,
                   layer_types=["full_attention", "sliding_attention"]), 64),
    ("qwen3", dict(use_sliding_window=True, sliding_window=4,
                   layer_types=["sliding_attention", "full_attention"]), 4),
    ("llama", dict(rope_parameters=..., rope_scaling=LONGROPE | {OLD: 100}), 100),
    ("mistral", dict(sliding_window=80, rope_parameters=LONGROPE | {
        "short_factor": 8 * [1.5], "long_factor": 8 * [4.0], "attention_factor": 1.2}), 64),
])
def test_positions_end_where_the_model_would_change(family, change, end, folder, capsys):
    place = folder(family, **change)
    ours, _ = load_pretrained(place)
    load_pretrained(place)
    said, = capsys.readouterr().err.splitlines()                # once
    assert str(place) in said and f"capped at {end}" in said and "allows 128" in said
    assert ours.config.max_positions == end
    theirs, tokens = AutoModelForCausalLM.from_pretrained(place).eval(), some_tokens(2, end)
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)
    save_pretrained(ours, place / "again")
    assert load_pretrained(place / "again")[0].config == ours.config


def test_mistral_7b_as_published_is_capped_at_its_window(folder, monkeypatch, capsys):
    published = dict(
        architectures=["MistralForCausalLM"], bos_token_id=1, eos_token_id=2, hidden_act="silu",
        hidden_size=4096, initializer_range=0.02, intermediate_size=14336,
        max_position_embeddings=32768, model_type="mistral", num_attention_heads=32,
        num_hidden_layers=32, num_key_value_heads=8, rms_norm_eps=1e-05, rope_theta=10000.0,
        sliding_window=4096, tie_word_embeddings=False, torch_dtype="bfloat16", use_cache=True,
        vocab_size=32000)
    config = parse_config(published)
    assert config.max_positions == 4096
    assert config.beyond == {"max_position_embeddings": 32768, "sliding_window": 4096}
    place = folder("mistral", max_position_embeddings=32768, sliding_window=4096)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(place))
    for _ in range(2):
        same_logits(load_pretrained("mistralai/Mistral-7B-v0.1")[0], "mistral")
    assert capsys.readouterr().err == ("mistralai/Mistral-7B-v0.1: positions capped at 4096, where "
                                       "a sliding window sets in (config.json allows 32768)\n")


def test_a_window_that_is_left_out_is_that_of_transformers(folder):
    place = folder("mistral", sliding_window=..., max_position_embeddings=32768)
    assert load_pretrained(place)[0].config.max_positions == 4096


# ---- refused

@pytest.mark.parametrize("family, change, words", [
    ("llama", dict(model_type=...), "model_type"),
    ("llama", dict(model_type="gemma"), "model_type"),
    ("llama", dict(model_type=["llama"]), "model_type"),
    ("llama", dict(hidden_size=...), "hidden_size"),
    ("llama", dict(num_attention_heads=...), "num_attention_heads"),
    ("llama", dict(vocab_size="97"), "vocab_size"),
    ("llama", dict(num_hidden_layers=-2), "num_hidden_layers"),
    ("llama", dict(num_hidden_layers=2.0), "num_hidden_layers"),
    ("llama", dict(num_hidden_layers=True), "num_hidden_layers"),
    ("llama", dict(num_hidden_layers=3), "3 layers"),
    ("llama", dict(num_hidden_layers=10 ** 7), "10000000 layers"),
    ("llama", dict(num_hidden_layers=10 ** 30), "num_hidden_layers"),
    ("llama", dict(intermediate_size=0), "intermediate_size"),
    ("llama", dict(intermediate_size=2 ** 24, hidden_size=2 ** 24, head_dim=2 ** 24,
                   num_attention_heads=2 ** 24, num_key_value_heads=2 ** 24), "impossible sizes"),
    ("llama", dict(num_key_value_heads=3), "3 key/value heads"),
    ("llama", dict(num_attention_heads=5, head_dim=None), "5 heads"),
    ("llama", dict(head_dim=7), "head_dim"),
    ("llama", dict(rms_norm_eps="small"), "rms_norm_eps"),
    ("llama", dict(rms_norm_eps=-1e-5), "rms_norm_eps"),
    ("llama", dict(attention_bias="no"), "attention_bias"),
    ("llama", dict(tie_word_embeddings=None), "tie_word_embeddings"),
    ("llama", dict(eos_token_id="</s>"), "eos_token_id"),
    ("llama", dict(eos_token_id=[2, None]), "eos_token_id"),
    ("llama", dict(bos_token_id=1.5), "bos_token_id"),
    ("llama", dict(dtype="int8"), "int8"),
    ("llama", dict(dtype=["float32"]), "dtype"),
    ("llama", dict(hidden_act="gelu"), "hidden_act"),
    ("llama", dict(quantization_config={"quant_method": "gptq"}), "gptq"),
    ("llama", dict(rope_scaling={"type": "mrope", "mrope_section": [1, 2, 1]}), "mrope"),
    ("llama", dict(rope_scaling="linear"), "rope_scaling"),
    ("llama", dict(rope_scaling=["linear"]), "rope_scaling"),
    ("llama", dict(rope_scaling={"rope_type": ["llama3"]}), "rope"),
    ("llama", dict(rope_parameters={"full_attention": {"rope_type": "default"}}), "full_attention"),
    ("llama", dict(rope_parameters={"rope_theta": 0}), "rope_theta"),
    ("llama", dict(rope_parameters=LLAMA3_ROPE | {"factor": None}), "factor"),
    ("llama", dict(rope_parameters=LLAMA3_ROPE | {"low_freq_factor": 4.0}), "low_freq_factor"),
    ("llama", dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
    ("mistral", dict(sliding_window="wide"), "sliding_window"),
    ("mistral", dict(sliding_window=0), "sliding_window"),
    ("qwen2", dict(layer_types=["full_attention", "sliding_attention"], sliding_window=None),
     "sliding_window"),
    ("qwen2", dict(layer_types=["full_attention"]), "layer_types"),
    ("qwen2", dict(layer_types="full_attention"), "layer_types"),
    ("qwen3", dict(layer_types=["full_attention", "chunked_attention"], sliding_window=64),
     "chunked_attention"),
    ("gpt2", dict(n_embd=...), "n_embd"),
    ("gpt2", dict(n_head=5), "5 heads"),
    ("gpt2", dict(n_inner=-1), "n_inner"),
    ("gpt2", dict(activation_function="relu"), "activation_function"),
    ("gpt2", dict(scale_attn_weights=False), "scale_attn_weights"),
    ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx"),
    ("gpt2", dict(add_cross_attention=True), "add_cross_attention"),
])
def test_a_config_that_would_go_wrong_is_refused(family, change, words, folder):
    place = folder(family, **change)
    message = refusal(load_pretrained, place)
    assert words in message
    assert str(place) in message


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff", '{"model_type": llama}',
                                  "[" * 100000, '{"a": ' + "9" * 5000 + "}"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json",
                                  "model.safetensors.index.json"])
def test_malformed_json_is_refused(name, text, folder):
    place = folder("llama")
    if "index" in name:
        (place / "model.safetensors").unlink()
    (place / name).write_bytes(text.encode("latin-1"))
    assert name in refusal(load_pretrained, place)


SIZES = st.one_of(st.integers(-3, 200), st.sampled_from([None, 4, 32, 97, True, 2.5, "4", [], {}]))
LEAF = st.none() | st.booleans() | st.integers(-9, 10 ** 12) | st.floats() | st.text(max_size=5)
ANY = st.recursive(LEAF, lambda inner: st.lists(inner, max_size=3)
                   | st.dictionaries(st.text(max_size=5), inner, max_size=3))
KEYS = ["vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim",
        "intermediate_size", "max_position_embeddings", "num_hidden_layers", "n_embd", "n_head",
        "n_layer", "n_inner", "n_positions", "sliding_window", "max_window_layers"]
OTHERS = ["rms_norm_eps", "layer_norm_epsilon", "rope_theta", "rope_scaling", "rope_parameters",
          "attention_bias", "mlp_bias", "tie_word_embeddings", "bos_token_id", "eos_token_id",
          "pad_token_id", "hidden_act", "use_sliding_window", "layer_types", "quantization_config",
          "activation_function", "model_type", "partial_rotary_factor"]
ROPE = st.fixed_dictionaries({}, optional={
    "rope_type": st.sampled_from(["llama3", "yarn", "linear", "dynamic", "longrope", 3]),
    "rope_theta": ANY | st.floats(1e-3, 1e12), "factor": ANY | st.just(8.0) | st.floats(1e-3, 1e12),
    "low_freq_factor": ANY | st.just(1.0), "high_freq_factor": ANY | st.just(4.0), OLD: SIZES,
    "beta_fast": ANY | st.floats(1e-3, 1e12), "beta_slow": ANY | st.floats(1e-3, 1e12),
    "truncate": st.booleans(), "attention_factor": ANY, "mscale": ANY, "mscale_all_dim": ANY,
    "short_factor": ANY | st.just([1.0, 2.0]), "long_factor": ANY | st.just([1.0, 2.0])})


@settings(max_examples=250, deadline=None)
@given(st.sampled_from(sorted(FAMILIES)),
       st.dictionaries(st.sampled_from(KEYS), SIZES, max_size=3),
       st.dictionaries(st.sampled_from(OTHERS), ANY, max_size=2),
       st.fixed_dictionaries({}, optional={"rope_scaling": ROPE, "rope_parameters": ROPE}))
@pytest.mark.slow
def test_any_config_works_or_is_refused(kind, sizes, others, rope):
    base = dict(model_type=kind, vocab_size=11, hidden_size=16, num_hidden_layers=1,
                num_attention_heads=4, num_key_value_heads=2, intermediate_size=8,
                max_position_embeddings=64, sliding_window=None,
                n_embd=16, n_layer=1, n_head=4, n_positions=64)
    try:
        config = parse_config(base | sizes | rope | others)
    except UserError as error:
        assert "\n" not in str(error)
        return
    with torch.device("meta"):
        model = Transformer(config)
    if sum(p.numel() for p in model.parameters()) < 10 ** 6 and config.n_layers < 10:
        model = Transformer(config).init_weights()
        with torch.no_grad():
            assert model(torch.zeros(1, 1, dtype=torch.long)).isfinite().all()
