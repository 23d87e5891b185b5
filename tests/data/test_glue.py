import json
import math
from pathlib import Path

import pytest
import torch
from conftest import SHARED, needs
from encoders import encoder_of
from runs import assert_eval_repeats, result_of, setup_of
from scipy import stats

import train
from data import LABELS, TASKS, glue, load_task, options_of
from data.scoring import choice_losses
from data.task import Setup
from support.errors import UserError

REAL = SHARED / "glue"


def write(folder: Path, name: str, *rows: str, end: str = "\n", start: str = "") -> None:
    """Rows with | where the file has tabs."""
    text = start + "".join(row.replace("|", "\t") + end for row in rows)
    (folder / name).write_bytes(text.encode("utf-8"))


def read(name: str, folder: Path):
    return load_task(f"glue/{name}", setup_of(), data_dir=str(folder))


def texts(examples: list) -> list[tuple[str, str]]:
    return [(e.prompt, e.target) for e in examples]


# ---- metrics, by hand

GOLD, SAID = [1, 1, 1, 0, 0, 0, 0, 1], [1, 1, 0, 0, 0, 1, 0, 1]       # tp 3, fp 1, fn 1, tn 3


def test_accuracy_f1_and_matthews_are_those_worked_by_hand():
    assert glue.confusion(GOLD, SAID) == (3, 1, 1, 3)
    assert glue.accuracy(GOLD, SAID) == 6 / 8
    assert glue.f1(GOLD, SAID) == 6 / 8                             # 2 * 3 / (2 * 3 + 1 + 1)
    assert glue.matthews(GOLD, SAID) == (3 * 3 - 1 * 1) / 16        # sqrt(4 * 4 * 4 * 4)
    gold, said = [1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 1]
    assert glue.confusion(gold, said) == (2, 1, 2, 1)
    assert glue.f1(gold, said) == 4 / 7                             # 2 * 2 / (2 * 2 + 1 + 2)
    assert glue.matthews(gold, said) == 0                           # 2 * 1 = 1 * 2


def test_matthews_is_the_correlation_of_the_two_label_columns():
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        gold, said = (torch.randint(0, 2, (15,), generator=draw).tolist() for _ in range(2))
        assert glue.matthews(gold, said) == pytest.approx(stats.pearsonr(gold, said).statistic)
    assert glue.matthews(GOLD, GOLD) == 1 and glue.matthews(GOLD, [1 - g for g in GOLD]) == -1


@pytest.mark.parametrize("gold, said", [([1, 0], [1, 1]), ([1, 0], [0, 0]), ([1, 1], [1, 0]),
                                        ([0, 0], [0, 0])])
def test_one_label_only_has_no_matthews(gold, said):
    assert glue.matthews(gold, said) == 0


def test_f1_of_nothing_positive_is_zero():
    assert glue.f1([0, 0], [0, 0]) == glue.f1([1, 0], [0, 1]) == 0


def test_correlations_are_those_worked_by_hand_and_a_constant_has_none():
    # gold - mean: -1.5 -.5 .5 1.5, said - mean: -1 -2 1 2; ranks of said: 2 1 3 4
    assert glue.pearson([1, 2, 3, 4], [3, 2, 5, 6]) == pytest.approx(6 / math.sqrt(5 * 10))
    assert glue.spearman([1, 2, 3, 4], [3, 2, 5, 6]) == pytest.approx(4 / 5)
    # tied: ranks 1.5 1.5 3 against 1 2 3: .75 + .75 over sqrt(1.5 * 2)
    assert glue.spearman([0, 0, 9], [1, 2, 3]) == pytest.approx(1.5 / math.sqrt(3))
    assert glue.pearson([1, 2, 3], [2.5] * 3) == glue.spearman([1, 2, 3], [2.5] * 3) == 0
    assert glue.pearson([4.0, 4.0], [1, 2]) == glue.pearson([4.0], [2.0]) == 0


def test_the_expected_score_weighs_the_written_scores_by_their_likelihood():
    third = [-math.log(p) for p in (1 / 2, 1 / 4, 1 / 4)]
    assert glue.expected_score(third, [0, 2, 4]) == pytest.approx(0 / 2 + 2 / 4 + 4 / 4)
    shifted = [loss + 700 for loss in third]                # of which exp() alone would be 0
    assert glue.expected_score(shifted, [0, 2, 4]) == pytest.approx(1.5)


# ---- how files look

