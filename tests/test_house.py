"""Checks the rules on which file may import which, and on the length of files."""
import ast
import sys
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT

from data import TASKS
from methods import METHODS

COMMANDS = {"train", "eval", "convert", "ablate"}
METHOD_FILES = sorted({method.layer.__module__ for method in METHODS.values() if method.layer})


def files() -> dict[str, Path]:
    """Returns module -> file, without the tests."""
    found = [*ROOT.glob("*.py"), *(path for folder in ("data", "support", "formats", "experiments")
                                   for path in (ROOT / folder).rglob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
            for path in found}


@cache
def imports(module: str) -> frozenset[str]:
    """Lists a file's imports anywhere in it: modules of the project, and packages of others."""
    found, known = set(), files()
    for node in ast.walk(ast.parse(known[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in known else node.module)
    return frozenset(name if name in known else name.partition(".")[0] for name in found)


def test_only_ablate_imports_experiments():
    users = {module for module in files() for name in imports(module)
             if name.startswith("experiments.") and not module.startswith("experiments.")}
    assert users == {"ablate"}


@pytest.mark.parametrize("module", METHOD_FILES)
def test_a_method_s_file_imports_torch_lora_and_support_alone(module):
    others = {name for name in imports(module) if name not in sys.stdlib_module_names
              and not name.startswith("support.")}
    assert others <= {"torch", "lora", "tqdm"}


def test_no_command_is_imported():
    assert not {(module, name) for module in files() for name in imports(module) & COMMANDS}


def test_formats_know_neither_a_run_nor_a_task():
    for module in files():
        if module.startswith("formats."):
            assert not {name for name in imports(module)
                        if name.partition(".")[0] == "data" or name == "support.run"}, module


def test_files_import_one_another_in_no_circle():
    done, path = set(), []

    def visit(module: str) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            path.append(module)
            for name in sorted(imports(module) & files().keys()):
                visit(name)
            path.pop()
            done.add(module)
    for module in files():
        visit(module)


def test_the_loop_names_no_method_and_no_task():
    tree = ast.parse((ROOT / "train.py").read_text(encoding="utf-8"))
    words = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    assert not words & (METHODS.keys() | TASKS.keys())


@pytest.mark.parametrize("path", [str(path.relative_to(ROOT)) for path in files().values()])
def test_no_file_is_long(path):
    assert len((ROOT / path).read_text(encoding="utf-8").splitlines()) <= 400


def test_scripts_need_no_games_with_the_path():
    assert not [path for path in files().values() if "sys.path" in path.read_text(encoding="utf-8")]
