import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import BASE
from encoders import encoder_of, opens, rte_folder
from runs import ITEMS, ONE_QUICK, SHORT, refused, result_of

import eval as evaluation
import lora
import train
from data import TASKS, recipes
from data.text import Text
from methods import METHODS
from support import flags as flags_of_train

pytestmark = pytest.mark.usefixtures("empty_folder")


@pytest.mark.parametrize("flags, said", [
    ([], "--method is missing"),
    (["--method", "dial"], "--method dial: unknown; did you mean dual?"),
    (["--method", "LoRA"], "--method LoRA: unknown; did you mean lora?"),
    (["--method", "lora", "--model", "gpt2-medium"], "the hub has openai-community/gpt2-medium"),
    (["--method", "lora", "--rnk", "4"], "--rnk: unknown flag; did you mean --rank?"),
    (["--method", "lora", "--r1", "4"], "--r1: method lora does not use it"),
    (["--method", "full", "--rank", "4"], "--rank: method full does not use it"),
    (["--method", "lora", "--rank", "0"], "rank"),
    (["--method", "lora", "--targets", "q,qq"], "qq"),
    (["--method", "lora", "--lr", "nan"], "--lr"),
    (["--method", "lora", "--steps", "3", "--epochs", "1"], "not both"),
    (["--method", "lora", "--batch-size", "4", "--grad-accum", "5"], "--batch-size 4"),
    (["--method", "lora", "--dtype", "fp16"], "--dtype"),
    (["--method", "lora", "--out", "", "--overwrite"], "--out"),
    (["--method", "lora", "--resume"], "--out"),
    (["--method", "lora", "--task", "fact"], "--task fact: unknown; did you mean facts?"),
    (["--method", "lora", "--task", "text"], "needs --data"),
    (["--method", "lora", "--data", "x.txt"], "--data: task facts does not use it"),
    (["--method", "lora", "--task", "text", "--data", "none.txt"], "none.txt"),
    (["--method", "lora", "--model", "nowhere"], "nowhere"),
    (["--method", "lora+", "--lr-ratio", "1e300"], "--lr-ratio"),
    (["--method", "dual", "--steps", "1"], "at least 2 steps"),
    (["--method", "adalora", "--t-init", "50", "--t-final", "50", "--steps", "100"], "t_init 50"),
    (["--method", "adalora", "--lr-ratio", "4"], "--lr-ratio: method adalora does not use it"),
    (["--method", "full", "--dora"], "dora goes over another method's update, not over full"),
    (["--method", "dora", "--dora"], "not over dora"),
    (["--method", "dual", "--dora", "--norm-gradient"], "--norm-gradient: method dual does not"),
    (["--method", "hira", "--alpha", "4"], "--alpha: method hira does not use it"),
    (["--method", "dual", "--scaling", "rslora"], "--scaling: method dual does not use it"),
    (["--method", "lora", "--scaling", "alpha"], "--scaling: invalid choice: 'alpha'"),
    (["--method", "lora", "--ab-init", "pissa", "--rank", "200"], "from 1 to 128, not 200"),
    (["--method", "loha", "--rank", "1"], "of at least 2, not 1"),
    (["--method", "lora", "--device", "hpu"], "--device: hpu: neither cpu"),
    (["--method", "lora", "--out", "x" * 300], "File name too long"),
    (["--resume", "--out", "none"], "none"),
])
def test_wrong_flags_end_with_one_line_and_write_nothing(flags, said, capsys):
    assert said in refused(capsys, *flags)
    assert list(Path().iterdir()) == []


def test_lora_with_dora_is_the_run_of_dora():
    def filled(*flags: str) -> dict:
        args = flags_of_train.parse_flags(list(flags))
        flags_of_train.check_flags(args)
        return {name: value for name, value in vars(args).items() if name != "given"}

    assert filled("--method", "lora", "--dora", "--norm-gradient") == filled(
        "--method", "dora", "--norm-gradient")
    assert filled("--method", "dual", "--dora")["method"] == "dual"


