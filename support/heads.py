"""Gives a model the head for labels that a task trains, and its dropout."""
from argparse import Namespace

import torch

from data import labels_for
from encoder import Encoder
from formats.checkpoint import say_once
from support.errors import UserError
from support.parser import flag

DROPOUTS = {"base_dropout": ("dropout", "attention_dropout"), "head_dropout": ("head_dropout",)}


def give_head(model, task: str, head: bool | None, draw: bool = True) -> list[str]:
    """Gives the model the head that a task needs; returns its name, in a list.

    The list is empty if the task needs no head. A head trains, so it is float32. head: the value of
    --head. A checkpoint's own head stays if it has the right number of outputs.
    Raises UserError if task and model do not go together, or if a head must be drawn and `draw` is
    False.
    """
    labels = labels_for(task, head, model.config)
    if labels is None:
        return []
    is_encoder = isinstance(model, Encoder)
    old = (model.config.n_labels if is_encoder else
           None if model.score is None else model.score.out_features)
    if old == len(labels):
        if is_encoder:
            put_in_order(model, labels)
        if not draw:
            say_once(f"{task}: the head's outputs are read as {', '.join(labels)}")
    elif not draw:
        raise UserError(f"--task {task}: the model has no trained head for {', '.join(labels)}: "
                        "train.py makes one")
    else:
        if old is not None:
            say_once(f"{task}: the model's head for {old} labels gives way to one for "
                     f"{len(labels)}")
        model.add_head(len(labels))
        if is_encoder:
            model.config.labels = list(labels)
    own = model.get_submodule(model.label_head)
    own.to(torch.promote_types(next(own.parameters()).dtype, torch.float32))
    return [model.label_head]


@torch.no_grad()
def put_in_order(model: Encoder, labels: tuple[str, ...]) -> None:
    """Puts the outputs of a checkpoint's head in the task's order, if it names the same labels.

    MNLI's three labels stand in three orders in public checkpoints.
    """
    theirs, ours = ([plain(name) for name in names] for names in (model.config.labels, labels))
    if theirs != ours and sorted(theirs) == sorted(ours):
        order = [theirs.index(name) for name in ours]
        for p in model.head.out.parameters():
            p.copy_(p[order])
        model.config.labels = list(labels)


def plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


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
