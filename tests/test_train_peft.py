"""train.py from PEFT's adapters and by PEFT's names, then resumed, scored and converted."""
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import BASE
from runs import SHORT, assert_eval_repeats, refused
from safetensors.torch import load_file

import convert
import train
from formats.checkpoint import load_pretrained
from formats.peft import export_peft
from methods import adapters, inject, load

pytestmark = pytest.mark.usefixtures("empty_folder")


def adapters_of_peft(folder: str) -> None:
    model = inject(load_pretrained(BASE)[0], "lora", ["q", "up"], rank=3, alpha=5)
    for layer in adapters(model).values():
        layer.B.data.normal_(std=0.05)
    export_peft(model, folder)


def stop_after(steps: int, monkeypatch, *flags: str) -> None:
    """Runs train.py, and stops it as a kill would before it logs the next step."""
    log = train.Run.log

    def stop(run, line):
        if line["step"] == steps:
            raise KeyboardInterrupt
        log(run, line)
    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "log", stop)
        with pytest.raises(SystemExit):
            train.main(list(flags))


@pytest.mark.slow
def test_a_run_goes_on_without_the_folder_of_its_first_adapters(monkeypatch, capsys):
    adapters_of_peft("theirs")
    flags = ["--from-peft", "theirs", "--save-every", "2", *SHORT]
    train.main([*flags, "--out", "whole"])
    stop_after(3, monkeypatch, *flags, "--out", "run")
    stop_after(1, monkeypatch, *flags, "--out", "early")
    shutil.rmtree("theirs")
    line = refused(capsys, "--resume", "--out", "early")
    assert "early: has no checkpoint yet, so it needs --from-peft again" in line
    train.main([*flags, "--resume", "--out", "run"])            # the whole command again
    for name in ("adapter.safetensors", "log.jsonl"):
        assert Path("run", name).read_bytes() == Path("whole", name).read_bytes()
    assert_eval_repeats(capsys)
    convert.main(["--run", "run", "--to", "merged"])
    convert.main(["--run", "run", "--peft", "again"])
    adapters_of_peft("theirs")
    assert "early: not what the run began with" in refused(capsys, "--resume", "--out", "early")


@pytest.mark.parametrize("adapters", [None, *(pytest.param(odd, marks=pytest.mark.slow) for odd in (
    [], [[]], [{"method": "magic"}], [{"targets": ["q"]}]))])
def test_a_config_that_lost_its_adapters_is_one_line(adapters, monkeypatch, capsys):
    adapters_of_peft("theirs")
    stop_after(3, monkeypatch, "--from-peft", "theirs", "--save-every", "2", *SHORT, "--out", "run")
    shutil.rmtree("theirs")
    config = json.loads(Path("run/config.json").read_text())
    Path("run/config.json").write_text(json.dumps(config | {"adapters": adapters}))
    assert "run/config.json: adapters" in refused(capsys, "--resume", "--out", "run")


@pytest.mark.slow
def test_targets_by_pefts_names_train_as_by_ours(capsys, monkeypatch):
    for out, targets in (("ours", "q,v,up"), ("run", "q_proj, v_proj, up_proj")):
        flags = ["--method", "lora", "--rank", "140", "--targets", targets, *SHORT]
        if out == "run":
            stop_after(5, monkeypatch, *flags, "--save-every", "2", "--out", out)
            flags = [*flags, "--save-every", "2", "--resume"]
        train.main([*flags, "--out", out])
    assert Path("run/adapter.safetensors").read_bytes() == Path(
        "ours/adapter.safetensors").read_bytes()
    assert load_file("run/adapter.safetensors")["layers.0.attn.q.A"].shape == (140, 128)
    assert_eval_repeats(capsys)
    model = load(load_pretrained(BASE)[0], "run")
    assert model.injected["targets"] == ["q", "up", "v"]
    assert all(torch.isfinite(layer.delta_weight()).all() for layer in adapters(model).values())
    line = refused(capsys, "--method", "lora", "--targets", "q_prj", *SHORT)
    assert "no nn.Linear is named q_prj" in line
    line = refused(capsys, "--method", "lora", "--rank", "1000000", *SHORT)
    assert "rank must be a whole number from 1 to 10000" in line
