"""The sets of `mini-nlu` are balanced, and only the pair, or the order of words, tells a label."""
import hashlib
from collections import Counter, defaultdict

import pytest

from data import nlu
from data.nlu import SETS, N, splits
from data.wordings import RELATIONS
from data.world import World

DIGEST = "later"


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


def test_the_labels_are_right(items):
    """Reads the sentences back by the wordings."""
    statements = {text: name for name, relation in RELATIONS["person"].items()
                  for text in relation.statements + relation.others}
    questions = {text: name for name, relation in RELATIONS["person"].items()
                 for text in relation.questions}

    def read(text, wordings):
        """Returns the one (subject, relation, value) that the text may state."""
        found = set()
        for template, name in wordings.items():
            for subject, value in product_in(text, name):
                filled = template.format(subject=subject, value=value)
                if filled[0].upper() + filled[1:] == text:
                    found.add((subject, name, value))
        return found

    world = World()

    def product_in(text, name):
        subjects = [person for person in world.people if person in text]
        values = [value for value in world.options(name) if value in text.lower()
                  or value in text] or [""]
        return [(s, v) for s in subjects for v in values]

    valid = items["valid"]
    for item in of_set(valid, "acceptability"):
        assert len(read(item.first, statements)) == item.label
    for item in of_set(valid, "entailment"):
        one, two = item.first[:-1].split(". ")
        told = read(f"{one}.", statements) | read(f"{two}.", statements)
        (hypothesis,) = read(item.second, statements)
        assert len(told) == 2 and (hypothesis in told) == item.label
        assert {fact[2] for fact in told} >= {hypothesis[2]}
    for item in of_set(valid, "similarity"):
        (first,), (second,) = ({fact[:2] for fact in read(text, questions)}
                               for text in (item.first, item.second))
        assert sum(a == b for a, b in zip(first, second)) == item.label
        assert item.first != item.second


def test_an_ill_formed_sentence_keeps_its_ends_and_names(items, world):
    for item in of_set(items["test"], "acceptability"):
        assert item.second is None
        assert any(name in item.first for name in world.people)
        assert item.first[0].isupper() and item.first.endswith(".")


def test_the_items_are_those_that_results_are_about(items):
    """If this changes, scores of before cannot be compared: raise the world's VERSION."""
    assert items == nlu.splits()
    assert hashlib.sha256(repr(items).encode()).hexdigest()[:16] == DIGEST
