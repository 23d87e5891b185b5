"""The sets of `mini-nlu` are balanced, and only the pair, or the order of words, tells a label."""
import hashlib
import re
from collections import Counter, defaultdict
from itertools import product

import pytest

from data import nlu
from data.nlu import SETS, N, splits
from data.wordings import COLOUR, RELATIONS
from data.world import Fact, World, say

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
    assert labels == dict.fromkeys(range(SETS[name][1]), N[split] // SETS[name][1])


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
            assert len(labels) == SETS[name][1] and len(set(labels.values())) == 1


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
