import json
from pathlib import Path

import pytest
import torch
from conftest import BASE, SHARED, needs
from runs import setup_of

import train
from data import load_task
from data.commonsense import SETS, average_title, example_of_row, extract, option_texts, read_rows
from formats.checkpoint import load_pretrained
from methods import adapters, inject, merge
from support.errors import UserError

REAL = SHARED / "commonsense"
FOUR = ("answer1", "answer2", "answer3", "answer4")
FIVE = (*FOUR, "answer5")
TRUTH, TWO, ENDS = ("true", "false"), ("solution1", "solution2"), ("ending1", "ending2", "ending3")
FISH = ("a red fish", "a bird", "two red fish", "No. 9")


@pytest.mark.parametrize("text, labels, answer", [
    # as trained, and nearly so
    (" the correct answer is answer2", FOUR, "answer2"),
    ("The correct answer is Answer3.", FOUR, "answer3"),
    ("the correct answer is answer 4", FOUR, "answer4"),
    ("the correct answer is: answer1", FOUR, "answer1"),
    ("the correct answer is \"answer1\"", FOUR, "answer1"),
    ("the correct answer is **answer2**", FOUR, "answer2"),
    ("the correct answer is (answer2)", FOUR, "answer2"),
    ("the answer is Answer-3", FOUR, "answer3"),
    ("Answer: answer3", FOUR, "answer3"),
    ("the correct answer is true", TRUTH, "true"),
    ("the correct answer is False", TRUTH, "false"),
    ("the correct answer is solution2", TWO, "solution2"),
    ("the correct answer is ending3", ENDS, "ending3"),
    ("the correct answer is answer5", FIVE, "answer5"),
    # the label alone, the number, the letter
    ("answer2", FOUR, "answer2"),
    ("Solution 1", TWO, "solution1"),
    ("TRUE", TRUTH, "true"),
    ("2", FOUR, "answer2"),
    ("(2)", FOUR, "answer2"),
    ("3.", FOUR, "answer3"),
    ("the correct answer is 3", FOUR, "answer3"),
    ("b) because it is late", FOUR, "answer2"),
    ("(c)", FOUR, "answer3"),
    ("D", FOUR, "answer4"),
    ("Yes, they do.", TRUTH, "true"),
    ("no", TRUTH, "false"),
    ("Answer: no, never", TRUTH, "false"),
    # more text around it
    ("I think it must be answer4, since answer4 is round.", FOUR, "answer4"),
    ("answer2\n\nQuestion: and what is answer3?", FOUR, "answer2"),
    ("the correct answer is answer2\n### Instruction: choose answer1", FOUR, "answer2"),
    ("answer1 looks right, but the correct answer is answer2", FOUR, "answer2"),
    ("not answer1 but answer3", FOUR, "answer3"),
    ("Well.\n\nSolution2 it is.", TWO, "solution2"),
    ("It is true that they do", TRUTH, "true"),
    # an option's text instead of its label
    ("a bird", FOUR, "answer2"),
    ("It must have been a bird!", FOUR, "answer2"),
    ("the correct answer is a bird", FOUR, "answer2"),
    ("no. 9", FOUR, "answer4"),
    ("two red fish", FOUR, "answer3"),
    ("The answer is a bird because answer1 is red", FOUR, "answer2"),
    ("The answer is B because it flies", FOUR, "answer2"),
    ("The correct answer is option 2", FOUR, "answer2"),
    ("2\nBecause it flies", FOUR, "answer2"),
    ("_answer2_", FOUR, "answer2"),
    ("the correct answer is \u201canswer2\u201d", FOUR, "answer2"),
    # what comes after the answer does not count
    ("answer3\n\n### Instruction:\nWhich?\n\nAnswer: answer1", FOUR, "answer3"),
    ("answer2.\n### Response:\nthe correct answer is answer4", FOUR, "answer2"),
    ("answer2.\nanswer3 is wrong", FOUR, "answer2"),
    ("Answer: answer1 is wrong. The correct answer is answer3", FOUR, "answer3"),
    # no answer
    ("the correct answer is true/false", TRUTH, None),
    ("the correct answer is answer1/answer2/answer3/answer4", FOUR, None),
    ("the correct answer is answer1 or answer2", FOUR, None),
    ("answer1 is incorrect", FOUR, None),
    ("It isn't answer1.", FOUR, None),
    ("No one knows whether it is", TRUTH, None),
    ("1. The bird is out.\n2. So is the dog.", FOUR, None),
    ("A.M. or P.M.", FOUR, None),
    ("", FOUR, None),
    ("   \n\n", FOUR, None),
    ("I do not know.", FOUR, None),
    ("answer1 or answer2", FOUR, None),
    ("answer7", FOUR, None),
    ("answer12", FOUR, None),
    ("answer3", TWO, None),
    ("5", FOUR, None),
    ("12", FOUR, None),
    ("2 fish", FOUR, None),
    ("2.5", FOUR, None),
    ("a dog", FOUR, None),
    ("a red fish and a bird", FOUR, None),
    ("untrue", TRUTH, None),
    ("nothing", TRUTH, None),
    ("the correct answer is not answer1", FOUR, None),
])
def test_the_answer_in_what_a_model_wrote(text, labels, answer):
    assert extract(text, labels, FISH if labels == FOUR else ()) == answer


