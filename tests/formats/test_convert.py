"""Checkpoints read and written: equal to transformers, or refused in one line."""
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import CONFIGS, LLAMA3_ROPE, checkpoint, some_tokens
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import convert
from formats import checkpoint as checkpoint_files
from formats import huggingface as hf_files
from formats.checkpoint import load_pretrained, save_pretrained
from formats.huggingface import parse_config
from generate import generate
from model import Config, Transformer
from support.errors import UserError

families = pytest.mark.parametrize("family", CONFIGS)
ROOT = Path(convert.__file__).parent


@pytest.fixture
def folder(tmp_path):
    """folder(family) copies a checkpoint to a place where it can be changed."""
    def copy(family: str, **config) -> Path:
        place = Path(shutil.copytree(checkpoint(family)[1], tmp_path / "copy", dirs_exist_ok=True))
        edit(place / "config.json", **config)
        return place
    return copy


def edit(path: Path, **changes) -> None:
    """Changes a JSON file; the value ... removes its key."""
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not ...}))


def tensors_of(place: Path) -> dict[str, torch.Tensor]:
    return load_file(place / "model.safetensors")


def write(place: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})


def refusal(call, *arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    return str(caught.value)


def same_logits(model, family: str, atol: float = 1e-6) -> None:
    _, _, expected = checkpoint(family)
    with torch.no_grad():
        torch.testing.assert_close(model(some_tokens()), expected(some_tokens()), atol=atol, rtol=0)


def same_weights(a: Transformer, b: Transformer) -> None:
    a, b = a.state_dict(), b.state_dict()
    assert list(a) == list(b)
    assert all(torch.equal(a[name], b[name]) for name in a)


# ---- written back (reading is what test_model.py compares)

@families
def test_a_saved_model_gives_transformers_the_same_logits(family, tmp_path):
    theirs, _, ours = checkpoint(family)
    save_pretrained(ours, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(some_tokens()).logits, theirs(some_tokens()).logits,
                                   atol=1e-5, rtol=0)
    assert again.config.eos_token_id == theirs.config.eos_token_id
    assert type(again) is type(theirs)


@families
def test_a_saved_model_is_read_back_bit_for_bit(family, tmp_path):
    _, _, ours = checkpoint(family)
    save_pretrained(ours, tmp_path)
    again, tokenizer = load_pretrained(tmp_path)
    same_weights(again, ours)
    assert again.config == ours.config
    assert tokenizer is None
    first = (tmp_path / "model.safetensors").read_bytes()
    save_pretrained(again, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == first


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_survives(family, dtype, tmp_path):
    _, place, _ = checkpoint(family)
    ours, _ = load_pretrained(place, dtype=dtype)
    assert {p.dtype for p in ours.parameters()} == {dtype}
    save_pretrained(ours, tmp_path)
    again, _ = load_pretrained(tmp_path)
    same_weights(again, ours)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == dtype


def test_a_saved_mistral_has_no_sliding_window(folder, tmp_path):
    # Left out, it would mean 4096 to transformers.
    ours, _ = load_pretrained(folder("mistral", max_position_embeddings=32768))
    save_pretrained(ours, tmp_path / "new")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "new").config.sliding_window is None
    assert load_pretrained(tmp_path / "new")[0].config == ours.config


def test_a_trained_model_can_be_saved(tmp_path):
    place = checkpoint("llama")[1]
    ours, _ = load_pretrained(place)
    assert all(p.requires_grad and p.is_leaf for p in ours.parameters())
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    ours(some_tokens()).square().mean().backward()
    optimizer.step()
    save_pretrained(ours, tmp_path)
    same_weights(load_pretrained(tmp_path)[0], ours)
    same_logits(load_pretrained(place)[0], "llama")        # what was read is not what was trained


def test_adapters_must_be_merged_before_saving(tmp_path):
    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.A = base, nn.Parameter(torch.zeros(2, 2))
    ours, _ = load_pretrained(checkpoint("llama")[1])
    ours.layers[0].attn.q = Adapter(ours.layers[0].attn.q)
    assert "merge" in refusal(save_pretrained, ours, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("changes, field", [
    (dict(qkv_bias=True), "o_bias"),                        # LLaMA: on all four or on none
    (dict(model_type="mistral", mlp_bias=True), "mlp_bias"),
    (dict(qk_norm=True), "qk_norm"),
    (dict(rope_scaling={"factor": 2.0}), "low_freq_factor"),
    (dict(model_type="gpt2", n_kv_heads=4), "qkv_bias"),
])
def test_a_config_that_the_format_cannot_say_is_not_saved(changes, field, tmp_path):
    shape = dict(vocab_size=9, d_model=16, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=4,
                 d_ff=8, max_positions=16)
    ours = Transformer(Config(**shape | changes))
    assert field in refusal(save_pretrained, ours, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_failed_save_leaves_the_old_files(tmp_path, monkeypatch):
    _, _, ours = checkpoint("llama")
    save_pretrained(ours, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(checkpoint_files, "save_file", full_disk)
    assert "No space left" in refusal(save_pretrained, ours, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    assert "file" in refusal(save_pretrained, checkpoint("llama")[2], tmp_path / "file")
    assert "neither a folder" in refusal(load_pretrained, tmp_path / "file")


# ---- the forms in which checkpoints come

@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_shards_are_read(family, tmp_path):
    theirs, _, _ = checkpoint(family)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    same_logits(load_pretrained(tmp_path)[0], family)


def test_shards_may_be_links_as_in_the_hubs_cache(tmp_path):
    theirs, _, _ = checkpoint("llama")
    theirs.save_pretrained(tmp_path / "blobs", max_shard_size="20KB")
    (tmp_path / "snapshot").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    same_logits(load_pretrained(tmp_path / "snapshot")[0], "llama")


@pytest.mark.parametrize("family", ["gpt2", "llama with a tied head"])
@pytest.mark.parametrize("mapped", [True, False], ids=["zip", "before torch 1.6"])
def test_a_pickled_checkpoint_is_read(family, mapped, folder):
    place, (theirs, _, _) = folder(family), checkpoint(family)
    (place / "model.safetensors").unlink()
    torch.save(theirs.state_dict(), place / "pytorch_model.bin",
               _use_new_zipfile_serialization=mapped)     # it holds the tied head twice
    same_logits(load_pretrained(place)[0], family)


def test_pickled_shards_are_read(folder):
    place = folder("llama")
    tensors = tensors_of(place)
    (place / "model.safetensors").unlink()
    names, files = sorted(tensors), ["pytorch_model-1.bin", "pytorch_model-2.bin"]
    for half, file in enumerate(files):
        torch.save({name: nn.Parameter(tensors[name]) for name in names[half::2]}, place / file)
    index = {name: files[i % 2] for i, name in enumerate(names)}
    (place / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    ours, _ = load_pretrained(place)
    same_logits(ours, "llama")
    assert all(p.is_leaf and p.requires_grad for p in ours.parameters())


def test_the_first_gpt2_file_is_read(folder):
    # No "transformer." in front, and the causal masks saved beside the weights.
    place = folder("gpt2", architectures=..., n_ctx=128)
    tensors = {name.removeprefix("transformer."): t for name, t in tensors_of(place).items()}
    for layer in range(2):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 128, 128).tril()
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    write(place, tensors)
    same_logits(load_pretrained(place)[0], "gpt2")


def test_the_frequencies_in_old_llama_files_are_left_out(folder):
    place = folder("llama 1")
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    write(place, tensors_of(place) | extra | {"model.rotary_emb.inv_freq": torch.ones(4)})
    same_logits(load_pretrained(place)[0], "llama 1")


def test_rotating_all_of_a_head_may_be_spelt_out_and_rotating_a_part_is_refused(folder):
    place = folder("llama 1")
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
    edit(place / "config.json", rope_parameters=rope)
    same_logits(load_pretrained(place)[0], "llama 1")
    edit(place / "config.json", rope_parameters=rope | {"partial_rotary_factor": 0.5})
    assert "partial_rotary_factor" in refusal(load_pretrained, place)


def test_a_tied_head_that_repeats_the_embedding_is_left_out(folder):
    place = folder("llama with a tied head")
    tensors = tensors_of(place)
    write(place, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    ours, _ = load_pretrained(place)
    assert ours.head is None
    same_logits(ours, "llama with a tied head")


def test_a_tied_head_that_differs_is_kept_as_transformers_does(folder):
    place = folder("llama with a tied head")
    write(place, tensors_of(place) | {"lm_head.weight": torch.randn(97, 32)})
    ours, _ = load_pretrained(place)
    theirs = AutoModelForCausalLM.from_pretrained(place).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(some_tokens()), theirs(some_tokens()).logits,
                                   atol=1e-4, rtol=0)
    assert ours.config.tied is False


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


@pytest.mark.parametrize("family, defaults", [
    (family, {**hf_files.FAMILIES[family].defaults}) for family in hf_files.FAMILIES])
def test_the_table_of_defaults_is_transformers_own(family, defaults):
    from transformers import AutoConfig
    theirs = AutoConfig.for_model(family)
    derived = {"head_dim", "num_key_value_heads"}           # transformers fills these in at once
    for key, value in defaults.items():
        if not (value is None and key in derived or key in hf_files.FAMILIES[family].fixed):
            assert getattr(theirs, key, value) == value, key


# ---- dtype, device, special tokens

def test_the_dtype_is_the_files_own_unless_asked_for(folder):
    place = folder("llama", dtype="bfloat16")
    assert load_pretrained(place)[0].embed.weight.dtype == torch.bfloat16       # config.json
    edit(place / "config.json", dtype=..., torch_dtype="float64")
    assert load_pretrained(place)[0].embed.weight.dtype == torch.float64
    edit(place / "config.json", torch_dtype=...)
    assert load_pretrained(place)[0].embed.weight.dtype == torch.float32        # the tensors
    write(place, {name: t.half() for name, t in tensors_of(place).items()})
    assert load_pretrained(place)[0].embed.weight.dtype == torch.float16
    assert load_pretrained(place, dtype=torch.float64)[0].embed.weight.dtype == torch.float64
    assert load_pretrained(place, device="cpu")[0].embed.weight.device.type == "cpu"


@pytest.mark.parametrize("config, generation, expected", [
    (7, ..., [7]), ([7, 8], ..., [7, 8]), (None, ..., []), (-1, ..., []),
    (7, [7, 9], [7, 9]),                                    # LLaMA-3 instruct
    (7, None, [7]), (None, 9, [9]),
])
def test_generation_stops_where_transformers_stops(config, generation, expected, folder):
    place = folder("llama", eos_token_id=config)
    edit(place / "generation_config.json", eos_token_id=generation)
    assert load_pretrained(place)[0].config.eos == expected


def test_generation_config_may_be_absent(folder):
    place = folder("llama", eos_token_id=[5, 6], bos_token_id=None, pad_token_id=-1)
    (place / "generation_config.json").unlink()
    config = load_pretrained(place)[0].config
    assert (config.bos, config.eos, config.pad) == (None, [5, 6], None)


def test_the_model_that_ships_is_read(base):
    ours, tokenizer = base
    text = "Where"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    new, = generate(ours, [[tokenizer.bos, *tokenizer.encode(text)]], 8)
    assert all(token < ours.config.vocab_size for token in new)


# ---- memory and time

@pytest.mark.slow
def test_loading_needs_hardly_more_memory_than_the_model(tmp_path):
    # A model of 60 MB, a third of it in one tensor, to keep the test quick.
    shape = dict(vocab_size=30000, d_model=256, n_layers=8, n_heads=4, n_kv_heads=4, head_dim=64,
                 d_ff=1024, max_positions=512, model_type="gpt2", qkv_bias=True, o_bias=True,
                 mlp_bias=True)
    save_pretrained(Transformer(Config(**shape)), tmp_path)
    script = """if True:
        import sys, gc, torch, convert
        def memory(key):
            lines = open("/proc/self/status").read().splitlines()
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
        convert.load_pretrained(sys.argv[2])                # what libraries load at first use
        gc.collect()
        open("/proc/self/clear_refs", "w").write("5")       # the peak starts anew
        before = memory("VmRSS")
        model, _ = convert.load_pretrained(sys.argv[1])
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        print((memory("VmHWM") - before) / size)"""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("needs /proc/self/clear_refs")
    result = subprocess.run([sys.executable, "-c", script, tmp_path, checkpoint("gpt2")[1]],
                            cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(result.stdout) < 1.1


def test_the_hub_out_of_reach_is_one_line_and_quick(tmp_path):
    script = "import convert; convert.load_pretrained('owner/name')"
    started = time.time()
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True,
                            text=True, env=os.environ | nowhere)
    assert time.time() - started < 20
    last = result.stderr.splitlines()[-1]
    assert "UserError: owner/name: no such folder, and not fetched" in last


def test_only_the_files_needed_are_fetched(monkeypatch, folder):
    place, asked = folder("llama"), []

    def snapshot_download(repo, allow_patterns):
        asked.append((repo, allow_patterns))
        return str(place)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    same_logits(load_pretrained("owner/name")[0], "llama")
    (repo, patterns), = asked
    assert repo == "owner/name"
    from fnmatch import fnmatch
    for name, wanted in [("config.json", True), ("model.safetensors", True),
                         ("model-00001-of-00004.safetensors", True), ("tokenizer.model", True),
                         ("model.safetensors.index.json", True), ("pytorch_model.bin", False),
                         ("consolidated.safetensors", False),
                         ("original/consolidated.00.pth", False),
                         ("tf_model.h5", False), ("onnx/model.onnx", False)]:
        assert any(fnmatch(name, pattern) for pattern in patterns) is wanted, name
    tensors = tensors_of(place)
    (place / "model.safetensors").unlink()
    torch.save(tensors, place / "pytorch_model.bin")        # an old repository
    same_logits(load_pretrained("owner/name")[0], "llama")
    assert "pytorch_model*.bin" in asked[-1][1]


def test_convert_imports_no_hub_by_itself():
    script = "import sys, convert; print({'huggingface_hub', 'transformers'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True,
                            text=True)
    assert result.stdout.strip() == "set()"


# ---- refused: config.json

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
    ("llama", dict(rope_scaling={"type": "linear", "factor": 2.0}), "linear"),
    ("llama", dict(rope_parameters={"rope_type": "yarn", "factor": 2.0}), "yarn"),
    ("llama", dict(rope_scaling="linear"), "rope_scaling"),
    ("llama", dict(rope_scaling=["linear"]), "rope_scaling"),
    ("llama", dict(rope_scaling={"rope_type": ["llama3"]}), "rope"),
    ("llama", dict(rope_parameters={"full_attention": {"rope_type": "default"}}), "full_attention"),
    ("llama", dict(rope_parameters={"rope_theta": 0}), "rope_theta"),
    ("llama", dict(rope_parameters=LLAMA3_ROPE | {"factor": None}), "factor"),
    ("llama", dict(rope_parameters=LLAMA3_ROPE | {"low_freq_factor": 4.0}), "low_freq_factor"),
    ("llama", dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
    ("mistral", dict(sliding_window=64), "sliding_window of 64"),
    ("mistral", dict(sliding_window=..., max_position_embeddings=32768), "sliding_window of 4096"),
    ("mistral", dict(sliding_window="wide"), "sliding_window"),
    ("qwen2", dict(use_sliding_window=True, sliding_window=64, max_window_layers=0,
                   layer_types=...), "sliding_window of 64"),
    ("qwen2", dict(layer_types=["full_attention", "sliding_attention"], sliding_window=64),
     "sliding_window of 64"),
    ("qwen3", dict(layer_types=["full_attention", "chunked_attention"], sliding_window=64),
     "sliding_window of 64"),
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


@pytest.mark.parametrize("family, change", [
    ("mistral", dict(sliding_window=None)),
    ("mistral", dict(sliding_window=128)),
    ("mistral", dict(sliding_window=4096)),
    ("qwen2", dict(use_sliding_window=False, sliding_window=64)),
    ("qwen2", dict(use_sliding_window=True, sliding_window=64, max_window_layers=2,
                   layer_types=...)),
    ("qwen2", dict(use_sliding_window=True, sliding_window=128, max_window_layers=0,
                   layer_types=...)),
    ("llama", dict(sliding_window=64)),                     # LLaMA has no such option
    ("llama", dict(pretraining_tp=2)),                      # the same sum in two parts
    ("llama", dict(rope_scaling=None)),
    ("gpt2", dict(reorder_and_upcast_attn=True)),
    ("gpt2", dict(attn_pdrop=0.5, summary_type="mean")),
])
def test_an_option_that_changes_nothing_is_accepted(family, change, folder):
    same_logits(load_pretrained(folder(family, **change))[0], family)


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
    "rope_type": st.sampled_from(["default", "llama3", "yarn", 3]), "rope_theta": ANY,
    "factor": ANY | st.just(8.0), "low_freq_factor": ANY | st.just(1.0),
    "high_freq_factor": ANY | st.just(4.0), "original_max_position_embeddings": SIZES})


@settings(max_examples=250, deadline=None)
@given(st.sampled_from(sorted(hf_files.FAMILIES)),
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


# ---- refused: files and tensors

def test_what_is_no_checkpoint_is_refused(tmp_path, folder):
    assert "config.json" in refusal(load_pretrained, tmp_path)                  # an empty folder
    assert "neither a folder" in refusal(load_pretrained, tmp_path / "nowhere")
    assert "neither a folder" in refusal(load_pretrained, "name")
    assert "neither a folder" in refusal(load_pretrained, "../owner/name")
    place = folder("llama")
    (place / "model.safetensors").unlink()
    assert "holds neither model.safetensors" in refusal(load_pretrained, place)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("keep", [0, 5, 400, 0.5, 0.99])
def test_a_truncated_file_is_refused(name, keep, folder):
    place = folder("llama")
    if name.endswith("bin"):
        torch.save(tensors_of(place), place / name)
        (place / "model.safetensors").unlink()
    data = (place / name).read_bytes()
    (place / name).write_bytes(data[:keep if isinstance(keep, int) else int(keep * len(data))])
    assert name in refusal(load_pretrained, place)


def test_a_pickle_that_would_run_code_is_refused(folder, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)
    place = folder("llama")
    (place / "model.safetensors").unlink()
    for zipped in (True, False):
        torch.save({"model.embed_tokens.weight": Evil()}, place / "pytorch_model.bin",
                   _use_new_zipfile_serialization=zipped)
        assert "pytorch_model.bin" in refusal(load_pretrained, place)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [
    {"model.norm.weight": torch.ones(64, device="meta")}, [torch.ones(2)], {"a": 1}, {"state_dict": {}}, {1: torch.ones(2)}, {}, torch.ones(2)])
def test_a_pickle_of_something_else_is_refused(content, folder):
    place = folder("llama")
    (place / "model.safetensors").unlink()
    torch.save(content, place / "pytorch_model.bin")
    refusal(load_pretrained, place)


def missing(tensors):
    del tensors["model.layers.1.mlp.up_proj.weight"]
    return "missing model.layers.1.mlp.up_proj.weight"


def unexpected(tensors):
    tensors["model.layers.1.mlp.experts.weight"] = torch.ones(2)
    return "unexpected model.layers.1.mlp.experts.weight"


def a_bias_the_config_denies(tensors):
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(32)
    return "unexpected model.layers.0.self_attn.q_proj.bias"


def misshapen(tensors):
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].T.contiguous()
    return f"{name} has the shape (32, 48)"


def flattened(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:, None].contiguous()
    return "model.norm.weight has the shape (32, 1)"


def integers(tensors):
    tensors["model.norm.weight"] = torch.ones(32, dtype=torch.int8)
    return "model.norm.weight"


def eight_bits(tensors):
    tensors["model.norm.weight"] = torch.ones(32).to(torch.float8_e4m3fn)
    return "model.norm.weight"


def sparse(tensors):
    tensors["model.norm.weight"] = torch.ones(32).to_sparse()
    return "model.norm.weight"


def twice(tensors):
    tensors["norm.weight"] = tensors["model.norm.weight"].clone()
    return "twice"


def a_layer_too_many(tensors):
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.ones(48, 32)
    return "2 layers"


def no_head(tensors):
    del tensors["lm_head.weight"]
    return "missing lm_head.weight"


@pytest.mark.parametrize("change", [
    missing, unexpected, a_bias_the_config_denies, misshapen, flattened, integers, eight_bits,
    sparse, twice, a_layer_too_many, no_head])
@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
def test_tensors_that_do_not_fit_are_refused(change, pickled, folder):
    place = folder("llama")
    tensors = tensors_of(place)
    words = change(tensors)
    if pickled:
        (place / "model.safetensors").unlink()
        torch.save(tensors, place / "pytorch_model.bin")
    elif change is sparse:
        return                                              # safetensors has no such tensors
    else:
        write(place, tensors)
    message = refusal(load_pretrained, place)
    assert words in message and str(place) in message


def test_a_gpt2_weight_that_is_not_transposed_is_refused(folder):
    place = folder("gpt2")
    tensors = tensors_of(place)
    name = "transformer.h.0.attn.c_attn.weight"
    write(place, tensors | {name: tensors[name].T.contiguous()})
    assert name in refusal(load_pretrained, place)


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..",
                                   ".", "", 3, None, "absent.safetensors", "a\0b"])
def test_an_index_that_points_elsewhere_is_refused(shard, folder):
    place = folder("llama")
    (place / "model.safetensors").rename(place.parent / "model.safetensors")    # reachable by ../
    index = {"weight_map": {"model.norm.weight": shard}}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))
    message = refusal(load_pretrained, place)
    assert str(place) in message


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": ["model.safetensors"]}])
def test_an_index_without_a_map_is_refused(index, folder):
    place = folder("llama")
    (place / "model.safetensors").rename(place / "shard.safetensors")
    (place / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "weight_map" in refusal(load_pretrained, place)


def test_an_index_that_promises_too_much_is_refused(folder):
    place = folder("llama")
    names = list(tensors_of(place)) + ["model.layers.1.lost.weight"]
    (place / "model.safetensors").rename(place / "shard.safetensors")
    index = {"weight_map": {name: "shard.safetensors" for name in names}}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model.layers.1.lost.weight" in refusal(load_pretrained, place)


def test_a_wrong_dtype_argument_is_refused():
    assert "dtype" in refusal(load_pretrained, checkpoint("llama")[1], dtype=torch.int8)
    assert "dtype" in refusal(load_pretrained, checkpoint("llama")[1], dtype="bf16")
