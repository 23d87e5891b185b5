"""Writes files whole or not at all."""
import argparse
import os
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

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


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turns a failure to write inside the block into a UserError that names the path."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:       # torch.save's is a RuntimeError
        reason = getattr(error, "strerror", None) or str(error)[:200]
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