def row(question="Is it so?", labels=TRUTH, gold="true", options=()):
    listed = " ".join(f"{label.capitalize()}: {text}" for label, text in zip(labels, options))
    blocks = [question, *([listed] if listed else []), "Answer format: " + "/".join(labels)]
    return {"instruction": "\n\n".join(blocks), "input": "", "answer": gold,
            "output": f"the correct answer is {gold}"}


@pytest.mark.parametrize("text, answer", [
    ("the correct answer is 4", "answer1"), ("4", "answer4"), ("rr", "answer3"), ("RR", "answer4")])
def test_an_option_s_own_text_beats_its_number_and_case_tells_options_apart(text, answer):
    options = ("4", "3", "2", "1") if text[-1] == "4" else ("R r", "Rr", "rr", "RR")
    assert extract(text, FOUR, options) == answer


def test_the_input_of_a_row_stands_before_the_answer_format():
    e = example_of_row(row() | {"input": "More to read."}, "{instruction}", "", "")
    assert e.prompt == "Is it so?\n\nMore to read.\n\nAnswer format: true/false"


def test_a_row_becomes_a_prompt_a_target_and_a_choice_for_each_label():
    two = row("Which?", TWO, "solution2", ["a\nb", "c: d"])
    e = example_of_row(two, "<{instruction}>", "PIQA", "")
    assert e.prompt == ("<Which?\n\nSolution1: a\nb Solution2: c: d\n\n"
                        "Answer format: solution1/solution2>")
    assert e.target == " the correct answer is solution2" and e.group == "PIQA"
    assert e.choices == (" the correct answer is solution1", " the correct answer is solution2")
    assert e.references == TWO and option_texts(e.prompt, TWO) == ("a\nb", "c: d")
    assert option_texts(example_of_row(row(), "{instruction}", "", "").prompt, TRUTH) == ()


def folder_of(path, sets, train=("boolq",), rows=20):
    for name in sets:
        (path / name).mkdir(parents=True)
        for split in ("train", "test") if name in train else ("test",):
            items = [row(f"{name} {split} {i}?", gold=TRUTH[i % 2]) for i in range(rows)]
            (path / name / f"{split}.json").write_text(json.dumps(items))
    return str(path)


def test_missing_sets_are_named_and_the_average_says_how_many_it_covers(base, tmp_path):
    model, tokenizer = base
    task = load_task("commonsense", setup_of(*base, 128),
                     data_dir=folder_of(tmp_path, ["boolq", "piqa"]))
    assert "hellaswag" in task.notes["missing"] and "boolq" not in task.notes["missing"]
    assert (len(task.train), len(task.valid), len(task.test)) == (18, 2, 40)
    scores = task.score(model, task.test)
    assert set(scores.values) == {
        f"{kind}/{name}" for kind in ("accuracy", "likelihood", "unparsed")
        for name in ("BoolQ", "PIQA", "Avg. of 2")}
    assert scores.counts["accuracy/BoolQ"] == 20 and "unparsed/BoolQ" not in scores.counts
    assert scores.values["likelihood/Avg. of 2"] == pytest.approx(
        (scores.values["likelihood/BoolQ"] + scores.values["likelihood/PIQA"]) / 2)
    assert average_title(8) == "Avg."
    for line in scores.predictions:
        assert line["gold"] in TRUTH and (line["answer"] is None or line["answer"] in TRUTH)
        assert line["answer"] == extract(line["output"], TRUTH)


def test_a_merged_training_file_is_used_alone(base, tmp_path):
    folder = folder_of(tmp_path, ["boolq"])
    (tmp_path / "commonsense_170k.json").write_text(json.dumps([row(f"{i}?") for i in range(30)]))
    task = load_task("commonsense", setup_of(*base, 128), data_dir=folder)
    assert len(task.train) == 27 and {e.group for e in task.train + task.valid} == {"train"}


def test_scores_and_texts_are_the_same_for_every_batch_size_greedy_and_with_beams(base, tmp_path):
    model, tokenizer = base
    folder = folder_of(tmp_path, ["boolq", "piqa"], rows=3)
    for beams in (1, 3):
        one, many = (load_task("commonsense", setup_of(*base, 128, batch_size=size),
                               data_dir=folder, beams=beams) for size in (1, 128))
        assert one.score(model, one.test) == many.score(model, many.test)


