"""Checks that NaN and infinity are refused when read, trained on, merged or written."""
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import BASE
from runs import ONE_QUICK, refused, result_of
from safetensors.torch import load_file, save_file

import convert
import eval as evaluation
import train
from formats.checkpoint import load_pretrained, save_pretrained
from methods import METHODS, inject, load, merge, save
from support.errors import UserError, refuse_not_finite

SHORT = ["--batch-size", "8", "--max-eval", "20"]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def spoilt(source: Path, folder: str, name: str, value: float) -> str:
    """Copies a folder, changes one number of a safetensors file, returns that tensor's name."""
    shutil.copytree(source, folder)
    tensors = load_file(Path(folder, name))
    victim = sorted(tensors)[3]
    tensors[victim].view(-1)[1] = value
    save_file(tensors, Path(folder, name), {"format": "pt"})
    return victim


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_number_is_found_in_any_dtype(dtype, value):
    tensor = torch.randn(3, 50).to(dtype)
    refuse_not_finite(tensor, "w")
    refuse_not_finite(tensor[:0], "nothing")
    refuse_not_finite(torch.ones(3, dtype=torch.int64), "whole numbers")
    tensor[2, 7] = value
    with pytest.raises(UserError, match="^w holds NaN or infinity$"):
        refuse_not_finite(tensor, "w")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_base_with_a_bad_number_is_refused_before_a_run_s_folder_is_made(value, capsys):
    name = spoilt(BASE, "model", "model.safetensors", value)
    line = refused(capsys, "--method", "lora", "--model", "model", "--out", "run")
    assert name in line and "NaN or infinity" in line and not Path("run").exists()
    assert name in refused(capsys, "--model", "model", "--task", "facts", main=evaluation.main)


def test_a_cast_that_overflows_is_refused_by_the_tensor_s_name():
    spoilt(BASE, "model", "model.safetensors", 1e30)
    load_pretrained("model")
    with pytest.raises(UserError, match="as torch.float16, holds NaN or infinity"):
        load_pretrained("model", torch.float16)


@pytest.mark.parametrize("method", ONE_QUICK)
def test_weights_that_a_step_spoils_end_the_run_with_status_1_and_no_result(method, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--method", method, "--weight-decay", "1e300", "--warmup", "0", "--steps",
                    "2" if method in ("adalora", "dash", "dual") else "1", "--out", "run", *SHORT])
    last = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 1 and last.startswith("error: step ")
    assert {path.name for path in Path("run").iterdir()} == {"config.json"}


def test_the_last_good_checkpoint_is_kept_when_a_later_step_spoils_the_weights(capsys, monkeypatch):
    real = METHODS["lora"].layer.on_step

    def spoil(layers, step, total_steps):
        real(layers, step, total_steps)
        if step == 3:
            with torch.no_grad():
                layers[0].B[0, 0] = float("nan")
    monkeypatch.setattr(METHODS["lora"].layer, "on_step", spoil)
    with pytest.raises(SystemExit) as stop:
        train.main(["--method", "lora", "--steps", "6", "--save-every", "2", "--out", "run",
                    *SHORT])
    last = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 1 and "layers.0.attn.q.B nan" in last
    assert last.endswith("the last checkpoint is run/checkpoint.pt")
    assert torch.load("run/checkpoint.pt", weights_only=True)["step"] == 2
    assert "NaN" not in Path("run/log.jsonl").read_text()


