import json
import math
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import BASE, SHARED, needs
from runs import setup_of
from safetensors.torch import load_file, save_file

from data import e2e, load_task
from data.e2e import normal_form, read_csv, read_txt
from data.task import Example
from data.text_metrics import bleu, caption_words, cider, meteor, nist, rouge_l, text_scores
from formats.checkpoint import load_pretrained
from support.errors import UserError

REAL = SHARED / "e2e"
with_real_files = needs(REAL)


@pytest.fixture(scope="module")
def mini():
    return load_task("mini-e2e", setup_of())


def split(*texts: str) -> list[list[str]]:
    return [text.split() for text in texts]


# ---- metrics
def test_bleu_is_100_for_any_of_the_references_whatever_case_and_spacing():
    outputs = ["The Mill is a pub near Crowne Plaza.", "Cotto, by the river, serves pasta."]
    references = [("A pub .", "the mill is a pub near Crowne Plaza ."),
                  ("Cotto , by the river , serves pasta .",)]
    assert bleu(outputs, references) == pytest.approx(100)
    assert bleu(outputs[::-1], references) < 20


def test_bleu_by_hand():
    # Of "a b c d e f" and "a b c d x f": 5/6, 3/5, 2/4, 1/3 of the n-grams are shared.
    expected = 100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25
    assert bleu(["a b c d e f"], [("a b c d x f",)]) == pytest.approx(expected)


def test_nist_by_hand():
    # Two words of one each: info = log2(2 / 1) = 1; the bigram follows from its first word: 0.
    assert nist(split("a b"), [split("a b")]) == pytest.approx(1)
    # Two thirds of the length halve the score.
    assert nist(split("a b"), [split("a b c")]) == pytest.approx(math.log2(3) / 2)
    # Counts are of both references: info(a) = log2(6 / 3), info(b) = log2(6 / 1), and after the
    # three a's info(a a) = info(a b) = log2(3 / 1). Both a's count, for one reference has both.
    expected = (2 * 1 + math.log2(6)) / 3 + (math.log2(3) + math.log2(3)) / 2
    assert nist(split("a a b"), [split("a b c", "a a d")]) == pytest.approx(expected)
    # Two references with one a each are no reason to count two: (log2(4 / 2) + 0) / 2, and of
    # the bigrams a a none is known.
    assert nist(split("a a"), [split("a b", "a c")]) == pytest.approx(0.5)


def test_nist_of_single_references_equals_nltk():
    from nltk.translate.nist_score import corpus_nist
    rng = random.Random("nist")
    text = lambda: [str(int(6 * rng.random())) for _ in range(5 + int(9 * rng.random()))]
    outputs, references = [text() for _ in range(30)], [[text()] for _ in range(30)]
    assert nist(outputs, references) == pytest.approx(corpus_nist(references, outputs))
    perfect = nist([item[0] for item in references], references)
    assert perfect > nist([sorted(item[0]) for item in references], references)


def test_rouge_l_by_hand():
    # LCS 2 (P 1/2, R 1) and LCS 3 (P 3/4, R 1/2): the best P and the best R are combined.
    references = [split("a c", "a b c x y z")]
    expected = 100 * (1 + 1.44) * 0.75 * 1 / (1 + 1.44 * 0.75)
    assert rouge_l(split("a b c d"), references) == pytest.approx(expected)
    assert rouge_l(split("a b c d", "q"), references * 2) == pytest.approx(expected / 2)


def test_cider_by_hand():
    # Two items, no word in both: every idf is log 2. The first has cosine 1 for n = 1 and 2, the
    # second 1/2 for n = 1; the texts have no longer n-grams.
    references = [split("a b"), split("c d")]
    assert cider(split("a b", "c x"), references) == pytest.approx((10 * 2 / 4 + 10 * 0.5 / 4) / 2)
    # a twice is clipped to once, and one word too many costs exp(-1 / 72).
    cosines = (1 + 1) / (math.sqrt(5) * math.sqrt(2)) + 1 / math.sqrt(2)
    assert cider(split("a b a", "q"), references) == pytest.approx(
        10 / 4 * math.exp(-1 / 72) * cosines / 2)
    # the mean over references; a word that all items have weighs nothing
    assert cider(split("a b", "q"), [split("a b", "x y"), split("c d")]) == pytest.approx(1.25)
    assert cider(split("a", "a"), [split("a"), split("a")]) == 0


