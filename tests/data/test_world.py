"""The built-in world: the same text everywhere, true facts, right answers, nothing to guess by."""
import hashlib
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from data import world as W

ROOT = Path(__file__).resolve().parents[2]
# The facts that data/base was trained on. Where this changes, pretrain the base model again.
FACTS = "269c70fb47388434"
ASKED = "Question:|name :"
NAME = r"[A-Z][a-z]+ [A-Z][a-z]+"


@pytest.fixture(scope="module")
def world():
    return W.World()


@pytest.fixture(scope="module")
def texts(world):
    return ["".join(item) for item in W.documents(world, random.Random("test"), 20000)]


def digest(items) -> str:
    return hashlib.sha256(repr(items).encode()).hexdigest()[:16]


def relations():
    return [relation for relations in W.RELATIONS.values() for relation in relations.values()]


def items(make, facts, world, calls=4000, **options):
    """(fact, prompt, target) of many calls of a question maker."""
    rng = random.Random("items")
    for _ in range(calls):
        fact = W.pick_one(rng, facts)
        yield fact, *make(world, fact, rng, **options)


def pattern(template, **names):
    """A regular expression for what a template gives; placeholders not named match anything."""
    return re.compile(re.sub(r"\\\{(\w+)\\\}", lambda found: names.get(found[1], ".+?"),
                             re.escape(template)))


# ---- the same everywhere
def test_the_same_seed_gives_the_same_text_in_every_process():
    program = ("import random; from world import *; w = World(seed=3, people=50);"
               "b, *lists = w.rewrite(99, 1); texts = list(documents(b, random.Random('x'), 300));"
               "print(w.facts, w.pronoun, lists, texts)")
    one, two = (subprocess.run([sys.executable, "-c", program], cwd=ROOT / "data", check=True,
                               env={**os.environ, "PYTHONHASHSEED": seed},
                               capture_output=True).stdout for seed in ("1", "2"))
    assert one == two and len(one) > 10000


def test_the_facts_are_those_that_the_base_model_was_trained_on(world):
    assert digest([(f.subject, f.relation, f.value, f.kind) for f in world.facts]) == FACTS


def test_another_seed_gives_another_world(world):
    other = W.World(seed=1)
    assert len(set(world.people) & set(other.people)) < 40
    assert world.facts != other.facts


def test_documents_change_with_the_generator_only(world):
    first, again, other = (list(W.documents(world, random.Random(s), 50)) for s in "aab")
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
    assert len(W.KIND) == sum(map(len, W.RELATIONS.values()))
    for name in W.KIND:
        assert len(set(world.options(name))) == len(world.options(name)) >= 8


def test_values_are_drawn_uniformly():
    counts = Counter((fact.relation, fact.value)
                     for seed in range(20) for fact in W.World(seed, people=200).facts)
    for name, kind in W.KIND.items():
        values = W.RELATIONS[kind][name].values
        if isinstance(values, list):
            mean = sum(counts[name, value] for value in values) / len(values)
            assert all(abs(counts[name, value] - mean) < 5 * mean ** 0.5 for value in values), name


def test_a_value_says_nothing_about_the_next(world):
    neighbours = [(a, b) for a in world.people for b in world.people
                  if a < b and world.value(a, "home") == world.value(b, "home")]
    same = sum(world.value(a, "job") == world.value(b, "job") for a, b in neighbours)
    mean = len(neighbours) / len(W.JOB)
    assert abs(same - mean) < 5 * mean ** 0.5


def test_two_thirds_of_the_people_are_taught(world):
    assert len(world.taught) == 266 and len(world.untaught) == 134
    assert set(world.taught) | set(world.untaught) == set(world.people)
    assert not {fact.subject for fact in world.asked} & set(world.untaught)
    assert not {fact.value for fact in world.hops} & set(world.untaught)


# ---- wordings
def test_every_relation_has_enough_wordings():
    for relation in relations():
        assert len(set(relation.statements)) >= 5 and len(set(relation.questions)) >= 3
        assert len(set(relation.others)) >= 2 and len(set(relation.checks)) == 2
        assert W.opening(relation.statements[0])
        for template in relation.questions + relation.checks:
            assert template.endswith("?") and template.count("{subject}") == 1
        assert all("{value}" in template for template in relation.others + relation.checks)
        assert not any("{value}" in template for template in relation.questions)
        assert "{a}" in relation.same and "{b}" in relation.same


def test_every_cloze_and_question_ends_with_the_value(world):
    for fact in world.facts:
        for wording, template in enumerate(W.relation_of(fact).statements):
            prompt, target = W.cloze(fact, wording)
            assert target == f" {fact.value}." and not prompt.endswith(" ")
            assert prompt + target == W.say(template, fact)
            assert fact.subject in prompt
        for wording in range(3):
            prompt, target = W.question(fact, wording)
            assert prompt.startswith("Question: ") and prompt.endswith("?\nAnswer:")
            assert target == f" {fact.value}." and fact.subject in prompt


