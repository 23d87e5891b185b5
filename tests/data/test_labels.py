import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import BASE
from encoders import Tokenizer, encoder_of, head_of, labelled, opens, rte_folder
from runs import assert_eval_repeats, refused, result_of
from safetensors.torch import load_file

import convert
import eval as evaluation
import train
from data import LABELS, labels_for
from data.labels import HeadTask, label_loss
from data.task import Setup
from formats.checkpoint import load_pretrained, say_once
from formats.peft import export_peft, import_peft
from methods import count, inject, param_groups
from support.errors import UserError
from support.heads import give_head

FAMILIES = ["bert", "roberta", "deberta-v2"]
LN2 = math.log(2)


class Counted(HeadTask):
    """Scores by the number of right answers."""

    def metrics(self, examples, said):
        return {"right": sum(s == e.label for s, e in zip(said, examples))}, {}


def task_of(model, examples, labels=("no", "yes"), tokenizer=Tokenizer, **setup) -> Counted:
    setup = Setup(tokenizer(), model.config, setup.pop("max_length", 32), **setup)
    return Counted("counted", examples, examples, examples, setup, {}, labels)


# ---- the loss, by hand

def test_the_loss_of_classes_is_their_summed_cross_entropy():
    logits = torch.tensor([[0.0, math.log(3)], [0.0, 0.0]])
    # softmax: 1/4, 3/4 and 1/2, 1/2
    assert label_loss(logits, labelled(1, 0)).item() == pytest.approx(math.log(4 / 3) + LN2)


def test_the_loss_of_scores_is_their_summed_squared_error():
    logits = torch.tensor([[2.5], [-1.0]])
    assert label_loss(logits, labelled(4.0, 1.0, n=1)).item() == pytest.approx(1.5 ** 2 + 2 ** 2)


def test_each_set_has_outputs_of_its_own():
    """A head of six outputs: 0-1 of one set, 2 a score, 3-5 of another."""
    logits = torch.tensor([[0.0, 0.0, 9.0, 9.0, 9.0, 9.0],
                           [9.0, 9.0, 1.0, 9.0, 9.0, 9.0],
                           [9.0, 9.0, 9.0, 0.0, LN2, 0.0]], requires_grad=True)
    mixed = [*labelled(1), *labelled(3.0, start=2, n=1), *labelled(1, start=3, n=3)]
    loss = label_loss(logits, mixed)
    assert loss.item() == pytest.approx(LN2 + 4 + LN2)         # 1/2; (1 - 3)^2; 2 of 1 + 2 + 1
    loss.backward()
    expected = [[0.5, -0.5, 0, 0, 0, 0], [0, 0, -4, 0, 0, 0], [0, 0, 0, 0.25, -0.5, 0.25]]
    torch.testing.assert_close(logits.grad, torch.tensor(expected))
    order = [2, 0, 1]
    again = label_loss(logits[order], [mixed[i] for i in order])
    assert again.item() == pytest.approx(loss.item())


def test_an_answer_is_one_of_the_example_s_own_outputs():
    rows = [[9.0, 0.0, 2.5, 0.0, 1.0, 0.0]]
    task = task_of(head_of(rows), labelled(0), ("a", "b", "score", "x", "y", "z"))
    for example, said in ((labelled(1)[0], "a"), (labelled(1.0, start=2, n=1)[0], 2.5),
                          (labelled(0, start=3, n=3)[0], "y")):
        scores = task.score(head_of(rows), [example])
        assert scores.predictions[0]["answer"] == said
        assert scores.predictions[0]["gold"] in (1.0, "b", "x")


def test_the_loss_of_a_split_is_its_mean_over_examples():
    model = head_of([[3.0], [3.0]])
    task = task_of(model, labelled(1.0, 3.0, n=1), ("score",))
    assert task.loss(model, task.train).item() == 4.0 and task.size(task.train) == 2
    assert task.mean_loss(model, task.train) == 2.0


# ---- texts