def test_caption_words_are_lower_case_without_punctuation():
    text = "It isn't far: Fitzbillies' pub (The Mill) is family-friendly, and under £10.50."
    assert caption_words(text) == (
        "it is n't far fitzbillies pub the mill is family-friendly and under £10.50".split())


def wordnet(error=None):
    def ensure_loaded():
        if error:
            raise error
    return SimpleNamespace(ensure_loaded=ensure_loaded, synsets=lambda word: [])


def test_meteor_by_hand(monkeypatch):
    monkeypatch.setattr("nltk.corpus.wordnet", wordnet())
    # One chunk of four matches: 1 - 0.5 (1 / 4)^3. The best reference counts.
    references = [split("a b c d", "x y")]
    assert meteor(split("a b c d"), references) == pytest.approx(100 * (1 - 0.5 / 64))
    assert meteor([[]], references) == 0
    assert "meteor" in text_scores(["a b c d"], [("a b c d",)])


def test_meteor_is_left_out_without_wordnet(monkeypatch, capsys):
    monkeypatch.setattr("nltk.corpus.wordnet", wordnet(LookupError()))
    monkeypatch.setattr(e2e, "write_texts", lambda *args, **options: ["a b c d"])
    task = load_task("mini-e2e", setup_of())
    for _ in range(2):
        scores = task.score(None, [Example("p", " a", references=("a b c d",))])
        assert list(scores.values) == ["bleu", "nist", "rouge_l", "cider"]
    assert "WordNet" in task.notes["meteor"]
    assert capsys.readouterr().err.count("meteor") == 1


@pytest.mark.parametrize("outputs, references", [
    ([""], [("a b",)]),
    (["", ""], [("a b", "c"), ("d",)]),
    (["a"], [("a",)]),
    (["a b"], [("c d", "a")]),
    (["a b c d e f"], [("a",)]),
    (["same words"] * 3, [("same words",), ("other words",), ("more",)]),
    ([".", "!"], [(".",), ("?",)]),
    (["a b c d e"] * 2, [("a b c d e",)] * 2),
])
def test_scores_of_odd_texts_are_finite(outputs, references):
    for name, value in text_scores(outputs, references).items():
        assert math.isfinite(value) and value >= 0, name
        assert outputs.count("") < len(outputs) or value == 0, name


@pytest.mark.slow
def test_the_metric_libraries_are_imported_only_where_they_are_used():
    code = "import sys, data; print({'nltk', 'sacrebleu', 'rouge_score'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=BASE.parents[1],
                          capture_output=True, text=True)
    assert done.stdout == "set()\n"


# ---- the challenge's files
TXT = "name : A | price : £ 20 - 25||A costs £ 20 .\n"
CSV = 'mr,ref\n"name[A], priceRange[£20-25]","A, ""the"" one."\n'


WORDS = SimpleNamespace(encode=str.split)        # a tokenizer, as far as reading needs one


def folder_of(path: Path, txt: dict | None = None, csv: dict | None = None) -> str:
    """The three files of either kind; txt and csv replace the content of some."""
    for files, default, kind in ((txt, TXT, "txt"), (csv, CSV, "csv")):
        for name in e2e.CHALLENGE_FILES[kind] if files is not None else ():
            path.joinpath(name).write_bytes(files.get(name, default).encode())
    return str(path)


def load(folder: str):
    return load_task("e2e", setup_of(tokenizer=WORDS), data_dir=folder)


def test_txt_lines_become_pairs_to_learn_and_groups_to_score(tmp_path):
    lines = "name : A||One .\n\nname : B||Two .\nname : A||Three  words . \n"
    task = load(folder_of(tmp_path, {name: lines for name in e2e.CHALLENGE_FILES["txt"]}))
    assert [(e.prompt, e.target) for e in task.train] == [
        ("name : A\nDescription:", " One ."), ("name : B\nDescription:", " Two ."),
        ("name : A\nDescription:", " Three words .")]
    for part in (task.valid, task.test):
        assert [e.prompt for e in part] == ["name : A\nDescription:", "name : B\nDescription:"]
        assert [e.references for e in part] == [("One .", "Three words ."), ("Two .",)]
        assert part[0].target == " One ."


