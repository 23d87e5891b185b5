"""Every figure is drawn from runs of a few steps, with numbers that are held against the runs."""
import json
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from PIL import Image
from runs import refused
from safetensors.torch import load_file

import train
from dual_lora import Sign
from experiments import analyze
from experiments.figures.inside import line_through, start_of
from experiments.learnt import Lacking, end_of, read_sweep, saved_at, updates
from experiments.measures import effective_rank
from experiments.results import SavedRun, chosen, read_run
from methods import METHODS
from support.errors import UserError

pytestmark = pytest.mark.slow

RUNS = [("full", 0), ("full", 1), ("lora", 0), ("lora", 1), ("dora", 0), ("adalora", 0),
        ("dash", 0), ("dual", 0)]
ADAPTERS = ["--rank", "4", "--targets", "q,up"]
LAYERS = 4 * 2              # data/base has four blocks


def train_one(folder: Path, name: str, *flags: str) -> None:
    train.main(["--steps", "6", "--batch-size", "8", "--max-eval", "3", "--snapshot-every", "2",
                "--eval-every", "2", "--out", str(folder / name), *flags])


@pytest.fixture(scope="session")
def sweep(tmp_path_factory) -> Path:
    """A folder of runs of six steps; of LoRA also at a second learning rate."""
    folder = tmp_path_factory.mktemp("sweep")
    for method, seed in RUNS:
        own = [] if method == "full" else ADAPTERS
        train_one(folder, f"{method}-{seed}", "--method", method, "--seed", str(seed), *own)
    train_one(folder, "lora-slow", "--method", "lora", "--lr", "1e-6", *ADAPTERS)
    for name, valid, test in (("lora-0", 0.5, 0.7), ("lora-1", 0.4, 0.8), ("lora-slow", 0.2, 0.9)):
        edit(folder / name / "result.json", lambda result: (        # six steps leave all at 0
            result["valid"].update(new=valid), result["after"].update(new=test)))
    return folder


@pytest.fixture(scope="session")
def figures(sweep) -> dict[str, dict]:
    """Every figure's JSON, after one call."""
    analyze.main([str(sweep)])
    return {path.stem: json.loads(path.read_text()) for path in (sweep / "figures").glob("*.json")}


# ---- by hand
def test_a_line_is_of_magnitude_over_direction():
    line = line_through([{"direction": x, "magnitude": y} for x, y in
                                 ((0.0, 1.0), (1.0, 3.0), (2.0, 5.0))])
    assert line == pytest.approx({"slope": 2, "intercept": 1, "r": 1})
    with pytest.raises(Lacking):
        line_through([{"direction": 1.0, "magnitude": y} for y in (1.0, 2.0)])


def fake_run(lr: float, seed: int, valid: float, metric: str = "new",
             base: str = "") -> SavedRun:
    args = Namespace(method="lora", rank=2, lr=lr, seed=seed, snapshot_every=seed,
                     model=f"folder{seed}")
    return SavedRun(Path(), args,
                    {"after": {metric: 0}, "valid": {metric: valid}, "base": base}, [])


@pytest.mark.parametrize("metric, best", [("new", 3e-3), ("loss", 1e-3)])
def test_the_best_rate_is_chosen_among_those_with_the_most_seeds(metric, best):
    runs = [fake_run(lr, seed, valid, metric) for lr, seed, valid in (
        (1e-3, 0, 0.5), (1e-3, 1, 0.1), (3e-3, 1, 0.3), (3e-3, 0, 0.4), (1e-2, 0, 0.9))]
    (found,) = chosen(runs).values()
    assert [(run.args.lr, run.args.seed) for run in found] == [(best, 0), (best, 1)]


def test_a_model_is_its_weights_wherever_they_lie():
    assert len(chosen([fake_run(1e-3, 0, 0.5), fake_run(1e-3, 1, 0.5)])) == 1
    assert len(chosen([fake_run(1e-3, 0, 0.5), fake_run(1e-3, 0, 0.5, base="another")])) == 2


def test_the_same_run_twice_is_not_two_seeds():
    with pytest.raises(UserError, match="are the same run"):
        chosen([fake_run(1e-3, 0, 0.5), fake_run(1e-3, 0, 0.5)])


# ---- from runs
def test_an_update_is_what_was_added_to_the_weight(sweep):
    path, run = "layers.2.attn.q", read_run(sweep / "lora-0")
    saved = {name: tensor.double() for name, tensor in load_file(end_of(run)).items()}
    expected = 2 * saved[f"{path}.B"] @ saved[f"{path}.A"]              # alpha = 2 r
    torch.testing.assert_close(updates(run, [path], end_of(run))[path], expected)
    full = read_run(sweep / "full-0")
    before, after = (updates(full, [path], saved_at(full)[step])[path].norm() for step in (2, 6))
    assert 0 < before < after


