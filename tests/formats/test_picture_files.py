"""The files of a picture model: what comes back, and what is refused in one line."""
import json
import shutil

import pytest
import torch
from conftest import BASE

from diffusion import PictureConfig, PictureModel
from formats.checkpoint import load_pretrained, save_pretrained
from formats.peft import export_peft, import_peft
from formats.pictures import Words, load_words, save_words
from methods import adapters, inject
from support.errors import UserError

TINY = PictureConfig(n_words=4, caption=3, side=8, patch=4, d_model=8, n_layers=2, n_heads=2,
                     d_ff=12, smooth=2)


def tiny():
    model = PictureModel(TINY)
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.dim() == 1), std=0.4)
    return model


@pytest.fixture
def saved(tmp_path):
    save_pretrained(tiny(), tmp_path / "model")
    save_words(Words(["cat", "red", "snow"]), tmp_path / "model" / "words.txt")
    return tmp_path / "model"


def inputs():
    return torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([[1, 2, 0], [3, 0, 0]])


def test_a_saved_model_comes_back(saved):
    model, words = load_pretrained(saved)
    z = inputs()
    torch.manual_seed(0)
    assert torch.equal(model(*z), tiny_again()(*z)) and model.config == TINY
    assert words.words == ["cat", "red", "snow"]
    assert words.batch(["red cat in the snow", ""], 4).tolist() == [[2, 1, 3, 0], [0] * 4]


def tiny_again():
    torch.manual_seed(0)                    # as the fixture's a_seed() does
    return tiny()


@pytest.mark.parametrize("change, told", [
    (dict(n_heads=3), "n_heads 3 does not divide d_model 8"),
    (dict(patch=3), "patch 3 does not divide side 8"),
    (dict(d_model=9, n_heads=3), "d_model 9: must be even"),
    (dict(d_ff="12"), "d_ff must be a whole number"),
    (dict(n_layers=3), "config.json says 3 layers, the tensors are of 2"),
    (dict(caption=5), "places.weight has the shape"),
    (dict(n_words=9), "words.txt has 3 words, config.json asks for 8"),
    (dict(model_type="sdxl"), "model_type must be one of")])
def test_a_config_that_does_not_fit_is_refused_by_name(saved, change, told):
    path = saved / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=told):
        load_pretrained(saved)


def test_a_model_and_a_tokenizer_of_two_kinds_are_refused(saved, tmp_path):
    shutil.copy(BASE / "base.tiktoken", saved)
    (saved / "words.txt").rename(tmp_path / "words.txt")
    with pytest.raises(UserError, match="words.txt belongs to a model that draws"):
        load_pretrained(saved)
    shutil.copytree(BASE, tmp_path / "text")
    (tmp_path / "text" / "base.tiktoken").unlink()
    shutil.copy(tmp_path / "words.txt", tmp_path / "text")
    with pytest.raises(UserError, match="words.txt belongs to a model that draws"):
        load_pretrained(tmp_path / "text")


def test_words_are_each_there_once(tmp_path):
    path = tmp_path / "words.txt"
    for content, told in ((b"cat\ncat\n", "each once"), (b"", "must hold words"),
                          (b"\xff", "not UTF-8")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"words.txt: .*{told}"):
            load_words(path)


def test_a_caption_that_the_model_cannot_read_is_refused():
    words = Words(["cat", "red"])
    with pytest.raises(UserError, match="'red cot': the model knows no word 'cot'; did you mean c"):
        words.encode("red cot")
    with pytest.raises(UserError, match="'red red cat': has 3 words .* reads 2"):
        words.batch(["red red cat"], 2)
    assert words.encode("The RED cat") == [2, 1]


@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "dash", "loha", "hira"])
def test_peft_reads_and_writes_the_adapters_of_a_picture_model(method, tmp_path, saved):
    from peft import PeftModel
    model = inject(tiny_again(), method, ["q", "up"], rank=2, alpha=6)
    for layer in adapters(model).values():
        for p in layer.parameters():
            if p.requires_grad:
                torch.nn.init.normal_(p)
    export_peft(model, tmp_path / "peft")
    z = inputs()
    theirs = PeftModel.from_pretrained(tiny_again(), str(tmp_path / "peft")).eval()
    assert torch.allclose(theirs(*z), model.eval()(*z), atol=1e-4)
    ours = import_peft(load_pretrained(saved)[0], tmp_path / "peft").eval()
    assert torch.allclose(ours(*z), model(*z), atol=1e-4)
