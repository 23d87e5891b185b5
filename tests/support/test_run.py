import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import BASE
from runs import ITEMS, ONE_QUICK, SHORT, assert_eval_repeats, refused, result_of
from safetensors.torch import load_file, save_file

import convert
import eval as evaluation
import train
from data.text import Text
from experiments.results import read_run
from support.errors import UserError
from support.run import Run

pytestmark = pytest.mark.usefixtures("empty_folder")


@pytest.mark.parametrize("method", ONE_QUICK)
def test_a_stopped_run_ends_like_one_that_was_never_stopped(method, monkeypatch):
    flags = ["--method", method, "--save-every", "2", *SHORT]
    flags += [] if method == "full" else ["--dropout", "0.1"]
    train.main([*flags, "--out", "whole"])

    log = train.Run.log
    def stop_at_4(run, line):
        log(run, line)
        if line["step"] == 4:
            raise KeyboardInterrupt
    monkeypatch.setattr(train.Run, "log", stop_at_4)
    with pytest.raises(SystemExit) as stop:
        train.main([*flags, "--out", "stopped", "--overwrite"])     # which resuming must not repeat
    assert stop.value.code == 130
    monkeypatch.setattr(train.Run, "log", log)
    assert not Path("stopped/result.json").exists()
    fits = []
    monkeypatch.setattr(train.Run, "log", lambda run, line: (fits.append(line), log(run, line)))

    train.main(["--resume", "--out", "stopped"])
    assert [line["step"] for line in fits] == [4, 5]        # it went on, it did not start anew
    for name in ("adapter.safetensors", "log.jsonl"):
        assert Path("stopped", name).read_bytes() == Path("whole", name).read_bytes(), name
    assert result_of("stopped")["after"] == result_of("whole")["after"]


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM,
                                                                marks=pytest.mark.slow)])
def test_a_request_to_stop_saves_after_the_step_and_says_how_to_go_on(number, monkeypatch, capsys):
    train.main(["--method", "dual", "--out", "whole", *SHORT])
    log = train.Run.log
    monkeypatch.setattr(train.Run, "log", lambda run, line: (
        log(run, line), line["step"] == 2 and os.kill(os.getpid(), number)))
    with pytest.raises(SystemExit) as stop:
        train.main(["--method", "dual", "--out", "a run", "--save-every", "5", *SHORT])
    assert stop.value.code == 130
    assert "python train.py --resume --out 'a run' goes on" in capsys.readouterr().err
    assert torch.load("a run/checkpoint.pt", weights_only=True)["step"] == 4
    monkeypatch.setattr(train.Run, "log", log)
    train.main(["--resume", "--out", "a run"])
    for name in ("adapter.safetensors", "log.jsonl"):
        assert Path("a run", name).read_bytes() == Path("whole", name).read_bytes()


