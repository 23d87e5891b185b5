"""Writes the text about the built-in world that the base model is pretrained on.

    documents(world, random.Random("text"), 1000)         an iterator of 1,000 documents
A document is a pair (prompt, target). Both together are the text. Plain text has an empty prompt.
Some answers take more than a fact looked up. Such an answer states its reason first:
"Mara Tolvik lives in Brenham, so no."
"""
import random
from bisect import bisect
from dataclasses import replace
from itertools import accumulate
from typing import Iterator

from data.wordings import CHOICE_LABELS, PLURAL, RELATIONS, SO, WHO
from data.world import (Fact, World, ask, find_rivals, pick_one, pick_several, question,
                        relation_of, say, shuffled, told)

# The mix of documents: kind -> weight. The first two are plain text.
MIX = {
    "fact": 24,         # one statement
    "profile": 10,      # several statements on one subject
    "listed": 6,        # a list of attributes, then a description with all of them
    "ask": 12,          # open questions, answered with the value
    "yes_no": 12,       # is a fact so? From here on, answers state their reason
    "same": 4,          # do two subjects agree?
    "which": 8,         # which of two subjects does a fact hold for?
    "choice": 16,       # two to four values with labels: which is right?
    "two_hop": 9,       # an open question on the value of another fact
}
# The mix of the first steps. It has more questions that take comparing and looking up, since these
# skills take long to form.
FIRST_MIX = {"fact": 15, "listed": 6, "ask": 18, "yes_no": 20, "choice": 25, "two_hop": 8}


# ---- statements by pronoun
def leading_subject(template: str) -> str:
    """Returns the start of a statement that opens with its subject, else "".

    Only such a statement can take a pronoun instead.
    """
    heads = ("{subject} ", "The {subject} ")
    return next((head for head in heads if template.startswith(head)), "")


def with_pronoun(template: str, pronoun: str) -> str:
    """Puts she, he, it or they in the place of the leading subject, if there is one."""
    head = leading_subject(template)
    if not head:
        return template
    verb, rest = template[len(head):].split(" ", 1)
    if pronoun == "they":
        verb = PLURAL.get(verb, verb.removesuffix("s"))
    return f"{pronoun.capitalize()} {verb} {rest}"


# ---- text on one subject
def write_statement(world: World, rng: random.Random) -> str:
    fact = pick_one(rng, world.facts)
    relation = relation_of(fact)
    return say(pick_one(rng, relation.statements + relation.others), fact)


def write_profile(world: World, rng: random.Random) -> str:
    """Writes two to five statements on one subject, the later ones by pronoun or by name."""
    first = pick_one(rng, world.facts)
    subject, names = first.subject, RELATIONS[first.kind]
    sentences, clear = [], False                # clear: a pronoun could mean nobody else
    for name in pick_several(rng, names, min(2 + int(4 * rng.random()), len(names))):
        fact = world.known[subject, name]
        relation = relation_of(fact)
        template = pick_one(rng, relation.statements + relation.others)
        if clear and rng.random() < 0.6:
            template = with_pronoun(template, world.pronoun.get(subject, "it"))
        sentences.append(say(template, fact))
        clear = relation.values != "person"
    return " ".join(sentences)


def join_facts(facts: list[Fact], rng: random.Random, pronoun: str = "") -> str:
    """Writes one sentence with all facts of a subject: "Ada Kelsen keeps a dog, ... and ..."."""
    parts = []
    for fact in facts:
        template = pick_one(rng, [t for t in relation_of(fact).statements if leading_subject(t)])
        head = f"{pronoun.capitalize()} " if pronoun else say(leading_subject(template), fact)
        text = say(with_pronoun(template, pronoun) if pronoun else template, fact)
        parts.append(text.removeprefix(head).removesuffix("."))
    *most, last = parts
    return head + (", ".join(most) + " and " if most else "") + last + "."


def list_attributes(world: World, subject: str, relations: list[str]) -> str:
    """Lists values as E2E's files do: "name : Ada Kelsen | home : Brenham"."""
    return " | ".join([f"name : {subject}", *(f"{relation} : {world.value(subject, relation)}"
                                              for relation in relations)])


def describe_subject(world: World, subject: str, relations: list[str],
                     rng: random.Random) -> tuple[str, str]:
    """Lists the relations of a subject, then tells all of them in one or two sentences.

    The form is that of E2E's examples.
    """
    facts = [world.known[subject, relation] for relation in relations]
    cut = 1 + int(len(facts) * rng.random())
    text = join_facts(facts[:cut], rng)
    if cut < len(facts):
        clear = all(relation_of(fact).values != "person" for fact in facts[:cut])
        pronoun = world.pronoun.get(subject, "it") if clear else ""
        text += " " + join_facts(facts[cut:], rng, pronoun)
    return list_attributes(world, subject, relations) + "\nDescription:", " " + text


