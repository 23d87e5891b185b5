"""Files that are never half written."""
import argparse
import os
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

from safetensors import SafetensorError

from support.errors import UserError


def new_file(name: str) -> Path:
    """The value of a flag for a file to write: said now, and not after hours of work. A link is
    followed; a file that is there already is replaced."""
    path = Path(name).resolve()
    if path.exists() and not path.is_file() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{name}: not a file in an existing folder")
    return path


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """What goes wrong on the disk inside the block is a UserError that names the path."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:       # torch.save's is a RuntimeError
        reason = getattr(error, "strerror", None) or str(error)[:200]
        raise UserError(f"{path}: cannot write: {reason}") from error


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; a clean exit flushes and renames it into place.

    A crash, a full disk or an exception inside the block leaves an earlier `path` as it was. The
    file gets the user's usual permissions, which not every writer gives it.
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
