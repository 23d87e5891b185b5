import functools
import json
import os
from pathlib import Path

import pytest
import torch
from runs import ITEMS, SHORT

import train
from data.text import Text
from formats.checkpoint import load_pretrained

ROOT = Path(__file__).parents[1]
NEEDED = "needs public files"
BASE = ROOT / "data" / "base"
# The folder of public files; LORA_TEST_DATA names another one.
SHARED = Path(os.environ.get("LORA_TEST_DATA", ROOT.parent / "shared" / "data"))


def needs(place: Path):
    """Makes a mark that skips a test if a public file or folder is not there."""
    return pytest.mark.skipif(not place.exists(), reason=NEEDED)


def pytest_terminal_summary(terminalreporter):
    lacking = sum(NEEDED in str(report.longrepr) for report in
                  terminalreporter.stats.get("skipped", []))
    if lacking:
        terminalreporter.write_line(f"{lacking} tests were skipped for want of public files in "
                                    f"{SHARED} (LORA_TEST_DATA)")


@pytest.fixture(scope="session")
def base():
    """Returns data/base and its tokenizer, read once; a test that changes one loads its own."""
    return load_pretrained(BASE)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Computes on one thread, in the whole session, since fixtures train too.

    More threads are slower on small matrices, and sum in an order that depends on the machine.
    """
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def a_seed():
    """Gives each test the same random numbers in every session."""
    torch.manual_seed(0)


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    """Runs the test in a folder of its own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def items(empty_folder):
    """Writes a file of examples; returns the flags of a run on it."""
    Path("items.jsonl").write_text("\n".join(map(json.dumps, ITEMS)))
    return ["--task", "jsonl", "--data", "items.jsonl", "--out", "run"]


@pytest.fixture
def scored(monkeypatch):
    """Lists the splits of jsonl that score() is called with, in order."""
    asked, real = [], Text.score

    def score(task, model, examples):
        asked.append("valid" if examples == task.valid else "test")
        return real(task, model, examples)
    monkeypatch.setattr(Text, "score", score)
    return asked


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """Returns method -> the folder of its run with SHORT, made once; no test may write there."""
    @functools.cache
    def folder_of(method: str) -> Path:
        folder = tmp_path_factory.mktemp("plain") / "run"
        train.main(["--method", method, "--out", str(folder), *SHORT])
        return folder
    return folder_of


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory):
    """Returns a tiny random folder in the form of SDXL; no test may write there."""
    pytest.importorskip("diffusers")
    from tiny_sdxl import make_sdxl  # imports diffusers, which few tests need
    return make_sdxl(tmp_path_factory.mktemp("sdxl") / "model")


@pytest.fixture
def folder(tmp_path):
    """folder(family, **config) copies a small checkpoint to a place where it can be changed."""
    from checkpoints import copy_of  # imports transformers, which few tests need
    return lambda family, **config: copy_of(family, tmp_path, **config)
