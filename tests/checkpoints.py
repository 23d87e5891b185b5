"""Copies the small checkpoints for tests to change, and holds checks that these tests share."""
import json
import shutil
from pathlib import Path

import pytest
import torch
from reference import CONFIGS, checkpoint, some_tokens
from safetensors.torch import load_file, save_file

from model import Transformer
from support.errors import UserError

families = pytest.mark.parametrize("family", CONFIGS)


def copy_of(family: str, top: Path, **config) -> Path:
    """Copies a family's checkpoint to a folder under `top`, and changes its config."""
    place = Path(shutil.copytree(checkpoint(family)[1], top / "copy", dirs_exist_ok=True))
    edit(place / "config.json", **config)
    return place


def edit(path: Path, **changes) -> None:
    """Changes a JSON file; the value ... removes its key."""
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not ...}))


def tensors_of(place: Path) -> dict[str, torch.Tensor]:
    return load_file(place / "model.safetensors")


def write(place: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})


def refusal(call, *arguments, **options) -> str:
    """Asserts that a call raises UserError with one short line; returns that line."""
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
