"""Command lines: flags without a usage block, and what several commands read alike."""
import argparse
import re

import torch

from support.errors import UserError, nearest


def flag(name: str) -> str:
    """An argument's name as it is typed: max_length -> --max-length."""
    return "--" + name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    """argparse without its usage block: a wrong flag is a UserError, with the nearest known one."""

    def __init__(self, doc: str):
        super().__init__(description=doc, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str):
        raise UserError(message)

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        """Reads a command line; the result's `given` has the names of the flags that stood there.

        Raises UserError if a flag is unknown or wrong.
        """
        own = [action for action in self._actions if action.dest != "help"]
        # With None there already, argparse fills in no default: what is not None was given.
        known, unknown = self.parse_known_args(
            args, argparse.Namespace(**{action.dest: None for action in own}))
        if unknown:
            raise UserError(f"{unknown[0]}: unknown flag"
                            + nearest(unknown[0], self._option_string_actions))
        for name, value in vars(known).items():
            if isinstance(value, str) and not is_utf8(value):
                raise UserError(f"{flag(name)} {value!r}: not UTF-8")
        known.given = {action.dest for action in own if getattr(known, action.dest) is not None}
        for action in own:
            if action.dest not in known.given:
                setattr(known, action.dest, action.default)
        return known


def is_utf8(text: str) -> bool:
    """False for what Python makes of other bytes on the command line."""
    try:
        text.encode()
        return True
    except UnicodeEncodeError:
        return False


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def device(name: str) -> str:
    """A --device flag's value, if this machine has that device."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise argparse.ArgumentTypeError(f"{name}: neither cpu, nor cuda, nor cuda:1")
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{name}: {str(error).splitlines()[0]}") from None
    return name