@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_no_score_and_no_loss(family):
    model, examples = encoder_of(family).add_head(2).eval(), labelled(0, 1, 1, 0)
    with torch.no_grad():
        for p in model.head.parameters():       # drawn so small that all texts score alike
            p.mul_(20)
    alone, together = (task_of(model, examples, batch_size=n) for n in (1, 4))
    one, all_at_once = alone.outputs(model, examples), together.outputs(model, examples)
    torch.testing.assert_close(torch.tensor(one), torch.tensor(all_at_once), rtol=0, atol=1e-5)
    assert (torch.tensor(one).std(0) > 0.05).all()               # the texts do differ
    parts = sum(alone.loss(model, [e]).item() for e in examples)
    assert together.loss(model, examples).item() == pytest.approx(parts, abs=1e-5)
    assert together.mean_loss(model, examples) == pytest.approx(parts / 4, abs=1e-5)


def test_an_encoder_is_told_which_sentence_a_token_is_of():
    model = encoder_of().add_head(2)
    task = task_of(model, labelled(0, 1))
    tokens, mask, types = task.batch(model, task.train)
    assert tokens.tolist() == [[1, 3, 9, 2, 6, 10, 2], [1, 4, 2, 0, 0, 0, 0]]
    assert mask.tolist() == [[True] * 7, [True] * 3 + [False] * 4]
    assert types.tolist() == [[0, 0, 0, 0, 1, 1, 1], [0] * 7]


def test_what_was_cut_is_counted_and_known_to_the_fingerprint():
    model, examples = encoder_of().add_head(2), labelled(0, 1, 1, 0)
    whole, exact, cut = (task_of(model, examples, max_length=n) for n in (32, 8, 7))
    assert whole.counts() == exact.counts() == {"cut": {"train": 0, "held out": 0}}
    assert cut.counts() == {"cut": {"train": 1, "held out": 2}}
    assert whole.fingerprint() == exact.fingerprint() != cut.fingerprint()
    assert task_of(model, labelled(0, 1, 1, 1)).fingerprint() != whole.fingerprint()
    with pytest.raises(UserError, match="--max-length 3"):
        task_of(model, examples, max_length=3).fingerprint()


def test_one_example_is_shown_with_both_answers():
    task = task_of(head_of([[0.0, 1.0]]), labelled(0))
    assert task.show(head_of([[0.0, 1.0]]), Path()) == '"red cat | one dog" -> yes  (right: no)'
    task = task_of(head_of([[3.14159]]), labelled(2.0, n=1), ("score",))
    assert task.show(head_of([[3.14159]]), Path()).endswith("-> 3.14  (right: 2.00)")


# ---- a decoder's head

@pytest.fixture(scope="module")
def decoder():
    return load_pretrained(BASE)


def test_a_decoder_judges_by_its_last_token_as_transformers_has_it(decoder):
    import transformers
    model = decoder[0].add_head(3)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        BASE, num_labels=3, pad_token_id=0, dtype=torch.float32)
    theirs.score.weight.data.copy_(model.score.weight)
    tokens = torch.tensor([[7, 9, 8, 5], [6, 4, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]], dtype=torch.bool)
    with torch.no_grad():
        ours = model.classify(tokens, mask)
        torch.testing.assert_close(ours, theirs(tokens, attention_mask=mask).logits, rtol=1e-4,
                                   atol=1e-4)
        left = model.classify(tokens[1:].roll(2, 1), mask[1:].roll(2, 1))
        torch.testing.assert_close(left, ours[1:], rtol=1e-4, atol=1e-4)


def test_a_decoder_reads_a_pair_on_two_lines(decoder):
    model, tokenizer = decoder
    task = task_of(model, labelled(0, 1), tokenizer=lambda: tokenizer)
    first, second = (task.encoded(e).tokens for e in task.train)
    assert tokenizer.decode(first, special=False) == "red cat\none dog"
    assert tokenizer.decode(second, special=False) == "blue"
    short = task_of(model, labelled(0, 1), tokenizer=lambda: tokenizer, max_length=3)
    assert short.encoded(short.train[0]).tokens[-2:] == first[-2:]
    assert short.counts()["cut"]["train"] == 1


# ---- runs

def run_flags(folder: Path, *more: str) -> list[str]:
    return ["--method", "lora", "--model", "encoder", "--task", "glue/rte", "--data-dir",
            str(rte_folder(folder)), "--steps", "12", "--batch-size", "8", "--lr", "0.01",
            "--out", "run", *more]