def test_the_documented_example():
    fact = W.Fact("Mara Tolvik", "home", "Brenham", "person")
    assert W.cloze(fact, 0) == ("Mara Tolvik lives in", " Brenham.")
    assert W.question(fact, 0) == ("Question: Where does Mara Tolvik live?\nAnswer:", " Brenham.")


def test_they_takes_the_plural():
    templates = [text for relation in W.RELATIONS["person"].values()
                 for text in relation.statements + relation.others if W.opening(text)]
    assert {W.with_pronoun(text, "they").split()[1] for text in templates} == {
        "live", "have", "work", "earn", "are", "keep", "like", "love", "ask", "play", "make",
        "write", "spend", "tell", "were", "turn"}
    assert W.with_pronoun("{subject} has a pet {value}.", "she") == "She has a pet {value}."
    assert W.with_pronoun("The {subject} eats {value}.", "it") == "It eats {value}."


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
    mean = sum(counts.values()) / len(W.COLOUR)
    # the old value is never the new one, so a colour that many people have comes up less often
    assert all(0.85 * mean < counts[colour] < 1.15 * mean for colour in W.COLOUR)


# ---- questions: right answers, wrong options, no pattern to exploit
def answered(target, *facts):
    """The answer, after what it must rest on."""
    reason = re.escape(W.told(*facts))
    return re.fullmatch(rf" {reason}, so(?: the answer is)? (.+)\.", target)[1]


def test_an_answer_rests_on_plain_statements(world):
    fact = next(f for f in world.hops if f.relation == "pet")
    second = world.known[fact.value, "diet"]
    assert W.told(fact) == f"{fact.subject} keeps a {fact.value}"
    assert W.told(fact, second) == (f"{fact.subject} keeps a {fact.value}, "
                                    f"the {fact.value} eats {second.value}")


def test_a_choice_has_one_right_value_at_a_uniform_place(world):
    places = Counter()
    for fact, prompt, target in items(W.choice, world.asked, world):
        lines = re.findall(r"^(\w+): (.+)$", prompt.split("?\n")[1].removesuffix("\nAnswer:"), re.M)
        labels, values = zip(*lines)
        assert any([label.lower() for label in all_labels[:len(values)]]
                   == [label.lower() for label in labels] for all_labels in W.LABELS)
        assert set(values) <= set(world.options(fact.relation)) - {fact.subject}
        assert len(set(values)) == len(values) and values.count(fact.value) == 1
        place = values.index(fact.value)
        assert answered(target, fact).lower() == labels[place].lower()
        places[len(values), place] += 1
    assert len(places) == 2 + 3 + 4
    for (n, _), count in places.items():
        assert abs(count - 4000 / 3 / n) < 5 * (4000 / 3 / n) ** 0.5


def test_yes_no_is_true_of_the_world_and_balanced(world):
    truths = Counter()
    for fact, prompt, target in items(W.yes_no, world.facts, world):
        asked = prompt.removeprefix("Question: ").removesuffix("\nAnswer:")
        truth = asked in [W.say(check, fact) for check in W.relation_of(fact).checks]
        assert answered(target, fact) == ("yes" if truth else "no")
        truths[truth] += 1
    assert abs(truths[True] - 2000) < 160


def test_same_is_true_of_the_world_and_balanced(world):
    truths = Counter()
    for fact, prompt, target in items(W.same, world.shared, world):
        regex = pattern(W.relation_of(fact).same, a="(.+)", b="(.+)")
        a, b = (world.known[name, fact.relation] for name in regex.search(prompt).groups())
        truth = a.value == b.value
        assert a != b and fact in (a, b)
        assert answered(target, a, b) == ("yes" if truth else "no")
        truths[truth] += 1
    assert abs(truths[True] - 2000) < 160


def test_which_has_one_right_candidate(world):
    first = 0
    for fact, prompt, target in items(W.which, world.asked, world):
        names = re.search(r", (?:the )?([\w ]+) or (?:the )?([\w ]+)\?\n", prompt).groups()
        a, b = (world.known[name, fact.relation] for name in names)
        assert [f.subject for f in (a, b) if f.value == fact.value] == [fact.subject]
        assert answered(target, a, b) == fact.subject
        first += a == fact
    assert abs(first - 2000) < 160


def test_rivals_are_no_holders_of_the_fact_and_no_friends_of_its_subject(world):
    befriended = {f.value for f in world.asked if f.relation == "friend"}
    for fact in world.asked:
        if fact.relation == "friend" and fact.subject in befriended:
            for name in W.rivals(world, fact, random.Random(fact.subject), 200):
                assert world.value(name, "friend") not in (fact.value, fact.subject)
                assert name not in (fact.value, fact.subject)


