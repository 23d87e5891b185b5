"""Checkpoints read and written: equal to transformers, or refused in one line."""
import json
import os
import subprocess
import sys
import time
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from checkpoints import edit, families, refusal, same_logits, same_weights, tensors_of, write
from conftest import ROOT
from reference import checkpoint, some_tokens
from torch import nn
from transformers import AutoModelForCausalLM

from formats import checkpoint as checkpoint_files
from formats.checkpoint import load_pretrained, save_pretrained
from generate import generate
from model import Config, Transformer

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


def test_a_saved_mistral_without_a_window_has_none(folder, tmp_path):
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
    (dict(rope_scaling={"rope_type": "llama3", "factor": 2.0}), "low_freq_factor"),
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


def test_a_tied_head_that_repeats_the_embedding_is_left_out(folder):
    place = folder("llama with a tied head")
    tensors = tensors_of(place)
    write(place, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    ours, _ = load_pretrained(place)
    assert ours.head is None
    same_logits(ours, "llama with a tied head")


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_a_tied_head_may_stand_for_the_embedding(family, folder):
    place, embed = folder(family), {"gpt2": "transformer.wte", "qwen2": "model.embed_tokens"}
    tensors = tensors_of(place)
    tensors["lm_head.weight"] = tensors.pop(f"{embed[family]}.weight")
    write(place, tensors)
    same_logits(load_pretrained(place)[0], family)
    theirs = AutoModelForCausalLM.from_pretrained(place).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(some_tokens()).logits,
                                   checkpoint(family)[0](some_tokens()).logits, atol=1e-5, rtol=0)
    edit(place / "config.json", tie_word_embeddings=False)
    assert f"missing {embed[family]}.weight" in refusal(load_pretrained, place)


def test_a_tied_head_that_differs_is_kept_as_transformers_does(folder):
    place = folder("llama with a tied head")
    write(place, tensors_of(place) | {"lm_head.weight": torch.randn(97, 32)})
    ours, _ = load_pretrained(place)
    theirs = AutoModelForCausalLM.from_pretrained(place).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(some_tokens()), theirs(some_tokens()).logits,
                                   atol=1e-4, rtol=0)
    assert ours.config.tied is False


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
    edit(place / "config.json", torch_dtype="auto")
    assert load_pretrained(place)[0].embed.weight.dtype == torch.float16
    assert load_pretrained(place, dtype=torch.float64)[0].embed.weight.dtype == torch.float64
    assert load_pretrained(place, device="cpu")[0].embed.weight.device.type == "cpu"


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_convert_imports_no_hub_by_itself():
    script = "import sys, convert; print({'huggingface_hub', 'transformers'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True,
                            text=True)
    assert result.stdout.strip() == "set()"


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
