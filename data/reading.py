"""Reads files of examples, and divides them into splits; errors name file and line."""
import json
from pathlib import Path
from typing import Iterator

from data.task import evenly
from support.errors import UserError
from support.files import open_regular


def read_text(path: str | Path) -> str:
    """Reads a UTF-8 file; drops a byte order mark, and makes each \\r\\n a \\n.

    Raises UserError if the file cannot be read, or if a line, which it names, is not UTF-8.
    """
    with open_regular(path) as file:
        data = file.read()
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = error.object[:error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8 text") from None


def parse_json(text: str, where: str):
    """Returns the value of a JSON text.

    Raises UserError, which begins with `where`, if it is not JSON, or if it holds half of a
    surrogate pair, which cannot be written to a file.
    """
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError:
        raise UserError(f"{where}: holds half of a surrogate pair, \\ud800 to \\udfff") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON: {str(error)[:100]}") from None


def numbered_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Yields the lines of a file that are not blank, with their numbers from 1."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip(" "):         # a line of tabs has columns, so it stays
            yield number, line


def read_template(path: str | None) -> str:
    """Reads a prompt template (None: data/prompt.txt); raises UserError if it does not hold {instruction} once."""
    path = path or Path(__file__).with_name("prompt.txt")
    template = read_text(path).rstrip()
    if template.count("{instruction}") != 1:
        raise UserError(f"{path}: a prompt template must hold {{instruction}} once")
    return template


def hold_out(items: list, n: int, source: str | Path) -> tuple[list, list]:
    """Holds out n items at even distances, since a file may be sorted; returns the rest and these.

    At least one item and at most a tenth is held out. Raises UserError, which names the source, if
    there are fewer than two items.
    """
    if len(items) < 2:
        raise UserError(f"{source}: fewer than 2 examples; train and valid need one each")
    taken = set(evenly(max(1, min(n, len(items) // 10)), len(items)))
    return ([item for i, item in enumerate(items) if i not in taken],
            [item for i, item in enumerate(items) if i in taken])


def split_file(items: list) -> tuple[list, list, list]:
    """Divides items into train, valid and test, which are the last two tenths.

    valid and test get at least one item each.
    """
    held = max(1, len(items) // 10)
    return items[:-2 * held], items[-2 * held:-held], items[-held:]
