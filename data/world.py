"""Makes up the built-in world: invented people, towns, animals and things, and facts about them.

A world is a list of facts (subject, relation, value), drawn uniformly and independently. So a fact
can be memorised, but never guessed. The small base model is pretrained on text about one world
(data/pretraining_text.py), and the built-in tasks are made from it.
    world = World(seed=0)            400 people, 60 places, 40 animals, 40 things: 3,880 facts
    changed, new, kept = world.rewrite(1000, seed=1)      the same world with 1,000 facts changed
    cloze(fact, 0)                   ("Mara Tolvik lives in", " Brenham.")
Two thirds of the people (`world.taught`) are asked about in pretraining. The others
(`world.untaught`) have plain statements only, to test whether a skill carries over.
All draws go through random.Random.random(), the one method whose sequence Python promises to keep.
So a seed gives the same world and the same text everywhere.
"""
import copy
import random
from collections import Counter
from dataclasses import dataclass, replace
from itertools import product

from data.wordings import ANIMAL, HE, KIND, PLACE, RELATIONS, SHE, SURNAME, THING, Relation

VERSION = 2


@dataclass(frozen=True)
class Fact:
    """Says that the subject's relation has this value."""
    subject: str
    relation: str
    value: str
    kind: str           # the subject's kind: person, place, animal or thing


# ---- drawing
def pick_one(rng: random.Random, items):
    return items[int(rng.random() * len(items))]


def pick_several(rng: random.Random, items, n: int) -> list:
    """Picks n of the items without replacement, in random order."""
    left = list(items)
    if n > len(left):
        raise ValueError(f"cannot draw {n} of {len(left)}")
    return [left.pop(int(rng.random() * len(left))) for _ in range(n)]


def shuffled(rng: random.Random, items) -> list:
    """Returns the items in random order, by nothing but rng.random()."""
    return sorted(items, key=lambda _: rng.random())


# ---- the world
def relation_of(fact: Fact) -> Relation:
    return RELATIONS[fact.kind][fact.relation]


class World:
    """Holds the facts of one seed. `facts` is ordered by kind, subject and relation."""

    def __init__(self, seed: int = 0, people: int = 400, places: int = 60):
        rng = random.Random(f"world {VERSION} {seed}")
        surnames = [stem + ending for stem, ending in product(*SURNAME)]
        self.people = [" ".join(name)
                       for name in pick_several(rng, product(SHE + HE, surnames), people)]
        self.places = ["".join(name) for name in pick_several(rng, product(*PLACE), places)]
        self.animals, self.things = ANIMAL, THING
        self.taught = self.people[:2 * people // 3]
        self.untaught = self.people[2 * people // 3:]
        self.pronoun = {}                                   # name -> she, he or they
        for name in self.people:
            usual = "she" if name.split()[0] in SHE else "he"
            self.pronoun[name] = "they" if rng.random() < 0.2 else usual
        self.facts = []
        for kind, relations in RELATIONS.items():
            for subject, relation in product(self.subjects(kind), relations):
                values = [value for value in self.options(relation) if value != subject]
                self.facts.append(Fact(subject, relation, pick_one(rng, values), kind))
        self._index()

    def _index(self):
        """Finds the facts that each kind of question can be about."""
        self.known = {(fact.subject, fact.relation): fact for fact in self.facts}
        untaught = set(self.untaught)
        self.asked = [fact for fact in self.facts if fact.subject not in untaught]
        # A question on two subjects needs a value that two have; a hop leads on from the value.
        holders = Counter((fact.relation, fact.value) for fact in self.asked)
        self.shared = [fact for fact in self.asked if holders[fact.relation, fact.value] > 1]
        self.hops = [fact for fact in self.asked
                     if relation_of(fact).hop and fact.value not in untaught]

    def subjects(self, kind: str) -> list[str]:
        return {"person": self.people, "place": self.places,
                "animal": self.animals, "thing": self.things}[kind]

    def peers(self, fact: Fact) -> list[str]:
        """Lists the subjects to compare the fact's with: for a taught person, taught people."""
        if fact.kind != "person":
            return self.subjects(fact.kind)
        return self.untaught if fact.subject in self.untaught else self.taught

    def value(self, subject: str, relation: str) -> str:
        return self.known[subject, relation].value

    def options(self, relation: str) -> list[str]:
        """Lists all values that the relation can take."""
        values = RELATIONS[KIND[relation]][relation].values
        return self.subjects(values) if isinstance(values, str) else values

    def wrong(self, fact: Fact) -> list[str]:
        """Lists all values that would make the fact false."""
        taken = (fact.value, fact.subject)
        return [value for value in self.options(fact.relation) if value not in taken]

    def rewrite(self, n: int, seed: int, kinds=("person",)) \
            -> tuple["World", list[Fact], list[Fact]]:
        """Changes n facts -> (the changed world, its new facts, the other facts of `kinds`).

        The facts that change are drawn uniformly, and so are their new values. A friend or a ruler
        never changes. Raises ValueError if fewer than n facts can change (2,800 can, with 400
        people).
        """
        rng = random.Random(f"rewrite {VERSION} {seed}")
        ours = [fact for fact in self.facts if fact.kind in kinds]
        free = [fact for fact in ours if relation_of(fact).values != "person"]
        new = {fact: replace(fact, value=pick_one(rng, self.wrong(fact)))
               for fact in pick_several(rng, free, n)}
        world = copy.copy(self)
        world.facts = [new.get(fact, fact) for fact in self.facts]
        world._index()
        rewritten = [new[fact] for fact in ours if fact in new]
        return world, rewritten, [fact for fact in ours if fact not in new]


def find_rivals(world: World, fact: Fact, rng: random.Random, n: int) -> list[str]:
    """Draws n other subjects for which the fact does not hold.

    No rival is the fact's value, and none has the fact's subject for its value: the subject and a
    rival are not friends.
    """
    return pick_several(rng, [name for name in world.peers(fact) if name != fact.value and
                              world.value(name, fact.relation) not in (fact.value, fact.subject)],
                        n)


# ---- sentences and questions on one fact
def say(template: str, fact: Fact, subject: str = "") -> str:
    """Fills the template in, and begins it with a capital. `subject` replaces the fact's own."""
    text = template.format(subject=subject or fact.subject, value=fact.value)
    return text[0].upper() + text[1:]


def cloze(fact: Fact, wording: int) -> tuple[str, str]:
    """Splits a statement before its value: ("Mara Tolvik lives in", " Brenham.")."""
    template = relation_of(fact).statements[wording]
    return say(template.removesuffix(" {value}."), fact), f" {fact.value}."


def told(*facts: Fact) -> str:
    """States the reason of an answer: "Mara Tolvik keeps a deer, the deer eats clover"."""
    texts = [say(relation_of(fact).statements[0], fact).removesuffix(".") for fact in facts]
    return ", ".join(texts).replace(", The ", ", the ")


def ask(text: str, answer: str) -> tuple[str, str]:
    """Makes a prompt of the question, and a target of the answer."""
    return f"Question: {text}\nAnswer:", f" {answer}."


def question(fact: Fact, wording: int) -> tuple[str, str]:
    """Asks for the value: ("Question: Where does Mara Tolvik live?\\nAnswer:", " Brenham.")."""
    return ask(say(relation_of(fact).questions[wording], fact), fact.value)
