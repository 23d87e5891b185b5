"""Keeps the folder of a run, from which a stopped run goes on.

config.json          the flags, the fingerprints of model and data, the scores before training
log.jsonl            a line for each step
checkpoint.pt        all that training changes, written only if it is finite
adapter.safetensors  the trained adapters
snapshots/           with --snapshot-every: the adapters after so many steps, <step>.safetensors
result.json          the scores before and after; once it is there, the run is finished
Each file but log.jsonl is written under a temporary name, flushed and renamed. Several processes
share the folder, and the first writes. Two runs cannot work in one folder at a time. --overwrite
renames an older run to NAME.old.
"""
import hashlib
import itertools
import json
import math
import os
import shutil
import sys
import zipfile
from argparse import Namespace
from numbers import Real as Number
from pathlib import Path
from types import NoneType
from typing import Iterator

import torch

from data import OPTIONS
from methods import METHODS, load, save, state
from support.errors import UserError, refuse_not_finite
from support.files import atomic_write, load_pickle, open_regular, writing
from support.heads import give_head
from support.parser import flag
from support.processes import gathered, is_main, process_number

ROOT = Path(__file__).resolve().parents[1]
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
CHECKPOINT, SNAPSHOTS = "checkpoint.pt", "snapshots"
FILES = ("result.json", "adapter.safetensors", CHECKPOINT, "log.jsonl")     # and config.json


class Flags(Namespace):
    """Holds the flags of a run, all filled in; they cannot be changed."""

    def __init__(self, **flags):
        self.__dict__.update(flags)

    def __setattr__(self, name, value):
        raise AttributeError(f"{name}: the flags of a run are settled")


class Run:
    """Writes and reads the files of a run; with several processes only the first one writes."""

    def __init__(self):
        self.folder: Path | None = None
        self.lock: int | None = None

    def claim(self, args: Namespace) -> None:
        """Makes --out, or a new folder under runs/, and locks it until release().

        With --overwrite an older run is set aside. Raises UserError if another process works in
        the folder, or has begun a run there since the flags were checked.
        """
        folder = None
        if is_main():
            if args.overwrite and args.out is not None and visible(args.out):
                set_aside(args.out)
            for folder in folders(args):
                try:
                    with writing(folder):
                        os.makedirs(folder, exist_ok=args.out is not None)
                    self.lock = locked(folder)
                    break
                except UserError:
                    if args.out is not None or not os.path.isdir(folder):
                        raise                           # else: take the next name
            if not args.resume and visible(folder):
                raise UserError(f"--out {folder}: another run has just begun there")
        self.folder = Path(gathered(folder)[0])

    def release(self) -> None:
        unlock(self.lock)
        self.lock = None

    @property
    def begun(self) -> bool:
        """Says whether the run has its config.json, so that it can be resumed."""
        return self.folder is not None and (self.folder / "config.json").exists()

    def note(self, **more) -> None:
        """Adds entries to config.json; the first call makes the file."""
        self.write("config.json", (read_config(self.folder) if self.begun else {}) | more)

    def write(self, name: str, content: dict) -> None:
        """Writes a JSON file; raises ValueError for NaN or infinity."""
        if is_main():
            with atomic_write(self.folder / name) as path:
                path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n",
                                encoding="utf-8")

    def log(self, line: dict) -> None:
        path = self.folder / "log.jsonl"
        if is_main():
            with writing(path), open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")

    def checkpoint(self, model, optimizer, step: int) -> None:
        """Writes checkpoint.pt: what training changes, and every process's random state."""
        states = gathered(rng_states(model))
        if is_main():
            with atomic_write(self.folder / CHECKPOINT) as path, open(path, "wb") as file:
                torch.save({"step": step, "model": state(model), "rng": states,
                            "optimizer": optimizer.state_dict(), "run": self.identity()}, file)

    def snapshot(self, model, step: int) -> None:
        if is_main():
            save(model, self.folder / SNAPSHOTS / f"{step:06d}.safetensors")

    def identity(self) -> str:
        """Returns the sha256 of config.json, by which a checkpoint knows its run."""
        with open_regular(self.folder / "config.json") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def restore(self, model, optimizer) -> int:
        """Loads the checkpoint; returns the step to go on from, 0 if there is no checkpoint.

        Raises UserError if the checkpoint is damaged or another run's.
        """
        path, step = self.folder / CHECKPOINT, 0
        if path.exists():
            try:
                step = read_checkpoint(path, model, optimizer, self.identity())
            except Exception as error:      # a damaged file can raise anything in its reader
                raise UserError(f"{path}: cannot resume from it: {str(error)[:200]}") from error
        if is_main():
            for temporary in self.folder.glob(".*.tmp"):        # a killed process left it
                temporary.unlink()
            self.cut_log(step)
        return step

    def cut_log(self, step: int) -> None:
        """Cuts log.jsonl to the first `step` steps."""
        log = self.folder / "log.jsonl"
        lines = []
        if log.exists():
            with open_regular(log) as file:
                lines = list(itertools.islice(file, step))
        with atomic_write(log) as temporary:
            temporary.write_bytes(b"".join(lines))