def test_csv_rows_give_the_same_prompts_as_txt_lines(tmp_path):
    (tmp_path / "x").mkdir()
    bom = "\ufeff" + CSV.replace("\n", "\r\n") + "name[B],\"two\nlines\"\r\n"
    task = load(folder_of(tmp_path, csv={"testset_w_refs.csv": bom}))
    assert task.train[0].prompt == "name : A | price : £ 20 - 25\nDescription:"
    assert task.train[0].references == ('A, "the" one.',)
    assert [e.references for e in task.test] == [('A, "the" one.',), ("two lines",)]
    assert task.train[0].prompt == load(folder_of(tmp_path / "x", txt={})).train[0].prompt


def test_names_and_prices_take_the_form_of_the_txt_files():
    mr = "name[The Mill], eatType[coffee shop], priceRange[less than £20], customer rating[5 out " \
         "of 5], familyFriendly[yes], near[Café Sicilia]"
    assert normal_form("", mr) == (
        "name : The Mill | Type : coffee shop | price : less than £ 20 | customer rating : 5 out "
        "of 5 | family friendly : yes | near : Café Sicilia")


def test_txt_files_are_read_where_there_are_both(tmp_path):
    task = load(folder_of(tmp_path, txt={}, csv={"trainset.csv": "broken"}))
    assert task.train[0].target == " A costs £ 20 ." and task.notes["files"] == "txt"


@pytest.mark.parametrize("name, content, message", [
    ("train.txt", TXT + "name : A|no bars\n", r"train\.txt:2: no \|\|"),
    ("test.txt", TXT + "\nname : A|| \n", r"test\.txt:3: the reference is empty"),
    ("valid.txt", " ||text\n", r"valid\.txt:1: the meaning representation is empty"),
    ("test.txt", "\n", r"test\.txt: holds no examples"),
    ("trainset.csv", "mr,text\na,b\n", r"trainset\.csv:1: the columns"),
    ("trainset.csv", "", r"trainset\.csv:1: the columns"),
    ("devset.csv", CSV + "name[B],a,b\n", r"devset\.csv:3: 3 columns"),
    ("devset.csv", CSV + 'name[B],""\n', r"devset\.csv:3: the reference is empty"),
    ("devset.csv", CSV + "name B,text\n", r"devset\.csv:3: not a list of name\[value\]"),
    ("devset.csv", CSV + 'name[B],"text\n', r"devset\.csv:3: unexpected end"),
    ("testset_w_refs.csv", "mr,ref\n", r"testset_w_refs\.csv: holds no examples"),
])
def test_wrong_lines_are_named(tmp_path, name, content, message):
    folder = folder_of(tmp_path, **{name[-3:]: {name: content}})
    with pytest.raises(UserError, match=message):
        load(folder)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match="holds none of train.txt, trainset.csv"):
        load(str(tmp_path))
    folder = folder_of(tmp_path, csv={})
    (tmp_path / "devset.csv").unlink()
    with pytest.raises(UserError, match=r"devset\.csv: cannot read: No such file"):
        load(folder)
    (tmp_path / "trainset.csv").unlink()
    with pytest.raises(UserError, match=r"trainset\.csv"):
        load(folder)


@with_real_files
@pytest.mark.slow
def test_the_real_files():
    task = load(str(REAL))
    assert [len(task.train), len(task.valid), len(task.test)] == [42061, 547, 630]
    assert sum(len(e.references) for e in task.valid) == 4672
    assert sum(len(e.references) for e in task.test) == 4693
    assert not {e.prompt for e in task.train} & {e.prompt for e in task.test}
    # The challenge's files hold the same meaning representations, line by line.
    for rows, lines in (("devset.csv", "valid.txt"), ("testset_w_refs.csv", "test.txt")):
        assert [row.mr for row in read_csv(REAL / rows)] == [row.mr for row in read_txt(REAL / lines)]


# ---- the built-in world
def test_mini_e2e_is_the_same_every_time(mini):
    again = load_task("mini-e2e", setup_of())
    assert (mini.train, mini.valid, mini.test) == (again.train, again.valid, again.test)
    first = mini.test[0]
    assert first.prompt.startswith("name : ") and first.prompt.endswith("\nDescription:")


def test_no_subject_of_mini_e2e_is_in_two_splits(mini):
    subjects = [{e.prompt.split(" | ")[0] for e in part}
                for part in (mini.train, mini.valid, mini.test)]
    assert [len(part) for part in subjects] == [340, 30, 90]
    assert len(set.union(*subjects)) == 460


