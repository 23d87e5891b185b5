"""Ends a command with one line on a user's error, and keeps it going where printing fails."""
import difflib
import functools
import math
import os
import sys
from contextlib import contextmanager
from importlib.util import find_spec
from threading import Thread
from typing import Callable, Iterable, Iterator

import torch


class UserError(ValueError):
    """Reports wrong input from the user, in one line that names the file, line or option."""


class NotFinite(ArithmeticError):
    """Reports a loss, gradient, weight or score that is NaN or infinite."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Ends an error line: names the known word most like this one, or all known words."""
    known = list(known)
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1)
    return f"; did you mean {by_lower[close[0]]}?" if close else f"; known: {', '.join(known)}"


def check_whole(name: str, value: int, low: int, high: float = math.inf) -> None:
    """Raises UserError unless `value` is a whole number from low to high."""
    if type(value) is not int or not low <= value <= high:
        limits = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
        raise UserError(f"{name} must be a whole number {limits}, not {value!r}")


def require(*packages: str) -> None:
    """Raises UserError, which says what to install, if a package is missing."""
    for package in packages:
        if find_spec(package) is None:
            raise UserError(f"the package {package} is missing: "
                            "pip install -r requirements-results.txt")


def out_of_memory(error: RuntimeError) -> bool:
    """Says whether an error means too little memory, on the GPU or on the machine."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


def within(seconds: float, call: Callable):
    """Returns call(). Raises TimeoutError if it takes longer; its thread is then left to itself."""
    ended = []

    def work() -> None:
        try:
            ended.append((call(), None))
        except Exception as error:
            ended.append((None, error))

    thread = Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if not ended:
        raise TimeoutError(f"takes longer than {seconds:.0f} seconds")
    value, error = ended[0]
    if error is not None:
        raise error
    return value


def stop_unless_finite(numbers: dict[str, float], when: str) -> None:
    """Raises NotFinite if a number is NaN or infinite; it names up to three."""
    bad = [f"{name} {value}" for name, value in numbers.items() if not math.isfinite(value)]
    if bad:
        raise NotFinite(f"{when}: {', '.join(bad[:3])}")


def refuse_not_finite(tensor: torch.Tensor, name: str) -> None:
    """Raises UserError if the tensor holds NaN or infinity; the error names the tensor."""
    if tensor.is_floating_point() and tensor.numel() and not all(
            extreme.isfinite() for extreme in tensor.detach().aminmax()):   # both NaN if one is
        raise UserError(f"{name} holds NaN or infinity")


class Output:
    """Wraps a text stream, and drops what cannot be written instead of raising.

    So a closed pipe or a full disk behind `print` does not end a run. A character that the
    stream's encoding lacks is written as "?".
    """

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        encoding = self.stream.encoding or "utf-8"
        with self.failing():
            self.stream.write(text.encode(encoding, "replace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        with self.failing():
            self.stream.flush()

    @contextmanager
    def failing(self) -> Iterator[None]:
        try:
            yield
        except OSError:         # Python flushes the rest at exit: without this it would fail again
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


@contextmanager
def lenient_output() -> Iterator[None]:
    """Makes standard output and standard error an Output each, inside the block."""
    streams = sys.stdout, sys.stderr
    with open(os.devnull, "w", encoding="utf-8") as nowhere:        # for a stream that is None
        sys.stdout, sys.stderr = (Output(stream or nowhere) for stream in streams)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            sys.stdout, sys.stderr = streams


def exit_on_user_error(main: Callable) -> Callable:
    """Decorates a script's main(), so that errors of the user end it with one line on stderr.

    These are a UserError, a file that cannot be used, and too little memory: status 2. Ctrl-C ends
    it with one line and status 130. Text that cannot be printed is dropped, and the work goes on.
    """
    def end(line: str, status: int):
        if os.environ.get("LOCAL_RANK", "0") == "0":        # of several processes one prints
            print(" ".join(line.split()), file=sys.stderr)
        sys.exit(status)

    @functools.wraps(main)
    @lenient_output()
    def wrapper(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except UserError as error:
            end(f"error: {error}", 2)
        except OSError as error:
            if error.filename is None:
                raise
            end(f"error: {error.filename}: {error.strerror}", 2)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            end(f"error: out of memory: {str(error)[:300]}", 2)
        except KeyboardInterrupt:
            end("stopped", 130)
    return wrapper
