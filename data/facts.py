"""Makes task `facts`, in which fine-tuning rewrites facts that the base model knows.

Half of the 3,200 facts on people of the built-in world get new values. The other 1,600 facts stay.
Half of these are trained along with the new ones, as one mixes old data into new. The rest is never
trained, and shows what fine-tuning destroys. Training shows one wording of each fact. A model is
scored by the share of values that greedy decoding writes exactly, on
    new          rewritten facts in the trained wording
    paraphrase   the same facts in a wording that training never showed
    kept         facts that stay and are never trained; without friends, which World.rewrite never
                 changes, and which would be easier to keep
The rank limits how many facts an update can rewrite, so methods differ after a minute. Every fifth
item of each score is for validation, the others are for the test.
"""
from data.scoring import recall
from data.task import Example, Scores, Setup, TextTask
from data.world import World, cloze

FACTS = 1600


class Facts(TextTask):
    """Scores facts by exact recall."""
    meaning = {"new": "share of the rewritten facts that it writes",
               "paraphrase": "the same facts, asked in words that training never showed",
               "kept": "share of the old facts that it still knows"}

    def score(self, model, examples: list[Example]) -> Scores:
        return recall(model, self.setup, examples)


def load(setup: Setup, rewrite_seed: int | None = None) -> Facts:
    """Builds the task; rewrite_seed (None: 0) draws the facts that change and their new values."""
    _, new, same = World().rewrite(FACTS, seed=rewrite_seed or 0)
    touched = {fact.relation for fact in new}
    rehearsed, kept = same[::2], [fact for fact in same[1::2] if fact.relation in touched]
    valid, test = [], []
    for group, facts, wording in (("new", new, 0), ("paraphrase", new, 1), ("kept", kept, 0)):
        for i, fact in enumerate(facts):
            example = Example(*cloze(fact, wording), group=group)
            (valid if i % 5 == 0 else test).append(example)
    train = [Example(*cloze(fact, 0), group="new") for fact in new]
    train += [Example(*cloze(fact, 0), group="rehearsed") for fact in rehearsed]
    return Facts("facts", train, valid, test, setup, {"steps": 300, "batch_size": 128},
                 {"rewritten": len(new), "rehearsed": len(rehearsed), "kept": len(kept)})