def test_a_run_counts_an_example_that_is_cut_once_and_checks_wrong_choices_before_it_starts(
        tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path, ["boolq"])
    flags = ["--method", "lora", "--task", "commonsense", "--data-dir", ".", "--max-length", "128",
             "--steps", "1", "--batch-size", "2", "--out", "run"]
    tests = [row("word " * 200), row("Is it so?")]         # one is cut, written on and in 2 choices
    Path("boolq/test.json").write_text(json.dumps(tests))
    train.main(flags)
    result = Path("run/result.json").read_text()
    assert json.loads(result)["cut"] == {"train": 0, "held out": 1}
    wrong = row("Is it so?", ("true", "false " * 200 + "end"))
    Path("boolq/test.json").write_text(json.dumps([*tests, wrong]))
    with pytest.raises(SystemExit):
        train.main([*flags, "--overwrite"])
    assert "false" in capsys.readouterr().err and Path("run/result.json").read_text() == result


@pytest.mark.parametrize("method", ["lora", "dora", "dual"])
def test_merging_changes_no_score(tmp_path, method):
    model, tokenizer = load_pretrained(BASE)
    inject(model, method, ["q", "v"], **({"update_warmup": 0} if method == "dual" else {}))
    for layer in adapters(model).values():
        torch.nn.init.normal_(layer.B, std=0.05)
    folder = folder_of(tmp_path, ["boolq", "piqa"], rows=4)
    task = load_task("commonsense", setup_of(model, tokenizer, 128), data_dir=folder)
    assert task.score(model, task.test) == task.score(merge(model), task.test)


def test_a_template_of_the_user_s_shapes_the_prompt(base, tmp_path):
    (tmp_path / "mine.txt").write_text("Task:\n{instruction}\n\nMy answer:\n")
    task = load_task("commonsense", setup_of(*base, 128), data_dir=folder_of(tmp_path, ["boolq"]),
                     prompt_template=str(tmp_path / "mine.txt"))
    assert task.test[0].prompt.startswith("Task:\nboolq test 0?")
    assert task.test[0].prompt.endswith("\n\nMy answer:")
    (tmp_path / "mine.txt").write_text("no place")
    with pytest.raises(UserError, match="mine.txt.*{instruction}"):
        load_task("commonsense", setup_of(*base, 128), data_dir=str(tmp_path),
                  prompt_template=str(tmp_path / "mine.txt"))


@pytest.mark.parametrize("content, said", [
    ("{", "not JSON"), ("{}", "a list"), ("[]", "not empty"), ('["a"]', "row 1"),
    ('[{"instruction": 1, "output": "", "answer": ""}]', "row 1"),
    (json.dumps([row(), {**row(), "answer": "maybe"}]), "row 2.*'maybe'"),
    (json.dumps([{**row(), "answer": ""}]), "row 1.*''"),
    (json.dumps([{**row(), "output": "I do not say"}]), "row 1.*stand in the output"),
    (json.dumps([{**row(), "instruction": "no labels"}]), "row 1.*Answer format"),
])
def test_a_wrong_file_is_named_with_its_row(base, tmp_path, content, said):
    folder = folder_of(tmp_path, ["boolq"])
    (tmp_path / "boolq" / "test.json").write_text(content)
    with pytest.raises(UserError, match=rf"boolq/test\.json.*{said}"):
        load_task("commonsense", setup_of(*base, 128), data_dir=folder)


def test_folders_without_sets_or_training_data_are_refused(base, tmp_path):
    for folder, said in ((tmp_path / "none", "not a folder"), (tmp_path, "none of boolq")):
        with pytest.raises(UserError, match=said):
            load_task("commonsense", setup_of(*base, 128), data_dir=str(folder))
    folder_of(tmp_path, ["piqa"], train=())
    with pytest.raises(UserError, match="commonsense_170k.json"):
        load_task("commonsense", setup_of(*base, 128), data_dir=str(tmp_path))
    folder_of(tmp_path / "one", ["boolq"], rows=1)
    with pytest.raises(UserError, match="one: fewer than 2 examples"):
        load_task("commonsense", setup_of(*base, 128), data_dir=str(tmp_path / "one"))


@needs(REAL)
@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_every_real_gold_output_is_parsed_and_right(name):
    if not (REAL / name).exists():
        pytest.skip(f"{name} is not here")
    for file in sorted((REAL / name).glob("*.json")):
        for i, item in enumerate(read_rows(file), 1):
            e = example_of_row(item, "{instruction}\n\nResponse:", name, f"{file}, row {i}")
            options = option_texts(e.prompt, e.references)
            assert extract(e.target, e.references, options) == item["answer"]
            assert bool(options) == (name != "boolq")


@needs(REAL)
@pytest.mark.slow
def test_the_real_folder_loads_whole(base):
    task = load_task("commonsense", setup_of(*base, 256), data_dir=str(REAL))
    counts = {name: sum(e.group == name for e in task.test) for name in SETS.values()}
    assert counts == {"BoolQ": 3270, "PIQA": 1838, "SIQA": 1954, "HellaS": 0, "WinoG": 1267,
                      "ARC-e": 2376, "ARC-c": 1172, "OBQA": 500}
    assert len(task.train) + len(task.valid) == 9427 + 2251 + 1119 + 4957
