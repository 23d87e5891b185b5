"""Gives a model the head for labels that a task trains, and its dropout."""
from argparse import Namespace

from data import labels_for
from data.labels import order_of
from encoder import Encoder
from formats.checkpoint import say_once
from methods import widen
from support.errors import UserError
from support.parser import flag

DROPOUTS = {"base_dropout": ("dropout", "attention_dropout"), "head_dropout": ("head_dropout",)}


def give_head(model, task: str, head: bool | None, draw: bool = True) -> list[str]:
    """Gives the model the head that a task needs; returns its name, in a list.

    The list is empty if the task needs no head. A head trains, so it is float32. head: the value of
    --head. A checkpoint's own head stays if it has the right number of outputs, and does not name
    them otherwise than the task.
    Raises UserError if task and model do not go together, or if a head must be drawn and `draw` is
    False.
    """
    labels = labels_for(task, head, model.config)
    if labels is None:
        return []
    old = None if model.label_head is None else (
        model.config.n_labels if isinstance(model, Encoder) else model.score.out_features)
    names = getattr(model.config, "labels", [])
    if old == len(labels) and (not names or order_of(labels, names) is not None):
        say_once(f"{task}: the head's outputs are read as {', '.join(names or labels)}")
    elif not draw:
        raise UserError(f"--task {task}: the model has no trained head for {', '.join(labels)}: "
                        "train.py makes one")
    else:
        if old is not None:
            say_once(f"{task}: the model's head for {', '.join(names) or f'{old} labels'} gives "
                     f"way to one for {', '.join(labels)}")
        model.add_head(len(labels))
    if isinstance(model, Encoder):
        model.config.labels = model.config.labels or list(labels)
    widen(model.get_submodule(model.label_head))
    return [model.label_head]


def set_dropout(model, flags: Namespace) -> None:
    """Sets the dropout of an encoder and its head, where a flag says so.

    Raises UserError if the user gave a flag for a decoder, which has no dropout.
    """
    is_encoder = isinstance(model, Encoder)
    for name, fields in DROPOUTS.items():
        if not is_encoder and name in getattr(flags, "given", ()):
            raise UserError(f"{flag(name)}: only encoders have such dropout")
        if is_encoder and getattr(flags, name) is not None:
            for own in fields:
                setattr(model.config, own, getattr(flags, name))


def dropouts(model) -> dict[str, float]:
    """Returns the value of each flag on dropout that the model has; none if it is no encoder."""
    return {name: getattr(model.config, fields[0]) for name, fields in DROPOUTS.items()
            if isinstance(model, Encoder)}
