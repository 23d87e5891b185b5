"""Opens regular files, writes files whole or not at all, and reads pickles as data."""
import argparse
import os
import pickle
import re
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Iterator

import torch
from safetensors import SafetensorError

from support.errors import UserError


def new_file(name: str) -> Path:
    """Reads a flag's value that names a file to write; links are followed.

    The check comes first, since the file is written after hours of work. A file that is there
    already will be replaced. Raises ArgumentTypeError if it is no file in an existing folder.
    """
    path = Path(name).resolve()
    if path.exists() and not path.is_file() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{name}: not a file in an existing folder")
    return path


def open_regular(path: str | Path) -> BinaryIO:
    """Opens a file to read its bytes.

    Raises UserError if it cannot be read, or is a pipe or a device, which may have no end.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path}: not a regular file")
    try:
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror}") from error
    except ValueError:                          # a name out of a file, with a byte 0 in it
        raise UserError(f"{str(path)!r}: not the name of a file") from None


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turns a failure to write inside the block into a UserError that names the path.

    torch.save raises a RuntimeError without the reason. If it writes to an open file, the error's
    __context__ is the OSError with the reason.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        told = error if isinstance(error, OSError) else error.__context__
        reason = getattr(told, "strerror", None) or str(error)[:200]
        raise UserError(f"{path}: cannot write: {reason}") from error


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; when the block ends, renames it to `path`.

    A crash, a full disk or an exception inside the block leaves an earlier `path` as it was. The
    file gets the user's usual permissions, which some writers do not set. Raises UserError if the
    disk refuses.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.touch()
            usual = temporary.stat().st_mode
            yield temporary
            os.chmod(temporary, usual)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def load_pickle(path: str | Path, **options):
    """Reads what torch.save wrote, tensors and plain values only: a pickle can run any code.

    options: of torch.load. Raises ValueError if it would run code, or is broken as a pickle.
    """
    try:
        with warnings.catch_warnings(action="ignore"):      # of odd pickle protocols
            return torch.load(path, weights_only=True, **options)
    except pickle.UnpicklingError as error:     # torch's own message tells how to run the code
        name = re.search(r"GLOBAL ([\w.]{1,100})", str(error))
        raise ValueError(f"it holds more than tensors, and would run code: {name[1]}" if name else
                         "its pickle is broken") from None
