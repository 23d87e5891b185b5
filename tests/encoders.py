"""Makes small encoders with a tokenizer for tests of heads for labels, and a set of pairs."""
import random
from pathlib import Path

import torch

from data.labels import Labelled
from encoder import Encoder, EncoderConfig
from support.errors import UserError

CLS, SEP = 1, 2
WORDS = "red blue green one two three cat dog".split()


class Tokenizer:
    """Gives each word of WORDS a token; joins two sentences as BERT does, the longer one cut."""
    vocab_size = 3 + len(WORDS)

    def encode(self, text: str) -> list[int]:
        return [3 + WORDS.index(word) for word in text.split()]

    def pair(self, a: str, b: str | None, max_length: int) -> tuple[list[int], list[int]]:
        if max_length < 4:
            raise UserError(f"--max-length {max_length}: too small")
        first, second = self.encode(a), None if b is None else self.encode(b)
        while len(first) + 2 + (0 if b is None else len(second) + 1) > max_length:
            max(first, second or [], key=len).pop()
        ids = [CLS, *first, SEP]
        if b is None:
            return ids, [0] * len(ids)
        return ids + [*second, SEP], [0] * len(ids) + [1] * (len(second) + 1)


def config_of(family: str = "bert", **own) -> EncoderConfig:
    types = 2 if family == "bert" else 0
    return EncoderConfig(**dict(
        vocab_size=Tokenizer.vocab_size, d_model=16, n_layers=2, n_heads=2, d_ff=32,
        max_positions=32, model_type=family, pad=0, n_types=types,
        has_positions=family != "deberta-v2", reach=8,
        distance_terms=("c2p", "p2c") if family == "deberta-v2" else ()) | own)


def encoder_of(family: str = "bert", dtype=torch.float32, **own) -> Encoder:
    """Makes the same encoder at each call, with larger weights than BERT's, so that texts differ."""
    model = Encoder(config_of(family, **own)).init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2:
                p.mul_(8)
    return model.to(dtype)


def opens(monkeypatch, make, tokenizer=Tokenizer) -> None:
    """Lets every command open make(dtype) as its model."""
    def load_pretrained(path, dtype=None, device="cpu"):
        model = make(dtype or torch.float32)
        model.also_named = {}
        return model, tokenizer()
    for place in ("formats.checkpoint", "convert"):
        monkeypatch.setattr(f"{place}.load_pretrained", load_pretrained)


def rte_folder(folder: Path, n: int = 40) -> Path:
    """Writes a set like RTE: the claim follows if both texts name the same colour."""
    rng, rows = random.Random(0), []
    for i in range(n):
        colours = rng.sample(WORDS[:3], 2)
        follows = i % 2
        claim = f"{rng.choice(WORDS[3:6])} {colours[0] if follows else colours[1]}"
        rows.append(f"{i}\t{rng.choice(WORDS[6:])} {colours[0]}\t{claim}\t"
                    + ("entailment" if follows else "not_entailment"))
    for name in ("train.tsv", "dev.tsv"):
        (folder / name).write_text("\n".join(["index\tsentence1\tsentence2\tlabel", *rows]) + "\n")
    return folder


def labelled(*labels, **own) -> list[Labelled]:
    """Makes an example of each label."""
    texts = [("red cat", "one dog"), ("blue", None), ("green two dog red", "cat"), ("dog", "one")]
    return [Labelled(*texts[i % len(texts)], label, **own) for i, label in enumerate(labels)]


def head_of(rows: list[list[float]]):
    """Makes a model whose head gives these outputs, whatever it reads."""
    model = torch.nn.Linear(1, 1)
    model.config = config_of()
    model.classify = lambda tokens, mask, types=None: torch.tensor(rows)[:len(tokens)]
    return model
