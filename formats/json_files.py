"""Reads JSON and other small files: every fault becomes one line that names the file."""
import json
from contextlib import contextmanager
from pathlib import Path

from support.errors import UserError
from support.files import open_regular


def read_bytes(path: Path) -> bytes:
    """Reads a file whole. Raises UserError if it cannot be read or is empty."""
    with open_regular(path) as file:
        data = file.read()
    if not data.strip():
        raise UserError(f"{path}: the file is empty")
    return data


def read_json(path: Path) -> dict:
    """Reads the JSON object in a file. Raises UserError if there is none."""
    data = read_bytes(path)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


def read_json_if_there(path: Path) -> dict:
    """Reads the JSON object in a file, or returns {} if there is no file."""
    return read_json(path) if path.exists() else {}


@contextmanager
def expected_layout(path: Path):
    """Turns the errors of a wrong layout into a UserError that names the file.

    JSON may hold a list or a number in the place of the object that the code inside reads.
    """
    try:
        yield
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        message = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{path}: unexpected layout: {message}") from error