@pytest.fixture
def opened(monkeypatch, empty_folder):
    """Lets commands open a small BERT, and returns what makes it."""
    opens(monkeypatch, lambda dtype: encoder_of(dtype=dtype))
    return encoder_of


HEAD = ["head.dense.bias", "head.dense.weight", "head.out.bias", "head.out.weight"]


@pytest.mark.usefixtures("opened")
def test_the_head_trains_beside_the_adapters_and_is_saved_and_counted(tmp_path, capsys):
    train.main(run_flags(tmp_path))
    result, saved = result_of("run"), load_file("run/adapter.safetensors")
    assert [name for name in sorted(saved) if name.startswith("head")] == HEAD
    assert result["whole"] == 16 * 16 + 16 + 2 * 16 + 2
    assert result["trainable"] == sum(tensor.numel() for tensor in saved.values())
    assert result["loss_on"] == "labels" and "loss on labels" in capsys.readouterr().out
    assert saved["head.out.bias"].abs().min() > 0               # it began at 0
    assert_eval_repeats(capsys, "--predictions", "out.jsonl")
    lines = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert len(lines) == 40
    assert lines[0].keys() == {"group", "first", "second", "answer", "gold"}
    assert {line["gold"] for line in lines} == {"entailment", "not_entailment"}


@pytest.mark.usefixtures("opened")
def test_it_learns_a_rule_on_both_sentences(tmp_path):
    train.main(run_flags(tmp_path, "--steps", "200", "--batch-size", "36", "--base-dropout", "0",
                         "--head-dropout", "0", "--lr", "0.01"))
    assert result_of("run")["after"]["accuracy"] > 0.9