def test_questions_and_answers_come_in_every_wording(world):
    rng, fact = random.Random(0), world.asked[0]
    asked = {W.open_question(world, fact, rng) for _ in range(100)}
    assert asked == {W.question(fact, wording) for wording in range(3)}
    long = sum("so the answer is" in W.yes_no(world, fact, rng)[1] for _ in range(2000))
    assert abs(long - 500) < 100


def test_two_hops_follow_two_facts_and_hide_the_one_between(world):
    for fact, prompt, target in items(W.two_hop, world.hops, world):
        hop = W.relation_of(fact).hop.format(subject=fact.subject)
        seconds = [world.known[fact.value, name]
                   for name, relation in W.RELATIONS[W.relation_of(fact).values].items()
                   for text in relation.questions
                   if prompt == f"Question: {text.format(subject=hop)}\nAnswer:"]
        assert any(W.told(fact, second) in target and answered(target, fact, second)
                   == second.value for second in seconds)
        assert not re.search(rf"\b{fact.value}\b", prompt)


# ---- documents
def test_documents_are_plain_ascii_of_bounded_length(texts):
    assert all(text.isascii() and "{" not in text and "  " not in text for text in texts)
    assert all(text == text.strip() and "\n\n\n" not in text for text in texts)
    assert max(map(len, texts)) < 480 and sum(map(len, texts)) / len(texts) < 120
    assert not any(re.search(r"\b[Aa] [aeiouAEIOU]|\b[Aa]n [^aeiouAEIOU]", text) for text in texts)


@pytest.mark.parametrize("mix", [W.START, W.MIX])
def test_documents_are_mixed_as_told(world, monkeypatch, mix):
    monkeypatch.setattr(W, "document", lambda world, kind, rng: kind)
    kinds = Counter(W.documents(world, random.Random(0), 20000, mix))
    assert set(kinds) == set(mix) <= W.PLAIN.keys() | W.QUESTIONS.keys()
    for kind, weight in mix.items():
        assert abs(kinds[kind] / 20000 - weight / sum(mix.values())) < 0.015


def test_nobody_untaught_is_asked_about(world, texts):
    """In a question an untaught name may be a value (friend, ruler), never the subject."""
    untaught = set(world.untaught)
    forms = [pattern(t, subject=f"({NAME})", a=f"({NAME})", b=f"({NAME})")
             for r in W.RELATIONS["person"].values()
             for t in (*r.statements, *r.questions, *r.checks, r.same, r.hop or r.same)]
    asked = [text for text in texts if re.match(ASKED, text)]
    mentions = [text for text in asked if untaught & set(re.findall(NAME, text))]
    for text in mentions:
        subjects = {name for form in forms for found in form.findall(text)
                    for name in ([found] if isinstance(found, str) else found)}
        assert not subjects & untaught, text
        two = re.search(rf"Question: Who .*, ({NAME}) or ({NAME})\?", text)
        assert not two or not untaught & set(two.groups()), text
    assert 50 < len(mentions) < len(asked) / 5
    assert not any(text.startswith(f"name : {name} ") for text in asked for name in untaught)


def test_plain_text_is_on_everybody_and_true(world, texts):
    true = {W.say(t, fact): fact for fact in world.facts
            for t in W.relation_of(fact).statements + W.relation_of(fact).others}
    single = [text for text in texts if text in true]
    said = {true[text].subject for text in single}
    assert len(said & set(world.people)) > 0.98 * len(world.people)
    assert said & set(world.untaught) and said & set(world.places + world.animals + world.things)
    profiles = [text for text in texts if ". " in text and not re.match(ASKED, text)]
    for text in profiles:
        sentences = [s + "." for s in text.removesuffix(".").split(". ")]
        subject = true[sentences[0]].subject
        for sentence, before in zip(sentences[1:], sentences):
            if sentence in true:
                assert true[sentence].subject == subject
            else:                                       # a pronoun, right and free of doubt
                pronoun = world.pronoun.get(subject, "it").capitalize()
                assert sentence.startswith(pronoun + " ")
                assert set(re.findall(NAME, before)) & set(world.people) <= {subject}


def test_descriptions_say_every_attribute(world):
    rng = random.Random(4)
    for fact in random.Random(5).sample(world.facts, 500):
        names = W.draw(rng, W.RELATIONS[fact.kind], 1 + int(4 * rng.random()))
        prompt, target = W.described(world, fact.subject, names, rng)
        line, last = prompt.split("\n")
        values = [world.value(fact.subject, name) for name in names]
        assert line == " | ".join([f"name : {fact.subject}",
                                   *(f"{name} : {value}" for name, value in zip(names, values))])
        assert last == "Description:" and target.startswith(" ") and target.endswith(".")
        assert all(value in target for value in values) and fact.subject in target
        first, *more = target.split(". ")
        if more and re.match("(She|He|They|It) ", more[0]):         # nobody else can be meant
            assert set(re.findall(NAME, first)) & set(world.people) <= {fact.subject}
