import errno
import functools
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
from runs import assert_eval_repeats, refused, result_of
from safetensors.torch import load_file, save_file

import convert
import eval as evaluation
import train
from data.task import Scores
from data.world import VERSION
from experiments.results import read_run
from formats.checkpoint import load_pretrained
from methods import METHODS, inject, load
from support import flags as flags_of_train
from support.errors import UserError
from support.run import Run
from train import batch_at, lr_factor, slices

SHORT = ["--steps", "6", "--batch-size", "8", "--max-eval", "20", "--eval-every", "3"]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Each test runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """method -> the folder of its run with SHORT, made once for all tests: none writes there."""
    @functools.cache
    def folder_of(method: str) -> Path:
        folder = tmp_path_factory.mktemp("plain") / "run"
        train.main(["--method", method, "--out", str(folder), *SHORT])
        return folder
    return folder_of


# ---- the loop's parts

def test_learning_rate_rises_to_its_peak_and_falls_to_zero():
    # 10 steps, 4 of warm-up: quarters up to 1, then sixths down; step 10 would be 0
    factors = [lr_factor(step, 10, 4) for step in range(10)]
    expected = [1 / 4, 2 / 4, 3 / 4, 1, 6 / 6, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    assert factors == pytest.approx(expected)
    assert lr_factor(0, 10, 0) == 1


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
    assert slices([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4, 5]]


# ---- whole runs

@pytest.mark.parametrize("method", METHODS)
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


ITEMS = [{"prompt": f"Item {i} weighs", "target": f" {i * 7 % 10} stones."} for i in range(30)]


@pytest.fixture
def items():
    Path("items.jsonl").write_text("\n".join(map(json.dumps, ITEMS)))
    return ["--task", "jsonl", "--data", "items.jsonl", "--out", "run"]


@pytest.mark.parametrize("method", METHODS)
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
    assert evaluation.interval(0.5, 10) == pytest.approx((0.23659, 0.76341), abs=1e-5)
    low, high = evaluation.interval(0.0, 10)
    assert abs(low) < 1e-9 and high == pytest.approx(0.27754, abs=1e-5)


def test_metrics_of_several_sets_become_a_table(capsys):
    values = {"loss": 1.5, "accuracy/A": 0.5, "accuracy/Avg.": 0.25, "unparsed/A": 0.1,
              "unparsed/Avg.": 0.2}
    evaluation.print_scores(Scores(values, {"accuracy/A": 10}, []))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [["loss", "1.5000"], ["A", "Avg."], ["accuracy", "0.5000", "0.2500"],
                     ["95", "%", "within", "+-0.2634"], ["unparsed", "0.1000", "0.2000"]]


def test_two_steps_equal_adamw_by_hand(items):
    """Clipping at norm 1, weight decay, the schedule, and LoRA+'s two rates are really applied."""
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
        items, monkeypatch):
    asked, real = [], train.score
    monkeypatch.setattr(train, "score", lambda *args: asked.append(args[4]) or real(*args))
    train.main(["--method", "lora", *items, "--steps", "4", "--eval-every", "2"])
    assert asked == ["test", "valid", "test", "valid"]      # before, step 2, after, at the end


@pytest.mark.parametrize("method", METHODS)
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
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


STOPPED = ["--method", "lora", "--save-every", "2", *SHORT]


