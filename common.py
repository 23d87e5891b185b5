"""What every script shares: one-line user errors, output whose loss loses nothing, and files that
are never half written."""
import argparse
import difflib
import functools
import os
import re
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterable, Iterator

import torch
from safetensors import SafetensorError


class UserError(ValueError):
    """Wrong input from the user: one line that names the file, line or option at fault."""


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of an error line: the known word most like this one, or all of them."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"


def flag(name: str) -> str:
    """An argument's name as it is typed: max_length -> --max-length."""
    return "--" + name.replace("_", "-")


def out_of_memory(error: RuntimeError) -> bool:
    """The GPU's memory, or the machine's, does not suffice."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


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
    outputs = [stream and Output(stream) for stream in streams]     # None: closed from the start
    sys.stdout, sys.stderr = outputs
    try:
        yield
    finally:
        for output in filter(None, outputs):
            output.flush()
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


class Parser(argparse.ArgumentParser):
    """argparse without its usage block: a wrong flag is a UserError, with the nearest known one."""

    def __init__(self, doc: str):
        super().__init__(description=doc, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str):
        raise UserError(message)

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            raise UserError(f"{unknown[0]}: unknown flag"
                            + nearest(unknown[0], self._option_string_actions))
        for name, value in vars(known).items():
            if isinstance(value, str) and not is_utf8(value):
                raise UserError(f"{flag(name)} {value!r}: not UTF-8")
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
