"""The tasks by name. A loader takes (tokenizer, max_length) and the flags that it has arguments
for: OPTIONS, below; one without a default must be given. It returns a data.task.Task."""
import inspect
from argparse import Namespace
from functools import partial

from data import commonsense, e2e, facts, glue, mini, text
from data.task import Task
from support.errors import UserError, nearest
from support.parser import flag

TASKS = {
    "facts": facts.load,
    "mini": mini.load,
    "commonsense": commonsense.load,
    "e2e": e2e.load,
    "mini-e2e": e2e.load_mini,
    **{name: partial(glue.load, name) for name in glue.SETS},
    "text": text.load_text,
    "jsonl": text.load_jsonl,
}
OPTIONS = {             # flag -> how argparse is to read it
    "data": dict(metavar="FILE", help="tasks text and jsonl: the file"),
    "data_dir": dict(metavar="DIR", help="tasks commonsense, e2e, glue/...: the folder"),
    "prompt_template": dict(metavar="FILE", help="tasks commonsense and mini: a text that holds "
                                                 "{instruction} (data/prompt.txt)"),
    "rewrite_seed": dict(type=int, help="task facts: draws the facts that get new values, and the "
                                        "values (--seed)"),
    "beams": dict(type=int, help="tasks that write text: beams of the search (1, greedy)"),
}


def options_of(name: str) -> dict:
    """The options that a task uses, with their defaults (no default: inspect.Parameter.empty).

    UserError: an unknown name.
    """
    if name not in TASKS:
        raise UserError(f"--task {name}: unknown{nearest(name, TASKS)}")
    accepted = list(inspect.signature(TASKS[name]).parameters.values())[2:]
    return {parameter.name: parameter.default for parameter in accepted}


def options_in(flags: Namespace) -> dict:
    """Picks a task's options from a run's flags. Without a rewrite_seed the run's own seed draws
    the facts, so that seeds vary the data too."""
    options = {name: getattr(flags, name) for name in OPTIONS}
    if options["rewrite_seed"] is None and "rewrite_seed" in options_of(flags.task):
        options["rewrite_seed"] = flags.seed
    return options


def load_task(name: str, tokenizer, max_length: int, **options) -> Task:
    """options: some of OPTIONS; None is as good as not given.

    UserError: an unknown name, an option that the task does not use or misses, a file that is
    missing or malformed.
    """
    given = {option: value for option, value in options.items() if value is not None}
    accepted = options_of(name)
    for option in given.keys() - accepted.keys():
        raise UserError(f"{flag(option)}: task {name} does not use it")
    for option, value in given.items():
        if value == "":
            raise UserError(f"{flag(option)}: is empty")
    for option, default in accepted.items():
        if default is inspect.Parameter.empty and option not in given:
            raise UserError(f"--task {name} needs {flag(option)}")
    if given.get("beams", 1) < 1:
        raise UserError(f"--beams {given['beams']}: must be at least 1")
    return TASKS[name](tokenizer, max_length, **given)