@pytest.mark.parametrize("more", [[], ["--dtype", "bf16"], ["--method", "full"]])
def test_a_resumed_run_equals_one_that_was_never_stopped(more, opened, tmp_path, capsys,
                                                        monkeypatch):
    """Dropout is on: its random state comes from the checkpoint."""
    flags = run_flags(tmp_path, *more, "--save-every", "6")
    train.main(flags)
    whole = load_file("run/adapter.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in whole.values())
    kept = train.Run.checkpoint

    def stop_at_6(run, model, optimizer, step):
        kept(run, model, optimizer, step)
        if step == 6:
            raise KeyboardInterrupt
    monkeypatch.setattr(train.Run, "checkpoint", stop_at_6)
    with pytest.raises(SystemExit):
        train.main([*flags, "--out", "stopped"])
    monkeypatch.setattr(train.Run, "checkpoint", kept)
    train.main(["--resume", "--out", "stopped"])
    again = load_file("stopped/adapter.safetensors")
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert_eval_repeats(capsys)


@pytest.mark.usefixtures("opened")
def test_full_trains_the_head_too(tmp_path):
    train.main(run_flags(tmp_path, "--method", "full"))
    result, saved = result_of("run"), load_file("run/adapter.safetensors")
    assert result["trainable"] == result["total"] and saved["head.out.bias"].abs().min() > 0


@pytest.mark.usefixtures("opened")
def test_dropout_is_the_checkpoint_s_own_unless_a_flag_sets_it(tmp_path, capsys):
    losses = {}
    for name, more in (("own", []), ("same", ["--base-dropout", "0.1", "--head-dropout", "0.1"]),
                       ("off", ["--base-dropout", "0", "--head-dropout", "0"]),
                       ("head", ["--base-dropout", "0", "--head-dropout", "0.5"])):
        train.main(run_flags(tmp_path, *more, "--out", name))
        losses[name] = [json.loads(line)["loss"] for line in
                        Path(name, "log.jsonl").read_text().splitlines()]
    assert losses["own"] == losses["same"]
    assert len({losses[name][0] for name in ("own", "off", "head")}) == 3
    assert "base dropout 0, head dropout 0.5" in capsys.readouterr().out
    flags = json.loads(Path("own/config.json").read_text())["args"]
    assert (flags["base_dropout"], flags["head_dropout"], flags["head"]) == (0.1, 0.1, None)


@pytest.mark.usefixtures("opened")
def test_micro_batches_add_up_to_the_batch(tmp_path):
    off = ["--base-dropout", "0", "--head-dropout", "0"]
    for name, parts in (("one", "1"), ("three", "3")):
        train.main(run_flags(tmp_path, *off, "--grad-accum", parts, "--out", name))
    one, three = (load_file(f"{name}/adapter.safetensors") for name in ("one", "three"))
    for name in one:
        torch.testing.assert_close(one[name], three[name], rtol=1e-3, atol=1e-4)


def test_a_decoder_takes_a_head_where_it_is_asked_for(tmp_path, empty_folder, capsys):
    flags = ["--method", "lora", "--task", "glue/rte", "--data-dir", str(rte_folder(tmp_path)),
             "--steps", "4", "--batch-size", "4", "--max-eval", "4", "--out", "run"]
    train.main([*flags, "--head"])
    result, saved = result_of("run"), load_file("run/adapter.safetensors")
    assert result["loss_on"] == "labels" and saved["score.weight"].shape == (2, result["whole"] / 2)
    assert_eval_repeats(capsys)
    right = result_of("run")["after"]
    convert.main(["--run", "run", "--to", "merged"])
    convert.main(["--run", "run", "--peft", "theirs"])
    capsys.readouterr()
    evaluation.main(["--model", "merged", *flags[2:6], "--head", "--max-eval", "4"])
    assert f"accuracy        {right['accuracy']:10.4f}" in capsys.readouterr().out
    train.main(["--from-peft", "theirs", *flags[2:-1], "on", "--head"])
    assert result_of("on")["before"] == right
    train.main([*flags, "--overwrite"])
    assert result_of("run")["whole"] == 0 and result_of("run")["loss_on"] == "answer"


def test_the_head_learns_at_the_run_s_rate():
    model = encoder_of().add_head(2)
    inject(model, "lora+", ["q"], whole=[model.label_head])
    rates = {id(p): group["lr"] for group in param_groups(model, 1e-3, 0.0, 16.0)
             for p in group["params"]}
    assert {rates[id(p)] for p in model.head.parameters()} == {1e-3}
    assert rates[id(model.layers[0].attn.q.B)] == pytest.approx(1.6e-2)


# ---- a head that the checkpoint or PEFT's adapters bring

@pytest.mark.usefixtures("opened")
@pytest.mark.parametrize("n_labels", [2, 3, None])
def test_adapters_of_peft_go_on_with_their_head_if_it_fits(n_labels, tmp_path, capsys):
    model = encoder_of() if n_labels is None else encoder_of().add_head(n_labels)
    inject(model, "lora", ["q"], whole=[] if n_labels is None else ["head"])
    with torch.no_grad():
        model.layers[0].attn.q.B.normal_()
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.01)
    export_peft(model, "theirs")
    say_once.cache_clear()
    train.main(["--from-peft", "theirs", *run_flags(tmp_path, "--steps", "2", "--lr", "1e-9")[2:]])
    saved = load_file("run/adapter.safetensors")
    torch.testing.assert_close(saved["layers.0.attn.q.B"], model.layers[0].attn.q.B)
    assert [name for name in sorted(saved) if name.startswith("head")] == HEAD
    if n_labels == 2:
        torch.testing.assert_close(saved["head.out.weight"], model.head.out.weight)
    assert saved["head.out.weight"].shape == (2, 16)
    assert ("3 labels gives way" in capsys.readouterr().err) == (n_labels == 3)
    assert_eval_repeats(capsys)



def test_a_fitting_head_stays_and_another_gives_way(capsys):
    say_once.cache_clear()
    model = encoder_of().add_head(2)
    old = model.head.out
    give_head(model, "glue/rte", None)
    assert model.head.out is old
    assert "outputs are read as not_entailment, entailment" in capsys.readouterr().err
    dense = model.head.dense
    give_head(model, "glue/mnli", None)                 # of three labels
    assert model.head.out.out_features == 3 and model.head.dense is dense
    assert model.config.labels == list(LABELS["glue/mnli"])
    assert "not_entailment, entailment gives way" in capsys.readouterr().err
    model = encoder_of().add_head(2)
    model.config.labels, old = ["negative", "positive"], model.head.out
    give_head(model, "glue/rte", None)                  # of two others
    assert model.head.out is not old
    assert model.config.labels == ["not_entailment", "entailment"]
    assert "negative, positive gives way" in capsys.readouterr().err