@pytest.fixture(scope="session")
def stopped_once(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stopped_once")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train.main([*STOPPED, "--out", "whole"])
        patch.setattr(train.Run, "finish", lambda *_: sys.exit("killed"))
        with pytest.raises(SystemExit):
            train.main([*STOPPED, "--out", "stopped"])
    return folder


@pytest.fixture
def stopped(stopped_once):
    """A run of 6 steps in the folder `stopped` that ended before its result; the flags it had."""
    shutil.copytree(stopped_once, ".", dirs_exist_ok=True)
    return STOPPED


def test_a_damaged_checkpoint_falls_back_to_the_one_before(stopped, capsys):
    newest = Path("stopped/checkpoint.pt")
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1                         # one bit, which torch does not see
    newest.write_bytes(content)
    train.main(["--resume", "--out", "stopped"])
    error = capsys.readouterr().err
    assert "checkpoint.pt: cannot resume from it" in error
    assert "checkpoint-before.pt, step 4" in error
    for name in ("adapter.safetensors", "log.jsonl"):
        assert Path("stopped", name).read_bytes() == Path("whole", name).read_bytes()
    assert not Path("stopped/checkpoint-before.pt").exists()


def test_a_damaged_checkpoint_never_takes_the_place_of_the_one_before(stopped, monkeypatch):
    newest, before = Path("stopped/checkpoint.pt"), Path("stopped/checkpoint-before.pt")
    newest.write_bytes(newest.read_bytes()[:1000])
    good = before.read_bytes()
    Path("stopped/.checkpoint.pt.1.tmp").write_bytes(b"left over by a process that was killed")
    monkeypatch.setattr(train.Run, "checkpoint", lambda *_: sys.exit("killed"))
    with pytest.raises(SystemExit):
        train.main(["--resume", "--out", "stopped"])
    assert before.read_bytes() == good and not newest.exists()
    assert not list(Path("stopped").glob(".*"))


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(stopped, capsys):
    for name in ("checkpoint.pt", "checkpoint-before.pt"):
        path = Path("stopped", name)
        path.write_bytes(path.read_bytes()[:1000])
    kept = {path.name: path.read_bytes() for path in Path("stopped").iterdir()}
    assert "checkpoint-before.pt" in refused(capsys, "--resume", "--out", "stopped")
    assert kept == {path.name: path.read_bytes() for path in Path("stopped").iterdir()}


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
        patch.setattr(train.Run, "finish", lambda *_: sys.exit("killed"))
        with pytest.raises(SystemExit):
            train.main(["--method", "lora", *items, "--steps", "2", "--model", "model"])
    Path("items.jsonl").write_text("\n".join(map(json.dumps, ITEMS[::-1])))
    assert "its train data is not" in refused(capsys, "--resume", "--out", "run")
    Path("items.jsonl").write_text("\n".join(map(json.dumps, ITEMS)))
    weights = load_file("model/model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, "model/model.safetensors", {"format": "pt"})
    assert "its base is not" in refused(capsys, "--resume", "--out", "run")
    assert "its base is not" in refused(capsys, "--run", "run", main=evaluation.main)
    assert "its base is not" in refused(capsys, "--run", "run", "--to", "out", main=convert.main)


@pytest.mark.parametrize("name, value", [
    ("model", None), ("model", 3), ("dtype", "fp99"), ("max_length", "x"), ("task", 5),
    ("task", "nope"), ("steps", "x"), ("method", "nope"), ("device", "gpu"), ("beams", "two"),
    ("lr", "0.015"), ("lr", float("nan")), ("lr", None), ("steps", None), ("steps", -3),
    ("steps", "6"), ("targets", ["q"]), ("targets", None), ("alpha", None), ("seed", None),
    ("device", None), ("lr_ratio", None), ("eval_batch_size", 0), ("r1", 4), ("command", None),
    ("nonsense", 1), ("save_every", 3)])
def test_a_config_that_was_edited_is_one_line(name, value, stopped, capsys):
    path = Path("stopped/config.json")
    config = json.loads(path.read_text())
    config["args"][name] = value
    path.write_text(json.dumps(config))
    refused(capsys, "--resume", "--out", "stopped")
    if name != "save_every":            # a value that a run may have: the checkpoint tells
        Path("stopped/checkpoint.pt").unlink()
        Path("stopped/checkpoint-before.pt").unlink()
        assert "config.json" in refused(capsys, "--resume", "--out", "stopped")


def test_a_checkpoint_or_an_adapter_of_another_run_is_refused(stopped, capsys):
    other = [*stopped, "--seed", "3"]
    train.main([*other, "--out", "other"])
    for name in ("checkpoint.pt", "checkpoint-before.pt"):
        shutil.copy("other/checkpoint.pt", f"stopped/{name}")
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
    """As on a full disk, torch and safetensors report it each in a way of their own."""
    kept = Path("stopped/checkpoint.pt").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        for out in ("other", "stopped"):
            with pytest.raises(SystemExit) as stop:
                train.main([*stopped, "--out", out, "--resume"])
            last = capsys.readouterr().err.splitlines()[-1]
            assert stop.value.code == 2 and f"error: {out}/" in last and "cannot write" in last
        assert "cannot write" in refused(capsys, "--run", "whole", "--to", "out", main=convert.main)
        assert "cannot write" in refused(capsys, "--run", "whole", "--peft", "p", main=convert.main)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert Path("stopped/checkpoint.pt").read_bytes() == kept


def test_a_full_disk_loses_no_earlier_checkpoint(monkeypatch, capsys):
    save = torch.save
    def full(content, path):
        if content["step"] == 4:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(content, path)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit) as stop:
        train.main(["--method", "lora", "--out", "run", "--save-every", "2", *SHORT])
    assert stop.value.code == 2
    assert "checkpoint.pt: cannot write: No space left on device" in capsys.readouterr().err
    monkeypatch.setattr(torch, "save", save)
    assert torch.load("run/checkpoint.pt", weights_only=True)["step"] == 2
    train.main(["--resume", "--out", "run"])
    assert result_of("run") and not list(Path("run").glob(".*"))


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


ADAPTERS = [method for method in METHODS if method != "full"]


@pytest.mark.parametrize("method", METHODS)
def test_bf16_trains_fp32_adapters_on_a_bf16_base_to_about_the_same(method, plain, capsys):
    train.main(["--method", method, "--dtype", "bf16", "--out", "run", *SHORT])
    losses = [[json.loads(line)["loss"] for line in open(folder / "log.jsonl")]
              for folder in (plain(method), Path("run"))]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.03)
    saved = load_file("run/adapter.safetensors").values()
    assert all(tensor.dtype == torch.float32 for tensor in saved)
    assert_eval_repeats(capsys)


