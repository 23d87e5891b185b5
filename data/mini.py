"""Makes task `mini`: eight small sets about the built-in world, shaped like the commonsense sets.

    python train.py --method dora --task mini
Each set has the shape of the one it is named after, with the same labels to answer with:
    BoolQ     true/false          is a fact so?
    PIQA      solution1-2         which means serves a goal?
    SIQA      answer1-3           what follows from a situation?
    HellaS    ending1-4           how does a statement end?
    WinoG     option1-2           which of two people does a statement hold for?
    ARC-e     answer1-4           an open question
    ARC-c     answer1-4           a question on somebody's home town, the town not named
    OBQA      answer1-4           a statement to complete on somebody's pet, the animal not named
Every question is about a person: in training one of `world.taught`, in validation and test one of
`world.untaught`. Pretraining had plain statements only about the untaught. So a good score takes
two things: the base model's knowledge, and a skill that fine-tuning taught on other people.
(Anyone may be named as somebody's friend. A validation person may be WinoG's other one in the
test. The facts on towns and animals are the same in all splits.)

A target states its reason before the label: "Ada Kelsen lives in Brenham, so the correct answer is
answer2". A model of this size cannot look a fact up and compare it in one go. The reason is always
the relation's first statement in data/wordings.py, however the question is worded. BoolQ's reason
also says whether it is the fact asked about: "lives in Brenham indeed", or "instead". Without this
word the label stayed a guess after 300 steps of `full`, LoRA and Dual LoRA alike.

`accuracy` scores the answers that the model writes, so it takes all of that. `likelihood` compares
whole answers, each with a reason that fits its label. To prefer the right one it is enough to know
the fact, so `likelihood` is high before fine-tuning. (BoolQ is the exception: both its answers
state the same fact.) Before fine-tuning a model answers in the form of the pretraining text:
"..., so 2." Such an answer is read only if its reason names an option, which must be a plain
value. So most of its answers to BoolQ, PIQA and WinoG are `unparsed`.
Every label is right equally often. A wrong option is about as common in the world as a right one.
"""
import random
from dataclasses import replace
from itertools import product
from typing import Callable, NamedTuple

from data.commonsense import NEW_TOKENS, Choices
from data.reading import read_template
from data.task import Example, Setup
from data.wordings import RELATIONS
from data.world import (VERSION, Fact, World, cloze, find_rivals, pick_one, relation_of, say,
                        shuffled, told)

N = {"train": 400, "valid": 30, "test": 100}        # items of each set, about


class Item(NamedTuple):
    """Holds a question, its options and their reasons, before it gets the form of an example."""
    text: str
    options: list[str]          # shown with the labels; none if these are true and false
    reasons: list[str]          # the reason of the answer with each label


def to_example(item: Item, labels: tuple[str, ...], place: int, template: str,
               group: str) -> Example:
    """Writes the item as LLM-Adapters does: the question, the options a line each, the labels.

    place: the place of the right label. group: the set.
    """
    shown = "\n".join(f"{label.capitalize()}: {option}"
                      for label, option in zip(labels, item.options))
    blocks = [item.text, *([shown] if shown else []), f"Answer format: {'/'.join(labels)}"]
    choices = tuple(f" {reason}, so the correct answer is {label}"
                    for reason, label in zip(item.reasons, labels))
    return Example(template.replace("{instruction}", "\n\n".join(blocks)), choices[place], choices,
                   labels, group)