@pytest.mark.parametrize("names, order", [
    (["CONTRADICTION", "NEUTRAL", "ENTAILMENT"], [0, 2, 1]),
    (["entailment", "neutral", "contradiction"], [2, 0, 1]), ([], [0, 1, 2])])
def test_the_outputs_of_a_named_head_are_read_in_the_task_s_order(names, order):
    model, labels = encoder_of().add_head(3).eval(), LABELS["glue/mnli"]
    model.config.labels = names
    with torch.no_grad():
        model.head.out.weight.zero_()
        model.head.out.bias.copy_(torch.tensor([0.0, 10.0, 20.0]))
    give_head(model, "glue/mnli", None, draw=False)
    assert model.config.labels == (names or list(labels))   # as the checkpoint has them
    task = task_of(model, labelled(order.index(2), n=3), labels)
    assert task.outputs(model, task.train) == [[10.0 * i for i in order]]
    assert task.loss(model, task.train).item() < 1e-3       # the right label has output 2


def test_peft_s_head_keeps_the_order_that_the_base_s_config_names(tmp_path):
    """In, trained on, and out again: a name belongs to the same output everywhere."""
    names = ["entailment", "not_entailment"]

    def base():
        model = encoder_of().add_head(2).eval()
        model.config.labels = list(names)
        return model
    theirs = inject(base(), "lora", ["q"], rank=2, whole=["head"])
    with torch.no_grad():
        theirs.head.out.bias.copy_(torch.tensor([1.0, -1.0]))
    export_peft(theirs, tmp_path / "theirs")
    ours = base()
    give_head(ours, "glue/rte", None)
    import_peft(ours, tmp_path / "theirs")
    assert give_head(ours, "glue/rte", None) == ["head"] and ours.config.labels == names
    assert ours.head.out.bias.tolist() == [1.0, -1.0]
    task = task_of(ours, labelled(1), LABELS["glue/rte"])
    assert task.answers(ours, task.train) == [1]            # entailment, output 0
    export_peft(ours, tmp_path / "again")
    name = "base_model.model.classifier.bias"
    assert torch.equal(load_file(tmp_path / "again" / "adapter_model.safetensors")[name],
                       load_file(tmp_path / "theirs" / "adapter_model.safetensors")[name])


def test_padding_and_types_are_tokens_of_the_model():
    model = encoder_of(pad=999, n_types=1).add_head(2)
    task = task_of(model, labelled(0, 1))
    tokens, mask, types = task.batch(model, task.train)
    assert tokens.max() < model.config.vocab_size and not types.any()
    assert torch.tensor(task.outputs(model, task.train)).isfinite().all()


def test_full_counts_its_head_apart():
    model = inject(encoder_of().add_head(2), "full", whole=["head"])
    numbers = count(model)
    assert numbers["whole"] == sum(p.numel() for p in model.head.parameters())
    assert numbers["trainable"] == numbers["total"]


def test_a_head_is_float32_on_a_bf16_encoder_and_scores_there():
    injected = inject(encoder_of(dtype=torch.bfloat16).add_head(2), "lora", ["q"], whole=["head"])
    assert {p.dtype for p in injected.head.parameters()} == {torch.float32}
    for made in (encoder_of(dtype=torch.bfloat16),
                 encoder_of().add_head(2).to(torch.bfloat16)):      # with a head of its own
        give_head(made, "glue/rte", None)
        assert {p.dtype for p in made.head.parameters()} == {torch.float32}
        task = task_of(made, labelled(0, 1))
        assert torch.tensor(task.outputs(made, task.train)).isfinite().all()