def test_mini_e2e_tells_every_attribute_in_several_texts(mini, base):
    prompts = [e.prompt for e in mini.test]
    assert len(set(prompts)) == len(prompts)
    for e in mini.valid + mini.test:
        values = [pair.split(" : ")[1] for pair in e.prompt.split("\n")[0].split(" | ")]
        assert 4 <= len(values) <= 6 and 4 <= len(set(e.references)) == len(e.references)
        assert e.target == " " + e.references[0]
        for text in e.references:
            assert all(value in text for value in values)
            assert len(base[1].encode(text)) < e2e.NEW_TOKENS
    assert {text.split()[0] for e in mini.test for text in e.references} == {
        "Meet", "This", "Let", "Welcome", "On"}


# ---- scoring a model
@pytest.mark.parametrize("beams", [1, 3])
def test_scores_do_not_depend_on_the_batch_size(base, beams):
    one, many = (load_task("mini-e2e", setup_of(*base, batch_size=size), beams=beams)
                 for size in (1, 4))
    assert one.score(base[0], one.test[::45]) == many.score(base[0], many.test[::45])


def test_a_tokenizer_whose_end_is_not_the_config_s_scores_the_same(base, tmp_path):
    """Renames data/base's bos and eos, each by the other's id, but not in config.json."""
    names = {"bos_token": "<|eos|>", "eos_token": "<|bos|>"}
    bos, eos = base[1].bos, base[1].eos
    shutil.copytree(BASE, tmp_path / "other")
    (tmp_path / "other" / "tokenizer_config.json").write_text(json.dumps(names))
    weights = load_file(BASE / "model.safetensors")
    weights["model.embed_tokens.weight"][[bos, eos]] = weights["model.embed_tokens.weight"][
        [eos, bos]]
    save_file(weights, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    model, tokenizer = load_pretrained(tmp_path / "other")
    assert (tokenizer.bos, tokenizer.eos, model.config.eos) == (eos, bos, [eos, bos])
    usual, other = (load_task("mini-e2e", setup_of(*pair)) for pair in (base, (model, tokenizer)))
    same = usual.score(base[0], usual.test[::45])
    assert other.score(model, other.test[::45]) == same
    model.config.eos = [eos]                                # what config.json alone says
    assert other.score(model, other.test[::45]) != same


def test_a_text_to_compare_with_may_be_longer_than_any_input(base, tmp_path):
    long = " ".join(["word"] * 300)
    folder = folder_of(tmp_path, txt={"test.txt": f"name : A||{long}\n{long} : B||short\n"})
    model, tokenizer = base
    task = load_task("e2e", setup_of(model, tokenizer, 128), data_dir=folder)
    short, cut = (task.scored(example) for example in task.test)
    assert [(len(s.tokens) < 128, s.cut) for s in short] == [(True, False)]
    assert [(len(s.tokens), s.cut) for s in cut] == [(128, True)]
    assert cut[0].tokens[-8:] == tokenizer.encode(task.test[1].prompt)[-8:]


def test_an_item_is_scored_on_its_first_line(monkeypatch, mini):
    written = iter([" \n One line . \nAnother", "", "\n\n"])
    monkeypatch.setattr(e2e, "write_texts", lambda *args, **options: list(written))
    items = [Example(prompt, " x", references=("One line .",)) for prompt in "abc"]
    rows = mini.score(None, items).predictions
    assert rows[0] == dict(prompt="a", output="One line .", references=["One line ."])
    assert [row["output"] for row in rows] == ["One line .", "", ""]


def test_texts_are_written_with_the_settings_of_the_paper(monkeypatch):
    asked = {}
    monkeypatch.setattr(e2e, "write_texts", lambda *args, **options: asked.update(options) or ["a"])
    task = load_task("mini-e2e", setup_of(), beams=10)
    task.score(None, [Example("p", " a", references=("a",))])
    # The prompt's own 4-grams must be free: a name in it can be longer than four tokens.
    assert asked == dict(beams=10, length_penalty=0.9, no_repeat_ngram=4, copy_prompt=True)


def test_new_tokens_suffice_for_the_longest_training_text(tmp_path):
    long = " ".join(["word"] * 100)
    folder = folder_of(tmp_path, txt={"train.txt": f"a : b||{long}\n"})
    assert load(folder).new_tokens == 101