LAYOUTS = {     # set -> header, a row of each label in its order of choices
    "sst2": ("sentence|label", 'so "bad|0', "good |1"),
    "cola": (None, 'gj04|0|*|Him "left', "gj04|1||He left."),
    "mrpc": ("Quality|#1 ID|#2 ID|#1 String|#2 String", '0|7|8|"A|B', "1|7|8|A|B"),
    "qqp": ("id|qid1|qid2|question1|question2|is_duplicate", '0|1|2|"A|B|0', "1|3|4||B|1"),
    "rte": ("index|sentence1|sentence2|label", '0|"A|B|not_entailment', "1|A|B|entailment"),
    "qnli": ("index|question|sentence|label", '0|"A|B|not_entailment', "1|A|B|entailment"),
    "mnli": ("index|promptID|pairID|genre|sentence1_binary_parse|sentence2_binary_parse|"
             "sentence1_parse|sentence2_parse|sentence1|sentence2|label1|gold_label",
             '0|1|2|x|(|)|(|)|"A|B|neutral|contradiction', "1|1|2|x|(|)|(|)|A|B|neutral|entailment",
             "2|1|2|x|(|)|(|)|A|B|neutral|neutral"),
    "stsb": ("index|genre|filename|year|old_index|source1|source2|sentence1|sentence2|score",
             *(f'{i}|x|x|x|x|x|x|"A|B|{i}.000' for i in range(6))),
}


def glue_folder(folder: Path, name: str, copies: int = 4, **how) -> Path:
    """The set's files as GLUE ships them, the rows of LAYOUTS `copies` times over."""
    header, *rows = LAYOUTS[name]
    head = [] if header is None else [header]
    write(folder, "train.tsv", *head, *rows * copies, **how)
    for file in ("dev_matched.tsv", "dev_mismatched.tsv") if name == "mnli" else ("dev.tsv",):
        write(folder, file, *head, *rows, **how)
    write(folder, "test.tsv", "index|sentence", "0|without a label")
    return folder


@pytest.mark.parametrize("how", [{}, {"end": "\r\n"}, {"start": "\ufeff"}])
@pytest.mark.parametrize("name", LAYOUTS)
def test_glues_own_files_are_read(name, how, tmp_path):
    task = read(name, glue_folder(tmp_path, name, **how))
    spec = glue.SETS[f"glue/{name}"]
    words = list(spec.words.values())
    files = 2 if name == "mnli" else 1
    assert [e.target for e in task.test] == words * files
    assert [list(e.choices) for e in task.test] == [words] * len(words) * files
    assert len(task.train) + len(task.valid) == 4 * len(words) and len(task.valid) >= 1
    for example in task.train + task.valid + task.test:
        assert example.prompt.endswith("\nAnswer:")
        assert example.target.startswith(" ") and example.target in example.choices
    assert '"' in task.test[0].prompt                   # a quote opens no field: it is text
    assert "\r" not in str(task.test) and "\ufeff" not in str(task.test)


def test_every_set_is_a_task():
    assert list(glue.SETS) == [name for name in TASKS if name.startswith("glue/")]
    assert {name.removeprefix("glue/") for name in glue.SETS} == LAYOUTS.keys()
    assert list(options_of("glue/rte")) == ["data_dir", "head"]


def test_a_prompt_asks_in_words(tmp_path):
    assert texts(read("cola", glue_folder(tmp_path, "cola")).test) == [
        ('Sentence: Him "left\nIs it acceptable English?\nAnswer:', " no"),
        ("Sentence: He left.\nIs it acceptable English?\nAnswer:", " yes")]
    assert texts(read("rte", glue_folder(tmp_path, "rte")).test)[1] == (
        "Text: A\nClaim: B\nDoes the claim follow from the text?\nAnswer:", " yes")


def test_braces_in_a_text_stay_text(tmp_path):
    glue_folder(tmp_path, "cola")
    write(tmp_path, "dev.tsv", "x|1||a {0} {b} {{")
    assert "Sentence: a {0} {b} {{\n" in read("cola", tmp_path).test[0].prompt


def test_raw_cola_has_its_own_three_splits(tmp_path):
    for name, text in (("in_domain_train", "one"), ("in_domain_dev", "two"),
                       ("out_of_domain_dev", "three")):
        write(tmp_path, f"{name}.tsv", f"x|1||{text}")
    task = read("cola", tmp_path)
    assert [e.prompt.split()[1] for e in task.train + task.valid + task.test] == [
        "one", "two", "three"]


