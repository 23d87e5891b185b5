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


def read_value(raw: dict, key: str, kind: str):
    """Returns raw[key]. Raises UserError if it is not of that kind, a key of the table below."""
    value = raw.get(key)
    right, expected = {
        "size": (type(value) is int and 1 <= value <= 2 ** 24, "a whole number from 1 to 2^24"),
        "number": (type(value) in (int, float) and 0 < value < 1e30, "a positive number"),
        "count": (type(value) is int and 0 <= value <= 2 ** 24, "a whole number from 0 to 2^24"),
        "share": (type(value) in (int, float) and 0 <= value < 1, "a number from 0 to below 1"),
        "scale": (type(value) in (int, float) and 1e-3 <= value <= 1e12,
                  "a number from 0.001 to 10^12"),
        "flag": (type(value) is bool, "true or false")}[kind]
    if not right:
        raise UserError(f"{key} must be {expected}, found {repr(value)[:200]}")
    return value
