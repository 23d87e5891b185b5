"""The grid of a sweep, the choices it makes, and commands that can be given again."""
import csv
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
from argparse import Namespace
from pathlib import Path

import pytest
from conftest import SHARED, needs
from runs import refused, result_of
from torch import nn

import ablate
import train
from data import TASKS
from experiments import analyze, results, sweep, table
from methods import inject
from support import flags as flags_of_train
from support.run import locked

SHORT = ["--steps", "4", "--batch-size", "8", "--max-eval", "3"]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def listed(capsys, *flags: str) -> list[list[str]]:
    ablate.main([*flags, "--list"])
    return [shlex.split(line)[2:] for line in capsys.readouterr().out.splitlines()]


def value_of(line: list[str], name: str) -> str:
    return line[line.index(name) + 1]


# ---- the grid
def test_the_grid_is_every_combination_once(capsys):
    lines = listed(capsys, "--methods", "lora,full", "--ranks", "2,8", "--lrs", "1e-3,1e-2",
                   "--seeds", "0,1", "--task", "mini", *SHORT)
    assert len(lines) == 2 * 2 * 2 + 2 * 2                      # full has no rank
    assert lines[0] == ["--method", "lora", "--rank", "2", "--task", "mini", *SHORT, "--lr", "0.001",
                        "--seed", "0", "--out", "runs/sweep/mini-lora-r2-lr0.001-s0", "--resume"]
    assert len({value_of(line, "--out") for line in lines}) == len(lines)


def test_a_recipe_brings_its_rank(capsys):
    flags = ["--methods", "adalora", "--lrs", "1e-3", "--task", "glue/rte", "--data-dir", "."]
    for more, rank in ([], "8"), (["--recipe", "adalora"], "2"), (
            ["--recipe", "adalora", "--ranks", "4"], "4"):
        assert [value_of(line, "--rank") for line in listed(capsys, *flags, *more)] == [rank]


def test_on_another_model_they_are_around_the_rate_for_large_models(capsys):
    lines = listed(capsys, "--methods", "lora", "--model", "some/where", *SHORT)
    assert [value_of(line, "--lr") for line in lines] == ["0.0001", "0.0002", "0.0004"]
    lines = listed(capsys, "--methods", "lora", "--lrs", "x1", "--vary", "model=x/z,x/y", *SHORT)
    assert [value_of(line, "--lr") for line in lines] == ["0.0002"] * 2


def test_learning_rates_are_around_each_method_s_own(capsys):
    lines = listed(capsys, "--methods", "lora,full", *SHORT)
    assert [value_of(line, "--lr") for line in lines] == ["0.00525", "0.0105", "0.021",
                                                          "0.0005", "0.001", "0.002"]
    assert len(listed(capsys, "--methods", "lora", "--ranks", "4,04", "--lrs", "x1,0.0105,.0105",
                      "--seeds", "0,00", *SHORT)) == 1          # one number, however it is written


def test_any_flag_can_be_varied_where_the_method_uses_it(capsys):
    lines = listed(capsys, "--methods", "dual,lora,full", "--lrs", "x1", "--vary",
                   "init-std=0.03,0.06", "--vary", "alpha=8,16", "--vary", "clip=yes,no", *SHORT)
    assert len(lines) == 8 + 2 + 1
    for part, times in (("--init-std=0.03", 4), ("--alpha=8", 4 + 1), ("--clip", 4),
                        ("--no-clip", 4)):
        assert sum(part in line for line in lines) == times


def test_a_sweep_goes_over_methods_with_and_without_dora(capsys):
    lines = listed(capsys, "--methods", "lora,dora,loha,full", "--lrs", "x1", "--vary",
                   "dora=no,yes", *SHORT)
    told = [(value_of(line, "--method"), "--dora" in line) for line in lines]
    assert told == [("lora", False), ("lora", True), ("dora", False), ("loha", False),
                    ("loha", True), ("full", False)]
    rates = [value_of(line, "--lr") for line in lines]
    assert rates[0] != rates[1] == rates[2]             # lora with dora takes dora's own rate
    assert len({value_of(line, "--out") for line in lines}) == len(lines)


def test_one_at_a_time_leaves_all_else_at_its_default(capsys):
    lines = listed(capsys, "--methods", "dual", "--lrs", "x1", "--one-at-a-time", "--vary",
                   "init-std=0.03,0.12", "--vary", "clip=no", *SHORT)
    changes = [[part for part in line if part[:4] in ("--in", "--no")] for line in lines]
    assert changes == [[], ["--init-std=0.03"], ["--init-std=0.12"], ["--no-clip"]]