def test_raw_mrpc_has_a_mark_before_its_header_and_a_test_file(tmp_path):
    header, no, yes = LAYOUTS["mrpc"]
    write(tmp_path, "msr_paraphrase_train.txt", header, *[no, yes] * 10, start="\ufeff", end="\r\n")
    write(tmp_path, "msr_paraphrase_test.txt", header, yes, start="\ufeff", end="\r\n")
    task = read("mrpc", tmp_path)
    assert (len(task.train), len(task.valid), len(task.test)) == (18, 2, 1)
    assert task.test[0].prompt.startswith("First: A\nSecond: B\n")


def test_raw_stsb_has_seven_or_nine_columns_and_targets_the_nearest_whole_score(tmp_path):
    rows = ['x|x|x|1|2.500|"A|B', "x|x|x|1|4.6|A|B|licence|link", "x|x|x|1|0|A|B"]
    for name in ("sts-train.csv", "sts-dev.csv", "sts-test.csv"):
        write(tmp_path, name, *rows)
    task = read("stsb", tmp_path)
    assert [(e.score, e.target) for e in task.test] == [(2.5, " 2"), (4.6, " 5"), (0.0, " 0")]
    assert task.train == task.valid == task.test
    assert task.test[0].prompt.startswith('First: "A\nSecond: B\n')


def test_a_line_ends_at_a_line_feed_only(tmp_path):
    glue_folder(tmp_path, "sst2")
    write(tmp_path, "dev.tsv", "sentence|label", "a\u2028b\x85c\x0bd|1", "", "e|0")
    assert [e.target for e in read("sst2", tmp_path).test] == [" positive", " negative"]


def test_a_tenth_of_train_is_held_out_the_same_in_every_run(tmp_path):
    glue_folder(tmp_path, "cola")
    write(tmp_path, "train.tsv", *(f"x|{int(i < 100)}||sentence {i}" for i in range(200)))
    task, again = read("cola", tmp_path), read("cola", tmp_path)
    assert (len(task.train), len(task.valid)) == (180, 20)
    assert task.valid == again.valid and not set(task.valid) & set(task.train)
    assert {e.target for e in task.valid} == {" no", " yes"}    # of a file sorted by label


# ---- what is wrong

@pytest.mark.parametrize("name, row, said", [
    ("sst2", "good|2", "label '2' is none of 0, 1"),
    ("sst2", "good|", "label ''"),
    ("sst2", "good", "1 columns instead of 2"),
    ("sst2", "good|1|1", "3 columns instead of 2"),
    ("sst2", " |1", "no text"),
    ("cola", "x|1|a sentence", "3 columns instead of 4"),
    ("qqp", "0|1|2|A|B", "5 columns instead of 6"),
    ("rte", "0|A|B|neutral", "label 'neutral'"),
    ("stsb", "0|x|x|x|x|x|x|A|B|high", "score 'high' is not a number from 0 to 5"),
    ("stsb", "0|x|x|x|x|x|x|A|B|5.1", "score '5.1'"),
    ("stsb", "0|x|x|x|x|x|x|A|B|nan", "score 'nan'"),
])
def test_each_kind_of_wrong_row_is_named(name, row, said, tmp_path):
    glue_folder(tmp_path, name)
    header, *rows = LAYOUTS[name]
    head = [header] * (header is not None)
    write(tmp_path, "dev.tsv", *head, rows[0], row)
    with pytest.raises(UserError, match=rf"dev\.tsv:{len(head) + 2}: .*") as error:
        read(name, tmp_path)
    assert said in str(error.value)


def test_raw_stsb_with_another_number_of_columns_is_named_with_how_many_more(tmp_path):
    for name in ("sts-train.csv", "sts-dev.csv", "sts-test.csv"):
        write(tmp_path, name, "x|x|x|1|5|A|B", "x|x|x|1|5|A|B|C", "x|x|x|1|5|A")
    with pytest.raises(UserError, match=r"sts-train\.csv:2: 8 columns instead of 7 or 9; 1 more"):
        read("stsb", tmp_path)


def test_a_line_in_a_thousand_may_be_broken_as_in_glue_s_own_qqp(tmp_path, capsys):
    glue_folder(tmp_path, "qqp")
    header, *rows = LAYOUTS["qqp"]
    broken = [header, *rows * 250, "|Was it so?|0"]
    write(tmp_path, "train.tsv", *broken, *rows * 250)
    task = read("qqp", tmp_path)
    assert len(task.train) + len(task.valid) == 1000
    assert "train.tsv:502: 3 columns instead of 6" in capsys.readouterr().err
    write(tmp_path, "train.tsv", *broken)
    with pytest.raises(UserError, match=r"train\.tsv:502"):
        read("qqp", tmp_path)


