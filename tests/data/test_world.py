"""The built-in world: the same facts everywhere, uniform values, wordings of one form."""
import hashlib
import os
import random
import subprocess
import sys
from collections import Counter

import pytest
from conftest import ROOT

from data.pretraining_text import documents, leading_subject, with_pronoun
from data.wordings import COLOUR, JOB, KIND, RELATIONS
from data.world import Fact, World, cloze, question, relation_of, say

# The facts that data/base was trained on. If this changes, pretrain the base model again.
FACTS = "269c70fb47388434"


@pytest.fixture(scope="module")
def world():
    return World()


# ---- the same everywhere
@pytest.mark.slow
def test_the_same_seed_gives_the_same_text_in_every_process():
    program = ("import random; from data.world import World;"
               "from data.pretraining_text import documents; w = World(seed=3, people=50);"
               "b, *lists = w.rewrite(99, 1); texts = list(documents(b, random.Random('x'), 300));"
               "print(w.facts, w.pronoun, lists, texts)")
    one, two = (subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True,
                               env={**os.environ, "PYTHONHASHSEED": seed},
                               capture_output=True).stdout for seed in ("1", "2"))
    assert one == two and len(one) > 10000


def test_the_facts_are_those_that_the_base_model_was_trained_on(world):
    facts = repr([(f.subject, f.relation, f.value, f.kind) for f in world.facts])
    assert hashlib.sha256(facts.encode()).hexdigest()[:16] == FACTS


def test_another_seed_gives_another_world(world):
    other = World(seed=1)
    assert len(set(world.people) & set(other.people)) < 40
    assert world.facts != other.facts


def test_documents_change_with_the_generator_only(world):
    first, again, other = (list(documents(world, random.Random(s), 50)) for s in "aab")
    assert first == again != other


# ---- names, values, split
def test_every_subject_has_a_name_of_its_own(world):
    names = world.people + world.places + world.animals + world.things
    assert len(names) == len(set(names)) == 400 + 60 + 40 + 40
    assert not any(a != b and b.startswith(a) for a in world.people + world.places
                   for b in world.people + world.places)
    firsts = Counter(name.split()[0] for name in world.people)
    assert len(firsts) > 50 and max(firsts.values()) < 20


def test_every_fact_is_there_once_and_has_a_value_among_the_options(world):
    assert len(world.facts) == len(world.known) == 400 * 8 + 60 * 6 + 40 * 4 + 40 * 4
    for fact in world.facts:
        assert fact.value in world.options(fact.relation) and fact.value != fact.subject
        assert world.value(fact.subject, fact.relation) == fact.value


def test_relation_names_and_the_words_of_a_list_are_unique(world):
    assert len(KIND) == sum(map(len, RELATIONS.values()))
    for name in KIND:
        assert len(set(world.options(name))) == len(world.options(name)) >= 8


def test_values_are_drawn_uniformly():
    counts = Counter((fact.relation, fact.value)
                     for seed in range(20) for fact in World(seed, people=200).facts)
    for name, kind in KIND.items():
        values = RELATIONS[kind][name].values
        if isinstance(values, list):
            mean = sum(counts[name, value] for value in values) / len(values)
            assert all(abs(counts[name, value] - mean) < 5 * mean ** 0.5 for value in values), name


def test_a_value_says_nothing_about_the_next(world):
    neighbours = [(a, b) for a in world.people for b in world.people
                  if a < b and world.value(a, "home") == world.value(b, "home")]
    same = sum(world.value(a, "job") == world.value(b, "job") for a, b in neighbours)
    mean = len(neighbours) / len(JOB)
    assert abs(same - mean) < 5 * mean ** 0.5


def test_two_thirds_of_the_people_are_taught(world):
    assert len(world.taught) == 266 and len(world.untaught) == 134
    assert set(world.taught) | set(world.untaught) == set(world.people)
    assert not {fact.subject for fact in world.asked} & set(world.untaught)
    assert not {fact.value for fact in world.hops} & set(world.untaught)