def test_a_resumed_run_keeps_its_magnitude(capsys):
    flags = ["--method", "hira", "--skip-before", *SHORT, "--out"]
    train.main([*flags, "run", "--dora"])
    assert "hira with DoRA on facts" in capsys.readouterr().out
    for same in ([], ["--dora"]):           # flags that are left out are the run's
        with pytest.raises(SystemExit) as stop:
            train.main([*flags, "run", "--resume", *same])
        assert stop.value.code == 0
    assert "dora" in refused(capsys, *flags, "run", "--no-dora", "--resume")
    train.main([*flags, "plain"])
    assert "dora" in refused(capsys, *flags, "plain", "--dora", "--resume")


def test_lora_with_a_magnitude_can_be_given_again(capsys):
    command = ["--method", "lora", "--dora", "--skip-before", *SHORT, "--out", "run"]
    train.main([*command, "--resume"])
    with pytest.raises(SystemExit) as stop:
        train.main([*command, "--resume"])
    assert stop.value.code == 0
    Path("run/result.json").unlink()
    train.main([*command, "--resume"])
    assert result_of("run")["method"] == "dora"


def test_a_run_goes_on_where_pissa_s_last_bits_are_others(monkeypatch):
    """As with another number of threads, or on another machine: singular vectors may turn."""
    command = ["--method", "lora", "--ab-init", "pissa", "--skip-before", *SHORT, "--out", "run",
               "--save-every", "1"]
    train.main(command)
    result = result_of("run")
    Path("run/result.json").unlink()
    factors = lora.best_factors
    monkeypatch.setattr(lora, "best_factors", lambda *args: [-part for part in factors(*args)])
    train.main([*command, "--resume"])
    assert result_of("run")["after"] == result["after"]


RTE = ["--method", "adalora", "--task", "glue/rte", "--data-dir", "."]


def followed(*flags: str) -> dict:
    """Returns the flags as check_flags() leaves them."""
    args = flags_of_train.parse_flags([*RTE, *flags])
    flags_of_train.check_flags(args)
    return vars(args)


def test_a_recipe_fills_in_what_the_user_left_out():
    args = followed("--recipe", "adalora", "--lr", "7e-4", "--batch-size", "8")
    row = dict(max_length=320, epochs=50, warmup=200, head_dropout=0.2, weight_decay=0.01,
               alpha=32, gamma=0.3, t_init=600, delta_t=1, t_final=1800, rank=2,
               targets="q,k,v,o,up,down")
    assert {name: args[name] for name in row} == row
    assert (args["lr"], args["batch_size"]) == (7e-4, 8)                    # the user's
    args = followed("--recipe", "adalora", "--steps", "9")
    assert args["epochs"] is None and args["steps"] == 9
    args = followed("--recipe", "lora", "--method", "lora")
    assert (args["rank"], args["alpha"], args["targets"]) == (8, 16, "q,v")
    assert (args["lr"], args["epochs"], args["batch_size"]) == (5e-4, 80, 32)
    assert args["warmup"] is None                                           # 6 % of the run
    args = followed("--recipe", "adalora", "--method", "lora")
    assert args["gamma"] is None and (args["rank"], args["lr"]) == (2, 1.2e-3)
    assert followed("--recipe", "lora", "--method", "full")["rank"] == 8    # its default, unused


@pytest.mark.parametrize("name, rows", [("lora", recipes.LORA), ("adalora", recipes.ADALORA)])
def test_every_set_has_a_line_in_each_recipe(name, rows):
    known = vars(flags_of_train.parse_flags(RTE))
    assert {f"glue/{of_set}" for of_set in rows} == {task for task in TASKS if "glue" in task}
    for of_set in rows:
        found = recipes.recipe(name, f"glue/{of_set}")
        columns, same = recipes.RECIPES[name][1:]
        assert list(found) == [*columns, *same] and found.keys() <= known.keys()
        assert len(rows[of_set]) == len(columns) and found["lr"] < 3e-3 <= found["epochs"]


@pytest.mark.parametrize("flags, said", [
    (["--method", "lora", "--recipe", "lora"], "--recipe lora: has no line for task facts"),
    ([*RTE, "--recipe", "adalor"], "--recipe adalor: unknown; did you mean adalora?"),
])
def test_a_recipe_that_does_not_fit_is_refused(flags, said, capsys):
    assert said in refused(capsys, *flags)