def test_the_base_is_held_in_the_dtype_that_was_asked_for(monkeypatch):
    seen, real = [], train.fit
    monkeypatch.setattr(train, "fit", lambda model, *rest: (
        seen.append(next(model.parameters()).dtype), real(model, *rest)))
    for method, dtype in (("lora", "bf16"), ("lora", "fp32"), ("full", "bf16")):
        train.main(["--method", method, "--dtype", dtype, *SHORT])
    assert seen == [torch.bfloat16, torch.float32, torch.float32]


@pytest.mark.parametrize("method", METHODS)
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
    monkeypatch.setattr(torch, "compile", lambda module: real(module, backend="eager"))
    train.main(["--method", method, "--compile", "--out", "run", *SHORT])
    one, compiled = (load_file(folder / "adapter.safetensors")
                     for folder in (plain(method), Path("run")))
    assert all(torch.allclose(one[name], compiled[name], atol=1e-5) for name in one)


def test_a_compiler_that_fails_is_one_line(monkeypatch, capsys):
    def broken(*_):
        raise OSError("no compiler\nfound")
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module: real(module, backend=broken))
    with pytest.raises(SystemExit) as stop:
        train.main(["--method", "lora", "--compile", *SHORT])
    last = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and last.startswith("error: --compile: ") and "no compiler" in last


