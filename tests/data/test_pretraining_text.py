"""The text for pretraining is true, its answers are right, and there is nothing to guess by."""
import random
import re
from collections import Counter

import pytest

from data import pretraining_text
from data.pretraining_text import (FIRST_MIX, MIX, PLAIN_TEXT, QUESTIONS, ask_choice, ask_same,
                                   ask_two_hop, ask_value, ask_which, ask_yes_no, describe_subject,
                                   documents)
from data.wordings import CHOICE_LABELS, RELATIONS
from data.world import World, find_rivals, pick_one, pick_several, question, relation_of, say, told

ASKED = "Question:|name :"
NAME = r"[A-Z][a-z]+ [A-Z][a-z]+"
CALLS = 1600            # of a question maker


@pytest.fixture(scope="module")
def world():
    return World()


@pytest.fixture(scope="module")
def texts(world):
    return ["".join(item) for item in documents(world, random.Random("test"), 20000)]


def items(make, facts, world):
    """(fact, prompt, target) of many calls of a question maker."""
    rng = random.Random("items")
    for _ in range(CALLS):
        fact = pick_one(rng, facts)
        yield fact, *make(world, fact, rng)


def assert_even(count: int, n: int = CALLS, share: float = 0.5) -> None:
    """Within five standard deviations."""
    assert abs(count - n * share) < 5 * (n * share * (1 - share)) ** 0.5


def pattern(template, **names):
    """A regular expression for what a template gives; placeholders not named match anything."""
    return re.compile(re.sub(r"\\\{(\w+)\\\}", lambda found: names.get(found[1], ".+?"),
                             re.escape(template)))


# ---- questions: right answers, wrong options, no pattern to exploit
def answered(target, *facts):
    """The answer, after what it must rest on."""
    reason = re.escape(told(*facts))
    return re.fullmatch(rf" {reason}, so(?: the answer is)? (.+)\.", target)[1]


def test_an_answer_rests_on_plain_statements(world):
    fact = next(f for f in world.hops if f.relation == "pet")
    second = world.known[fact.value, "diet"]
    assert told(fact) == f"{fact.subject} keeps a {fact.value}"
    assert told(fact, second) == (f"{fact.subject} keeps a {fact.value}, "
                                  f"the {fact.value} eats {second.value}")


def test_a_choice_has_one_right_value_at_a_uniform_place(world):
    places = Counter()
    for fact, prompt, target in items(ask_choice, world.asked, world):
        lines = re.findall(r"^(\w+): (.+)$", prompt.split("?\n")[1].removesuffix("\nAnswer:"), re.M)
        labels, values = zip(*lines)
        assert any([label.lower() for label in all_labels[:len(values)]]
                   == [label.lower() for label in labels] for all_labels in CHOICE_LABELS)
        assert set(values) <= set(world.options(fact.relation)) - {fact.subject}
        assert len(set(values)) == len(values) and values.count(fact.value) == 1
        place = values.index(fact.value)
        assert answered(target, fact).lower() == labels[place].lower()
        places[len(values), place] += 1
    assert len(places) == 2 + 3 + 4
    for (n, _), count in places.items():
        assert_even(count, share=1 / 3 / n)


def test_yes_no_is_true_of_the_world_and_balanced(world):
    truths = Counter()
    for fact, prompt, target in items(ask_yes_no, world.facts, world):
        asked = prompt.removeprefix("Question: ").removesuffix("\nAnswer:")
        truth = asked in [say(check, fact) for check in relation_of(fact).checks]
        assert answered(target, fact) == ("yes" if truth else "no")
        truths[truth] += 1
    assert_even(truths[True])


def test_same_is_true_of_the_world_and_balanced(world):
    truths = Counter()
    for fact, prompt, target in items(ask_same, world.shared, world):
        regex = pattern(relation_of(fact).same, a="(.+)", b="(.+)")
        a, b = (world.known[name, fact.relation] for name in regex.search(prompt).groups())
        truth = a.value == b.value
        assert a != b and fact in (a, b)
        assert answered(target, a, b) == ("yes" if truth else "no")
        truths[truth] += 1
    assert_even(truths[True])


