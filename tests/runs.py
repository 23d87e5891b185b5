"""Helps tests make short runs, read their results and check how a wrong command ends."""
import json
from pathlib import Path

import pytest

import eval as evaluation
import train
from data.task import Setup
from methods import METHODS

SHORT = ["--steps", "6", "--batch-size", "8", "--max-eval", "20", "--eval-every", "3"]
# Every method; all but one are marked slow.
ONE_QUICK = [method if method == "dual" else pytest.param(method, marks=pytest.mark.slow)
             for method in METHODS]
ITEMS = [{"prompt": f"Item {i} weighs", "target": f" {i * 7 % 10} stones."} for i in range(30)]


def result_of(folder: str) -> dict:
    return json.loads(Path(folder, "result.json").read_text())


def assert_eval_repeats(capsys, *flags: str) -> None:
    """Asserts that eval.py prints the score that the run in the folder `run` stored."""
    capsys.readouterr()
    evaluation.main(["--run", "run", *flags])
    shown = dict(line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:])
    assert shown == {name: f"{value:.4f}" for name, value in result_of("run")["after"].items()}


def refused(capsys, *flags: str, main=train.main) -> str:
    """Runs a wrong command; returns the one line that it ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(list(flags))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and error.startswith("error: ")
    return error


def setup_of(model=None, tokenizer=None, max_length=256, **more) -> Setup:
    """Makes the Setup of a task; a test that scores nothing needs no model."""
    return Setup(tokenizer, model and model.config, max_length, **more)


def train_until(done: int, flags: list[str]) -> None:
    """Runs train.py and stops it, as Ctrl-C does, after `done` steps."""
    real = train.after_step

    def stop(now, *args):
        real(now, *args)
        if now == done:
            raise KeyboardInterrupt
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "after_step", stop)
        train.main(flags)


def interrupt(monkeypatch, module, name: str, at: int) -> list[tuple]:
    """Ends the at-th call of a function as Ctrl-C does; returns the list of all calls' arguments."""
    real, calls = getattr(module, name), []

    def stops(*args):
        calls.append(args)
        if len(calls) == at:
            raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(module, name, stops)
    return calls