# ---- one maker a set: (world, rng, the place of the right label, fact or facts) -> Item
GOALS = {   # PIQA: relation -> a goal and the means to it
    "home": ("to visit {subject} at home", "take the coach to {value}"),
    "job": ("to help {subject} at work", "learn the trade of a {value}"),
    "pet": ("to feed the pet of {subject}", "ask what a {value} eats"),
    "food": ("to cook what {subject} likes best", "buy plenty of {value}"),
    "instrument": ("to give {subject} the right notes", "find music for the {value}"),
    "colour": ("to knit a scarf that {subject} will wear", "take {value} wool"),
    "friend": ("to hear the secrets of {subject}", "have a talk with {value}"),
    "month": ("to bring a gift on the birthday of {subject}", "come in {value}"),
}
SCENES = {  # SIQA: relation -> a situation and a question on it
    "home": "The work is done and {subject} takes the coach home. Where does the journey end?",
    "job": "It is Monday and {subject} has to go to work. As what?",
    "pet": "{subject} hears a noise from the yard at home. Which animal makes it?",
    "food": "{subject} is hungry and may choose a meal. What will be on the plate?",
    "instrument": "{subject} is asked for a song and begins to play. On what?",
    "colour": "{subject} needs a new coat and may choose. Which colour will it be?",
    "friend": "{subject} has a secret to tell. Who will hear it first?",
    "month": "{subject} asks everyone to a birthday party. When will it be?",
}


def decoys(world: World, fact: Fact, rng: random.Random, n: int) -> list[str]:
    """Draws n wrong values, each as likely as it is common among the others.

    So a common value is not likelier to be the right one.
    """
    values: list[str] = []
    while len(values) < n:
        value = world.value(pick_one(rng, world.subjects(fact.kind)), fact.relation)
        if value not in (fact.value, fact.subject, *values):
            values.append(value)
    return values


MATCH = (" indeed", " instead")     # ends BoolQ's reasons: the fact is the one asked about, or not


def boolq(world: World, rng: random.Random, place: int, fact: Fact) -> Item:
    other = replace(fact, value=decoys(world, fact, rng, 1)[0])
    text = say(pick_one(rng, relation_of(fact).checks), fact if place == 0 else other)
    return Item(f"Answer the question with true or false: {text}", [],
                [f"{told(fact)}{word}" for word in MATCH])


def multiple_choice(world: World, rng: random.Random, place: int, fact: Fact, n: int, text: str,
                    option: str = "{value}") -> Item:
    """Offers n values, one of which makes the fact true. `option` words each of them."""
    options = decoys(world, fact, rng, n - 1)
    options.insert(place, fact.value)
    return Item(text, [option.format(value=value) for value in options],
                [told(replace(fact, value=value)) for value in options])


def piqa(world: World, rng: random.Random, place: int, fact: Fact) -> Item:
    goal, means = GOALS[fact.relation]
    text = f"Choose the solution that serves the goal {goal.format(subject=fact.subject)}."
    return multiple_choice(world, rng, place, fact, 2, text, means)


def siqa(world: World, rng: random.Random, place: int, fact: Fact) -> Item:
    text = f"Choose the answer that fits the situation: {say(SCENES[fact.relation], fact)}"
    return multiple_choice(world, rng, place, fact, 3, text)


def hellaswag(world: World, rng: random.Random, place: int, fact: Fact) -> Item:
    wording = int(rng.random() * len(relation_of(fact).statements))
    text = f"Choose the ending that completes the sentence: {cloze(fact, wording)[0]}"
    return multiple_choice(world, rng, place, fact, 4, text)


def winogrande(world: World, rng: random.Random, place: int, fact: Fact) -> Item:
    names = find_rivals(world, fact, rng, 1)
    names.insert(place, fact.subject)
    a, b = (world.known[name, fact.relation] for name in names)
    true, swapped = told(a, b), told(replace(a, value=b.value), replace(b, value=a.value))
    text = say(pick_one(rng, relation_of(fact).statements), fact, subject="_")
    return Item(f"Choose the option that fills the gap: {text}", names,
                [true, swapped] if place == 0 else [swapped, true])


def arc_easy(world: World, rng: random.Random, place: int, fact: Fact) -> Item:
    text = say(pick_one(rng, relation_of(fact).questions), fact)
    return multiple_choice(world, rng, place, fact, 4,
                           f"Choose the right answer to the question: {text}")


