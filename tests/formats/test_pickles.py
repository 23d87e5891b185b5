"""Pickled files hold tensors, or are refused without running them and without advice to."""
import os
import shutil

import pytest
import torch
from checkpoints import refusal
from conftest import BASE
from torch import nn

from formats.checkpoint import load_pretrained
from formats.peft import export_peft, import_peft
from methods import inject
from support.errors import UserError
from support.files import load_pickle
from support.run import CHECKPOINT, Run


class Evil:
    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.fixture(params=[True, False], ids=["zip", "before torch 1.6"])
def write_evil(request, empty_folder):
    def write(path, content):
        torch.save({"model.embed_tokens.weight": content}, path,
                   _use_new_zipfile_serialization=request.param)
    return write


def assert_refused(message: str, name: str) -> None:
    assert "would run code" in message and message.endswith(name)
    assert "weights_only" not in message and not os.path.exists("ran")


@pytest.mark.parametrize("content, name", [(Evil(), "system"),
                                           (nn.Linear(2, 2), "torch.nn.modules.linear.Linear")])
def test_a_checkpoint_that_would_run_code_is_refused(content, name, write_evil, folder):
    place = folder("llama")
    (place / "model.safetensors").unlink()
    write_evil(place / "pytorch_model.bin", content)
    message = refusal(load_pretrained, place)
    assert message.startswith(str(place / "pytorch_model.bin"))
    assert_refused(message, name)


def test_adapters_of_peft_that_would_run_code_are_refused(write_evil, tmp_path):
    model = inject(load_pretrained(BASE)[0], "lora", ["q"])
    export_peft(model, tmp_path / "peft")
    (tmp_path / "peft" / "adapter_model.safetensors").unlink()
    write_evil(tmp_path / "peft" / "adapter_model.bin", Evil())
    assert_refused(refusal(import_peft, load_pretrained(BASE)[0], tmp_path / "peft"), "system")


def test_a_run_s_checkpoint_that_would_run_code_is_refused(empty_folder, tmp_path):
    torch.save({"model": Evil()}, CHECKPOINT)
    run = Run()
    run.folder = tmp_path
    shutil.copy(BASE / "config.json", tmp_path)
    with pytest.raises(UserError) as caught:
        run.restore(nn.Linear(1, 1), None)
    assert "cannot resume" in str(caught.value)
    assert_refused(str(caught.value), "system")


@pytest.mark.parametrize("content", [b"", b"\x80\x02}.", b"\x80\x02junk", b"\x80\x02cos\nsystem\n",
                                     b"\x80\x02K\x01K\x02\x86Q."])
def test_a_broken_pickle_is_refused_without_advice(content, tmp_path):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(Exception) as caught:
        load_pickle(tmp_path / "file")
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("content", [
    {"model.norm.weight": torch.ones(64, device="meta")}, [torch.ones(2)], {"a": 1},
    {"state_dict": {}}, {1: torch.ones(2)}, {}, torch.ones(2)])
def test_a_pickle_of_something_else_is_refused(content, folder):
    place = folder("llama")
    (place / "model.safetensors").unlink()
    torch.save(content, place / "pytorch_model.bin")
    refusal(load_pretrained, place)
