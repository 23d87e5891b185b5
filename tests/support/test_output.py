"""Checks that a run whose output cannot be printed still saves its results."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ablate
import train
from support.errors import Output

SHORT = ["--steps", "2", "--batch-size", "8", "--max-eval", "3", "--skip-before"]
FULL = Path("/dev/full")


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(script: str, flags: list[str], **options) -> int:
    """Runs a command; returns its exit status.

    Its standard output is a closed pipe, unless the options name another.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | options.pop("environment", {})
    process = subprocess.Popen([sys.executable, script, *flags], env=environment,
                               **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options)
    for stream in filter(None, (process.stdout, process.stderr)):
        stream.close()
    return process.wait()


@pytest.mark.slow
def test_a_closed_pipe_stops_neither_a_run_nor_a_sweep():
    assert run(train.__file__, ["--method", "lora", "--out", "run", *SHORT]) == 0
    assert json.loads(Path("run/result.json").read_text())["before"] is None
    assert run(ablate.__file__, ["--methods", "lora", "--lrs", "x1", *SHORT]) == 0
    assert Path("runs/sweep/table.md").exists() and Path("runs/sweep/score.png").exists()


@pytest.mark.slow
def test_streams_that_are_closed_from_the_start_stop_no_run():
    command = f"{sys.executable} {train.__file__} --method lora --out run {' '.join(SHORT)}"
    assert subprocess.run(["sh", "-c", f"{command} >&- 2>&-"]).returncode == 0
    assert Path("run/result.json").exists()


@pytest.mark.slow
@pytest.mark.skipif(not FULL.exists(), reason="Linux has it")
def test_a_full_terminal_and_an_odd_alphabet_stop_no_sweep():
    flags = ["--methods", "lora", "--lrs", "x1", *SHORT]
    with open(FULL, "w") as full:
        assert run(ablate.__file__, [*flags, "--out", "a"], stdout=full, stderr=full) == 0
    ascii_only = {"PYTHONIOENCODING": "ascii:strict", "LC_ALL": "C"}
    assert run(ablate.__file__, [*flags, "--out", "b"], environment=ascii_only,
               stdout=subprocess.DEVNULL) == 0
    assert all("±" in Path(out, "table.md").read_text(encoding="utf-8") for out in "ab")


def test_what_an_alphabet_lacks_is_replaced():
    with open("out", "w", encoding="ascii") as stream:
        print("a ± b \udc80", file=Output(stream))
    assert Path("out").read_text() == "a ? b ?\n"


@pytest.mark.skipif(not FULL.exists(), reason="Linux has it")
def test_a_stream_that_fails_is_silent_from_then_on():
    with open(FULL, "w") as stream:
        output = Output(stream)
        for _ in range(3):
            print("a line", file=output, flush=True)
