"""Makes the sets of task `mini-nlu`: sentences and pairs about the built-in world, with labels.

    acceptability  2 labels     is the sentence well formed, or did two of its words change places?
    paraphrase     2 labels     do the two questions ask the same?
    entailment     2 labels     does the second text follow from the first?
    similarity     3 labels     how many of the two facts do both texts state?
They have the shapes of GLUE's CoLA, QQP, RTE and STS-B. All are about people, in training those of
`world.taught`, in validation and test those of `world.untaught`. The values are drawn, not looked
up: what is judged is the form, or the pair, never a fact of the world.

The items come in blocks, and within a block each sentence has each label equally often. So no
sentence alone tells its label, not even by heart. An ill-formed sentence has the words of a well
formed one. In a pair of equal subjects, a shared value or a shared matter may be missing.
"""
import random
from itertools import product
from typing import NamedTuple

from data.labels import HeadTask, Labelled
from data.scoring import shares
from data.task import Setup
from data.wordings import RELATIONS
from data.world import VERSION, Fact, World, pick_one, pick_several, relation_of, say, shuffled

N = {"train": 1200, "valid": 120, "test": 600}      # items of each set: whole blocks


class Item(NamedTuple):
    """Holds one sentence or two, and the number of their label."""
    first: str
    second: str | None
    label: int
    set: str


def invented(world: World, people: list[str], rng: random.Random, relation: str) -> list[Fact]:
    """Draws two people and two values, and returns the four facts that they make."""
    values = pick_several(rng, world.options(relation), 2)
    subjects = pick_several(rng, [name for name in people if name not in values], 2)
    return [Fact(*parts, "person") for parts in product(subjects, [relation], values)]


# ---- one maker a set: (world, people, rng) -> (first, second, label) of each item of a block
def acceptability(world: World, people: list[str], rng: random.Random) -> list[tuple]:
    """Writes a sentence, then the same with two of its words exchanged.

    The first and the last word stay, and so does a name. The words between are exchanged.
    """
    while True:
        fact = invented(world, people, rng, pick_one(rng, list(RELATIONS["person"])))[0]
        relation = relation_of(fact)
        template = pick_one(rng, relation.statements + relation.others)
        words = template.split(" ")
        pairs = [(i, j) for j in range(1, len(words) - 1) for i in range(1, j)
                 if words[i] != words[j]]
        if pairs:
            i, j = pick_one(rng, pairs)
            words[i], words[j] = words[j], words[i]
            return [(say(template, fact), None, 1), (say(" ".join(words), fact), None, 0)]


def entailment(world: World, people: list[str], rng: random.Random) -> list[tuple]:
    """Pairs two statements on two people with a third, in another wording, on one of them.

    1: it follows. 0: it gives the value of the other person. Both sentences have the same words
    in common under both labels.
    """
    relation = pick_one(rng, list(RELATIONS["person"]))
    a, b, c, d = invented(world, people, rng, relation)     # a and b, c and d: the same person
    first, second, third = pick_several(rng, RELATIONS["person"][relation].statements, 3)
    return [(f"{say(first, one)} {say(second, two)}", say(third, fact), int(fact in (one, two)))
            for one, two in ((a, d), (b, c)) for fact in (a, b, c, d)]


def paraphrase(world: World, people: list[str], rng: random.Random) -> list[tuple]:
    """Pairs questions on two people and two relations, each relation in two wordings.

    1: the same person and relation. 0: another person, or in other blocks another relation.
    """
    relations = pick_several(rng, list(RELATIONS["person"]), 2)
    wordings = {name: pick_several(rng, RELATIONS["person"][name].questions, 2)
                for name in relations}
    topics = list(product(pick_several(rng, people, 2), relations))
    kept = int(2 * rng.random())            # what the pairs of label 0 have in common
    return [(wordings[a[1]][0].format(subject=a[0]), wordings[b[1]][1].format(subject=b[0]),
             int(a == b)) for a, b in product(topics, topics) if a[kept] == b[kept]]


def similarity(world: World, people: list[str], rng: random.Random) -> list[tuple]:
    """Pairs texts of two facts on one person. The label is the number of facts in common: 0 to 2.

    Both texts are on the same two relations, in two wordings each, and in any order.
    """
    names = pick_several(rng, list(RELATIONS["person"]), 2)
    subject = pick_one(rng, people)
    pairs = [pick_several(rng, [value for value in world.options(name) if value != subject], 2)
             for name in names]
    sides = list(zip(*(pick_several(rng, RELATIONS["person"][name].statements, 2)
                       for name in names)))
    orders = [shuffled(rng, [0, 1]) for _ in sides]
    kept = int(2 * rng.random())            # the fact in common of pairs of label 1

    def text(side: int, values: tuple) -> str:
        return " ".join(say(sides[side][i], Fact(subject, names[i], values[i], "person"))
                        for i in orders[side])

    return [(text(0, a), text(1, b), (a[0] == b[0]) + (a[1] == b[1]))
            for a, b in product(product(*pairs), product(*pairs))
            if a[kept] == b[kept] or a[1 - kept] != b[1 - kept]]


SETS = {        # name -> its maker, and the names of its labels
    "acceptability": (acceptability, ("ill-formed", "well-formed")),
    "paraphrase": (paraphrase, ("different questions", "same question")),
    "entailment": (entailment, ("does not follow", "follows")),
    "similarity": (similarity, ("no fact in common", "one fact in common", "both facts in common")),
}
LABELS = tuple(label for _, labels in SETS.values() for label in labels)     # the head's outputs


def splits() -> dict[str, list[Item]]:
    """Makes the items of train, valid and test, the same in every run."""
    world, rng = World(), random.Random(f"nlu {VERSION}")
    quarter = len(world.untaught) // 4
    people = {"train": world.taught, "valid": world.untaught[:quarter],
              "test": world.untaught[quarter:]}
    items: dict[str, list[Item]] = {split: [] for split in people}
    for split, (name, (make, _)) in product(people, SETS.items()):
        made = []
        while len(made) < N[split]:
            made += [Item(*item, name) for item in make(world, people[split], rng)]
        items[split] += shuffled(rng, made)
    return items


# ---- the task
class NLU(HeadTask):
    """Scores each set by the share of its items that the head judges rightly."""
    meaning = {"accuracy": "sentences and pairs that it judges rightly; Avg. is the sets' mean"}

    def metrics(self, examples: list[Labelled], said: list) -> tuple[dict, dict]:
        right = [e.label == answer for e, answer in zip(examples, said)]
        by_set, n = shares([e.group for e in examples], right)
        values = {f"accuracy/{name}": share for name, share in by_set.items()}
        average = sum(by_set.values()) / len(by_set)
        return values | {"accuracy/Avg.": average}, {f"accuracy/{name}": n[name] for name in n}


def load(setup: Setup, head: bool | None = None) -> NLU:
    """Builds the task. Each set has outputs of its own in the head."""
    def labelled(item: Item) -> Labelled:
        own = SETS[item.set][1]
        return Labelled(item.first, item.second, item.label, LABELS.index(own[0]), len(own),
                        item.set)

    examples = {split: list(map(labelled, items)) for split, items in splits().items()}
    return NLU("mini-nlu", **examples, setup=setup, defaults={"steps": 250, "batch_size": 32},
               labels=LABELS)
