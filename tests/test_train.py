import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import BASE
from runs import ITEMS, ONE_QUICK, SHORT, assert_eval_repeats, refused, result_of
from safetensors.torch import load_file

import eval as evaluation
import train
from data import load_task
from data.facts import Facts
from data.task import Scores, Setup, sample
from data.world import VERSION
from experiments.results import read_run
from formats.checkpoint import load_pretrained
from methods import METHODS, inject, load
from support.messages import explained
from support.processes import own_parts
from train import batch_at, schedule

pytestmark = pytest.mark.usefixtures("empty_folder")


def test_learning_rate_rises_to_its_peak_and_falls_to_zero():
    # 10 steps, 4 of warm-up: quarters up to 1, then sixths down; step 10 would be 0
    factors = [schedule(step, 10, 4) for step in range(10)]
    expected = [1 / 4, 2 / 4, 3 / 4, 1, 6 / 6, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    assert factors == pytest.approx(expected)
    assert schedule(0, 10, 0) == 1


def test_every_epoch_holds_each_example_once_in_a_new_order():
    seen = [i for step in range(10) for i in batch_at(step, n=25, batch_size=5, seed=3)]
    assert sorted(seen[:25]) == sorted(seen[25:]) == list(range(25))
    assert seen[:25] != seen[25:] != list(range(25))
    assert batch_at(4, 25, 5, seed=3) != batch_at(4, 25, 5, seed=4)


def test_a_batch_may_run_over_the_end_of_an_epoch():
    seen = [i for step in range(3) for i in batch_at(step, n=5, batch_size=7, seed=0)]
    for epoch in range(4):
        assert sorted(seen[5 * epoch:5 * epoch + 5]) == list(range(5))


def test_slices_are_contiguous_and_cover_the_batch():
    assert own_parts([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4, 5]]


@pytest.mark.parametrize("method", ONE_QUICK)
def test_a_run_leaves_the_designs_files_and_eval_repeats_its_score(method, plain, capsys):
    shutil.copytree(plain(method), "run")
    assert {path.name for path in Path("run").iterdir()} == {
        "config.json", "log.jsonl", "adapter.safetensors", "checkpoint.pt", "result.json"}
    result = result_of("run")
    assert result["method"] == method and result["loss_on"] == "answer"
    assert 0 < result["trainable"] <= result["total"]
    assert set(result["before"]) == set(result["after"]) == {"new", "paraphrase", "kept"}
    assert all(0 <= share <= 1 for share in result["after"].values())
    assert len(result["base"]) == 64 and result["versions"]["world"] == VERSION
    assert result["counts"] == {"new": 6, "paraphrase": 6, "kept": 6}
    assert result["seconds"] > 0 and result["peak_memory_mb"] > 0 and "command" in result
    lines = [json.loads(line) for line in Path("run", "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(6))
    assert "valid" in lines[2] and "valid" not in lines[3]
    torch.load("run/checkpoint.pt", weights_only=True)

    assert_eval_repeats(capsys)


@pytest.mark.parametrize("method", ONE_QUICK)
def test_eval_scores_and_shows_the_fine_tuned_model_not_the_base(method, items, capsys):
    train.main(["--method", method, *items, "--steps", "40", "--batch-size", "24"])
    result = result_of("run")
    assert result["after"]["loss"] < 0.8 * result["before"]["loss"]
    assert_eval_repeats(capsys)
    evaluation.main(["--run", "run", "--prompt", "Item 3 weighs", "--max-new-tokens", "8"])
    before, after = capsys.readouterr().out.splitlines()
    assert before.startswith("before:") and after.startswith("after: ")
    assert "stones" in after and "stones" not in before


def test_eval_writes_every_prediction_and_prints_each_share_with_its_interval(capsys):
    evaluation.main(["--model", str(BASE), "--task", "facts",
                     "--max-eval", "30", "--predictions", "out.jsonl"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "facts: 30 test items"
    assert [line.split()[0] for line in lines[1:]] == ["new", "paraphrase", "kept"]
    assert lines[3].split() == ["kept", "1.0000", "95", "%", "[0.7225,", "1.0000]"]    # 10 of 10
    rows = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert len(rows) == 30 and set(rows[0]) == {"group", "prompt", "gold", "right"}
    assert sum(row["right"] for row in rows if row["group"] == "kept") == 10


def test_a_confidence_interval_by_hand():
    # Wilson, z = 1.96: 5 of 10 -> (0.5 + .19208 -+ 1.96 sqrt(.025 + .009604)) / 1.38416
    assert evaluation.wilson_interval(0.5, 10) == pytest.approx((0.23659, 0.76341), abs=1e-5)
    low, high = evaluation.wilson_interval(0.0, 10)
    assert abs(low) < 1e-9 and high == pytest.approx(0.27754, abs=1e-5)


def test_metrics_of_several_sets_become_a_table(capsys):
    values = {"loss": 1.5, "accuracy/A": 0.5, "accuracy/Avg.": 0.25, "unparsed/A": 0.1,
              "unparsed/Avg.": 0.2}
    evaluation.print_scores(Scores(values, {"accuracy/A": 10}, []))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [["loss", "1.5000"], ["A", "Avg."], ["accuracy", "0.5000", "0.2500"],
                     ["95", "%", "within", "+-0.2634"], ["unparsed", "0.1000", "0.2000"]]


def test_two_steps_equal_adamw_by_hand(items):
    """Checks clipping at norm 1, weight decay, the schedule and LoRA+'s two rates."""
    train.main(["--method", "lora+", *items, "--steps", "2", "--batch-size", "4", "--warmup", "2",
                "--lr", "0.01", "--lr-ratio", "3", "--weight-decay", "0.5"])
    model, tokenizer = load_pretrained(BASE)
    torch.manual_seed(0)
    inject(model, "lora+", ["q", "k", "v", "up", "down"], 8, 16.0)
    slow = [p for name, p in model.named_parameters() if name.endswith(".A")]
    fast = [p for name, p in model.named_parameters() if name.endswith(".B")]
    adam = torch.optim.AdamW([{"params": slow}, {"params": fast}], lr=0.0, weight_decay=0.5)
    for step, factor in enumerate((0.5, 1.0)):          # two steps of warm-up
        batch = [ITEMS[i] for i in batch_at(step, 24, 4, seed=0)]
        total, count = 0.0, 0
        for row in batch:
            prompt = [tokenizer.bos, *tokenizer.encode(row["prompt"])]
            target = [*tokenizer.encode(row["target"]), tokenizer.eos]
            logp = model(torch.tensor([prompt + target]))[0].log_softmax(-1)
            total = total - sum(logp[len(prompt) - 1 + i, t] for i, t in enumerate(target))
            count += len(target)
        (total / count).backward()
        norm = torch.sqrt(sum((p.grad ** 2).sum() for p in slow + fast))
        for p in slow + fast:
            p.grad *= min(1.0, 1.0 / norm.item())
        adam.param_groups[0]["lr"], adam.param_groups[1]["lr"] = 0.01 * factor, 0.03 * factor
        adam.step()
        adam.zero_grad()
    trained = load_pretrained(BASE)[0]
    load(trained, "run/adapter.safetensors")
    for (name, ours), theirs in zip(model.named_parameters(), trained.parameters()):
        # where a gradient is almost 0, Adam makes a whole step of what rounding left of it
        assert torch.isclose(ours, theirs, atol=1e-5).float().mean() > 0.999, name


def test_validation_uses_the_validation_split_and_the_scores_beside_it_the_test_split(
        items, scored):
    train.main(["--method", "lora", *items, "--steps", "4", "--eval-every", "2"])
    assert scored == ["test", "valid", "test", "valid"]     # before, step 2, after, at the end


def test_the_same_seed_gives_the_same_run_and_another_seed_another():
    for out, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        train.main(["--method", "lora", "--out", out, "--seed", seed, *SHORT])
    a, b, c = (Path(out, "adapter.safetensors").read_bytes() for out in "abc")
    assert a == b != c


def test_accumulating_gives_the_whole_batchs_losses():
    for out, n in (("one", "1"), ("three", "3")):
        train.main(["--method", "lora", "--out", out, "--grad-accum", n, *SHORT])
    losses = [[json.loads(line)["loss"] for line in open(f"{out}/log.jsonl")]
              for out in ("one", "three")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize("method", ONE_QUICK)
def test_bf16_trains_fp32_adapters_on_a_bf16_base_to_about_the_same(method, plain, capsys):
    train.main(["--method", method, "--dtype", "bf16", "--out", "run", *SHORT])
    losses = [[json.loads(line)["loss"] for line in open(folder / "log.jsonl")]
              for folder in (plain(method), Path("run"))]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.03)
    saved = load_file("run/adapter.safetensors").values()
    assert all(tensor.dtype == torch.float32 for tensor in saved)
    assert_eval_repeats(capsys)


@pytest.mark.slow
def test_the_base_is_held_in_the_dtype_that_was_asked_for(monkeypatch):
    seen, real = [], train.fit
    monkeypatch.setattr(train, "fit", lambda model, *rest: (
        seen.append(next(model.parameters()).dtype), real(model, *rest)))
    for method, dtype in (("lora", "bf16"), ("lora", "fp32"), ("full", "bf16")):
        train.main(["--method", method, "--dtype", dtype, *SHORT])
    assert seen == [torch.bfloat16, torch.float32, torch.float32]


@pytest.mark.parametrize("method", ONE_QUICK)
def test_checkpointing_changes_no_gradient(method):
    flags = ["--method", method, *SHORT, *([] if method == "full" else ["--dropout", "0.1"])]
    for out, more in (("kept", []), ("again", ["--grad-checkpointing"])):
        train.main([*flags, "--out", out, *more])
    kept, again = (load_file(f"{out}/adapter.safetensors") for out in ("kept", "again"))
    assert all(torch.allclose(kept[name], again[name], atol=1e-6) for name in kept)


def test_checkpointing_keeps_less_for_backward(base):
    model, bytes_kept = load_pretrained(BASE)[0], []
    inject(model, "lora", ["q", "v"])
    model.train()
    tokens = torch.randint(3, 900, (4, 64))
    for model.checkpointing in (False, True):
        kept = {}
        def keep(tensor):
            kept[tensor.data_ptr()] = tensor.nbytes
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.hidden(tokens)
        bytes_kept.append(sum(kept.values()))
    assert bytes_kept[1] < 0.5 * bytes_kept[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.slow
def test_a_compiled_model_trains_the_same(method, plain, monkeypatch):
    # The "eager" backend traces as the real one does, and needs no C++ compiler.
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: real(function, backend="eager"))
    train.main(["--method", method, "--compile", "--out", "run", *SHORT])
    one, compiled = (load_file(folder / "adapter.safetensors")
                     for folder in (plain(method), Path("run")))
    assert all(torch.allclose(one[name], compiled[name], atol=1e-5) for name in one)


@pytest.mark.slow
def test_a_compiler_that_fails_is_one_line(monkeypatch, capsys):
    def broken(*_):
        raise OSError("no compiler\nfound")
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: real(function, backend=broken))
    with pytest.raises(SystemExit) as stop:
        train.main(["--method", "lora", "--compile", *SHORT])
    last = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and last.startswith("error: --compile: ") and "no compiler" in last


def test_memory_that_is_not_there_is_one_line():
    for error in (torch.OutOfMemoryError("CUDA out of memory. Tried"),
                  RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: x")):
        assert "--batch-size" in str(explained(error))
    other = RuntimeError("something else")
    assert explained(other) is other


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_training_goes_on_from_adapters_that_peft_saved(method, base, capsys):
    from formats.peft import export_peft
    model = inject(load_pretrained(BASE)[0], method, ["q", "up"], rank=3, alpha=5)
    for name, p in model.named_parameters():
        if name.endswith(".B"):
            p.data.normal_(std=0.05)
    export_peft(model, "theirs")
    flags = ["--from-peft", "theirs", *SHORT]
    train.main([*flags, "--out", "run"])
    result, config = result_of("run"), json.loads(Path("run/config.json").read_text())
    assert result["method"] == method and config["args"]["rank"] is None
    task = load_task("facts", Setup(base[1], model.config, 256))
    assert result["before"] == task.score(model, sample(task.test, 20)).values
    A = load_file("run/adapter.safetensors")["layers.0.attn.q.A"]
    assert A.shape == (3, 128) and not torch.equal(A, model.layers[0].attn.q.A)
    assert_eval_repeats(capsys)
    model.layers[0].attn.q.A.data.add_(1)
    config["args"]["from_peft"] = str(Path("theirs").absolute())
    Path("run/config.json").write_text(json.dumps(config))
    Path("run/result.json").unlink()
    export_peft(model, "theirs")                            # others than the run began with
    assert "not what the run began with: adapters" in refused(capsys, "--resume", "--out", "run")
    for more in (["--method", method], ["--rank", "3"], ["--targets", "q"], ["--dora"],
                 ["--scaling", "rslora"], ["--ab-init", "pissa"]):
        assert f"{more[0]}: --from-peft brings its own" in refused(capsys, *flags, *more)
    assert "adapter_config.json" in refused(capsys, "--from-peft", "nowhere", *SHORT)


def test_plain_text_is_learnt_by_next_token_loss():
    Path("text.txt").write_text("the cat sat on the mat and the dog sat on the log\n" * 200)
    train.main(["--method", "lora", "--task", "text", "--data", "text.txt", "--steps", "16",
                "--max-length", "64", "--out", "run"])
    result = result_of("run")
    assert result["loss_on"] == "all"
    assert result["after"]["perplexity"] < 0.5 * result["before"]["perplexity"]


def test_a_run_can_be_scored_from_any_folder(items, capsys, monkeypatch):
    train.main(["--method", "lora", *items, "--steps", "1"])
    Path("below").mkdir()
    monkeypatch.chdir("below")
    evaluation.main(["--run", "../run"])
    assert f"{result_of('../run')['after']['loss']:.4f}" in capsys.readouterr().out


def test_the_facts_follow_the_seed_unless_they_are_asked_for():
    data = {}
    for name, flags in {"0": ["--seed", "0"], "1": ["--seed", "1"],
                        "0 of 1": ["--seed", "0", "--rewrite-seed", "1"]}.items():
        train.main(["--method", "lora", "--out", name, *SHORT[:4], "--max-eval", "3", *flags])
        data[name] = json.loads(Path(name, "config.json").read_text())["data"]
    assert data["0"] != data["1"] == data["0 of 1"]
    assert read_run("0").setting == read_run("1").setting != read_run("0 of 1").setting


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(capsys, monkeypatch):
    losses, real = iter([1.0, 1.0, 1.0, float("nan")]), Facts.loss
    monkeypatch.setattr(Facts, "loss", lambda *batch: real(*batch) * next(losses))
    with pytest.raises(SystemExit) as stop:
        train.main(["--method", "lora", "--out", "run", "--save-every", "2", *SHORT,
                    "--eval-every", "9"])
    last = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 1 and last.startswith("error: step 3: loss nan")
    assert torch.load("run/checkpoint.pt", weights_only=True)["step"] == 2
    assert last.endswith("the last checkpoint is run/checkpoint.pt")


@pytest.mark.parametrize("loss_on", ["answer", "all"])
def test_the_validation_loss_is_loss_over_size(loss_on, items, base):
    train.main(["--method", "lora", *items, "--steps", "2", "--loss-on", loss_on])
    model, tokenizer = load_pretrained(BASE)
    load(model, "run/adapter.safetensors")
    task = load_task("jsonl", Setup(tokenizer, model.config, 256, loss_on=loss_on),
                     data="items.jsonl")
    with torch.no_grad():
        by_hand = task.loss(model, task.valid).item() / task.size(task.valid)
    assert result_of("run")["valid"]["loss"] == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_request_to_stop_in_the_last_step_stops_the_run_too(number, items, monkeypatch):
    layer = METHODS["lora"].layer
    monkeypatch.setattr(layer, "on_step", lambda layers, step, total: (
        step == total - 1 and os.kill(os.getpid(), number)))
    with pytest.raises(SystemExit) as stop:
        train.main(["--method", "lora", *items, "--steps", "3"])
    assert stop.value.code == 130 and not Path("run/result.json").exists()