# ---- commands that can be given again
def test_a_command_can_be_given_again(capsys, monkeypatch):
    line, = listed(capsys, "--methods", "dual", "--lrs", "x1", "--out", "sweep", *SHORT)
    with monkeypatch.context() as patch:
        patch.setattr(train, "report", lambda *_: exit("killed"))
        with pytest.raises(SystemExit):
            train.main(line)
    train.main(line)
    run = Path(value_of(line, "--out"))
    before = {path: path.stat().st_mtime_ns for path in run.iterdir()}
    assert result_of(run)["method"] == "dual"
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main(line)
    assert stop.value.code == 0 and "finished already" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in run.iterdir()}


def test_a_finished_run_of_other_flags_is_not_taken_for_this_one(capsys):
    line, = listed(capsys, "--methods", "lora", "--lrs", "x1", *SHORT)
    train.main(line)
    line[line.index("4")] = "5"
    with pytest.raises(SystemExit) as stop:
        train.main(line)
    assert stop.value.code == 2 and "--steps 5: the run has 4" in capsys.readouterr().err
    assert "--steps 5: the run has 4" in refused(capsys, "--methods", "lora", "--lrs", "x1",
                                                 "--steps", "5", *SHORT[2:], main=ablate.main)


def test_a_folder_of_other_things_is_not_begun_in(capsys):
    line, = listed(capsys, "--methods", "lora", "--lrs", "x1", *SHORT)
    folder = Path(value_of(line, "--out"))
    folder.mkdir(parents=True)
    (folder / ".config.json.1.tmp").write_text("{")         # killed before its first file stood
    (folder / "log.jsonl").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        train.main(line)
    assert stop.value.code == 2 and "not a run folder" in capsys.readouterr().err
    (folder / "log.jsonl").unlink()
    train.main(line)
    assert result_of(folder)


@pytest.mark.slow
def test_a_real_sweep_runs_compares_and_then_finds_everything_done(capsys):
    command = ["--methods", "lora", "--lrs", "x0.5,x1", "--jobs", "2", *SHORT]
    ablate.main(command)
    first = capsys.readouterr().out
    assert first.count("| lora | 8 | 0.0") == 1 and "mean ± standard deviation" in first
    for name in ("table.md", "results.csv", "score.png", "rates.png", "loss.png",
                 "logs/facts-lora-r8-lr0.0105-s0.txt"):
        assert Path("runs/sweep", name).is_file()
    runs = {path: path.stat().st_mtime_ns for path in Path("runs/sweep").glob("*/result.json")}
    ablate.main(command)
    assert capsys.readouterr().out == first and len(runs) == 2
    assert runs == {path: path.stat().st_mtime_ns for path in runs}


@pytest.mark.slow
@pytest.mark.parametrize("task, folder", [("commonsense", "commonsense"), ("glue/rte", "glue/RTE")])
@needs(SHARED)
def test_a_sweep_whose_validation_covers_other_sets_than_its_test_is_compared(task, folder, capsys):
    ablate.main(["--methods", "lora", "--lrs", "x1", "--task", task, "--data-dir",
                 str(SHARED / folder), "--skip-before", *SHORT])
    assert len(table_of(capsys.readouterr().out)) == 1
    analyze.main(["runs/sweep", "--figures", "score"])


@pytest.mark.slow
@pytest.mark.parametrize("task", [*(name for name in TASKS if "/" not in name and
                                    name not in ("facts", "commonsense", "e2e", "dreambooth"))])
def test_a_sweep_of_every_task_that_needs_no_public_files_is_compared_and_drawn(task, capsys):
    flags = ["--task", task, "--skip-before", *SHORT]
    if task in ("text", "jsonl"):
        rows = [f"The number {i} comes after {i - 1} and before {i + 1}." for i in range(200)]
        Path("mine").write_text("\n".join(
            rows if task == "text" else [json.dumps({"prompt": row, "target": " Yes."})
                                         for row in rows]))
        flags += ["--data", "mine"]
    ablate.main(["--methods", "lora", "--lrs", "x0.5,x1", *flags])
    row, = table_of(capsys.readouterr().out)
    assert {"score.png", "rates.png", "loss.png", "table.md", "results.csv"} <= set(
        os.listdir("runs/sweep"))
    metric = next(iter(row.keys() - {"method", "rank", "lr", "seeds", "trainable", "s a run"}))
    assert math.isfinite(float(row[metric].split()[0]))
    analyze.main(["runs/sweep"])                            # what these runs allow
    assert {"score.png", "rates.png", "loss.png"} <= set(os.listdir("runs/sweep/figures"))


