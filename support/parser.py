"""Reads command lines, with one-line errors, and the flags that several commands share."""
import argparse
import re

import torch

from support.errors import UserError, nearest


def flag(name: str) -> str:
    """Returns a flag as the user types it: max_length -> --max-length."""
    return "--" + name.replace("_", "-")


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Writes --steps N and --lr X, where argparse would write --steps STEPS and --lr LR."""

    def _get_default_metavar_for_optional(self, action):
        usual = super()._get_default_metavar_for_optional(action)
        return {int: "N", float: "X"}.get(action.type, usual)


class Parser(argparse.ArgumentParser):
    """Parses flags as argparse does, but raises UserError, which names the nearest known flag."""

    def __init__(self, doc: str):
        super().__init__(usage="%(prog)s [options]", description=doc, allow_abbrev=False,
                         formatter_class=Formatter)

    def error(self, message: str):
        raise UserError(message)

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        """Reads a command line; the result's `given` holds the names of the flags in it.

        Raises UserError if a flag is unknown or wrong.
        """
        actions = [action for action in self._actions if action.dest != "help"]
        # argparse fills in no default over a None that is there: what is not None was given.
        known, unknown = self.parse_known_args(
            args, argparse.Namespace(**{action.dest: None for action in actions}))
        if unknown:
            raise UserError(f"{unknown[0]}: unknown flag"
                            + nearest(unknown[0], self._option_string_actions))
        for name, value in vars(known).items():
            if isinstance(value, str) and not is_utf8(value):
                raise UserError(f"{flag(name)} {value!r}: not UTF-8")
        known.given = {action.dest for action in actions
                       if getattr(known, action.dest) is not None}
        for action in actions:
            if action.dest not in known.given:
                setattr(known, action.dest, action.default)
        return known


def is_utf8(text: str) -> bool:
    """Says whether an argument came in UTF-8; Python turns other bytes into surrogates."""
    try:
        text.encode()
        return True
    except UnicodeEncodeError:
        return False


def default_device() -> str:
    """Returns cuda if there is a GPU, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def device(name: str) -> str:
    """Reads the value of --device.

    Raises ArgumentTypeError if this machine does not have that device.
    """
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise argparse.ArgumentTypeError(f"{name}: neither cpu, nor cuda, nor cuda:1")
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{name}: {str(error).splitlines()[0]}") from None
    return name
