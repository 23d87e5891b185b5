"""What a run stored, and whether eval.py repeats it."""
import json
from pathlib import Path

import eval as evaluation


def result_of(folder: str) -> dict:
    return json.loads(Path(folder, "result.json").read_text())


def assert_eval_repeats(capsys, *flags: str) -> None:
    """eval.py, run on its own, prints the score that the run in the folder `run` stored."""
    capsys.readouterr()
    evaluation.main(["--run", "run", *flags])
    shown = dict(line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:])
    assert shown == {name: f"{value:.4f}" for name, value in result_of("run")["after"].items()}