# ---- what it makes of results, given by the test
def finish(flags: list[str], valid: float, test: float) -> None:
    """Writes what train.py leaves of a finished run."""
    args = flags_of_train.parse_flags(flags)
    model = inject(nn.ModuleDict({"q": nn.Linear(32, 32)}), args.method, ["q"], args.rank)
    task = Namespace(defaults={"steps": 4, "batch_size": 8}, train=[None] * 24, loss_on="answer",
                     setup=Namespace(max_length=256))
    args.command = "python train.py"
    args = flags_of_train.resolve(args, model, task)
    folder = Path(args.out)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"args": vars(args), "before": None}))
    (folder / "log.jsonl").write_text('{"step": 0, "loss": 1.0}\n')
    (folder / "adapter.safetensors").write_text("")
    (folder / "result.json").write_text(json.dumps({
        "before": {"new": 0.0, "paraphrase": 0.0, "kept": 1.0},
        "valid": {"loss": 1.0, "new": valid, "paraphrase": 0.4, "kept": 0.5},
        "after": {"new": test, "paraphrase": 0.4, "kept": 0.5},
        "counts": {"new": 10}, "trainable": 55296, "base": "", "seconds": 30.0,
        "peak_memory_mb": 400.0, "versions": {"torch": "2", "threads": 1}}))


class Process:
    """Stands in for a child process that trains: ends with `status` after writing its result."""
    score = staticmethod(lambda args: (0.5, 0.5))
    ran: list[Namespace] = []

    def __init__(self, command, stdout, **_):
        self.args = flags_of_train.parse_flags(command[2:])
        Process.ran.append(self.args)
        try:
            finish(command[2:], *Process.score(self.args))
            self.returncode = 0
        except ZeroDivisionError:
            stdout.write(b"some output\nerror: step 3: loss nan\n")
            self.returncode = 1

    def poll(self):
        return self.returncode


@pytest.fixture
def processes(monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", Process)
    monkeypatch.setattr(sweep, "draw_sweep", lambda *_: [])
    monkeypatch.setattr(Process, "ran", [])
    monkeypatch.setattr(Process, "score", Process.score)    # what a test sets, this one only
    return Process


def table_of(text: str) -> list[dict[str, str]]:
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")]
            for line in text.splitlines() if line.startswith("|")]
    return [dict(zip(rows[0], row)) for row in rows[2:]]


