"""Knows the files of a picture model, which are our own: config.json, tensors, words.txt.

words.txt holds the words that captions may have, one a line. Tensors are named as in diffusion.py.
"""
from dataclasses import asdict, fields
from pathlib import Path

import torch
from torch import Tensor

from diffusion import PictureConfig
from formats.decoders import Family
from formats.json_files import read_value
from formats.tensors import Stored, all_stored
from support.errors import UserError, nearest
from support.files import atomic_write, open_regular

TELLS_NOTHING = frozenset("a an the with and on in at".split())
NAMES = ("embed", "places", "patches", "time_in", "time_out", "last", "smooth", *(
    f"layers.{{}}.{part}" for part in ("table", "attn.q", "attn.k", "attn.v", "attn.o",
                                       "attn.q_norm", "attn.k_norm", "mlp.gate", "mlp.up",
                                       "mlp.down")))
FAMILIES = {"pictures": Family("PictureModel", "", (), {name: [name] for name in NAMES}, {}, {},
                               {})}
SIZES = [field.name for field in fields(PictureConfig) if field.name != "model_type"]


def parse_config(raw: dict) -> PictureConfig:
    """Does huggingface.parse_config() for a picture model."""
    sizes = {name: read_value(raw, name, "size") for name in SIZES}
    for name, parts in (("d_model", "n_heads"), ("side", "patch")):
        if sizes[name] % sizes[parts]:
            raise UserError(f"{parts} {sizes[parts]} does not divide {name} {sizes[name]}")
    if sizes["d_model"] % 2:
        raise UserError(f"d_model {sizes['d_model']}: must be even, for cos and sin of the time")
    return PictureConfig(**sizes)


def make_config_json(model, dtype: torch.dtype) -> dict:
    return asdict(model.config) | {"torch_dtype": str(dtype).removeprefix("torch.")}


def by_full_name(folder: Path, config: PictureConfig) -> dict[str, Stored]:
    return {tensor.name: tensor for tensor in all_stored(folder)}


class Words:
    """Numbers the words of captions: encode("red cat on the beach") -> [9, 1, 21].

    Number 0 is "no word". Words that tell nothing, such as "the", have no number.
    """
    bos = eos = None

    def __init__(self, words: list[str]):
        self.words, self.numbers = words, {word: i for i, word in enumerate(words, 1)}

    def encode(self, caption: str) -> list[int]:
        """Raises UserError if a word is not known."""
        said = [word for word in caption.lower().split() if word not in TELLS_NOTHING]
        for word in said:
            if word not in self.numbers:
                raise UserError(f"{caption!r}: the model knows no word {word!r}"
                                f"{nearest(word, self.words)}")
        return [self.numbers[word] for word in said]

    def check_number(self, n_words: int, folder: Path) -> None:
        """Raises UserError if a model of n_words in the folder has another number of words."""
        if len(self.words) + 1 != n_words:
            raise UserError(f"{folder}: words.txt has {len(self.words)} words, config.json asks "
                            f"for {n_words - 1}")

    def batch(self, captions: list[str], length: int) -> Tensor:
        """Encodes captions, filled up with 0: (n, length). Raises UserError if one is longer."""
        rows = [self.encode(caption) for caption in captions]
        for row, caption in zip(rows, captions):
            if len(row) > length:
                raise UserError(f"{caption!r}: has {len(row)} words that tell something, the "
                                f"model reads {length}")
        return torch.tensor([row + [0] * (length - len(row)) for row in rows])


def load_words(path: Path) -> Words:
    """Reads a words.txt. Raises UserError if it is not such a file."""
    with open_regular(path) as file:
        try:
            words = file.read().decode().split()
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8: {error}") from None
    if not words or len(set(words)) < len(words):
        raise UserError(f"{path}: must hold words, each once")
    return Words(words)


def save_words(words: Words, path: Path) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text("\n".join(words.words) + "\n", encoding="utf-8")
