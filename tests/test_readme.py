"""Checks what README.md and RESULTS.md say, as far as a test can."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from methods import METHODS
from support.errors import UserError
from support.run import read_config

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def code_under(heading: str, place: int = 0) -> str:
    section = README.split(f"## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.S)[place]


@pytest.mark.parametrize("place, file", [(0, "lora.py"), (1, "train.py")])
def test_what_is_quoted_from_a_file_stands_there_in_this_order(place, file):
    text, at = (ROOT / file).read_text(encoding="utf-8"), 0
    for line in code_under("Read the code in this order", place).splitlines():
        at = text.index(line.split("   #")[0].strip(), at)


@pytest.mark.slow
def test_the_loop_of_one_s_own_trains_every_method(tmp_path):
    code = code_under("Your own model and data").replace("data/base", str(ROOT / "data" / "base"))
    own = "\n".join(code.replace('"dual"', repr(method)).replace("100", "20")
                    + f"assert loss < 2, {method!r}" for method in METHODS)
    done = subprocess.run([sys.executable, "-c", own], cwd=tmp_path, capture_output=True,
                          text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "adapter.safetensors").exists()


@pytest.mark.slow
def test_the_method_added_in_25_lines_trains_saves_and_merges(tmp_path):
    code = code_under("Add your own method in 25 lines")
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) <= 25
    (tmp_path / "vera.py").write_text(code)
    flags = "--method vera --rank 4 --d-init 0.2 --steps 4 --batch-size 8 --max-eval 3 --out run"
    check = ("import torch, vera, methods\n"
             "methods.METHODS['vera'] = methods.Method(vera.VeRALinear, lr=5e-2)\n"
             "from convert import load_pretrained\n"
             "model, _ = load_pretrained('" + str(ROOT / "data" / "base") + "')\n"
             "tokens = torch.arange(20)[None]\n"
             "before = model(tokens)\n"
             "methods.load(model, 'run/adapter.safetensors')\n"
             "after = model(tokens)\n"
             "assert (after - before).abs().max() > 1e-3\n"
             "assert torch.allclose(methods.merge(model)(tokens), after, atol=1e-4)\n")
    for arguments in (["vera.py", *flags.split()], ["-c", check]):
        done = subprocess.run([sys.executable, *arguments], cwd=tmp_path, capture_output=True,
                              text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
        assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["method"] == "vera" and result["trainable"] == 4 * (5 * 4 + 4 * 128 + 352)
    with pytest.raises(UserError, match="method vera: not in methods.METHODS"):  # not here
        read_config(tmp_path / "run")


@pytest.mark.slow
def test_the_method_added_in_25_lines_passes_all_tests_of_methods_as_it_stands(tmp_path):
    for name in ("data", "formats", "support", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in (*ROOT.glob("*.py"), ROOT / "pytest.ini"):
        shutil.copy(file, tmp_path)
    (tmp_path / "vera.py").write_text(code_under("Add your own method in 25 lines"))
    table = (tmp_path / "methods.py").read_text()
    for old, new in (("from support.errors", "from vera import VeRALinear\nfrom support.errors"),
                     ("METHODS = {\n", 'METHODS = {\n    "vera": Method(VeRALinear, 5e-2),\n')):
        assert table.count(old) == 1
        table = table.replace(old, new)
    (tmp_path / "methods.py").write_text(table)
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "tests/methods", "-k", "vera"],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:]


@pytest.mark.parametrize("name", METHODS)
def test_the_table_of_methods_has_each_with_the_length_of_its_file(name):
    row = next((line for line in README.splitlines() if line.startswith(f"| `{name}` |")), None)
    assert row, f"README's table has no row for {name}: python -m experiments.claims write"
    for file, length in re.findall(r"`(\w+\.py)` \((\d+)\)", row):
        assert len((ROOT / file).read_text().splitlines()) == int(length)


def test_every_script_and_picture_that_is_named_exists():
    patterns = (r"python ([\w/]+\.py)", r"`([\w/]+\.py)`", r"(?:\]\(|src=\")(assets/[\w./]+)")
    text = README + (ROOT / "RESULTS.md").read_text(encoding="utf-8")
    named = [name for pattern in patterns for name in re.findall(pattern, text)]
    assert len(named) > 20
    assert set(named) >= {f"assets/{png.name}" for png in (ROOT / "assets").glob("*.png")}
    for name in set(named) - {"vera.py"}:
        assert (ROOT / name).is_file(), name
