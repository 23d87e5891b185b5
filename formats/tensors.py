"""Lists the tensors in the files of a folder, before any of them is read.

Files are *.safetensors or pytorch_model.bin. A large model is cut into several, which an index
lists.
"""
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from formats.json_files import read_json
from support.errors import UserError, refuse_not_finite
from support.files import load_pickle, open_regular

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
          "float64": torch.float64}
SAFE_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
               "F64": torch.float64}


@dataclass
class Stored:
    """Stands for a tensor in a file that is not yet read.

    A file is mapped into memory. Each page that was touched counts as ours until the file is
    unmapped. So read() maps the file anew, and the file is unmapped once the tensor is dropped.
    """
    path: Path
    name: str
    shape: tuple
    dtype: torch.dtype | None           # None if it is not plain floating-point numbers
    kept: Tensor | None = None          # the tensor itself, if its file cannot be mapped

    def read(self) -> Tensor:
        """Reads the tensor. Raises UserError, which names it, if it holds NaN or infinity."""
        tensor = self.values()
        refuse_not_finite(tensor, f"{self.path}: {self.name}")
        return tensor

    def values(self) -> Tensor:
        """Reads the tensor, whatever it holds."""
        if self.kept is not None:
            return self.kept
        if self.path.suffix != ".safetensors":
            return load_pickle(self.path, map_location="cpu", mmap=True)[self.name]
        with safe_open(self.path, "pt") as file:
            return file.get_tensor(self.name)


def stored_in(path: Path) -> list[Stored]:
    """Lists the tensors of a file without reading them. Raises UserError if it is broken."""
    open_regular(path).close()
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                views = [(name, file.get_slice(name)) for name in file.keys()]
                return [Stored(path, name, tuple(v.get_shape()), SAFE_DTYPES.get(v.get_dtype()))
                        for name, v in views]
        try:
            tensors, mapped = load_pickle(path, map_location="cpu", mmap=True), True
        except RuntimeError as error:           # the format before torch 1.6
            if "mmap can only be used" not in str(error):
                raise
            tensors, mapped = load_pickle(path, map_location="cpu"), False
        return [Stored(path, str(name), tuple(t.shape),
                       t.dtype if t.layout is torch.strided and not t.is_meta else None,
                       kept=None if mapped else t) for name, t in tensors.items()]
    except Exception as error:                  # a broken file can break its reader in any way
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path}: cannot read its tensors: {reason}") from None


def all_stored(folder: Path, names=("model.safetensors", "pytorch_model.bin")) -> list[Stored]:
    """Lists the tensors of a folder, in the first of the files with these names.

    A large model is cut into shards, which an index lists. Raises UserError if a file is missing
    or broken, or the index names a file outside the folder.
    """
    for name in names:
        if (folder / name).exists():
            return stored_in(folder / name)
        index = folder / f"{name}.index.json"
        if index.exists():
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not shards:
                raise UserError(f"{index}: weight_map must name the file of each tensor")
            for shard in shards.values():       # by name, since the hub's files are links
                if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".."):
                    raise UserError(f"{index}: {shard!r} is not the name of a file beside it")
            found = [t for shard in sorted(set(shards.values())) for t in stored_in(folder / shard)]
            lost = set(shards) - {tensor.name for tensor in found}
            if lost:
                raise UserError(f"{index}: no shard holds {few_names(lost)}")
            return found
    raise UserError(f"{folder}: holds neither {' nor '.join(names)}")


def few_names(names) -> str:
    """Joins the first three names, and counts the others."""
    names = sorted(" ".join(str(name).split()) for name in names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
