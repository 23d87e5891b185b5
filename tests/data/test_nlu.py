"""The sets of `mini-nlu` are balanced, and only the pair, or the order of words, tells a label."""
import hashlib
import re
from collections import Counter, defaultdict
from itertools import product

import pytest
import torch
import transformers
from conftest import ROOT
from runs import result_of, setup_of

import train
from data import load_task, nlu
from data.labels import HeadTask
from data.nlu import SETS, N, splits
from data.wordings import COLOUR, RELATIONS
from data.world import Fact, World, say
from formats.checkpoint import load_pretrained

DIGEST = "b33f3ae013602de7"


@pytest.fixture(scope="module")
def items():
    return splits()


@pytest.fixture(scope="module")
def world():
    return World()


def of_set(items, name):
    return [item for item in items if item.set == name]


@pytest.mark.parametrize("split", N)
@pytest.mark.parametrize("name", SETS)
def test_every_label_is_equally_frequent(items, split, name):
    labels = Counter(item.label for item in of_set(items[split], name))
    assert labels == dict.fromkeys(range(len(SETS[name][1])), N[split] // len(SETS[name][1]))


@pytest.mark.parametrize("split", N)
@pytest.mark.parametrize("name, sides", [("acceptability", ["words"]),
                                         ("entailment", ["first", "second", "words"]),
                                         ("paraphrase", ["first", "second"]),
                                         ("similarity", ["first", "second"])])
def test_no_sentence_alone_tells_its_label(items, split, name, sides):
    """Whoever knows one sentence, or the words in any order, has nothing to go by."""
    for side in sides:
        seen = defaultdict(Counter)
        for item in of_set(items[split], name):
            words = f"{item.first} {item.second}".lower().replace(",", "").split()
            known = (" ".join(sorted(words)),) if side == "words" else getattr(item, side)
            seen[known][item.label] += 1
        for labels in seen.values():
            assert len(labels) == len(SETS[name][1]) and len(set(labels.values())) == 1


def test_people_of_the_splits_are_apart(items, world):
    quarter = len(world.untaught) // 4
    people = {"train": set(world.taught), "valid": set(world.untaught[:quarter]),
              "test": set(world.untaught[quarter:])}
    friends = ("friend", "letters", "holiday", "secret", "need")    # anyone may be one's friend
    for split, made in items.items():
        others = set(world.people) - people[split]
        for item in made:
            text = f"{item.first} {item.second or ''}"
            named = [name for name in others if name in text]
            assert not named or any(word in text for word in friends)
        assert sum(any(name in item.first for name in people[split]) for item in made) == len(made)


def read(text: str, wordings: dict, world) -> list[set]:
    """Finds the facts (subject, relation, value) that each sentence of a text may state or ask."""
    found = []
    for sentence in re.findall(r".+?[.?]", text):
        sentence, facts = sentence.strip(), set()
        subjects = [person for person in world.people if person in sentence]
        for template, name in wordings.items():
            values = [value for value in world.options(name) if value in sentence] or [""]
            facts |= {(subject, name, value) for subject, value in product(subjects, values)
                      if say(template, Fact(subject, name, value, "person")) == sentence}
        found.append(facts)
    return found


def test_the_labels_are_right(items, world):
    """Reads the sentences back by the wordings."""
    relations = RELATIONS["person"].items()
    statements = {text: name for name, r in relations for text in r.statements}
    others = {text: name for name, r in relations for text in r.others}
    questions = {text: name for name, r in relations for text in r.questions}
    valid = items["valid"]
    for item in of_set(valid, "acceptability"):
        (found,) = read(item.first, statements | others, world)
        assert len(found) == item.label or item.first.split()[0].lower() in COLOUR
    for item in of_set(valid, "paraphrase"):
        (one,), (two,) = (read(text, questions, world) for text in (item.first, item.second))
        assert len(one) == len(two) == 1 and (one == two) == item.label
        assert item.first != item.second
    for item in of_set(valid, "entailment"):
        told, (hypothesis,) = (read(text, statements, world) for text in (item.first, item.second))
        assert len(told) == 2 and len(hypothesis) == 1
        assert (hypothesis in told) == item.label
    for item in of_set(valid, "similarity"):
        one, two = (read(text, statements, world) for text in (item.first, item.second))
        assert len(one) == len(two) == 2 and all(len(facts) == 1 for facts in one + two)
        assert sum(facts in two for facts in one) == item.label
        assert {(s, r) for facts in one for s, r, _ in facts} == {
            (s, r) for facts in two for s, r, _ in facts}


def test_an_ill_formed_sentence_keeps_its_ends_and_names(items, world):
    for item in of_set(items["test"], "acceptability"):
        assert item.second is None
        assert any(name in item.first for name in world.people)
        assert item.first[0].isupper() and item.first.endswith(".")


def test_the_items_are_those_that_results_are_about(items):
    """If this changes, scores of before cannot be compared: raise the world's VERSION."""
    assert items == nlu.splits()
    assert hashlib.sha256(repr(items).encode()).hexdigest()[:16] == DIGEST


# ---- the task
def test_the_outputs_of_the_head_are_cut_among_the_sets(items, base):
    setup = setup_of(*load_pretrained(ROOT / "data" / "encoder"))
    task = load_task("mini-nlu", setup)
    assert isinstance(task, HeadTask) and len(task.labels) == 9 == len(set(task.labels))
    own = {(e.group, e.start, e.n) for e in task.test}
    assert own == {("acceptability", 0, 2), ("paraphrase", 2, 2), ("entailment", 4, 2),
                   ("similarity", 6, 3)}
    assert not any(task.counts()["cut"].values())


def test_the_average_is_the_mean_of_the_sets(items):
    task = load_task("mini-nlu", setup_of(*load_pretrained(ROOT / "data" / "encoder")))
    examples = [next(e for e in task.test if e.group == name) for name in SETS]
    said = [e.label for e in examples[:3]] + [(examples[3].label + 1) % 3]
    values, counts = task.metrics(examples, said)
    assert values == {**{f"accuracy/{name}": 1.0 for name in list(SETS)[:3]},
                      "accuracy/similarity": 0.0, "accuracy/Avg.": 0.75}
    assert set(counts.values()) == {1}


def test_the_shipped_encoder_is_small_and_reads_as_transformers_does():
    folder = ROOT / "data" / "encoder"
    assert sum(file.stat().st_size for file in folder.iterdir() if file.suffix != ".pt") < 5.5e6
    ours, tokenizer = load_pretrained(folder)
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    pair = "Mara Tolvik lives in Brenham.", "Who lives there?"
    ids, _ = tokenizer.pair(*pair, 64)
    assert ids == reference(*pair)["input_ids"]
    tokens = torch.tensor([ids])
    with torch.no_grad():
        torch.testing.assert_close(ours.eval().mlm(tokens), theirs(tokens).logits, atol=1e-4,
                                   rtol=1e-4)


@pytest.mark.slow
def test_a_short_run_learns_to_judge_sentences_and_pairs(empty_folder):
    train.main(["--method", "lora", "--task", "mini-nlu", "--steps", "120", "--skip-before",
                "--out", "run"])
    after = result_of("run")["after"]
    assert after["accuracy/acceptability"] > 0.9 and after["accuracy/paraphrase"] > 0.9