def test_the_start_of_a_run_is_made_again(sweep):
    dual, lora = (start_of(read_run(sweep / name)) for name in ("dual-0", "lora-0"))
    assert dual["layers.0.attn.q.B"].std() > 0 and not lora["layers.0.attn.q.B"].any()


def test_every_figure_is_drawn_with_its_numbers(sweep, figures):
    assert set(figures) == set(analyze.FIGURES) - {"pictures"}         # of task subject
    for name in figures:
        path = sweep / "figures" / f"{name}.png"
        assert Image.open(path).width >= 1000 and path.stat().st_size < 300_000


def test_the_hero_picture_counts_parameters_and_rank(figures):
    q = 4 * (128 + 128)
    found = {method: (row["parameters"], row["rank"]) for method, row in figures["updates"].items()
             if method not in ("layer", "shape")}
    assert figures["updates"]["layer"] == "layers.2.attn.q"
    assert found["lora"] == (q, 4) and found["dora"][0] == q + 128
    assert found["adalora"][0] == 6 * (128 + 1 + 128) and found["adalora"][1] <= 6
    assert found["dash"][0] == q + 8 and found["dual"][0] == q and found["dual"][1] > 64
    assert found["full"][0] == 128 * 128 and found["full"][1] > 64


def test_lines_stand_at_the_steps_that_were_measured(figures):
    assert {row["method"] for row in figures["loss"]} == {method for method, _ in RUNS}
    assert all(row["x"] == [2, 4, 6] for row in figures["loss"])
    seeds = {row["method"]: len(row["seeds"]) for row in figures["loss"]}
    assert seeds["full"] == seeds["lora"] == 2 and seeds["dual"] == 1
    assert figures["budget"]["kept"]["x"] == [2, 4, 6]


def test_score_and_rates_are_the_results_of_the_runs(sweep, figures):
    result = {name: json.loads((sweep / name / "result.json").read_text())
              for name in ("lora-0", "lora-1", "lora-slow")}
    (row,) = [row for row in figures["score"] if row["method"] == "lora"]
    assert row["scores"] == [result[name]["after"]["new"] for name in ("lora-0", "lora-1")]
    assert row["trainable"] == result["lora-0"]["trainable"]
    rates = {row["lr"]: row for row in figures["rates"] if row["method"] == "lora"}
    assert rates[1e-6]["scores"] == [result["lora-slow"]["valid"]["new"]]
    assert {lr: row["chosen"] for lr, row in rates.items()} == {1e-6: False, 0.0105: True}


def test_rates_are_compared_on_the_seeds_that_all_of_them_have(sweep):
    figure, rows = analyze.FIGURES["rates"](read_sweep(sweep))
    line = next(drawn for axes in figure.axes for drawn in axes.containers
                if drawn.get_label() == "LoRA")
    slow, fast = [row for row in rows if row["method"] == "lora"]
    assert slow["seeds"] == [0] and fast["seeds"] == [0, 1]
    assert list(line[0].get_ydata()) == [slow["scores"][0], fast["scores"][0]]


def test_the_tradeoff_has_every_run_of_every_rate(sweep, figures):
    rows = {(row["method"], row["lr"]): row for row in figures["tradeoff"]}
    assert {method for method, _ in rows} == {method for method, _ in RUNS}
    slow, fast = rows["lora", 1e-6], rows["lora", 0.0105]
    assert slow["seeds"] == [0] and fast["seeds"] == [0, 1]
    assert fast["chosen"] and not slow["chosen"] and rows["full", 1e-3]["chosen"]
    after = [json.loads((sweep / f"lora-{seed}" / "result.json").read_text())["after"]
             for seed in (0, 1)]
    assert fast["new"] == [of_run["new"] for of_run in after] == [0.7, 0.8]
    assert fast["kept"] == [of_run["kept"] for of_run in after]


def test_ranks_of_the_updates_are_those_of_the_methods(sweep, figures):
    rank = {label: row["numerical_rank"] for label, row in figures["spectra"].items()}
    assert rank["LoRA"] == [4, 4] and all(len(row["median"]) == 128 and row["median"][0] == 1
                                          for row in figures["spectra"].values())
    assert rank["AdaLoRA"][0] <= 6 and rank["LoRA-Dash"][0] <= 12
    assert min(rank["full"] + rank["Dual LoRA"] + rank["random dW"]) > 64
    end = load_file(sweep / "dual-0" / "adapter.safetensors")
    paths = [name[:-2] for name in end if name.endswith(".D")]
    for label, matrices in (
            ("Dual: Sign(DC)", [Sign.apply(end[f"{path}.D"] @ end[f"{path}.C"], 1)
                                for path in paths]),
            ("Dual: ReLU(BA)", [(end[f"{path}.B"] @ end[f"{path}.A"]).relu() for path in paths])):
        ranks = [effective_rank(torch.linalg.svdvals(matrix.double())) for matrix in matrices]
        assert figures["spectra"][label]["effective_rank"][0] == pytest.approx(
            sum(ranks) / len(ranks), rel=1e-3)


