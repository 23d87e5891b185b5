"""The tokens that end a text: all that the files name, when loaded and when merged."""
import json
import shutil

import pytest
import torch
from checkpoints import edit
from conftest import BASE
from reference import checkpoint
from transformers import AutoModelForCausalLM

import convert
from formats.checkpoint import load_pretrained
from formats.peft import export_peft
from methods import inject

BOS, EOS = 2720, 2721                           # data/base's, by which its tokenizer knows them


def model_with(folder, config, generation, tokenizer):
    """Copies data/base with other ends: ... leaves a key out, and a whole file if it has one."""
    shutil.copytree(BASE, folder)
    edit(folder / "config.json", eos_token_id=config)
    if generation is not ...:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    if tokenizer is not ...:
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": tokenizer}))
    return folder


@pytest.mark.parametrize("config, generation, tokenizer, ends, trained", [
    (EOS, ..., "<|eos|>", [EOS], EOS),
    (EOS, ..., "<|bos|>", [EOS, BOS], BOS),                 # as Qwen3's base models
    (None, ..., "<|bos|>", [BOS], BOS),
    ([EOS, 8], {"eos_token_id": [8, 9]}, "<|bos|>", [EOS, 8, 9, BOS], BOS),
    ([7, 8], {"eos_token_id": [8, 9]}, None, [7, 8, 9], 7),     # a tokenizer without an end
    (None, {"eos_token_id": 9}, None, [9], 9),
    (None, {}, None, [], None),
])
def test_all_ends_are_ends_and_one_of_them_is_trained(config, generation, tokenizer, ends, trained,
                                                      tmp_path):
    model, read = load_pretrained(model_with(tmp_path / "model", config, generation, tokenizer))
    assert (model.config.eos, read.eos) == (ends, trained)


def test_an_end_that_the_model_lacks_is_none(tmp_path):
    place = model_with(tmp_path / "model", EOS, ..., "<|far|>")
    edit(place / "tokenizer_config.json", added_tokens_decoder={"9999": {"content": "<|far|>"}})
    model, tokenizer = load_pretrained(place)
    assert (model.config.eos, tokenizer.eos) == ([EOS], 9999)


def merged(place, tmp_path):
    """Merges an adapter that changes nothing into the model at `place`, by convert.py."""
    export_peft(inject(load_pretrained(place)[0], "lora", ["q"]), tmp_path / "peft")
    convert.main([str(flag) for flag in ("--from-peft", tmp_path / "peft", "--model", place,
                                         "--to", tmp_path / "out")])
    return tmp_path / "out"


def ends_in(path):
    return json.loads(path.read_text())["eos_token_id"]


@pytest.mark.parametrize("generation, tokenizer, ends", [
    ({"eos_token_id": [EOS, 9], "top_p": 0.8}, "<|bos|>", [EOS, 9, BOS]),
    ({"top_p": 0.8}, "<|bos|>", [EOS, BOS]),
    (..., "<|bos|>", [EOS, BOS]),
    ({"eos_token_id": [EOS]}, "<|eos|>", EOS),
])
def test_a_merged_folder_lists_all_ends(generation, tokenizer, ends, tmp_path):
    out = merged(model_with(tmp_path / "model", EOS, generation, tokenizer), tmp_path)
    assert ends_in(out / "config.json") == ends
    assert (out / "generation_config.json").exists() == (generation is not ...)
    if generation is not ...:
        text = json.loads((out / "generation_config.json").read_text())
        assert text == generation | {"eos_token_id": ends}
    theirs = AutoModelForCausalLM.from_pretrained(out)
    assert theirs.generation_config.eos_token_id == ends
    ours, read = load_pretrained(out)
    assert ours.config.eos == (ends if isinstance(ends, list) else [ends])
    assert read.eos == (BOS if tokenizer == "<|bos|>" else EOS)


def test_transformers_stops_at_each_end_of_a_merged_folder(folder, tmp_path):
    theirs, start = checkpoint("llama")[0], torch.tensor([[5, 7]])

    def written(model):
        return model.generate(start, max_new_tokens=20, do_sample=False)[0, 2:].tolist()
    theirs.generation_config.eos_token_id, kept = None, theirs.generation_config.eos_token_id
    free = written(theirs)
    theirs.generation_config.eos_token_id = kept
    first, later = free[2], next(token for token in free[3:] if token not in free[:3])
    for config, generation in ((first, later), (later, first)):     # each alone would not be first
        place = folder("llama", eos_token_id=config)
        edit(place / "generation_config.json", eos_token_id=generation)
        out = merged(place, tmp_path)
        expected = free[:free.index(first) + 1]
        assert written(AutoModelForCausalLM.from_pretrained(out)) == expected
        (out / "generation_config.json").unlink()
        assert written(AutoModelForCausalLM.from_pretrained(out)) == expected
        shutil.rmtree(out), shutil.rmtree(tmp_path / "peft")