def two_hop(world: World, rng: random.Random, place: int, first: Fact, second: Fact,
            text: str) -> Item:
    """Offers four values of the second fact.

    The reason of a wrong one states a first fact that would lead to it.
    """
    ways: dict[str, str] = {}
    while len(ways) < 3:
        middle = world.value(pick_one(rng, world.people), first.relation)
        last = world.known[middle, second.relation]
        if last.value != second.value:
            ways.setdefault(last.value, told(replace(first, value=middle), last))
    options, reasons = list(ways), list(ways.values())
    options.insert(place, second.value)
    reasons.insert(place, told(first, second))
    return Item(text, options, reasons)


def arc_challenge(world: World, rng: random.Random, place: int, first: Fact, second: Fact) -> Item:
    hidden = relation_of(first).hop.format(subject=first.subject)
    text = say(pick_one(rng, relation_of(second).questions), second, hidden)
    return two_hop(world, rng, place, first, second,
                   f"Choose the right answer to the question: {text}")


def openbookqa(world: World, rng: random.Random, place: int, first: Fact, second: Fact) -> Item:
    hidden = relation_of(first).hop.format(subject=first.subject)
    return two_hop(world, rng, place, first, second, f"Choose the answer that completes the "
                   f"statement: {cloze(replace(second, subject=hidden), 0)[0]}")


class Set(NamedTuple):
    """Says how the items of a set are made and answered."""
    make: Callable[..., Item]
    labels: tuple[str, ...]
    hop: str | None = None      # the relation that leads on to a second fact


FOUR = ("answer1", "answer2", "answer3", "answer4")
SETS = {
    "BoolQ": Set(boolq, ("true", "false")),
    "PIQA": Set(piqa, ("solution1", "solution2")),
    "SIQA": Set(siqa, ("answer1", "answer2", "answer3")),
    "HellaS": Set(hellaswag, ("ending1", "ending2", "ending3", "ending4")),
    "WinoG": Set(winogrande, ("option1", "option2")),
    "ARC-e": Set(arc_easy, FOUR),
    "ARC-c": Set(arc_challenge, FOUR, "home"),
    "OBQA": Set(openbookqa, FOUR, "pet"),
}


def paths(world: World, people: list[str], hop: str | None) -> list[tuple[Fact, ...]]:
    """Lists the facts to ask about: each fact on the people.

    With `hop`, lists pairs: the fact of that relation, and a fact on its value.
    """
    if hop is None:
        return [(world.known[key],) for key in product(people, RELATIONS["person"])]
    firsts = [world.known[name, hop] for name in people]
    return [(first, world.known[first.value, relation]) for first in firsts
            for relation in RELATIONS[RELATIONS["person"][hop].values]]


def splits(template: str) -> dict[str, list[Example]]:
    """Makes the examples of train, valid and test, the same in every run."""
    world, rng = World(), random.Random(f"mini {VERSION}")
    quarter = len(world.untaught) // 4
    people = {"train": world.taught, "valid": world.untaught[:quarter],
              "test": world.untaught[quarter:]}
    examples: dict[str, list[Example]] = {split: [] for split in people}
    for split, (title, (make, labels, hop)) in product(people, SETS.items()):
        n = N[split] - N[split] % len(labels)
        places = shuffled(rng, [i % len(labels) for i in range(n)])
        for place, path in zip(places, shuffled(rng, paths(world, people[split], hop))):
            item = make(world, rng, place, *path)
            examples[split].append(to_example(item, labels, place, template, title))
    return examples


def load(setup: Setup, prompt_template: str | None = None, beams: int = 1) -> Choices:
    """Builds the task. The model may write as many tokens as the longest target takes.

    The label is the last word of a target, so none may be cut.
    """
    examples = splits(read_template(prompt_template))
    targets = [example.target for split in examples.values() for example in split]
    new = max(NEW_TOKENS, *(1 + len(setup.tokenizer.encode(target)) for target in targets))
    return Choices("mini", **examples, setup=setup, defaults={"steps": 100, "batch_size": 32},
                   notes={"new_tokens": new}, beams=beams, new_tokens=new)