def test_dora_has_a_point_a_layer_and_snapshot(figures):
    assert {method: len(row["points"]) for method, row in figures["dora"].items()} == {
        "full": 2 * 3 * 4, "lora": 2 * 3 * 4, "dora": 12, "adalora": 12, "dash": 12, "dual": 12}
    assert set(figures["dora"]["lora"]["lines"]) == {"q", "up"}
    line = figures["dora"]["lora"]["lines"]["q"]                # of 2 seeds and 3 snapshots
    assert len(line["r of each seed"]) == 2 and len(line["r of each step and seed"]) == 6
    assert all(point["direction"] >= 0 and point["magnitude"] >= 0
               for row in figures["dora"].values() for point in row["points"])


def test_the_budget_ends_at_the_target(figures):
    found = figures["budget"]
    assert found["schedule"][-1] == sum(found["final"].values()) == 4 * LAYERS
    assert found["kept"]["mean"][-1] == 4 * LAYERS


def test_directions_are_compared_in_every_layer(figures):
    found = figures["directions"]
    assert found["s"] == 8 and len(found["layers"]) == LAYERS
    assert all(len(shares) == LAYERS for shares in found["by layer"].values())
    assert found["by layer"]["chance"] == [8 / 128] * LAYERS
    assert len(found["where"]["chosen by LoRA-Dash"]) == 8 * LAYERS
    assert len(found["where"]["task-specific"]) == 2 * 8 * LAYERS
    assert len(found["where"]["of a Gaussian dW"]) == 2 * 8 * LAYERS
    assert list(found["ranks"]) == ["4"] and list(found["steps"]) == ["2", "4", "6"]
    assert found["ranks"]["4"] == pytest.approx(found["steps"]["6"])


def test_signs_start_where_the_run_did(sweep, figures):
    found = figures["signs"]
    start, last = found["flipped since the start"], found["flipped since the point before"]
    assert start["x"] == [0, 2, 4, 6] and start["mean"][0] == last["mean"][0] == 0
    assert start["mean"][1] == last["mean"][1] > 0
    *_, before, end = [load_file(path) for path in saved_at(read_run(sweep / "dual-0")).values()]
    paths = [name[:-2] for name in end if name.endswith(".D")]
    changed = [((before[f"{path}.D"] @ before[f"{path}.C"] > 0)
                != (end[f"{path}.D"] @ end[f"{path}.C"] > 0)).float().mean().item()
               for path in paths]
    off = [(end[f"{path}.B"] @ end[f"{path}.A"] <= 0).float().mean().item() for path in paths]
    assert last["seeds"][0][-1] == pytest.approx(100 * sum(changed) / len(paths), abs=1e-2)
    assert found["switched off by ReLU"]["seeds"][0][-1] == pytest.approx(
        100 * sum(off) / len(paths), abs=1e-2)


# ---- what the runs do not hold
@pytest.fixture
def of_lora(sweep, tmp_path) -> Path:
    shutil.copytree(sweep / "lora-0", tmp_path / "lora-0")
    return tmp_path


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_figure_that_lacks_runs_is_one_line_and_the_others_are_drawn(of_lora, capsys):
    shutil.rmtree(of_lora / "lora-0" / "snapshots")
    analyze.main([str(of_lora)])
    lines = capsys.readouterr().out.splitlines()
    drawn = {path.stem for path in (of_lora / "figures").glob("*.png")}
    assert drawn == {"loss", "score", "tradeoff", "spectra"} and len(lines) == len(analyze.FIGURES)
    assert any(line.startswith("updates: needs runs of full, lora, dora, adalora, dash, dual")
               for line in lines)
    assert "rates: needs a method's runs with several learning rates" in lines


def test_figures_go_where_they_are_sent(of_lora, tmp_path):
    analyze.main([str(of_lora), "--figures", "loss", "--out", str(tmp_path / "a" / "b")])
    assert {path.name for path in (tmp_path / "a" / "b").iterdir()} == {"loss.png", "loss.json"}


def test_a_task_that_does_not_score_what_is_kept_has_no_tradeoff(of_lora, capsys):
    edit(of_lora / "lora-0" / "result.json", lambda result: result["after"].pop("kept"))
    said = refused(capsys, str(of_lora), "--figures", "tradeoff", main=analyze.main)
    assert "needs a task that scores new and kept" in said