def test_memory_that_is_not_there_is_one_line():
    for error in (torch.OutOfMemoryError("CUDA out of memory. Tried"),
                  RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: x")):
        assert "--batch-size" in str(train.explained(error))
    other = RuntimeError("something else")
    assert train.explained(other) is other


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
    assert result["before"] == train.score(
        model, base[1], train.load_task("facts", base[1], 256), 20).values
    A = load_file("run/adapter.safetensors")["layers.0.attn.q.A"]
    assert A.shape == (3, 128) and not torch.equal(A, model.layers[0].attn.q.A)
    assert_eval_repeats(capsys)
    model.layers[0].attn.q.A.data.add_(1)
    config["args"]["from_peft"] = str(Path("theirs").absolute())
    Path("run/config.json").write_text(json.dumps(config))
    Path("run/result.json").unlink()
    export_peft(model, "theirs")                            # others than the run began with
    assert "its adapters is not" in refused(capsys, "--resume", "--out", "run")
    for more in (["--method", method], ["--rank", "3"], ["--targets", "q"]):
        assert f"{more[0]}: --from-peft brings its own" in refused(capsys, *flags, *more)
    assert "adapter_config.json" in refused(capsys, "--from-peft", "nowhere", *SHORT)


def test_plain_text_is_learnt_by_next_token_loss():
    Path("text.txt").write_text("the cat sat on the mat and the dog sat on the log\n" * 200)
    train.main(["--method", "lora", "--task", "text", "--data", "text.txt", "--steps", "16",
                "--max-length", "64", "--out", "run"])
    result = result_of("run")
    assert result["loss_on"] == "all"
    assert result["after"]["perplexity"] < 0.5 * result["before"]["perplexity"]


def test_default_folders_never_collide():
    flags = ["--method", "lora", "--rank", "2", *SHORT]
    for name in ("facts-lora-r2-s0", "facts-lora-r2-s0-2"):
        train.main(flags)
        assert result_of(f"runs/{name}")


# ---- wrong input

@pytest.mark.parametrize("flags, said", [
    ([], "--method is missing"),
    (["--method", "dial"], "--method dial: unknown; did you mean dual?"),
    (["--method", "lora", "--rnk", "4"], "--rnk: unknown flag; did you mean --rank?"),
    (["--method", "lora", "--r1", "4"], "--r1: method lora does not use it"),
    (["--method", "full", "--rank", "4"], "--rank: method full does not use it"),
    (["--method", "lora", "--rank", "0"], "rank"),
    (["--method", "lora", "--rank", "4000"], "rank"),
    (["--method", "lora", "--rank", "two"], "--rank"),
    (["--method", "lora", "--targets", "q,qq"], "qq"),
    (["--method", "lora", "--lr", "-1"], "--lr"),
    (["--method", "lora", "--lr", "nan"], "--lr"),
    (["--method", "lora", "--steps", "0"], "--steps"),
    (["--method", "lora", "--steps", "3", "--epochs", "1"], "not both"),
    (["--method", "lora", "--batch-size", "4", "--grad-accum", "5"], "--batch-size 4"),
    (["--method", "lora", "--dtype", "fp16"], "--dtype"),
    (["--method", "lora", "--epochs", "1e308"], "--epochs"),
    (["--method", "lora", "--batch-size", "1000000000000"], "--batch-size"),
    (["--method", "lora", "--out", "", "--overwrite"], "--out"),
    (["--method", "lora", "--resume"], "--out"),
    (["--method", "lora", "--task", "fact"], "--task fact: unknown; did you mean facts?"),
    (["--method", "lora", "--task", "text"], "needs --data"),
    (["--method", "lora", "--data", "x.txt"], "--data: task facts does not use it"),
    (["--method", "lora", "--task", "text", "--data", "none.txt"], "none.txt"),
    (["--method", "lora", "--model", "nowhere"], "nowhere"),
    (["--method", "lora", "--device", "foo"], "--device"),
    (["--method", "lora", "--device", "meta"], "--device"),
    (["--method", "lora+", "--lr-ratio", "1e300"], "--lr-ratio"),
    (["--method", "dual", "--steps", "1"], "at least 2 steps"),
    (["--method", "dash", "--steps", "1"], "at least 2 steps"),
    (["--method", "adalora", "--t-init", "50", "--t-final", "50", "--steps", "100"], "t_init 50"),
    (["--method", "adalora", "--lr-ratio", "4"], "--lr-ratio: method adalora does not use it"),
    (["--method", "lora", "--norm-gradient"], "--norm-gradient: method lora does not use it"),
    (["--method", "lora", "--seed", "99999999999999999999"], "--seed"),
    (["--method", "lora", "--lr", "1e38"], "--lr"),
    (["--method", "lora", "--rank", "0"], "--rank 0"),
    (["--method", "lora", "--alpha", "inf"], "alpha must be above 0 and finite"),
    (["--method", "lora", "--device", "hpu"], "--device: hpu: neither cpu"),
    (["--method", "lora", "--out", "x" * 300], "File name too long"),
    (["--resume"], "--out"),
    (["--resume", "--out", "none"], "none"),
])
def test_wrong_flags_end_with_one_line_and_write_nothing(flags, said, capsys):
    assert said in refused(capsys, *flags)
    assert list(Path().iterdir()) == []


def test_an_existing_folder_is_kept_unless_overwriting_is_asked_for(capsys):
    Path("run").mkdir()
    Path("run/mine.txt").write_text("precious")
    assert "--overwrite" in refused(capsys, "--method", "lora", "--out", "run", *SHORT)
    assert os.listdir("run") == ["mine.txt"]
    train.main(["--method", "lora", "--out", "run", "--overwrite", *SHORT])
    assert Path("run/mine.txt").read_text() == "precious" and result_of("run")


def test_overwriting_spares_what_is_no_run(capsys):
    """A model's folder has a config.json, too."""
    shutil.copytree(BASE, "model")
    kept = {path.name: path.read_bytes() for path in Path("model").iterdir()}
    error = refused(capsys, "--method", "lora", "--out", "model", "--overwrite", *SHORT)
    assert "model/config.json: not the config.json of a run" in error
    Path("logs").mkdir()
    Path("logs/log.jsonl").write_text("mine")
    assert "logs" in refused(capsys, "--method", "lora", "--out", "logs", "--overwrite", *SHORT)
    assert kept == {path.name: path.read_bytes() for path in Path("model").iterdir()}
    assert Path("logs/log.jsonl").read_text() == "mine"


@pytest.mark.parametrize("error, status", [(KeyboardInterrupt, 130), (UserError("no"), 2)])
def test_overwriting_loses_nothing_before_the_first_step_is_done(error, status, monkeypatch,
                                                                 capsys):
    train.main(["--method", "lora", "--out", "run", *SHORT])
    kept = {path.name: path.read_bytes() for path in Path("run").iterdir()}
    flags = ["--method", "dora", "--out", "run", "--overwrite", *SHORT]

    def stop(*_):
        raise error
    with monkeypatch.context() as patch:
        patch.setattr(train, "target_loss", stop)
        with pytest.raises(SystemExit) as stopped:
            train.main(flags)
    assert stopped.value.code == status
    assert "goes on" not in capsys.readouterr().err
    assert kept == {path.name: path.read_bytes() for path in Path("run").iterdir()}
    train.main(flags)
    assert result_of("run")["method"] == "dora"
    assert len(Path("run/log.jsonl").read_text().splitlines()) == 6


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
    run.claim(Namespace(out="stopped", resume=True))
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


def test_flags_that_a_text_task_cannot_follow_are_refused(capsys):
    Path("t.txt").write_text("some words to learn from\n" * 50)
    flags = ["--method", "lora", "--task", "text", "--data", "t.txt"]
    assert "--max-length 1" in refused(capsys, *flags, "--max-length", "1")
    assert "--loss-on answer" in refused(capsys, *flags, "--loss-on", "answer")
    assert "--predictions: task text" in refused(
        capsys, "--model", str(BASE), "--task", "text", "--data", "t.txt",
        "--predictions", "out.jsonl", main=evaluation.main)
    assert os.listdir() == ["t.txt"]


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
    with pytest.raises(SystemExit) as stop:
        train.main([*flags, "--out", "run", "--overwrite"])
    last = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and "run/result.json: cannot write" in last
    assert Path("run/result.json/x").is_dir() and Path("run/adapter.safetensors").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
def test_a_disk_that_fills_up_in_a_log_line_is_one_line(monkeypatch, capsys):
    begin = train.Run.begin
    monkeypatch.setattr(train.Run, "begin", lambda run, *how: (
        begin(run, *how), (run.folder / "log.jsonl").symlink_to("/dev/full")))
    with pytest.raises(SystemExit) as stop:
        train.main(["--method", "lora", "--out", "run", *SHORT])
    last = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and "run/log.jsonl: cannot write: No space left" in last


def test_half_of_a_surrogate_pair_is_named_before_a_terminal_fails_on_it(capsys):
    Path("data.jsonl").write_text('{"prompt": "a \\ud800", "target": "b"}\n' * 9)
    flags = ["--method", "lora", "--task", "jsonl", "--data", "data.jsonl"]
    assert "data.jsonl:1: holds half of a surrogate pair" in refused(capsys, *flags)


def test_a_wrong_line_of_data_is_named(capsys):
    Path("data.jsonl").write_text('{"prompt": "a", "target": "b"}\n\n{"prompt": "a"}\n')
    flags = ["--method", "lora", "--task", "jsonl", "--data", "data.jsonl"]
    assert "data.jsonl:3:" in refused(capsys, *flags)


@pytest.mark.parametrize("row", [0, -1])        # in the training part, in the test part
def test_a_target_that_does_not_fit_is_an_error_before_anything_is_lost(row, items, capsys):
    train.main(["--method", "lora", *items, "--steps", "1"])
    kept = {path.name: path.read_bytes() for path in Path("run").iterdir()}
    rows = ITEMS.copy()
    rows[row] = {"prompt": "a", "target": "b " * 100}
    Path("items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ["--method", "lora", *items, "--max-length", "20", "--overwrite"]
    line = refused(capsys, *flags)
    assert "--max-length 20" in line and f"items.jsonl:{row % len(ITEMS) + 1}: a target of" in line
    assert kept == {path.name: path.read_bytes() for path in Path("run").iterdir()}


def test_a_run_can_be_scored_from_any_folder(items, capsys, monkeypatch):
    train.main(["--method", "lora", *items, "--steps", "1"])
    Path("below").mkdir()
    monkeypatch.chdir("below")
    evaluation.main(["--run", "../run"])
    assert f"{result_of('../run')['after']['loss']:.4f}" in capsys.readouterr().out


def test_a_changed_test_part_is_refused_by_resume_and_by_eval(items, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "finish", lambda *_: sys.exit("killed"))
        with pytest.raises(SystemExit):
            train.main(["--method", "lora", *items, "--steps", "2"])
    changed = ITEMS[:-1] + [{"prompt": "Item 29 weighs", "target": " nothing."}]
    Path("items.jsonl").write_text("\n".join(map(json.dumps, changed)))
    assert "its test data is not" in refused(capsys, "--resume", "--out", "run")
    assert "its test data is not" in refused(capsys, "--run", "run", main=evaluation.main)
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


def test_the_score_before_is_computed_once_and_can_be_left_out(items, capsys, monkeypatch):
    asked, real = [], train.score
    monkeypatch.setattr(train, "score", lambda *args: asked.append(args[4]) or real(*args))
    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "finish", lambda *_: sys.exit("killed"))
        with pytest.raises(SystemExit):
            train.main(["--method", "lora", *items, "--steps", "2", "--eval-every", "9"])
    before = json.loads(Path("run/config.json").read_text())["before"]
    with monkeypatch.context() as patch:        # stopped while it is computed: the run has begun
        patch.setattr(train, "score", lambda *_: exec("raise KeyboardInterrupt"))
        with pytest.raises(SystemExit):
            train.main(["--method", "lora", *items[:-1], "early", "--steps", "2"])
    assert "before" not in json.loads(Path("early/config.json").read_text())
    train.main(["--resume", "--out", "early"])
    assert result_of("early")["before"] == before
    del asked[3:]
    train.main(["--resume", "--out", "run"])
    assert asked == ["test", "test", "valid", "test", "valid"]      # resumed: no "before" again
    assert result_of("run")["before"] == before and set(before) == {"loss", "perplexity", "exact"}
    asked.clear()
    train.main(["--method", "lora", *items, "--steps", "2", "--eval-every", "9", "--skip-before",
                "--overwrite"])
    assert asked == ["test", "valid"] and result_of("run")["before"] is None
    assert read_run("run").result["before"] is None
    capsys.readouterr()


@pytest.mark.parametrize("method", METHODS)
def test_another_model_gets_the_method_s_rate_for_large_models_and_says_so(method, capsys):
    shutil.copytree(BASE, "model")
    train.main(["--method", method, "--model", "model", "--out", "run", *SHORT[:4], "--max-eval",
                "3", "--skip-before"])
    lr = json.loads(Path("run/config.json").read_text())["args"]["lr"]
    assert lr == METHODS[method].large_lr < METHODS[method].lr
    whose = METHODS[method].large_lr_from
    assert f"learning rate {lr:g} ({whose} for large models)" in capsys.readouterr().out
    assert flags_of_train.default_lr(method, str(BASE)) == METHODS[method].lr


def test_the_facts_follow_the_seed_unless_they_are_asked_for():
    data = {}
    for name, flags in {"0": ["--seed", "0"], "1": ["--seed", "1"],
                        "0 of 1": ["--seed", "0", "--rewrite-seed", "1"]}.items():
        train.main(["--method", "lora", "--out", name, *SHORT[:4], "--max-eval", "3", *flags])
        data[name] = json.loads(Path(name, "config.json").read_text())["test_data"]
    assert data["0"] != data["1"] == data["0 of 1"]
    assert read_run("0").setting == read_run("1").setting != read_run("0 of 1").setting


def test_a_run_that_its_method_refuses_is_refused_before_the_texts_are_read(items, capsys,
                                                                           monkeypatch):
    monkeypatch.setattr(train, "encode_all", lambda *_, **__: pytest.fail("tokenized"))
    assert "to prune in" in refused(capsys, "--method", "adalora", *items, "--steps", "1")
    assert "layers.0.attn.q: rank" in refused(capsys, "--method", "lora", *items, "--rank", "999")
    assert not Path("run").exists()


@pytest.mark.parametrize("out, said", [("-x", "--out -x"), ("", "--out"), ("a\udcff", "not UTF-8")])
def test_a_folder_s_name_that_cannot_be_used_is_refused_at_once(out, said, capsys):
    assert said in refused(capsys, "--method", "lora", f"--out={out}")


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


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(capsys, monkeypatch):
    losses = iter([1.0, 1.0, 1.0, float("nan")])
    real = train.target_loss
    monkeypatch.setattr(train, "target_loss", lambda *batch: real(*batch) * next(losses))
    with pytest.raises(SystemExit) as stop:
        train.main(["--method", "lora", "--out", "run", "--save-every", "2", *SHORT])
    last = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 1 and last.startswith("error: step 3: loss nan")
    assert torch.load("run/checkpoint.pt", weights_only=True)["step"] == 2
    assert last.endswith("the last good state is run/checkpoint.pt")


@pytest.mark.parametrize("every, good", [("1", "run/checkpoint-before.pt"), ("3", None)])
def test_a_checkpoint_of_the_weights_that_fail_is_not_called_good(every, good, capsys,
                                                                  monkeypatch):
    losses = iter([1.0, 1.0, 1.0, float("nan")])
    real = train.target_loss
    monkeypatch.setattr(train, "target_loss", lambda *batch: real(*batch) * next(losses))
    with pytest.raises(SystemExit):
        train.main(["--method", "lora", "--out", "run", "--save-every", every, *SHORT])
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith(f"the last good state is {good}" if good else "no good state was saved")


@pytest.mark.parametrize("flags, said", [
    ([], "--run"),
    (["--run", "none"], "none"),
    (["--run", "a", "--model", "b"], "--run"),
    (["--run", "a", "--task", "facts"], "--task"),
    (["--model", "nowhere", "--task", "facts"], "nowhere"),
    (["--model", "nowhere"], "--task"),
    (["--run", "a", "--batch-size", "0"], "--batch-size"),
    (["--run", "a", "--max-eval", "0"], "--max-eval"),
    (["--run", "a", "--device", "foo"], "--device"),
    (["--run", ""], "not a run folder"),
    (["--model", "x", "--prompt", "Hi", "--max-eval", "3"], "--max-eval: --prompt scores nothing"),
    (["--run", "x", "--prompt", "Hi", "--beams", "3"], "--beams: --prompt scores nothing"),
    (["--model", "x", "--task", "facts", "--max-new-tokens", "3"], "--max-new-tokens"),
    (["--model", "x", "--task", "facts", "--predictions", "no/where"], "--predictions: no/where"),
    (["--model", "x", "--task", "facts", "--predictions", os.devnull], os.devnull),
    (["--model", "x" * 300, "--task", "facts"], "File name too long"),
])
def test_eval_refuses_wrong_flags_in_one_line(flags, said, capsys):
    assert said in refused(capsys, *flags, main=evaluation.main)