def set_aside(out: str) -> None:
    """Renames the run in `out` to NAME.old; an older NAME.old goes.

    Raises UserError if another process works in one of them, or NAME.old is no run.
    """
    parent, name = os.path.split(out.rstrip("/"))
    old, lock = Path(os.path.realpath(parent or "."), f"{name}.old"), locked(out)
    try:
        if old.exists():
            try:
                read_config(old)
            except UserError as error:
                raise UserError(f"{old}: stands where --overwrite would put the older run, and is "
                                f"no run: {error}") from None
            unlock(locked(str(old)))
            with writing(old):
                shutil.rmtree(old)
        with writing(old):
            os.rename(out, old)
    finally:
        unlock(lock)


def snapshots(folder: str | Path) -> list[Path]:
    """Lists the run's snapshots, oldest first."""
    return sorted(Path(folder, SNAPSHOTS).glob("[0-9]*.safetensors"))


def folders(args: Namespace) -> Iterator[str]:
    """Yields --out, or else free names: runs/<task>-<method>-r<rank>-s<seed>, then -2, -3, ..."""
    if args.out is not None:
        yield args.out
        return
    size = "-dora" * bool(args.dora) + ("" if args.rank is None else f"-r{args.rank}")
    name = f"runs/{args.task.replace('/', '-')}-{args.method}{size}-s{args.seed}"
    for out in itertools.chain([name], (f"{name}-{i}" for i in itertools.count(2))):
        if not os.path.exists(out):
            yield out


def locked(folder: str) -> int | None:
    """Locks the folder; returns the open file that holds the lock, None where there are no locks.

    The system frees the lock when the process ends, even if it is killed. Raises UserError if
    another process holds it.
    """
    try:
        import fcntl
    except ImportError:                     # Windows
        return None
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise UserError(f"--out {folder}: another process is at work there") from None
    except OSError:                         # a file system without locks
        pass
    return lock


def unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def visible(folder: str | Path) -> list[Path]:
    """Lists the files in a folder, without hidden ones; empty if there is no folder."""
    return list(Path(folder).glob("[!.]*"))


def read_checkpoint(path: Path, model, optimizer, identity: str) -> int:
    """Loads model, optimizer and random state; returns the number of steps done."""
    with open_regular(path) as whole, zipfile.ZipFile(whole) as file:
        if file.testzip() is not None:      # torch writes checksums, but does not read them
            raise ValueError(f"{file.testzip()} in it is damaged")
    saved = load_pickle(path)
    of_optimizer = saved["optimizer"]["state"].values()
    for name, tensor in [*saved["model"].items(), *(item for of_parameter in of_optimizer
                                                     for item in of_parameter.items())]:
        refuse_not_finite(tensor, name)
    if saved["run"] != identity:
        raise ValueError("it is another run's, or config.json was edited")
    if not isinstance(saved["step"], int) or saved["step"] < 0:
        raise ValueError(f"its step is {saved['step']!r}")
    with torch.no_grad():
        for name, tensor in state(model).items():
            if saved["model"][name].shape != tensor.shape:
                raise ValueError(f"{name} has another shape")
            tensor.copy_(saved["model"][name])
    optimizer.load_state_dict(saved["optimizer"])
    states = saved["rng"][process_number()]
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1], next(model.parameters()).device)
    return saved["step"]


def rng_states(model) -> list:
    """Returns the random state of the CPU; if the model is on a GPU, also the GPU's."""
    device = next(model.parameters()).device
    on_gpu = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *on_gpu]


# ---- what a run was
def read_config(folder: str | Path) -> dict:
    """Reads a run's config.json: flags, versions, fingerprints, scores before training.

    Raises UserError if there is none, or if no run of this version wrote it.
    """
    path = Path(folder) / "config.json"
    kinds = dict(model=str, task=str, method=str, dtype=str, loss_on=str, max_length=int,
                 max_eval=(int, NoneType), rank=(int, NoneType), lr=Number, seed=int, steps=int,
                 batch_size=int, targets=(str, NoneType), from_peft=(str, NoneType))
    kinds |= {name: (bool if "action" in how else how.get("type", str), NoneType)
              for name, how in OPTIONS.items()}
    if not path.exists():
        raise UserError(f"{folder}: not a run folder, it has no config.json")
    with open_regular(path) as file:
        content = file.read()
    try:
        config = json.loads(content)
        for name, kind in kinds.items():
            if not isinstance(config["args"][name], kind):
                raise ValueError(f"{name} is {config['args'][name]!r}")
        if config["args"]["dtype"] not in PRECISIONS:
            raise ValueError(f"dtype is {config['args']['dtype']!r}")
        before = config.get("before") or {}
        if not isinstance(before, dict) or not all(
                isinstance(value, Number) and math.isfinite(value) for value in before.values()):
            raise ValueError(f"before is {before!r}")
    except KeyError as error:
        raise UserError(f"{path}: not the config.json of a run of this version: has no "
                        f"{error.args[0]}") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: not the config.json of a run: {error!r}") from None
    if config["args"]["method"] not in METHODS:
        raise UserError(f"{path}: method {config['args']['method']}: not in methods.METHODS")
    return config