def test_another_sets_file_is_told_by_its_header(tmp_path):
    glue_folder(tmp_path, "qnli")
    with pytest.raises(UserError, match=r"train\.tsv:1: no column 'sentence1'.*index, question"):
        read("rte", tmp_path)


def test_missing_files_are_named_in_both_layouts(tmp_path):
    with pytest.raises(UserError, match=r"train\.tsv and dev\.tsv, or in_domain_train\.tsv and "
                                        r"in_domain_dev\.tsv and out_of_domain_dev\.tsv; .* none"):
        read("cola", tmp_path)
    write(tmp_path, "train.tsv", "x|1||a", "x|1||b")
    with pytest.raises(UserError, match=r"there is train\.tsv alone"):
        read("cola", tmp_path)
    with pytest.raises(UserError, match="nowhere"):
        read("cola", tmp_path / "nowhere")


@pytest.mark.parametrize("rows, said", [([], "no examples"), (["sentence|label"], "no examples"),
                                        (["sentence|label", "a|1"], "fewer than 2")])
def test_too_few_rows_are_an_error(rows, said, tmp_path):
    glue_folder(tmp_path, "sst2")
    write(tmp_path, "train.tsv", *rows)
    with pytest.raises(UserError, match=rf"train\.tsv: {said}"):
        read("sst2", tmp_path)


# ---- scores

def test_a_choice_is_the_likeliest_and_the_metrics_are_of_these(base, tmp_path):
    model, tokenizer = base
    task = read("mrpc", glue_folder(tmp_path, "mrpc"))
    task.setup = setup_of(model, tokenizer)
    scores = task.score(model, task.test)
    losses = choice_losses(model, task.setup, task.test)
    answers = [e.choices[0 if no <= yes else 1] for e, (no, yes) in zip(task.test, losses)]
    assert [row["answer"] for row in scores.predictions] == answers
    assert [row["gold"] for row in scores.predictions] == [" no", " yes"]
    assert [row["prompt"] for row in scores.predictions] == [e.prompt for e in task.test]
    right = sum(a == e.target for a, e in zip(answers, task.test))
    assert scores.values["accuracy"] == right / 2 and scores.counts == {"accuracy": 2}
    assert list(scores.values) == ["accuracy", "f1"]


def test_mnli_has_an_accuracy_for_each_dev_file(tmp_path, monkeypatch):
    task = read("mnli", glue_folder(tmp_path, "mnli"))
    sure = [[0.0, 1, 1], [1, 0.0, 1], [1, 1, 0.0], [1, 0.0, 1], [0.0, 1, 1], [1, 1, 0.0]]
    monkeypatch.setattr(glue, "choice_losses", lambda *_: sure)
    scores = task.score(None, task.test)
    assert scores.values == {"accuracy_matched": 1, "accuracy_mismatched": 1 / 3}
    assert scores.counts == {"accuracy_matched": 3, "accuracy_mismatched": 3}
    assert [row["group"] for row in scores.predictions] == ["matched"] * 3 + ["mismatched"] * 3
    assert list(task.score(None, task.valid).values) == ["accuracy"]


def test_stsb_predicts_the_expected_score(tmp_path, monkeypatch):
    task = read("stsb", glue_folder(tmp_path, "stsb"))
    flat, half = [1.0] * 6, [0.0, 99, 99, 99, 99, 0.0]              # both expect 2.5
    monkeypatch.setattr(glue, "choice_losses", lambda *_: [flat, half] * 3)
    scores = task.score(None, task.test)
    assert [row["answer"] for row in scores.predictions] == pytest.approx([2.5] * 6)
    assert [row["gold"] for row in scores.predictions] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    sure = [[99.0 * (i != k) for i in range(6)] for k in (1, 0, 3, 2, 5, 4)]
    monkeypatch.setattr(glue, "choice_losses", lambda *_: sure)
    scores = task.score(None, task.test)
    # of gold 0..5: sum of squares 17.5; each swap of neighbours takes 1 from the sum of products
    assert scores.values == pytest.approx({"pearson": 14.5 / 17.5, "spearman": 14.5 / 17.5})
    assert scores.counts == {}


@pytest.mark.parametrize("name", ["cola", "stsb"])
def test_scores_do_not_depend_on_the_batch_size(name, base, tmp_path):
    task, scores = read(name, glue_folder(tmp_path, name)), []
    for size in (1, 64):
        task.setup = setup_of(*base, batch_size=size)
        scores.append(task.score(base[0], task.train))
    one, many = scores
    assert one.values == pytest.approx(many.values, abs=1e-6) and one.counts == many.counts
    for a, b in zip(one.predictions, many.predictions):
        assert a == b or a["answer"] == pytest.approx(b["answer"], abs=1e-4)