# ---- prompts with one right target: (world, fact, rng) -> (prompt, target)
def describe_some(world: World, fact: Fact, rng: random.Random) -> tuple[str, str]:
    """Describes the fact's subject by one to four of its relations."""
    relations = pick_several(rng, RELATIONS[fact.kind], 1 + int(4 * rng.random()))
    return describe_subject(world, fact.subject, relations, rng)


def ask_value(world: World, fact: Fact, rng: random.Random) -> tuple[str, str]:
    return question(fact, int(rng.random() * len(relation_of(fact).questions)))


def ask_with_reason(text: str, facts: list[Fact], answer: str,
                    rng: random.Random) -> tuple[str, str]:
    """Asks a question whose answer first states the facts that are its reason."""
    return ask(text, f"{told(*facts)}{pick_one(rng, SO)} {answer}")


def ask_yes_no(world: World, fact: Fact, rng: random.Random) -> tuple[str, str]:
    """Asks whether the fact is so. Yes and no have equal chances."""
    truth = rng.random() < 0.5
    stated = fact if truth else replace(fact, value=pick_one(rng, world.wrong(fact)))
    text = say(pick_one(rng, relation_of(fact).checks), stated)
    return ask_with_reason(text, [fact], "yes" if truth else "no", rng)


def ask_same(world: World, fact: Fact, rng: random.Random) -> tuple[str, str]:
    """Asks whether two subjects have the same value.

    Yes and no have equal chances for the facts in `world.shared`.
    """
    others = [name for name in world.peers(fact) if name != fact.subject]
    equal = [name for name in others if world.value(name, fact.relation) == fact.value]
    truth = bool(equal) and rng.random() < 0.5
    second = pick_one(rng, equal) if truth else find_rivals(world, fact, rng, 1)[0]
    a, b = shuffled(rng, [fact.subject, second])
    return ask_with_reason(relation_of(fact).same.format(a=a, b=b),
                           [world.known[name, fact.relation] for name in (a, b)],
                           "yes" if truth else "no", rng)


def ask_which(world: World, fact: Fact, rng: random.Random) -> tuple[str, str]:
    """Asks which of two subjects the fact holds for. The answer is the name."""
    template = relation_of(fact).statements[0]
    head = leading_subject(template)
    the = "the " if head.startswith("The") else ""
    a, b = shuffled(rng, [fact.subject, *find_rivals(world, fact, rng, 1)])
    said = template.removeprefix(head).removesuffix(".").format(value=fact.value)
    return ask_with_reason(f"{WHO[fact.kind]} {said}, {the}{a} or {the}{b}?",
                           [world.known[name, fact.relation] for name in (a, b)], fact.subject,
                           rng)


def ask_choice(world: World, fact: Fact, rng: random.Random) -> tuple[str, str]:
    """Asks for the right one of two to four values, a line each: "A: Brenham".

    The answer is the label.
    """
    wrong = pick_several(rng, world.wrong(fact), 1 + int(3 * rng.random()))
    values = shuffled(rng, [fact.value, *wrong])
    labels = pick_one(rng, CHOICE_LABELS)
    text = say(pick_one(rng, relation_of(fact).questions), fact)
    lines = [f"\n{label.capitalize()}: {value}" for label, value in zip(labels, values)]
    return ask_with_reason(text + "".join(lines), [fact], labels[values.index(fact.value)], rng)


def ask_two_hop(world: World, fact: Fact, rng: random.Random) -> tuple[str, str]:
    """Asks about the value of a fact in `world.hops`, without naming this value."""
    relation = relation_of(fact)
    second = world.known[fact.value, pick_one(rng, list(RELATIONS[relation.values]))]
    text = pick_one(rng, relation_of(second).questions)
    return ask_with_reason(say(text, second, subject=relation.hop.format(subject=fact.subject)),
                           [fact, second], second.value, rng)


# ---- documents
PLAIN_TEXT = {"fact": write_statement, "profile": write_profile}
QUESTIONS = {       # kind -> its maker, and the list of the world's facts that it is made on
    "listed": (describe_some, "asked"), "ask": (ask_value, "asked"),
    "yes_no": (ask_yes_no, "asked"), "same": (ask_same, "shared"), "which": (ask_which, "asked"),
    "choice": (ask_choice, "asked"), "two_hop": (ask_two_hop, "hops"),
}


def write_document(world: World, kind: str, rng: random.Random) -> tuple[str, str]:
    """Writes one document of the kind: (prompt, target)."""
    if kind in PLAIN_TEXT:
        return "", PLAIN_TEXT[kind](world, rng)
    make, facts = QUESTIONS[kind]
    return make(world, pick_one(rng, getattr(world, facts)), rng)


def documents(world: World, rng: random.Random, n: int,
              mix: dict[str, int] = MIX) -> Iterator[tuple[str, str]]:
    """Writes n independent documents, one after the other: (prompt, target)."""
    kinds, limits = list(mix), list(accumulate(mix.values()))
    for _ in range(n):
        yield write_document(world, kinds[bisect(limits, rng.random() * limits[-1])], rng)
