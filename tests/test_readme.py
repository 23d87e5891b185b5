"""What README.md and RESULTS.md say that a test can hold."""
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from methods import METHODS
from support.errors import UserError
from support.run import read_config

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def code_under(heading: str) -> str:
    section = README.split(f"## {heading}\n")[1].split("\n## ")[0]
    return re.search(r"```python\n(.*?)```", section, re.S).group(1)


@pytest.mark.slow
def test_the_method_added_in_25_lines_trains_saves_and_merges(tmp_path):
    code = code_under("Add your own method in 25 lines")
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) <= 25
    (tmp_path / "vera.py").write_text(code)
    check = ("import sys; sys.path[:0] = sys.argv[1:3]\n"
             "import torch, vera, methods, train\n"
             "from convert import load_pretrained\n"
             "train.main('--method vera --rank 4 --d-init 0.2 --steps 4 --batch-size 8 --max-eval 3"
             " --lr 0.05 --out run'.split())\n"
             "model, _ = load_pretrained('" + str(ROOT / "data" / "base") + "')\n"
             "tokens = torch.arange(20)[None]\n"
             "before = model(tokens)\n"
             "methods.load(model, 'run/adapter.safetensors')\n"
             "after = model(tokens)\n"
             "assert (after - before).abs().max() > 1e-3\n"
             "assert torch.allclose(methods.merge(model)(tokens), after, atol=1e-4)\n")
    done = subprocess.run([sys.executable, "-c", check, str(tmp_path), str(ROOT)], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["method"] == "vera" and result["trainable"] == 4 * (5 * 4 + 4 * 128 + 352)
    with pytest.raises(UserError, match="method vera: not in methods.METHODS"):  # not here
        read_config(tmp_path / "run")


@pytest.mark.parametrize("name", METHODS)
def test_the_table_of_methods_has_each_with_the_length_of_its_file(name):
    row = next(line for line in README.splitlines() if line.startswith(f"| `{name}` |"))
    for file, length in re.findall(r"`(\w+\.py)` \((\d+)\)", row):
        assert len((ROOT / file).read_text().splitlines()) == int(length)


def test_every_script_and_picture_that_is_named_exists():
    patterns = (r"python ([\w/]+\.py)", r"`([\w/]+\.py)`", r"\]\((assets/[\w./]+)\)")
    text = README + (ROOT / "RESULTS.md").read_text(encoding="utf-8")
    named = [name for pattern in patterns for name in re.findall(pattern, text)]
    assert len(named) > 20
    assert set(named) >= {f"assets/{png.name}" for png in (ROOT / "assets").glob("*.png")}
    for name in set(named) - {"vera.py"}:
        assert (ROOT / name).is_file(), name
