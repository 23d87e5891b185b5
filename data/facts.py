"""Task `facts`: fine-tuning rewrites facts of the built-in world that the base model knows.

World A becomes world B: FACTS facts on people get new values. Training shows each of them in one
wording only. A model is scored, greedily and exactly, on
    new          rewritten facts in the trained wording
    paraphrase   the same facts in a wording that training never showed
    kept         facts that were not rewritten, in the same wordings
Rank limits how many facts an update can rewrite, so methods differ within a minute. All rewritten
facts are trained; every fifth belongs to the validation score, the others to the test score.
"""
from common import UserError
from data.task import Example, Task, recall
from data.world import VERSION, World, cloze

FACTS = 1500


def load(tokenizer, max_length: int | None, data: str | None) -> Task:
    """The task as it is in every run: the run's --seed does not change the facts."""
    if data is not None:
        raise UserError("--data: task facts does not use it, its world is built in")
    _, new, kept = World().rewrite(FACTS, seed=0)
    valid, test = [], []
    for group, facts, wording in (("new", new, 0), ("paraphrase", new, 1), ("kept", kept, 0)):
        for i, fact in enumerate(facts):
            example = Example(*cloze(fact, wording), group=group)
            (valid if i % 5 == 0 else test).append(example)
    train = [Example(*cloze(fact, 0), group="new") for fact in new]
    return Task("facts", train, valid, test, recall,
                defaults={"steps": 400, "batch_size": 128},
                notes={"world": VERSION, "rewritten": len(new), "kept": len(kept)})
