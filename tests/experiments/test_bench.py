"""bench.py runs and writes its files; how fast anything is stands in no test."""
import json

import pytest
from runs import refused

from experiments import bench, contenders, encoders, growth
from lora import LoRALinear
from methods import METHODS, Method

pytestmark = pytest.mark.slow

FAST = ["frozen", *contenders.OURS]


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(bench, "LAYER_WIDTHS", [32])
    monkeypatch.setattr(bench, "LAYER_TOKENS", [64])
    monkeypatch.setattr(growth, "AXES", {"rank": (2, 4), "tokens": (16, 32), "width": (32, 64)})
    monkeypatch.setattr(growth, "USUAL", {"rank": 4, "tokens": 16, "width": 32})
    monkeypatch.setitem(contenders.SIZES, "25 M", dict(vocab_size=8192, d_model=32, n_layers=2,
                                                       n_heads=2, d_ff=64))


def test_layer_model_growth_and_sizes_give_a_row_a_contender_and_the_files(tiny, tmp_path, capsys):
    out, figure = tmp_path / "out.json", tmp_path / "growth.png"
    bench.main(["layer", "model", "growth", "sizes", "--device", "cpu", "--json", str(out),
                "--figure", str(figure)])
    found = json.loads(out.read_text())
    assert found["device"] == "cpu" and found["dtype"] == "fp32"
    for part in ("layer", "model"):
        rows = {row["contender"]: row for row in found[part]}
        assert set(FAST) < set(rows)
        for row in rows.values():
            assert 0 < row["fb_best"] <= row["best"] <= row["seconds"]
    kept = {row["contender"]: row["kept_bytes"] for row in found["layer"]}
    assert kept["lora"] == 4 * 64 * contenders.RANK and kept["dual"] == 0
    assert kept["dual, naive"] >= 4 * 32 * 32
    points = [(row["axis"], row[row["axis"]], row["contender"]) for row in found["growth"]]
    assert points == [(axis, value, name) for axis, values in growth.AXES.items()
                      for value in values for name in FAST]
    assert figure.read_bytes().startswith(b"\x89PNG")
    drawn = json.loads(figure.with_suffix(".json").read_text())
    assert drawn["growth"] == found["growth"] and drawn["machine"] == found["machine"]
    text = capsys.readouterr().out
    assert "LLaMA 7B" in text and "DoRA / our LoRA" in text


def test_a_method_of_one_s_own_is_measured_and_said_to_be_not_mapped(tiny, monkeypatch, capsys):
    monkeypatch.setitem(METHODS, "mine", Method(LoRALinear, lr=1e-3))
    for module in (bench, growth):
        monkeypatch.setattr(module, "OURS", ["full", "lora", "dora", "adalora", "dual", "mine"])
    monkeypatch.setattr(bench, "PEFT", [])
    bench.main(["layer", "model", "growth", "sizes", "--device", "cpu"])
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()
             if line.startswith("mine ")]
    assert len(lines) == 2 + 6 + 2                      # a layer, a model, growth, 7B and 70B
    assert ["not mapped" in map(str.strip, line) for line in lines] == (
        [False, True] + [False] * 6 + [True] * 2)


def test_the_encoder_s_part_compares_with_transformers_and_prints_the_bars(monkeypatch, capsys,
                                                                           tmp_path):
    for module in (encoders, bench):
        monkeypatch.setattr(module, "SHAPES", ((2, 16),))
    monkeypatch.setattr(encoders, "SIZE", dict(d_model=24, n_heads=2, d_ff=48))
    bench.main(["encoder", "--device", "cpu", "--json", str(tmp_path / "out.json")])
    rows = {row["contender"]: row for row in
            json.loads((tmp_path / "out.json").read_text())["encoder"]}
    assert set(rows) == {"ours", "transformers"}
    assert 0 < rows["ours"]["kept_bytes"] < rows["transformers"]["kept_bytes"]
    text = capsys.readouterr().out
    assert "memory held by attention / transformers'" in text and "0.85" in text


@pytest.mark.parametrize("argv, message", [
    (["layers"], "did you mean layer?"), (["--al"], "did you mean --all?"),
    (["sizes", "--json", "/no/such/folder/x.json"], "--json: /no/such/folder/x.json"),
    (["layer", "--figure", "x.png"], "--figure"), (["growth", "--figure", "x.jpg"], "--figure"),
    (["growth", "--figure", "x.png", "--json", "x.json"], "--json needs another"),
    (["growth", "--figure", "x.png", "--json", "x.png"], "--json needs another"),
    (["sizes", "--device", "tpu9"], "--device")])
def test_wrong_input(argv, message, capsys):
    assert message in refused(capsys, *argv, main=bench.main)