@pytest.mark.parametrize("name, metrics", [("cola", {"matthews", "accuracy"}),
                                           pytest.param("stsb", {"pearson", "spearman"},
                                                        marks=pytest.mark.slow)])
def test_a_short_run_learns_its_twelve_rows_and_eval_repeats_it(name, metrics, tmp_path,
                                                                monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    header, *rows = LAYOUTS[name]
    rows = [rows[0], rows[-1].replace('"A', "Six")] * 6
    for file in ("train.tsv", "dev.tsv"):
        write(tmp_path, file, *([] if header is None else [header]), *rows)
    train.main(["--method", "lora", "--task", f"glue/{name}", "--data-dir", ".", "--steps", "20",
                "--lr", "0.01", "--out", "run"])
    result = result_of("run")
    assert set(result["before"]) == set(result["after"]) == metrics
    assert all(result["after"][metric] > 0.9 for metric in metrics), result["after"]
    assert_eval_repeats(capsys, "--predictions", "out.jsonl")
    lines = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert len(lines) == 12 and lines[0].keys() == {"group", "prompt", "answer", "gold"}


# ---- by a trained head

def by_head(name: str, folder: Path):
    model = encoder_of()
    return load_task(f"glue/{name}", Setup(None, model.config, 32), data_dir=str(folder))


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_head_reads_the_same_rows(name, tmp_path):
    """In words and by a head: equal texts and equal labels, in equal splits."""
    glue_folder(tmp_path, name)
    words, head = read(name, tmp_path), by_head(name, tmp_path)
    spec = glue.SETS[f"glue/{name}"]
    assert LABELS[f"glue/{name}"] == head.labels == spec.labels
    assert len(spec.labels) == (1 if name == "stsb" else len(spec.words))
    for split in ("train", "valid", "test"):
        ours, theirs = getattr(head, split), getattr(words, split)
        assert [glue.in_words(e, spec) for e in ours] == theirs
        assert {(e.start, e.n) for e in ours} == {(0, len(spec.labels))}
    if name == "mnli":
        assert [e.label for e in head.test] == [0, 1, 2] * 2
        assert [head.say(e, e.label) for e in head.test[:3]] == ["contradiction", "entailment",
                                                                 "neutral"]
    assert (head.train[0].second is None) == (name in ("sst2", "cola"))


def test_a_decoder_takes_the_head_where_it_is_asked_for(base, tmp_path):
    setup, folder = setup_of(*base), str(glue_folder(tmp_path, "rte"))
    assert isinstance(load_task("glue/rte", setup, data_dir=folder, head=True), glue.GlueByHead)
    for head in (None, False):
        assert isinstance(load_task("glue/rte", setup, data_dir=folder, head=head), glue.Glue)


def test_a_head_s_official_metrics(tmp_path, monkeypatch):
    answers = []
    monkeypatch.setattr(glue.GlueByHead, "answers", lambda *_: answers)
    glue_folder(tmp_path, "mnli")
    task, answers = by_head("mnli", tmp_path), [0, 1, 2, 1, 0, 2]
    scores = task.score(None, task.test)
    assert scores.values == {"accuracy_matched": 1, "accuracy_mismatched": 1 / 3}
    assert scores.counts == {"accuracy_matched": 3, "accuracy_mismatched": 3}
    glue_folder(tmp_path, "stsb")
    task, answers = by_head("stsb", tmp_path), [-0.5, 9.0, 1.0, 2.0, 3.0, 4.0]
    scores = task.score(None, task.test)            # the output as it is, outside [0, 5] too
    assert scores.values == pytest.approx({
        "pearson": stats.pearsonr(range(6), answers).statistic,
        "spearman": stats.spearmanr(range(6), answers).statistic})
    assert scores.counts == {} and scores.predictions[1]["answer"] == 9.0


# ---- the real files

@needs(REAL)
@pytest.mark.slow
@pytest.mark.parametrize("name, folder, sizes", [("cola", "CoLA", (8551, 527, 516)),
                                                 ("stsb", "STS-B", (5749, 1500, 1379))])
def test_the_real_sets_are_read_whole(name, folder, sizes):
    task = read(name, REAL / folder)
    assert (len(task.train), len(task.valid), len(task.test)) == sizes
    if name == "cola":                                  # the share that is acceptable English
        assert sum(e.target == " yes" for e in task.train) == 6023
    else:
        assert any('"' in e.prompt for e in task.test)
        assert {e.target for e in task.train} == set(task.train[0].choices)
