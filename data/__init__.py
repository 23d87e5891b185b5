"""Lists the tasks by name, and builds them.

A loader takes a data.task.Setup, and those flags of OPTIONS that it has arguments for. A flag whose
argument has no default must be given. The loader returns a data.task.Task.
"""
import inspect
from argparse import BooleanOptionalAction, Namespace
from functools import partial
from pathlib import Path

from data import commonsense, dreambooth, e2e, facts, glue, mini, nlu, subject, text
from data.labels import uses_head
from data.pictures import SUBJECTS
from data.task import Setup, Task
from diffusion import PictureConfig
from encoder import EncoderConfig
from formats.sdxl import SDXLConfig
from support.errors import UserError, nearest
from support.parser import flag

TASKS = {
    "facts": facts.load,
    "mini": mini.load,
    "mini-nlu": nlu.load,
    "commonsense": commonsense.load,
    "e2e": e2e.load,
    "mini-e2e": e2e.load_mini,
    **{name: partial(glue.load, name) for name in glue.SETS},
    "subject": subject.load,
    "dreambooth": dreambooth.load,
    "text": text.load_text,
    "jsonl": text.load_jsonl,
}
# Tasks that can train a head for labels -> the names of its outputs.
LABELS = {"mini-nlu": nlu.LABELS, **{name: spec.labels for name, spec in glue.SETS.items()}}
FOLDER = Path(__file__).parent
# The pretrained models that ship.
BASE, ENCODER, PICTURES = (FOLDER / name for name in ("base", "encoder", "pictures"))
BASES = {"mini-nlu": ENCODER, "subject": PICTURES}      # of the tasks that start not from BASE
ADAPTERS = {                                            # a task's own defaults
    "subject": dict(targets="q,k,v,o", rank=4),
    "dreambooth": dict(targets="to_q,to_k,to_v,to_out.0", rank=4)}
DRAWERS = {             # a task that draws -> the config of its model, and where one is
    "subject": (PictureConfig, "such as data/pictures"),
    "dreambooth": (SDXLConfig, "a diffusers folder of SDXL, given as --model")}
OPTIONS = {             # flag -> how argparse is to read it
    "data": dict(metavar="FILE", help="text, jsonl: read the examples from this file"),
    "data_dir": dict(metavar="DIR", help="commonsense, e2e, glue/..., dreambooth: read this "
                                         "folder's files"),
    "prompt_template": dict(metavar="FILE", help="commonsense, mini: put the question in place of "
                                                 "{instruction} in this text (data/prompt.txt)"),
    "rewrite_seed": dict(type=int, help="facts: draw the facts to rewrite, and their new values, "
                                        "by this seed (the run's own)"),
    "subject": dict(metavar="TEXT", help=f"subject: learn this one of {', '.join(SUBJECTS)} (zib); "
                                         "dreambooth: the caption of all photos"),
    "beams": dict(type=int, help="tasks that write text: search with N beams (1, greedy)"),
    "head": dict(action=BooleanOptionalAction, help="glue/..., mini-nlu: answer by a trained head, "
                                                    "not in words (on an encoder yes, else no)"),
}


def base_of(name: str) -> Path:
    """Returns the pretrained model that a task starts from, unless the user names another."""
    return BASES.get(name, BASE)


def options_of(name: str) -> dict:
    """Returns the options that a task uses, with their defaults.

    An option that must be given has the default Parameter.empty. Raises UserError if the task is
    unknown.
    """
    if name not in TASKS:
        raise UserError(f"--task {name}: unknown{nearest(name, TASKS)}")
    accepted = list(inspect.signature(TASKS[name]).parameters.values())[1:]
    return {parameter.name: parameter.default for parameter in accepted}


def options_in(flags: Namespace) -> dict:
    """Picks a task's options from a run's flags.

    Without --rewrite-seed the run's seed draws the facts, so that another seed has other data too.
    """
    options = {name: getattr(flags, name) for name in OPTIONS}
    if options["rewrite_seed"] is None and "rewrite_seed" in options_of(flags.task):
        options["rewrite_seed"] = flags.seed
    return options


def checked_options(name: str, options: dict) -> dict:
    """Returns the options that are given, which are those that are not None.

    Raises UserError if the task is unknown, does not use an option, or lacks one that it needs.
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
    return given


def labels_for(name: str, head: bool | None, config) -> tuple[str, ...] | None:
    """Names the outputs of the head that a task needs on a model; None if it needs none.

    head: the value of --head. config: the model's. Raises UserError if an encoder cannot do the
    task.
    """
    kind, where = DRAWERS.get(name, (object, ""))
    draws = isinstance(config, PictureConfig | SDXLConfig)
    if draws != (name in DRAWERS) or not isinstance(config, kind):
        raise UserError(f"--task {name}: needs a model that " + (
            f"draws pictures, {where}" if where else "reads text; this one draws pictures"))
    if uses_head(config, head):
        if name not in LABELS:
            raise UserError(f"--task {name}: an encoder writes no text; its tasks are "
                            f"{', '.join(LABELS)}")
        return LABELS[name]
    if isinstance(config, EncoderConfig):
        raise UserError("--no-head: an encoder answers by a head only")
    return None


def load_task(name: str, setup: Setup, **options) -> Task:
    """Builds a task; the names of `options` are those of OPTIONS.

    Raises UserError as checked_options() does, or if a file is missing or malformed.
    """
    return TASKS[name](setup, **checked_options(name, options))