def test_the_learning_rate_is_chosen_on_validation_never_on_the_test(processes, capsys):
    processes.score = lambda args: {0.01: (0.9, 0.1), 0.02: (0.2, 0.8)}[args.lr]
    ablate.main(["--methods", "lora", "--lrs", "0.01,0.02", "--seeds", "0,1,2", *SHORT])
    row, = table_of(capsys.readouterr().out)
    assert row["lr"] == "0.01" and row["seeds"] == "3" and row["new"].startswith("0.100 ± 0.000")
    with open("runs/sweep/results.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    assert {(row["lr"], row["chosen"]) for row in rows} == {("0.01", "1"), ("0.02", "0")}
    assert {row["after new"] for row in rows if row["chosen"] == "1"} == {"0.1"}


def test_a_loss_is_better_when_it_is_lower(processes, capsys, monkeypatch):
    monkeypatch.setattr(table, "LOWER_IS_BETTER", ("new",))
    monkeypatch.setattr(results, "LOWER_IS_BETTER", ("new",))
    processes.score = lambda args: (args.lr, {"lora": 0.9, "dora": 0.2}[args.method]
                                    + 0.01 * args.seed)
    ablate.main(["--methods", "lora,dora", "--lrs", "0.01,0.02", "--seeds", "0,1,2", *SHORT])
    lora, dora = table_of(capsys.readouterr().out)
    assert (lora["lr"], dora["lr"]) == ("0.01", "0.01")
    assert dora["new"].startswith("**") and not lora["new"].startswith("**")


def test_a_metric_that_the_task_has_not_ends_the_sweep(processes, capsys):
    for lrs in ("x1", "x1", "x1,x2"):               # once nothing, then one run is finished
        with pytest.raises(SystemExit) as stop:
            ablate.main(["--methods", "lora", "--metric", "loss", "--lrs", lrs, *SHORT])
        assert stop.value.code == 2
        assert "--metric loss: the task has no such metric" in capsys.readouterr().err
    assert len(processes.ran) == 1


def test_one_seed_decides_nothing(processes, capsys):
    processes.score = lambda args: (0.5, {"lora": 0.9, "dora": 0.2}[args.method])
    ablate.main(["--methods", "lora,dora", "--lrs", "x1", *SHORT])
    assert [row["new"] for row in table_of(capsys.readouterr().out)] == ["0.900", "0.200"]


def test_other_seeds_run_with_the_chosen_rate_alone(processes, capsys):
    processes.score = lambda args: (args.lr, 0.5)
    flags = ["--methods", "lora,dora", "--lrs", "x0.1,x0.5,x1", "--seeds", "0,1,2",
             "--search-seeds", "1", *SHORT]
    assert len(listed(capsys, *flags)) == 6
    ablate.main(flags)
    assert len(processes.ran) == 2 * (3 + 2)
    assert {(args.seed, args.lr) for args in processes.ran if args.method == "lora"} == {
        (1, 0.00105), (1, 0.00525), (1, 0.0105), (0, 0.0105), (2, 0.0105)}
    out = capsys.readouterr().out
    assert [row["seeds"] for row in table_of(out)] == ["3", "3"]
    assert "the highest or lowest one tried" in out
    assert len(listed(capsys, *flags)) == 10                # the search is over: all are known


def test_ties_are_marked_and_clear_differences_are_not(processes, capsys):
    means = {"lora": 0.70, "dora": 0.71, "dash": 0.40, "full": 0.90}
    processes.score = lambda args: (0.5, means[args.method] + 0.02 * args.seed)
    ablate.main(["--methods", "lora,dora,dash,full", "--lrs", "x1", "--seeds", "0,1,2", *SHORT])
    lora, dora, dash, full = (row["new"] for row in table_of(capsys.readouterr().out))
    assert dora == "**0.730 ± 0.020 [0.680, 0.780]**"
    assert lora == "0.720 ± 0.020 [0.670, 0.770] ~"
    assert dash == "0.420 ± 0.020 [0.370, 0.470]"
    assert full == "0.920 ± 0.020 [0.870, 0.970]"            # alone in its rank: nothing to mark


@pytest.mark.parametrize("lrs", ["0.01,0.02", "0.02,0.01"])
def test_a_run_that_fails_is_told_and_the_others_still_compare(processes, capsys, lrs):
    processes.score = lambda args: (0.5 if args.lr < 0.02 else 1 / 0, 0.5)
    with pytest.raises(SystemExit) as stop:
        ablate.main(["--methods", "lora", "--lrs", lrs, *SHORT])
    assert stop.value.code == 1
    out = capsys.readouterr().out
    assert table_of(out)[0]["lr"] == "0.01"
    assert "no result from facts-lora-r8-lr0.02-s0: error: step 3: loss nan" in out


@pytest.mark.slow
def test_a_run_that_is_refused_before_it_begins_ends_the_sweep(capsys):
    with pytest.raises(SystemExit) as stop:
        ablate.main(["--methods", "lora,dora", "--seeds", "0,1", "--model", "nowhere", "--jobs",
                     "2", *SHORT])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith("error: nowhere: neither a folder")
    assert err.count("nowhere: neither") == 1
    assert "failed" not in err and "Traceback" not in err
    assert [path.name for path in Path("runs/sweep").iterdir()] == ["logs"]


def test_a_refusal_is_the_run_s_own_once_another_has_begun(processes, monkeypatch, capsys):
    class Refused(Process):
        def __init__(self, command, stdout, **_):
            super().__init__(command, stdout)
            if self.args.method == "dora":
                shutil.rmtree(self.args.out)
                stdout.write(b"error: no such thing\n")
                self.returncode = 2

    monkeypatch.setattr(subprocess, "Popen", Refused)
    with pytest.raises(SystemExit) as stop:
        ablate.main(["--methods", "lora,dora,dash", "--lrs", "x1", "--jobs", "3", *SHORT])
    assert stop.value.code == 1
    out = capsys.readouterr().out
    assert [row["method"] for row in table_of(out)] == ["lora", "dash"]
    assert "no result from facts-dora-r8-lr0.015-s0: error: no such thing" in out
    with pytest.raises(SystemExit) as stop:                 # given again, where two are finished
        ablate.main(["--methods", "dora,lora,dash", "--lrs", "x1", *SHORT])
    assert stop.value.code == 1
    with pytest.raises(SystemExit) as stop:
        ablate.main(["--methods", "dora", "--lrs", "x1", "--out", "runs/first", *SHORT])
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: no such thing"


@pytest.mark.slow
def test_a_folder_that_another_process_holds_is_a_failed_run(capsys):
    line, = listed(capsys, "--methods", "lora", "--lrs", "x1", *SHORT)
    folder = Path(value_of(line, "--out"))
    train.main(line)
    (folder / "result.json").unlink()
    lock = locked(folder)
    with pytest.raises(SystemExit) as stop:
        ablate.main(["--methods", "lora", "--lrs", "x1", *SHORT])
    os.close(lock)
    assert stop.value.code == 1
    assert f"{folder.name}: failed: error: --out {folder}: another" in capsys.readouterr().err


def test_a_stopped_run_with_other_flags_is_told_before_anything_runs(processes, capsys):
    ablate.main(["--methods", "lora", "--lrs", "x1", *SHORT])
    Path("runs/sweep/facts-lora-r8-lr0.0105-s0/result.json").unlink()
    with pytest.raises(SystemExit) as stop:
        ablate.main(["--methods", "dora,lora", "--lrs", "x1", *SHORT, "--steps", "5"])
    assert stop.value.code == 2 and len(processes.ran) == 1
    assert "--steps 5: the run has 4" in capsys.readouterr().err


def test_a_damaged_result_is_told_before_anything_runs(processes, capsys):
    flags = ["--methods", "lora", "--lrs", "x0.5,x1", *SHORT]
    ablate.main(flags)
    Path("runs/sweep/facts-lora-r8-lr0.0105-s0/result.json").write_text("{")
    with pytest.raises(SystemExit) as stop:
        ablate.main([*flags, "--seeds", "0,1"])
    assert stop.value.code == 2 and len(processes.ran) == 2
    assert "lr0.0105-s0/result.json: not what a run" in capsys.readouterr().err


@pytest.mark.slow
def test_the_figures_show_the_metric_that_was_asked_for(processes, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "draw_sweep", table.draw_sweep)
    processes.score = lambda args: (0.9, 0.9)
    ablate.main(["--methods", "lora", "--metric", "kept", "--lrs", "x0.5,x1", *SHORT])
    for name, rows in (("score", 1), ("rates", 2)):
        numbers = json.loads(Path(f"runs/sweep/{name}.json").read_text())
        assert [row["scores"] for row in numbers] == [[0.5]] * rows
    assert "kept 0.5000 on validation" in capsys.readouterr().err


def test_a_request_to_stop_reaches_the_runs_and_ends_the_sweep_with_one_line(monkeypatch, capsys):
    asked = []

    class Endless(Process):
        def __init__(self, *_, **__):
            pass

        def poll(self):
            os.kill(os.getpid(), signal.SIGTERM)

        def terminate(self):
            asked.append("to end")

        def wait(self):
            asked.append("to wait")

    monkeypatch.setattr(subprocess, "Popen", Endless)
    with pytest.raises(SystemExit) as stop:
        ablate.main(["--methods", "lora,dora", *SHORT])
    assert stop.value.code == 130 and asked == ["to end", "to wait"]
    assert capsys.readouterr().err.splitlines()[-1] == "stopped; the same sweep goes on"


@pytest.mark.parametrize("flags, said", [
    ([], "--methods"),
    (["--methods", "lora,dosa"], "did you mean"),
    (["--methods", "lora,"], "a value is missing"),
    (["--methods", "lora", "dual"], "dual: lists are comma-separated"),
    (["--methods", "lora", "--lr", "1"], "--lrs"),
    (["--methods", "lora", "--overwrite"], "--overwrite"),
    (["--methods", "lora", "--lrs", "x"], "--lrs x"),
    (["--methods", "lora", "--r1", "1"], "--r1: method lora does not use it"),
    (["--methods", "lora", "--search-seeds", "1"], "--search-seeds 1"),
    (["--methods", "lora", "--ranks", "4,0"], "--rank 0"),
    (["--methods", "lora", "--vary", "alfa=1"], "did you mean alpha"),
    (["--methods", "lora", "--vary", "task=facts,mini"], "no such flag to vary"),
    (["--methods", "lora", "--vary", "alpha=8", "--vary", "alpha=16"], "given twice"),
    (["--methods", "lora", "--seeds", "one"], "--seeds one: not whole numbers"),
    (["--methods", "lora", "--vary", "alpha=8", "--alpha", "16"], "given for all runs"),
    (["--methods", "lora,dora", "--vary", "clip=no"], "no method of --methods uses it"),
])
def test_wrong_flags_end_with_one_line_before_any_run(flags, said, capsys):
    assert said in refused(capsys, *flags, main=ablate.main)
    assert not list(Path().iterdir())