@pytest.mark.parametrize("flags, said", [
    (["--figures", "updats"], "did you mean updates?"),
    (["--figures", ""], "known: updates"),
    (["--figures", "loss,budget"], "budget: needs runs of adalora"),
    (["--figure", "loss"], "did you mean --figures?"),
])
def test_what_cannot_be_drawn_ends_with_one_line(flags, said, of_lora, capsys):
    assert said in refused(capsys, str(of_lora), *flags, main=analyze.main)


def test_runs_that_cannot_be_compared_end_with_one_line(of_lora, capsys, tmp_path):
    other = of_lora / "other"
    shutil.copytree(of_lora / "lora-0", other)
    edit(other / "config.json", lambda config: config["args"].update(alpha=3.0))
    said = refused(capsys, str(of_lora), main=analyze.main)
    assert "runs of lora at rank 4 cannot be one line" in said and "--alpha" in said
    edit(other / "config.json", lambda config: config["args"].update(steps=7))
    assert "differ in --steps: 6, 7" in refused(capsys, str(of_lora), main=analyze.main)


def test_another_base_model_or_start_is_refused(of_lora, capsys):
    edit(of_lora / "lora-0" / "config.json",
         lambda config: config.update(start="of a GPU"))
    with pytest.raises(Lacking, match="comes out otherwise here"):
        start_of(read_sweep(of_lora).runs[0])
    edit(of_lora / "lora-0" / "result.json", lambda result: result.update(base="another"))
    assert "not the model that" in refused(capsys, str(of_lora), main=analyze.main)


def test_adapters_of_another_run_are_refused(sweep, of_lora):
    shutil.copy(sweep / "dash-0" / "adapter.safetensors", of_lora / "lora-0")
    run = read_run(of_lora / "lora-0")
    with pytest.raises(UserError, match="not the adapters that the run trained"):
        updates(run, ["layers.2.attn.q"], end_of(run))


def test_a_method_of_one_s_own_is_drawn_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "mine", METHODS["lora"])
    train_one(tmp_path, "mine-0", "--method", "mine", *ADAPTERS)
    analyze.main([str(tmp_path), "--figures", "loss,score,spectra,dora"])
    spectra = json.loads((tmp_path / "figures" / "spectra.json").read_text())
    assert max(spectra["mine"]["numerical_rank"]) <= 4


@pytest.mark.parametrize("name, content, said", [
    ("result.json", "[]", "has no before"), ("result.json", "{", "result.json"),
    ("result.json", {"valid": {"loss": 1}}, "no validation score stands for new"),
    ("result.json", {"valid": {"loss": 1, "new": "high"}}, "new is 'high'"),
    ("result.json", {"trainable": None}, "trainable is None"),
    ("log.jsonl", "3\n", "has no step"), ("log.jsonl", '{"step": 0, "valid": 3}\n', "has no loss"),
    ("config.json", {"lr": "fast"}, "lr is 'fast'")])
def test_a_damaged_run_ends_with_one_line(name, content, said, of_lora, capsys):
    path = of_lora / "lora-0" / name
    if isinstance(content, str):
        path.write_text(content)
    else:
        edit(path, lambda found: found.get("args", found).update(content))
    text = refused(capsys, str(of_lora), main=analyze.main)
    assert said in text and name in text


def test_a_damaged_snapshot_ends_with_one_line(sweep, tmp_path, capsys):
    shutil.copytree(sweep / "adalora-0", tmp_path / "adalora-0")
    snapshot = tmp_path / "adalora-0" / "snapshots" / "000004.safetensors"
    snapshot.write_bytes(snapshot.read_bytes()[:1000])
    said = refused(capsys, str(tmp_path), "--figures", "budget", main=analyze.main)
    assert str(snapshot) in said


def test_no_runs_end_with_one_line(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "missing"):
        assert "neither the folder of a finished run" in refused(capsys, str(folder), main=analyze.main)


# ---- pictures
def test_the_pictures_figure_has_a_row_for_each_run_of_task_subject(tmp_path, sweep, capsys):
    from data import subject
    assert "pictures: needs runs of task subject" in refused(
        capsys, str(sweep), "--figures", "pictures", main=analyze.main)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subject, "N", {"valid": 1, "test": 1})
        for method in ("lora", "dual"):
            train.main(["--method", method, "--task", "subject", "--steps", "2", "--batch-size",
                        "2", "--eval-every", "9", "--out", str(tmp_path / method)])
        analyze.main([str(tmp_path), "--figures", "pictures"])
    rows = json.loads((tmp_path / "figures" / "pictures.json").read_text())
    assert [(row["method"], row["rank"], row["seeds"]) for row in rows] == [("lora", 4, 1),
                                                                          ("dual", 4, 1)]
    after = json.loads((tmp_path / "dual" / "result.json").read_text())["after"]
    assert {name: rows[1][name] for name in after} == after
    image = Image.open(tmp_path / "figures" / "pictures.png")
    assert image.width > image.height > 400