def test_which_has_one_right_candidate(world):
    first = 0
    for fact, prompt, target in items(ask_which, world.asked, world):
        names = re.search(r", (?:the )?([\w ]+) or (?:the )?([\w ]+)\?\n", prompt).groups()
        a, b = (world.known[name, fact.relation] for name in names)
        assert [f.subject for f in (a, b) if f.value == fact.value] == [fact.subject]
        assert answered(target, a, b) == fact.subject
        first += a == fact
    assert_even(first)


def test_rivals_are_no_holders_of_the_fact_and_no_friends_of_its_subject(world):
    befriended = {f.value for f in world.asked if f.relation == "friend"}
    for fact in world.asked:
        if fact.relation == "friend" and fact.subject in befriended:
            for name in find_rivals(world, fact, random.Random(fact.subject), 200):
                assert world.value(name, "friend") not in (fact.value, fact.subject)
                assert name not in (fact.value, fact.subject)


def test_questions_and_answers_come_in_every_wording(world):
    rng, fact = random.Random(0), world.asked[0]
    asked = {ask_value(world, fact, rng) for _ in range(100)}
    assert asked == {question(fact, wording) for wording in range(3)}
    long = sum("so the answer is" in ask_yes_no(world, fact, rng)[1] for _ in range(2000))
    assert_even(long, 2000, 1 / 4)


def test_two_hops_follow_two_facts_and_hide_the_one_between(world):
    for fact, prompt, target in items(ask_two_hop, world.hops, world):
        hop = relation_of(fact).hop.format(subject=fact.subject)
        seconds = [world.known[fact.value, name]
                   for name, relation in RELATIONS[relation_of(fact).values].items()
                   for text in relation.questions
                   if prompt == f"Question: {text.format(subject=hop)}\nAnswer:"]
        assert any(told(fact, second) in target and answered(target, fact, second)
                   == second.value for second in seconds)
        assert not re.search(rf"\b{fact.value}\b", prompt)


# ---- documents
def test_documents_are_plain_ascii_of_bounded_length(texts):
    assert all(text.isascii() and "{" not in text and "  " not in text for text in texts)
    assert all(text == text.strip() and "\n\n\n" not in text for text in texts)
    assert max(map(len, texts)) < 480 and sum(map(len, texts)) / len(texts) < 120
    assert not any(re.search(r"\b[Aa] [aeiouAEIOU]|\b[Aa]n [^aeiouAEIOU]", text) for text in texts)


@pytest.mark.parametrize("mix", [FIRST_MIX, MIX])
def test_documents_are_mixed_as_told(world, monkeypatch, mix):
    monkeypatch.setattr(pretraining_text, "write_document", lambda world, kind, rng: kind)
    kinds = Counter(documents(world, random.Random(0), 20000, mix))
    assert set(kinds) == set(mix) <= PLAIN_TEXT.keys() | QUESTIONS.keys()
    for kind, weight in mix.items():
        assert abs(kinds[kind] / 20000 - weight / sum(mix.values())) < 0.015


def test_nobody_untaught_is_asked_about(world, texts):
    """In a question an untaught name may be a value (friend, ruler), never the subject."""
    untaught = set(world.untaught)
    forms = [pattern(t, subject=f"({NAME})", a=f"({NAME})", b=f"({NAME})")
             for r in RELATIONS["person"].values()
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
    true = {say(t, fact): fact for fact in world.facts
            for t in relation_of(fact).statements + relation_of(fact).others}
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
        names = pick_several(rng, RELATIONS[fact.kind], 1 + int(4 * rng.random()))
        prompt, target = describe_subject(world, fact.subject, names, rng)
        line, last = prompt.split("\n")
        values = [world.value(fact.subject, name) for name in names]
        assert line == " | ".join([f"name : {fact.subject}",
                                   *(f"{name} : {value}" for name, value in zip(names, values))])
        assert last == "Description:" and target.startswith(" ") and target.endswith(".")
        assert all(value in target for value in values) and fact.subject in target
        first, *more = target.split(". ")
        if more and re.match("(She|He|They|It) ", more[0]):         # nobody else can be meant
            assert set(re.findall(NAME, first)) & set(world.people) <= {fact.subject}