def read_flags(folder: str | Path) -> Flags:
    """Reads the flags of a run; raises UserError as read_config() does."""
    return Flags(**read_config(folder)["args"])


def finished(folder: str | Path) -> bool:
    """Says whether a run has its adapters and its result."""
    return all((Path(folder) / name).exists() for name in ("result.json", "adapter.safetensors"))


def saved_flags(given: Namespace) -> Flags:
    """Returns the flags that the run in --out began with.

    Raises UserError if a flag was given with another value.
    """
    saved = read_flags(given.out)
    for name, value in vars(given).items():
        if name == "given":
            continue
        if name not in saved:
            raise UserError(f"{given.out}/config.json: has no {name}: not a run of this version")
        began, usual = getattr(saved, name), type(value)
        if None not in (value, began) and not isinstance(began, (int, float) if usual is float
                                                         else usual):
            raise UserError(f"{given.out}/config.json: {name} is {began!r}")
        if (name in given.given - {"out", "resume", "overwrite"} and value != began
                and not same_path(value, began)):
            raise UserError(f"{flag(name)} {value}: the run has {began}, and a resumed run keeps "
                            f"its own flags")
    return saved


def resumed(given: Namespace) -> Flags:
    """Returns the flags of the run in --out, to go on with.

    If the run is finished, a command that names its method ends with status 0, so it may be
    repeated. Any other raises UserError. Raises UserError as saved_flags() does, too.
    """
    saved = saved_flags(given)
    if finished(given.out):
        if given.method is None and given.from_peft is None:
            raise UserError(f"--out {given.out}: the run is finished, there is nothing to resume")
        print(f"{given.out}: finished already")
        sys.exit(0)
    return Flags(**vars(saved) | {"out": given.out, "resume": True, "overwrite": False})


def same_path(a, b) -> bool:
    return isinstance(a, str) and isinstance(b, str) and os.path.abspath(a) == os.path.abspath(b)


def check_same(folder: str, **now) -> None:
    """Raises UserError if a value in `now` differs from what the run began with."""
    began = read_config(folder)
    for name, value in now.items():
        if name not in began:
            raise UserError(f"{folder}/config.json: has no {name}: not a run of this version")
        if began[name] != value:
            detail = f": {value}, then {began[name]}" if isinstance(value, int) else ""
            raise UserError(f"{folder}: not what the run began with: {name}{detail}")


def weights_dtype(dtype: str, method: str | None) -> torch.dtype:
    """Returns the dtype of the base model.

    Weights that train stay float32: bf16 has 8 bits, and would round small steps to none.
    """
    return torch.float32 if method == "full" else PRECISIONS[dtype]


def check_base(folder: str, model, dtype: torch.dtype) -> None:
    """Raises UserError if the model is not the one that the run began with."""
    check_same(folder, base=fingerprint(model.state_dict(), dtype))


def load_adapters(folder: str | Path, model, snapshot: Path | None = None) -> None:
    """Puts the run's head and trained adapters into its base model, or those of a snapshot.

    Raises UserError if there are none yet, or they are another run's.
    """
    file = snapshot or Path(folder) / "adapter.safetensors"
    config = read_config(folder)
    began = config.get("adapters")
    if not file.exists():
        raise UserError(f"{file}: is not there; python train.py --resume --out {folder} goes on "
                        "with the run")
    give_head(model, config["args"]["task"], config["args"]["head"])
    load(model, file)
    if not isinstance(began, list) or model.injected not in began:
        raise UserError(f"{file}: not the adapters that the run trained, but of "
                        f"{model.injected['method']} with other settings than in config.json")


def fingerprint(tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> str:
    """Returns one sha256 of all tensors: names, shapes and about 1,000 numbers of each, as dtype.

    The numbers stand at even distances. To read all of a 7B model would take 40 seconds.
    """
    digest = hashlib.sha256(str(dtype).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        apart = tensor.numel() // 1024 | 1          # odd: not the same columns of every row
        sample = tensor.reshape(-1)[::apart].to("cpu", dtype).contiguous()
        digest.update(sample.view(torch.uint8).numpy())
    return digest.hexdigest()