def test_eval_scores_an_encoder_by_a_head_of_its_own(monkeypatch, empty_folder, tmp_path, capsys):
    flags = ["--model", "encoder", "--task", "glue/rte", "--data-dir", str(rte_folder(tmp_path))]
    for made in (encoder_of, lambda **how: encoder_of(**how).add_head(3)):
        opens(monkeypatch, lambda dtype: made(dtype=dtype))
        assert "no trained head for not_entailment, entailment" in refused(capsys, *flags,
                                                                           main=evaluation.main)
    opens(monkeypatch, lambda dtype: encoder_of(dtype=dtype).add_head(2))
    evaluation.main(flags)
    assert "accuracy" in capsys.readouterr().out


# ---- what is refused, in one line

@pytest.mark.parametrize("flags, said", [
    (["--task", "facts"], "--task facts: an encoder writes no text; its tasks are mini-nlu, glue/sst2"),
    (["--task", "glue/rte", "--data-dir", ".", "--no-head"], "--no-head: an encoder"),
    (["--task", "glue/rte", "--data-dir", ".", "--loss-on", "all"], "--loss-on all: task glue/rte"),
    (["--task", "glue/rte", "--data-dir", ".", "--max-length", "2"], "--max-length 2"),
    (["--task", "glue/rte", "--data-dir", ".", "--head-dropout", "1"], "--head-dropout 1.0: must"),
    (["--task", "facts", "--head"], "--head: task facts does not use it"),
    (["--task", "facts", "--no-head"], "--head: task facts does not use it"),
])
@pytest.mark.usefixtures("opened")
def test_what_an_encoder_cannot_do_is_refused(flags, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(rte_folder(tmp_path))
    assert said in refused(capsys, "--method", "lora", "--model", "encoder", *flags)
    assert not Path("runs").exists()


@pytest.mark.parametrize("name", ["--base-dropout", "--head-dropout"])
def test_a_decoder_has_no_such_dropout(name, empty_folder, capsys):
    assert f"{name}: only encoders" in refused(capsys, "--method", "lora", name, "0.1")


@pytest.mark.usefixtures("opened")
def test_an_encoder_answers_no_prompt(tmp_path, capsys):
    assert "--prompt: an encoder writes no text" in refused(
        capsys, "--model", "encoder", "--prompt", "Hi", main=evaluation.main)
    train.main(run_flags(tmp_path))
    out = capsys.readouterr().out
    assert "--prompt" not in out and "eval.py --run run --predictions FILE" in out
    assert "--prompt" in refused(capsys, "--run", "run", "--prompt", "Hi", main=evaluation.main)


def test_tasks_without_labels_need_no_head_on_a_decoder():
    assert labels_for("facts", None, object()) is None
    assert labels_for("glue/stsb", True, object()) == ("score",)


# ---- several processes
PROCESSES = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import pytest
import torch
import train, eval
from encoders import encoder_of, opens
torch.set_num_threads(1)
opens(pytest.MonkeyPatch(), lambda dtype: encoder_of(dtype=dtype))
train.main({flags!r} + ["--out", "two"])
train.main({flags!r} + ["--head-dropout", "0.5", "--out", "dropout"])
eval.main(["--run", "two", "--predictions", "two.jsonl"])
"""


@pytest.mark.slow
@pytest.mark.usefixtures("opened")
def test_two_processes_train_and_score_as_one(tmp_path):
    flags = [*run_flags(tmp_path)[:-2], "--base-dropout", "0", "--head-dropout", "0"]
    tests = Path(__file__).parents[1]
    Path("driver.py").write_text(PROCESSES.format(root=str(tests.parent), tests=str(tests),
                                                  flags=flags))
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
                           "--standalone", "driver.py"], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    train.main([*flags, "--out", "one"])
    evaluation.main(["--run", "one", "--predictions", "one.jsonl"])
    one, two = (load_file(f"{name}/adapter.safetensors") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4)
    assert result_of("two")["after"] == result_of("one")["after"]
    assert Path("two.jsonl").read_text() == Path("one.jsonl").read_text()
    train.main([*flags, "--head-dropout", "0.5", "--grad-accum", "2", "--out", "same"])
    first = [json.loads(Path(name, "log.jsonl").read_text().splitlines()[0])["loss"]
             for name in ("dropout", "same")]
    assert first[0] != first[1]         # two processes draw two dropouts