@pytest.mark.slow
def test_a_killed_process_leaves_a_run_that_goes_on_to_the_same_bytes():
    flags = ["--method", "adalora", "--save-every", "1", *SHORT]
    train.main([*flags, "--out", "whole"])
    process = subprocess.Popen([sys.executable, train.__file__, *flags, "--out", "killed"],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    log = Path("killed/log.jsonl")
    while process.poll() is None and (not log.exists() or log.read_text().count("\n") < 3):
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    train.main(["--resume", "--out", "killed"])
    for name in ("adapter.safetensors", "log.jsonl"):
        assert Path("killed", name).read_bytes() == Path("whole", name).read_bytes()


GONE = object()
STOPPED = ["--method", "lora", "--save-every", "2", *SHORT]


@pytest.fixture(scope="session")
def stopped_once(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stopped_once")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train.main([*STOPPED, "--out", "whole"])
        patch.setattr(train, "report", lambda *_: sys.exit("killed"))
        with pytest.raises(SystemExit):
            train.main([*STOPPED, "--out", "stopped"])
    return folder


@pytest.fixture
def stopped(stopped_once):
    """Copies a run of 6 steps that has no result yet to `stopped`; returns its flags."""
    shutil.copytree(stopped_once, ".", dirs_exist_ok=True)
    return STOPPED


def test_a_damaged_checkpoint_is_refused_and_nothing_is_lost(stopped, capsys):
    path = Path("stopped/checkpoint.pt")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1                         # one bit, which torch does not see
    path.write_bytes(content)
    kept = {path.name: path.read_bytes() for path in Path("stopped").iterdir()}
    assert "checkpoint.pt: cannot resume from it" in refused(capsys, "--resume", "--out", "stopped")
    assert kept == {path.name: path.read_bytes() for path in Path("stopped").iterdir()}


def test_what_a_killed_process_left_half_written_is_cleared_away(stopped):
    Path("stopped/.checkpoint.pt.1.tmp").write_bytes(b"left over")
    train.main(["--resume", "--out", "stopped"])
    assert not list(Path("stopped").glob(".*"))


def test_a_resumed_run_keeps_its_flags(stopped, capsys):
    resume = ["--resume", "--out", "stopped"]
    for flags, said in ((["--steps", "12"], "--steps 12: the run has 6"),
                        (["--method", "dora"], "--method dora: the run has lora"),
                        (["--lr", "1"], "--lr 1.0: the run has 0.0105"),
                        (["--r1", "2"], "--r1"), (["--overwrite"], "--overwrite")):
        assert said in refused(capsys, *resume, *flags)
    assert "--out" in refused(capsys, "--resume", *stopped)
    train.main([*resume, *stopped, "--model", os.path.relpath(BASE)])      # its own: nothing to say
    assert result_of("stopped")["after"] == result_of("whole")["after"]


def test_a_resumed_run_needs_the_model_and_the_data_it_began_with(items, capsys, monkeypatch):
    shutil.copytree(BASE, "model")
    with monkeypatch.context() as patch:
        patch.setattr(train, "report", lambda *_: sys.exit("killed"))
        with pytest.raises(SystemExit):
            train.main(["--method", "lora", *items, "--steps", "2", "--model", "model"])
    Path("items.jsonl").write_text("\n".join(map(json.dumps, ITEMS[::-1])))
    assert "not what the run began with: data" in refused(capsys, "--resume", "--out", "run")
    Path("items.jsonl").write_text("\n".join(map(json.dumps, ITEMS)))
    weights = load_file("model/model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, "model/model.safetensors", {"format": "pt"})
    assert "not what the run began with: base" in refused(capsys, "--resume", "--out", "run")
    assert "not what the run began with: base" in refused(capsys, "--run", "run", main=evaluation.main)
    assert "not what the run began with: base" in refused(capsys, "--run", "run", "--to", "out", main=convert.main)


@pytest.mark.parametrize("name, value", [
    ("model", None), ("dtype", "fp99"), ("task", "nope"), ("method", "nope"), ("lr", "0.015"),
    ("steps", None), ("nonsense", 1), ("save_every", 3), ("dropout", "x"), ("alpha", GONE),
    ("compile", GONE)])
def test_a_config_that_was_edited_is_one_line(name, value, stopped, capsys):
    path = Path("stopped/config.json")
    config = json.loads(path.read_text())
    config["args"][name] = value
    if value is GONE:
        del config["args"][name]
    path.write_text(json.dumps(config))
    refused(capsys, "--resume", "--out", "stopped")


def test_a_checkpoint_or_an_adapter_of_another_run_is_refused(stopped, capsys):
    other = [*stopped, "--seed", "3"]
    train.main([*other, "--out", "other"])
    shutil.copy("other/checkpoint.pt", "stopped/checkpoint.pt")
    assert "another run's" in refused(capsys, "--resume", "--out", "stopped")
    train.main(["--method", "dora", *SHORT, "--out", "dora"])
    shutil.copy("dora/adapter.safetensors", "whole/adapter.safetensors")
    for command in ((["--run", "whole"], evaluation.main),
                    (["--run", "whole", "--to", "merged"], convert.main)):
        error = refused(capsys, *command[0], main=command[1])
        assert "whole/adapter.safetensors" in error and "dora" in error
    assert not Path("merged").exists()


def test_a_finished_run_that_lost_its_adapter_makes_it_again(stopped):
    kept = Path("whole/adapter.safetensors").read_bytes()
    Path("whole/adapter.safetensors").unlink()
    train.main(["--resume", "--out", "whole"])
    assert Path("whole/adapter.safetensors").read_bytes() == kept


@pytest.mark.slow
def test_files_that_grow_too_large_for_the_disk_are_one_line_and_lose_nothing(stopped, capsys):
    """Limits the size of files. torch and safetensors report that in different ways."""
    kept = Path("stopped/checkpoint.pt").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        for out in ("other", "stopped"):
            with pytest.raises(SystemExit) as stop:
                train.main([*stopped, "--out", out, "--resume"])
            last = capsys.readouterr().err.splitlines()[-1]
            assert stop.value.code == 2 and f"error: {out}/" in last and "cannot write: " in last
            assert "File too large" in last
        assert "cannot write" in refused(capsys, "--run", "whole", "--to", "out", main=convert.main)
        assert "cannot write" in refused(capsys, "--run", "whole", "--peft", "p", main=convert.main)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert Path("stopped/checkpoint.pt").read_bytes() == kept


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
def test_a_full_disk_is_said_to_be_full_and_loses_no_earlier_checkpoint(monkeypatch, capsys):
    save = torch.save
    def full(content, file):
        if content["step"] == 4:
            with open("/dev/full", "wb", buffering=0) as file:
                save(content, file)
        save(content, file)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit) as stop:
        train.main(["--method", "lora", "--out", "run", "--save-every", "2", *SHORT])
    assert stop.value.code == 2
    assert "checkpoint.pt: cannot write: No space left on device" in capsys.readouterr().err
    monkeypatch.setattr(torch, "save", save)
    assert torch.load("run/checkpoint.pt", weights_only=True)["step"] == 2
    train.main(["--resume", "--out", "run"])
    assert result_of("run") and not list(Path("run").glob(".*"))


def test_default_folders_never_collide():
    flags = ["--method", "lora", "--rank", "2", *SHORT]
    for name in ("facts-lora-r2-s0", "facts-lora-r2-s0-2"):
        train.main(flags)
        assert result_of(f"runs/{name}")


def test_an_existing_folder_is_kept_and_set_aside_by_overwrite(capsys):
    Path("run").mkdir()
    Path("run/mine.txt").write_text("precious")
    flags = ["--method", "lora", "--out", "run", *SHORT]
    assert "--overwrite" in refused(capsys, *flags)
    assert os.listdir("run") == ["mine.txt"]
    train.main([*flags, "--overwrite"])
    assert Path("run.old/mine.txt").read_text() == "precious" and result_of("run")
    assert "run.old: stands where" in refused(capsys, *flags, "--overwrite")    # it holds no run
    shutil.rmtree("run.old")
    shutil.copytree(BASE, "run.old")                        # whose config.json is a model's
    assert "run.old: stands where" in refused(capsys, *flags, "--overwrite")
    shutil.rmtree("run.old")
    first = Path("run/result.json").read_bytes()
    train.main([*flags, "--overwrite", "--seed", "1"])
    assert Path("run.old/result.json").read_bytes() == first
    second = Path("run/result.json").read_bytes()
    train.main([*flags[:3], "run/", *SHORT, "--overwrite"])         # the older run.old goes
    assert Path("run.old/result.json").read_bytes() == second != first


def test_overwriting_spares_what_is_no_run(capsys):
    """Uses the folder of a model, which has a config.json too."""
    shutil.copytree(BASE, "model")
    kept = {path.name: path.read_bytes() for path in Path("model").iterdir()}
    error = refused(capsys, "--method", "lora", "--out", "model", "--overwrite", *SHORT)
    assert "model/config.json: not the config.json of a run" in error
    Path("logs").mkdir()
    Path("logs/log.jsonl").write_text("mine")
    assert "logs" in refused(capsys, "--method", "lora", "--out", "logs", "--overwrite", *SHORT)
    assert kept == {path.name: path.read_bytes() for path in Path("model").iterdir()}
    assert Path("logs/log.jsonl").read_text() == "mine"


def test_overwriting_waits_until_nothing_can_refuse_the_run(monkeypatch, capsys):
    train.main(["--method", "lora", "--out", "run", *SHORT])
    kept = {path.name: path.read_bytes() for path in Path("run").iterdir()}
    for flags in (["--targets", "none"], ["--method", "adalora", "--steps", "1"],
                  ["--task", "text", "--data", "none.txt"]):
        refused(capsys, "--method", "lora", "--out", "run", "--overwrite", *SHORT, *flags)
        assert not Path("run.old").exists()
    assert kept == {path.name: path.read_bytes() for path in Path("run").iterdir()}


@pytest.mark.slow
def test_two_runs_that_start_together_get_a_folder_each():
    command = [sys.executable, train.__file__, "--method", "lora", *SHORT]
    both = [subprocess.Popen([*command, "--lr", lr], env=os.environ | {"OMP_NUM_THREADS": "1"},
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            for lr in ("1e-2", "1e-3")]
    assert [process.wait() for process in both] == [0, 0]
    folders = sorted(Path("runs").iterdir())
    assert [path.name for path in folders] == ["facts-lora-r8-s0", "facts-lora-r8-s0-2"]
    assert {json.loads((path / "config.json").read_text())["args"]["lr"]
            for path in folders} == {1e-2, 1e-3}
    assert all(len((path / "log.jsonl").read_text().splitlines()) == 6 for path in folders)


def test_a_second_process_in_the_same_folder_is_refused(stopped, capsys):
    run = Run()
    run.claim(Namespace(out="stopped", resume=True, overwrite=False))
    try:
        for flags in (["--resume"], [*stopped, "--overwrite"]):
            assert "another process" in refused(capsys, "--out", "stopped", *flags)
    finally:
        run.release()
    train.main(["--resume", "--out", "stopped"])
    Path("new").mkdir()
    Path("new/config.json").write_text("{}")                # since the flags were checked
    with pytest.raises(UserError, match="--out new: another run"):
        run.claim(Namespace(out="new", resume=False, overwrite=False))
    run.release()


def test_a_file_in_the_place_of_the_runs_folder_is_kept(capsys):
    Path("run").write_text("mine")
    assert "run" in refused(capsys, "--method", "lora", "--out", "run", "--overwrite", *SHORT)
    assert Path("run").read_text() == "mine"


def test_a_folder_that_cannot_be_written_is_named_and_nothing_lost(capsys):
    Path("file").write_text("mine")
    flags = ["--method", "lora", *SHORT]
    assert "file/run: cannot write" in refused(capsys, *flags, "--out", "file/run")
    train.main([*flags, "--out", "run"])
    Path("run/result.json").unlink()
    Path("run/result.json/x").mkdir(parents=True)           # where a file should stand
    Path("run/adapter.safetensors").unlink()
    with pytest.raises(SystemExit) as stop:
        train.main(["--resume", "--out", "run"])
    last = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and "run/result.json: cannot write" in last
    assert Path("run/result.json/x").is_dir() and Path("run/adapter.safetensors").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
def test_a_disk_that_fills_up_in_a_log_line_is_one_line(monkeypatch, capsys):
    claim = train.Run.claim
    monkeypatch.setattr(train.Run, "claim", lambda run, args: (
        claim(run, args), (run.folder / "log.jsonl").symlink_to("/dev/full")))
    with pytest.raises(SystemExit) as stop:
        train.main(["--method", "lora", "--out", "run", *SHORT])
    last = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and "run/log.jsonl: cannot write: No space left" in last


def test_a_changed_test_part_is_refused_by_resume_and_by_eval(items, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(train, "report", lambda *_: sys.exit("killed"))
        with pytest.raises(SystemExit):
            train.main(["--method", "lora", *items, "--steps", "2"])
    changed = ITEMS[:-1] + [{"prompt": "Item 29 weighs", "target": " nothing."}]
    Path("items.jsonl").write_text("\n".join(map(json.dumps, changed)))
    assert "not what the run began with: data" in refused(capsys, "--resume", "--out", "run")
    assert "not what the run began with: data" in refused(capsys, "--run", "run", main=evaluation.main)
    Path("items.jsonl").write_text("\n".join(map(json.dumps, ITEMS)))
    train.main(["--resume", "--out", "run"])
    assert_eval_repeats(capsys)


def test_another_model_s_fingerprint_differs_though_a_sample_is_read():
    from support.run import fingerprint
    tensors = {"a": torch.randn(300, 500), "b": torch.randn(7)}
    whole = fingerprint(tensors, torch.float32)
    assert whole == fingerprint({name: tensors[name].clone() for name in "ba"}, torch.float32)
    for other in ({"a": tensors["a"] * 1.001}, {"a": tensors["a"].T}, {"c": tensors["a"]}):
        other["b"] = tensors["b"]
        assert fingerprint(other, torch.float32) != whole
    assert fingerprint(tensors, torch.bfloat16) != whole


def test_the_score_before_is_computed_once_and_can_be_left_out(items, scored, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(train, "report", lambda *_: sys.exit("killed"))
        with pytest.raises(SystemExit):
            train.main(["--method", "lora", *items, "--steps", "2", "--eval-every", "9"])
    before = json.loads(Path("run/config.json").read_text())["before"]
    with monkeypatch.context() as patch:        # stopped while it is computed: the run has begun
        patch.setattr(Text, "score", lambda *_: exec("raise KeyboardInterrupt"))
        with pytest.raises(SystemExit):
            train.main(["--method", "lora", *items[:-1], "early", "--steps", "2"])
    assert "before" not in json.loads(Path("early/config.json").read_text())
    train.main(["--resume", "--out", "early"])
    assert result_of("early")["before"] == before
    assert scored == ["test", "test", "valid", "test", "valid"]     # of run, then of early
    scored.clear()
    train.main(["--resume", "--out", "run"])
    assert scored == ["test", "valid"]                          # no "before" again
    assert result_of("run")["before"] == before and set(before) == {"loss", "perplexity", "exact"}
    scored.clear()
    train.main(["--method", "lora", *items, "--steps", "2", "--eval-every", "9", "--skip-before",
                "--overwrite"])
    assert scored == ["test", "valid"] and result_of("run")["before"] is None
    assert read_run("run").result["before"] is None
    capsys.readouterr()


def test_an_empty_folder_is_taken_and_files_have_the_user_s_usual_permissions(items):
    Path("run").mkdir()
    train.main(["--method", "lora", *items, "--steps", "1"])
    Path("mine").touch()
    assert {path.stat().st_mode for path in Path("run").iterdir()} == {Path("mine").stat().st_mode}


def test_a_damaged_run_is_refused_in_one_line(items, capsys):
    train.main(["--method", "lora", *items, "--steps", "1"])
    Path("run/result.json").unlink()
    Path("run/checkpoint.pt").write_bytes(Path("run/checkpoint.pt").read_bytes()[:1000])
    assert "checkpoint.pt" in refused(capsys, "--resume", "--out", "run")
    Path("run/config.json").write_text('{"args": {}}')
    assert "config.json" in refused(capsys, "--resume", "--out", "run")
    assert "config.json" in refused(capsys, "--run", "run", main=evaluation.main)