def test_the_header_says_what_the_recipe_set(monkeypatch, tmp_path, capsys):
    opens(monkeypatch, lambda dtype: encoder_of(dtype=dtype))
    train.main([*RTE[:-1], str(rte_folder(tmp_path)), "--recipe", "adalora", "--model", "x",
                "--steps", "4", "--t-init", "1", "--t-final", "1", "--lr", "1e-3", "--out", "run"])
    shown = capsys.readouterr().out
    flags = json.loads(Path("run/config.json").read_text())["args"]
    line = next(line for line in shown.splitlines() if line.startswith("recipe"))
    for name in ("warmup", "head_dropout", "alpha", "gamma", "rank", "targets", "weight_decay"):
        assert f"{name} {flags[name]}".removesuffix(".0") in line
    for name in ("lr", "t_init", "epochs", "max_length"):
        assert f" {name} " not in line


def test_flags_that_a_text_task_cannot_follow_are_refused(capsys):
    Path("t.txt").write_text("some words to learn from\n" * 50)
    flags = ["--method", "lora", "--task", "text", "--data", "t.txt"]
    assert "--max-length 1" in refused(capsys, *flags, "--max-length", "1")
    assert "--loss-on answer" in refused(capsys, *flags, "--loss-on", "answer")
    assert "--predictions: task text" in refused(
        capsys, "--model", str(BASE), "--task", "text", "--data", "t.txt",
        "--predictions", "out.jsonl", main=evaluation.main)
    assert os.listdir() == ["t.txt"]


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


@pytest.mark.parametrize("method", ONE_QUICK)
def test_another_model_gets_the_method_s_rate_for_large_models_and_says_so(method, capsys):
    shutil.copytree(BASE, "model")
    train.main(["--method", method, "--model", "model", "--out", "run", *SHORT[:4], "--max-eval",
                "3", "--skip-before"])
    lr = json.loads(Path("run/config.json").read_text())["args"]["lr"]
    if METHODS[method].large_lr is not None:
        assert lr == METHODS[method].large_lr < METHODS[method].lr
        whose = METHODS[method].large_lr_from
        assert f"learning rate {lr:g} ({whose} for large models)" in capsys.readouterr().out
    assert flags_of_train.default_lr(method, str(BASE)) == METHODS[method].lr


def test_a_run_that_its_method_refuses_is_refused_before_the_texts_are_read(items, capsys,
                                                                           monkeypatch):
    monkeypatch.setattr(Text, "sequence", lambda *_: pytest.fail("tokenized"))
    assert "to prune in" in refused(capsys, "--method", "adalora", *items, "--steps", "1")
    assert "layers.0.attn.q: rank" in refused(capsys, "--method", "lora", *items, "--rank", "10001")
    assert not Path("run").exists()


@pytest.mark.parametrize("out, said", [("-x", "--out -x"), ("", "--out"), ("a\udcff", "not UTF-8")])
def test_a_folder_s_name_that_cannot_be_used_is_refused_at_once(out, said, capsys):
    assert said in refused(capsys, "--method", "lora", f"--out={out}")


@pytest.mark.parametrize("flags, said", [
    ([], "--run"),
    (["--run", "none"], "none"),
    (["--run", "a", "--model", "b"], "--run"),
    (["--run", "a", "--task", "facts"], "--task"),
    (["--model", "nowhere"], "--task"),
    (["--run", "a", "--batch-size", "0"], "--batch-size"),
    (["--model", "x", "--prompt", "Hi", "--max-eval", "3"], "--max-eval: --prompt scores nothing"),
    (["--model", "x", "--task", "facts", "--max-new-tokens", "3"], "--max-new-tokens"),
    (["--model", "x", "--task", "facts", "--predictions", "no/where"], "--predictions: no/where"),
    (["--model", "x" * 300, "--task", "facts"], "File name too long"),
])
def test_eval_refuses_wrong_flags_in_one_line(flags, said, capsys):
    assert said in refused(capsys, *flags, main=evaluation.main)


def test_spaces_around_the_commas_of_targets_are_free():
    args = flags_of_train.parse_flags(["--method", "lora", "--targets", " q , v "])
    assert args.targets == "q,v"        # as config.json has it, and every reader of it