def test_a_score_that_is_not_finite_is_no_result(capsys, monkeypatch):
    from data.text import Text
    real = Text.score

    def broken(*args):
        scores = real(*args)
        return scores._replace(values=scores.values | {"perplexity": float("nan")})
    Path("a.jsonl").write_text("".join(json.dumps({"prompt": f"Item {i}", "target": " is new"})
                                       + "\n" for i in range(20)))
    flags = ["--method", "lora", "--task", "jsonl", "--data", "a.jsonl", "--steps", "2"]
    with monkeypatch.context() as patch:
        patch.setattr(Text, "score", broken)
        for out, more, when in (("a", [], "before training"), ("b", ["--skip-before"], "step 0")):
            with pytest.raises(SystemExit) as stop:
                train.main([*flags, *more, "--out", out])
            assert stop.value.code == 1
            assert f"error: {when}: perplexity nan" in capsys.readouterr().err
            assert not Path(out, "result.json").exists()
    train.main([*flags, "--out", "c"])
    json.dumps(result_of("c"), allow_nan=False)
    with monkeypatch.context() as patch:        # of the test alone, as eval.py scores it
        patch.setattr(Text, "score", broken)
        line = refused(capsys, "--run", "c", "--predictions", "p.jsonl", main=evaluation.main)
        assert "c: perplexity nan" in line and not Path("p.jsonl").exists()
        patch.setattr(Text, "score", lambda task, model, examples: (
            broken if examples == task.test else real)(task, model, examples))
        with pytest.raises(SystemExit) as stop:
            train.main([*flags, "--skip-before", "--out", "d"])
        assert stop.value.code == 1
        assert "error: after training: perplexity nan" in capsys.readouterr().err


def test_an_adapter_file_with_a_bad_number_is_refused_and_the_model_left_as_it_was(base):
    model = load_pretrained(BASE)[0]
    inject(model, "lora", ["q"])
    save(model, "a.safetensors")
    tensors = load_file("a.safetensors")
    tensors["layers.1.attn.q.B"][0, 0] = float("inf")
    save_file(tensors, "b.safetensors", {"adapter": json.dumps(model.injected)})
    fresh = load_pretrained(BASE)[0]
    with pytest.raises(UserError, match="layers.1.attn.q.B holds NaN or infinity"):
        load(fresh, "b.safetensors")
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    tensors["layers.1.attn.q.B"][0, 0] = 1e300                  # finite, until it is a float32
    save_file(tensors, "c.safetensors", {"adapter": json.dumps(model.injected)})
    with pytest.raises(UserError, match="layers.1.attn.q.B holds NaN or infinity"):
        load(fresh, "c.safetensors")
    assert fresh.state_dict().keys() == base[0].state_dict().keys()
    model.layers[1].attn.q.B.data[0, 0] = float("nan")
    with pytest.raises(UserError, match="layers.1.attn.q.B holds NaN or infinity"):
        save(model, "d.safetensors")
    assert not Path("d.safetensors").exists()


def test_a_merge_that_overflows_float16_is_refused_and_nothing_written(capsys):
    model = load_pretrained(BASE)[0]
    inject(model, "lora", ["q"], alpha=1e7)
    torch.nn.init.ones_(model.layers[2].attn.q.B)
    model.half()
    with pytest.raises(UserError, match="^layers.2.attn.q: the merged weight, as torch.float16"):
        merge(model)
    assert type(model.layers[0].attn.q) is METHODS["lora"].layer        # not half merged
    plain = load_pretrained(BASE)[0]
    plain.norm.weight.data[0] = float("nan")
    with pytest.raises(UserError, match="norm.weight holds NaN or infinity"):
        save_pretrained(plain, "out")
    assert not Path("out").exists()


def test_a_peft_adapter_with_a_bad_number_is_refused_and_nothing_written(capsys):
    train.main(["--method", "lora", "--steps", "2", "--out", "run", *SHORT])
    convert.main(["--run", "run", "--peft", "peft"])
    name = spoilt(Path("peft"), "bad", "adapter_model.safetensors", float("nan"))
    line = refused(capsys, "--from-peft", "bad", "--model", str(BASE), "--to", "merged",
                   main=convert.main)
    assert name in line and not Path("merged").exists()
    line = refused(capsys, "--from-peft", "bad", "--out", "again")
    assert name in line and not Path("again").exists()
