"""The grid of a sweep, and commands that can be given again."""
import shlex
import subprocess
from pathlib import Path

import pytest

import ablate
import train
from runs import refused, result_of

SHORT = ["--steps", "4", "--batch-size", "8", "--max-eval", "3"]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def listed(capsys, *flags: str) -> list[list[str]]:
    ablate.main([*flags, "--list"])
    return [shlex.split(line)[2:] for line in capsys.readouterr().out.splitlines()]


def test_the_grid_is_every_combination_once(capsys):
    lines = listed(capsys, "--methods", "lora,full", "--ranks", "2,8", "--lrs", "1e-3,1e-2",
                   "--seeds", "0,1", "--task", "mini", *SHORT)
    assert len(lines) == 2 * 2 * 2 + 2 * 2                      # full has no rank
    assert lines[0] == ["--method", "lora", "--rank", "2", "--lr", "1e-3", "--seed", "0", "--task",
                        "mini", *SHORT, "--out", "runs/mini-lora-r2-lr1e-3-s0", "--resume"]
    assert len({line[line.index("--out") + 1] for line in lines}) == len(lines)


def test_a_command_can_be_given_again(capsys, monkeypatch):
    line, = listed(capsys, "--methods", "dual", "--out", "sweep", *SHORT)
    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "finish", lambda *_: exit("killed"))
        with pytest.raises(SystemExit):
            train.main(line)
    train.main(line)
    run = Path("sweep/facts-dual-s0")
    before = {path: path.stat().st_mtime_ns for path in run.iterdir()}
    assert result_of(run)["method"] == "dual"
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main(line)
    assert stop.value.code == 0 and "finished already" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in run.iterdir()}


def test_a_finished_run_of_other_flags_is_not_taken_for_this_one(capsys):
    line, = listed(capsys, "--methods", "lora", *SHORT)
    train.main(line)
    line[line.index("4")] = "5"
    with pytest.raises(SystemExit) as stop:
        train.main(line)
    assert stop.value.code == 2 and "--steps 5: the run has 4" in capsys.readouterr().err


def test_a_folder_of_other_things_is_not_begun_in(capsys):
    line, = listed(capsys, "--methods", "lora", *SHORT)
    folder = Path(line[line.index("--out") + 1])
    folder.mkdir(parents=True)
    (folder / ".config.json.1.tmp").write_text("{")         # killed before its first file stood
    (folder / "log.jsonl").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        train.main(line)
    assert stop.value.code == 2 and "not a run folder" in capsys.readouterr().err
    (folder / "log.jsonl").unlink()
    train.main(line)
    assert result_of(folder)


def test_a_sweep_runs_everything_and_reports_what_failed(monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(subprocess, "run", lambda command: (
        ran.append(command), subprocess.CompletedProcess(command, int("dora" in command)))[1])
    with pytest.raises(SystemExit) as stop:
        ablate.main(["--methods", "lora,dora,dual", *SHORT])
    assert stop.value.code == 1 and len(ran) == 3
    failed = [line for line in capsys.readouterr().err.splitlines() if line.startswith("failed: ")]
    assert len(failed) == 1 and "--method dora" in failed[0]


def test_ctrl_c_ends_the_sweep_with_one_line(monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "run", lambda command: subprocess.CompletedProcess(
        command, 130))
    with pytest.raises(SystemExit) as stop:
        ablate.main(["--methods", "lora,dora", *SHORT])
    assert stop.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1] == "stopped; the same sweep goes on"


@pytest.mark.parametrize("flags, said", [
    ([], "--methods"),
    (["--methods", "lora,dosa"], "did you mean"),
    (["--methods", "lora,"], "--methods"),
    (["--methods", "lora", "--lr", "1"], "--lrs"),
    (["--methods", "lora", "--ranks", "2", "--rank=4"], "--ranks"),
    (["--methods", "lora", "--overwrite"], "--overwrite"),
    (["--methods", "lora", "--from-peft", "x"], "--from-peft"),
    (["--methods", "lora", "--lrs", "fast"], "--lr"),
    (["--methods", "lora", "--rnk", "1"], "--rnk"),
    (["--methods", "lora", "--r1", "1"], "--r1: method lora does not use it"),
    (["--methods", "lora", "--seeds", "-1"], "--seed"),
    (["--methods", "lora", "--ranks", "4,0"], "--rank 0"),
    (["--methods", "lora", "--task", "fakts"], "did you mean facts"),
])
def test_wrong_flags_end_with_one_line_before_any_run(flags, said, capsys):
    assert said in refused(capsys, *flags, main=ablate.main)
    assert not list(Path().iterdir())
