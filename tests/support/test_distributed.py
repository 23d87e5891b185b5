"""Checks that three processes train the same model as one with three times the micro-batches."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import result_of
from safetensors.torch import load_file

import eval as evaluation
import train
from methods import METHODS
from support import processes

pytestmark = pytest.mark.slow

ROOT = Path(train.__file__).parent
FLAGS = ["--steps", "8", "--batch-size", "27", "--max-eval", "30", "--eval-batch-size", "16",
         "--eval-every", "4", "--save-every", "4", "--seed", "3"]
SUBJECT = ["--method", "dash", "--task", "subject", "--steps", "3", "--batch-size", "6",
           "--max-eval", "6", "--eval-every", "9"]
# Three processes start once for all runs of this file, since a start takes seconds.
DRIVER = f"""
import pathlib, shutil, sys
sys.path.insert(0, {str(ROOT)!r})
import eval, train
from support import processes
for method in {list(METHODS)!r}:
    train.main(["--method", method, "--out", method, *{FLAGS!r}])
train.main(["--method", "lora", "--dropout", "0.2", "--out", "dropout", *{FLAGS!r}])
train.main([*{SUBJECT!r}, "--out", "subject"])
train.main(["--method", "full", "--grad-accum", "2", "--out", "accum", *{FLAGS!r}])

def stop(*_): raise KeyboardInterrupt
checkpoint = train.Run.checkpoint
def kept(run, model, optimizer, step):
    checkpoint(run, model, optimizer, step)
    if step == 4 and processes.is_main():
        shutil.copy(run.folder / "checkpoint.pt", "at4.pt")
train.Run.checkpoint = kept
report, train.report = train.report, stop
try: train.main(["--method", "lora", "--dropout", "0.2", "--out", "stopped", *{FLAGS!r}])
except SystemExit: pass
processes.gathered(0)
if processes.is_main():         # as if killed after step 5, with the checkpoint of step 4
    pathlib.Path("at4.pt").replace("stopped/checkpoint.pt")
processes.gathered(0)
train.report = report
train.main(["--resume", "--out", "stopped"])
eval.main(["--run", "lora", "--predictions", "scored.jsonl"])
"""


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Trains in three processes; returns the folder of their runs."""
    folder = tmp_path_factory.mktemp("three")
    (folder / "driver.py").write_text(DRIVER)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "3",
         "--standalone", "driver.py"], cwd=folder, text=True, capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder / "out").write_text(done.stdout)
    return folder


def differences(a: Path, b: Path) -> torch.Tensor:
    """Returns the absolute differences of all entries of two runs' adapters."""
    a, b = (load_file(folder / "adapter.safetensors") for folder in (a, b))
    assert a.keys() == b.keys()
    return torch.cat([(a[name] - b[name]).abs().flatten() for name in a])


@pytest.mark.parametrize("method", METHODS)
def test_three_processes_equal_one_that_accumulates_three_times(method, three, tmp_path):
    train.main(["--method", method, "--grad-accum", "3", "--out", str(tmp_path / "one"), *FLAGS])
    assert differences(three / method, tmp_path / "one").max() < 1e-6
    both = [result_of(folder) for folder in (three / method, tmp_path / "one")]
    for name in ("before", "after", "counts", "trainable", "total", "cut"):
        assert both[0][name] == both[1][name]
    logs = [[json.loads(line) for line in open(folder / "log.jsonl")]
            for folder in (three / method, tmp_path / "one")]
    for mine, other in zip(*logs, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-6)
        assert mine.get("valid") == pytest.approx(other.get("valid"), abs=1e-6)


def test_pictures_train_and_are_scored_in_three_processes_as_in_one(three, tmp_path):
    train.main([*SUBJECT, "--grad-accum", "3", "--out", str(tmp_path / "one")])
    one, other = (load_file(folder / "adapter.safetensors")
                  for folder in (tmp_path / "one", three / "subject"))
    assert all(torch.allclose(one[name], other[name], rtol=1e-4, atol=1e-5) for name in one)
    ours, theirs = (result_of(folder)["after"] for folder in (tmp_path / "one", three / "subject"))
    assert theirs == pytest.approx(ours, abs=0.01)


def test_micro_batches_of_processes_are_slices_of_one_batch(three, tmp_path):
    # full: Adam makes a step of full size out of a gradient that is nothing but rounding, as some
    # of an adapter's are in its first steps.
    train.main(["--method", "full", "--grad-accum", "6", "--out", str(tmp_path / "one"), *FLAGS])
    # Not 1e-6: (a + b) + (c + d) + (e + f) rounds otherwise than a sum from left to right.
    assert differences(three / "accum", tmp_path / "one").max() < 1e-5
    losses = [[json.loads(line)["loss"] for line in open(folder / "log.jsonl")]
              for folder in (three / "accum", tmp_path / "one")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_each_process_draws_a_dropout_of_its_own(three, tmp_path):
    train.main(["--method", "lora", "--dropout", "0.2", "--grad-accum", "3",
                "--out", str(tmp_path / "one"), *FLAGS])
    assert differences(three / "dropout", tmp_path / "one").max() > 1e-6


def test_a_run_of_several_processes_that_was_stopped_ends_as_if_it_was_not(three):
    for name in ("adapter.safetensors", "log.jsonl"):
        assert (three / "stopped" / name).read_bytes() == (three / "dropout" / name).read_bytes()


def test_a_run_goes_on_with_as_many_processes_as_it_began_with(three, monkeypatch, capsys):
    monkeypatch.chdir(three)
    (three / "stopped" / "result.json").unlink()
    with pytest.raises(SystemExit):
        train.main(["--resume", "--out", "stopped"])
    assert "not what the run began with: processes: 1, then 3" in capsys.readouterr().err


def test_eval_scores_in_three_processes_what_one_scores(three, monkeypatch, capsys):
    monkeypatch.chdir(three)
    evaluation.main(["--run", "lora", "--predictions", "alone.jsonl"])
    assert (three / "scored.jsonl").read_text() == (three / "alone.jsonl").read_text()
    assert (three / "out").read_text().endswith(capsys.readouterr().out)     # printed once


def test_parts_of_a_batch_go_to_processes_in_order(monkeypatch):
    batch, seen = list(range(11)), []
    monkeypatch.setattr(processes, "process_count", lambda: 3)
    for number in range(3):
        monkeypatch.setattr(processes, "process_number", lambda: number)
        seen += processes.own_parts(batch, 2)
    assert len(seen) == 6 and sum(seen, []) == batch
    assert {len(part) for part in seen} == {1, 2}


def test_variables_that_a_scheduler_left_are_not_taken_for_torchruns(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    processes.join_processes("cpu")
    assert processes.process_count() == 1


def test_alone_there_is_nothing_to_exchange():
    assert processes.is_main() and processes.process_count() == 1
    assert processes.gathered("x") == ["x"] and processes.summed([2.0], "cpu") == [2.0]
    assert processes.joined([1, None, 3]) == [1, None, 3]
    parameter = torch.nn.Parameter(torch.ones(2))
    processes.sum_gradients([parameter])
    assert parameter.grad is None