# ---- wordings
def test_every_relation_has_enough_wordings():
    for relation in (r for kind in RELATIONS.values() for r in kind.values()):
        assert len(set(relation.statements)) >= 5 and len(set(relation.questions)) >= 3
        assert len(set(relation.others)) >= 2 and len(set(relation.checks)) == 2
        assert leading_subject(relation.statements[0])
        for template in relation.questions + relation.checks:
            assert template.endswith("?") and template.count("{subject}") == 1
        assert all("{value}" in template for template in relation.others + relation.checks)
        assert not any("{value}" in template for template in relation.questions)
        assert "{a}" in relation.same and "{b}" in relation.same


def test_every_cloze_and_question_ends_with_the_value(world):
    for fact in world.facts:
        for wording, template in enumerate(relation_of(fact).statements):
            prompt, target = cloze(fact, wording)
            assert target == f" {fact.value}." and not prompt.endswith(" ")
            assert prompt + target == say(template, fact)
            assert fact.subject in prompt
        for wording in range(3):
            prompt, target = question(fact, wording)
            assert prompt.startswith("Question: ") and prompt.endswith("?\nAnswer:")
            assert target == f" {fact.value}." and fact.subject in prompt


def test_the_documented_example():
    fact = Fact("Mara Tolvik", "home", "Brenham", "person")
    assert cloze(fact, 0) == ("Mara Tolvik lives in", " Brenham.")
    assert question(fact, 0) == ("Question: Where does Mara Tolvik live?\nAnswer:", " Brenham.")


def test_they_takes_the_plural():
    templates = [text for relation in RELATIONS["person"].values()
                 for text in relation.statements + relation.others if leading_subject(text)]
    assert {with_pronoun(text, "they").split()[1] for text in templates} == {
        "live", "have", "work", "earn", "are", "keep", "like", "love", "ask", "play", "make",
        "write", "spend", "tell", "were", "turn"}
    assert with_pronoun("{subject} has a pet {value}.", "she") == "She has a pet {value}."
    assert with_pronoun("The {subject} eats {value}.", "it") == "It eats {value}."


# ---- rewriting
@pytest.mark.parametrize("n, kinds", [(1, ("person",)), (1000, ("person",)), (2800, ("person",)),
                                      (200, ("place", "animal"))])
def test_rewriting_changes_n_facts_and_no_other(world, n, kinds):
    changed, new, kept = world.rewrite(n, seed=5, kinds=kinds)
    assert len({(f.subject, f.relation) for f in new}) == len(new) == n
    assert len(new) + len(kept) == sum(fact.kind in kinds for fact in world.facts)
    for fact in new:
        assert fact.value != world.value(fact.subject, fact.relation)
        assert fact.value in world.options(fact.relation) and fact.kind in kinds
        assert fact.relation not in ("friend", "ruler")
    differing = [b for a, b in zip(world.facts, changed.facts) if a != b]
    assert differing == new and all(fact in world.known.values() for fact in kept[:50])
    assert all(changed.value(f.subject, f.relation) == f.value for f in new + kept)


def test_rewriting_is_deterministic_and_leaves_the_world_alone(world):
    before = list(world.facts)
    assert world.rewrite(300, seed=2)[1:] == world.rewrite(300, seed=2)[1:]
    assert world.rewrite(300, seed=2)[1] != world.rewrite(300, seed=3)[1]
    assert world.facts == before and world.known[before[0].subject, before[0].relation] == before[0]
    with pytest.raises(ValueError):
        world.rewrite(2801, seed=0)


def test_new_values_are_uniform(world):
    counts = Counter(fact.value for seed in range(20) for fact in world.rewrite(2800, seed)[1]
                     if fact.relation == "colour")
    mean = sum(counts.values()) / len(COLOUR)
    # the old value is never the new one, so a colour that many people have comes up less often
    assert all(0.85 * mean < counts[colour] < 1.15 * mean for colour in COLOUR)
