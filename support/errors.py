"""One-line user errors, and output whose loss loses nothing."""
import difflib
import functools
import math
import os
import sys
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Callable, Iterable, Iterator

import torch


class UserError(ValueError):
    """Wrong input from the user: one line that names the file, line or option at fault."""


class NotFinite(ArithmeticError):
    """A loss, gradient, weight or score that is NaN or infinite."""


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of an error line: the known word most like this one, or all of them."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"


def require(*packages: str) -> None:
    """Raises UserError, which names the package and the file to install, if one is missing."""
    for package in packages:
        if find_spec(package) is None:
            raise UserError(f"the package {package} is missing: "
                            "pip install -r requirements-results.txt")


def out_of_memory(error: RuntimeError) -> bool:
    """The GPU's memory, or the machine's, does not suffice."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


def stop_unless_finite(numbers: dict[str, float], when: str) -> None:
    """Raises NotFinite, which names up to three of them, if a number is not finite."""
    bad = [f"{name} {value}" for name, value in numbers.items() if not math.isfinite(value)]
    if bad:
        raise NotFinite(f"{when}: {', '.join(bad[:3])}")


def refuse_not_finite(tensor: torch.Tensor, name: str) -> None:
    """Raises UserError, which names the tensor, if it holds NaN or infinity."""
    if tensor.is_floating_point() and tensor.numel() and not all(
            extreme.isfinite() for extreme in tensor.detach().aminmax()):     # NaN passes through
        raise UserError(f"{name} holds NaN or infinity")


class Output:
    """A text stream that takes everything: what its reader, disk or alphabet refuses is dropped.

    So that a closed pipe, a full disk or an odd locale behind `print` loses no result.
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
        except OSError:         # and what is still in its buffer must find a place at the very end
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


@contextmanager
def lenient_output() -> Iterator[None]:
    """Inside, standard output and standard error are each an Output."""
    streams = sys.stdout, sys.stderr
    with open(os.devnull, "w", encoding="utf-8") as nowhere:        # for one closed from the start
        sys.stdout, sys.stderr = (Output(stream or nowhere) for stream in streams)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            sys.stdout, sys.stderr = streams


def exit_on_user_error(main: Callable) -> Callable:
    """Decorator for a script's main(): a UserError, a file that cannot be used and memory that does
    not suffice end it with one line on stderr and status 2; Ctrl-C with one line and 130. What
    cannot be printed is dropped, and the work goes on."""
    def end(line: str, status: int):
        if os.environ.get("LOCAL_RANK", "0") == "0":        # one line, not one for each process
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
