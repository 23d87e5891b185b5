"""Defines tasks whose examples have a label: a head on the model is trained to give it.

The model reads one sentence or two, and its head gives one number for each label. Several sets can
share a head, each with outputs of its own. With z the example's own n outputs:

    class   loss = log sum_i exp(z_i) - z_label     cross-entropy, in nats
    score   loss = (z_0 - score)^2                  n = 1, in the square of the score's unit

An encoder reads a pair as its tokenizer joins it (formats/pairs.py). A decoder reads bos, the first
sentence, a line feed and the second one. If they are too long, it loses their start.
A family of sets needs only its examples and metrics(); data/glue.py is one.
"""
import hashlib
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data.scoring import by_length
from data.task import (Example, Scores, Setup, WholeTask, checked_sequence, device_of,
                       encode_prompt, scoring, shorten)
from encoder import EncoderConfig
from support.errors import UserError
from support.processes import joined


@dataclass(frozen=True)
class Labelled:
    """Holds one or two sentences, and the label that the head should give them."""
    first: str
    second: str | None
    label: int | float              # the number of a class, or a score
    start: int = 0                  # the first output of the head that is the example's own
    n: int = 2                      # the number of its outputs; 1 for a score
    group: str = ""                 # the part of the task that the item counts in
    source: str = field(default="", repr=False, compare=False)      # file and line, for errors

    @property
    def is_score(self) -> bool:
        return isinstance(self.label, float)


class Encoded(NamedTuple):
    """Holds an example as tokens."""
    tokens: list[int]
    types: list[int]        # 0 for tokens of the first sentence, 1 for the second
    cut: bool               # lost tokens to the length limit


def uses_head(config, head: bool | None) -> bool:
    """Says whether a head is to answer: as --head says, else on an encoder only."""
    return isinstance(config, EncoderConfig) if head is None else head


def order_of(labels: tuple[str, ...], names: list[str]) -> list[int] | None:
    """Finds the output of each label, where a checkpoint's head names its outputs.

    MNLI's three labels stand in three orders in public checkpoints. Case and punctuation do not
    count. Returns None if the names are of other labels.
    """
    theirs, ours = ([re.sub(r"\W|_", "", name.lower()) for name in part]
                    for part in (names, labels))
    return [theirs.index(name) for name in ours] if sorted(theirs) == sorted(ours) else None


def encode_texts(example: Labelled, setup: Setup) -> Encoded:
    """Encodes an example for the model.

    Raises UserError if max_length leaves no room, or a token is not in the model's vocabulary.
    """
    a, b, most = example.first, example.second, setup.max_length
    if isinstance(setup.config, EncoderConfig):
        pair = setup.tokenizer.pair
        tokens, types = pair(a, b, most)
        types = types if setup.config.n_types > 1 else [0] * len(types)
        cut = len(tokens) == most and len(pair(a, b, most + 1)[0]) > most
    else:
        asked = Example(a if b is None else f"{a}\n{b}", "")
        tokens, _, cut, _ = encode_prompt(asked, setup, 0)
        types = [0] * len(tokens)
    if not tokens:
        raise UserError(f"{example.source}: no tokens")
    return checked_sequence(Encoded(tokens, types, cut), setup)


def collate_texts(rows: list[Encoded], pad: int, device) -> tuple[Tensor, Tensor, Tensor]:
    """Returns tokens, mask and types, each (B, T), padded on the right to the longest text."""
    T = max(len(row.tokens) for row in rows)
    tokens = torch.tensor([row.tokens + [pad] * (T - len(row.tokens)) for row in rows])
    types = torch.tensor([row.types + [0] * (T - len(row.types)) for row in rows])
    lengths = torch.tensor([len(row.tokens) for row in rows])
    return tokens.to(device), (torch.arange(T) < lengths[:, None]).to(device), types.to(device)


def classify(model, tokens: Tensor, mask: Tensor, types: Tensor) -> Tensor:
    """Scores the labels of each text: (B, n_labels)."""
    return model.classify(tokens, mask, types)


def label_loss(logits: Tensor, examples: list[Labelled]) -> Tensor:
    """Sums the losses of the examples; logits (B, n_labels)."""
    alike = defaultdict(list)           # (start, n, is_score) -> rows of the batch
    for row, e in enumerate(examples):
        alike[e.start, e.n, e.is_score].append(row)
    total = logits.new_zeros((), dtype=torch.float32)
    for (start, n, is_score), rows in alike.items():
        own = logits[rows, start:start + n].float()                             # (rows, n)
        gold = torch.tensor([examples[row].label for row in rows], device=own.device)
        total = total + (F.mse_loss(own[:, 0], gold, reduction="sum") if is_score else
                         F.cross_entropy(own, gold, reduction="sum"))
    return total


class HeadTask(WholeTask):
    """Trains and scores a head for labels; `labels` names its outputs."""
    loss_on, trains = "labels", "a head on labels"
    look = "--predictions FILE"

    def __init__(self, name: str, train: list[Labelled], valid: list[Labelled],
                 test: list[Labelled], setup: Setup, defaults: dict, labels: tuple[str, ...],
                 notes: dict | None = None):
        super().__init__(name, train, valid, test, setup, defaults,
                         {"labels": list(labels)} | (notes or {}))
        self.labels, self.known = labels, {}
        names = getattr(setup.config, "labels", [])
        self.order = order_of(labels, names) or list(range(len(labels)))
        self.classify = torch.compile(classify) if setup.compile else classify

    def encoded(self, example: Labelled) -> Encoded:
        """Encodes an example, and remembers the result."""
        if example not in self.known:
            self.known[example] = encode_texts(example, self.setup)
        return self.known[example]

    def batch(self, model, examples: list[Labelled]) -> tuple[Tensor, Tensor, Tensor]:
        pad = self.setup.config.pad or 0            # it may be no token of the model
        pad = pad if pad < self.setup.config.vocab_size else 0
        return collate_texts([self.encoded(e) for e in examples], pad, device_of(model))

    def loss(self, model, examples: list[Labelled]) -> Tensor:
        logits = self.classify(model, *self.batch(model, examples))[:, self.order]
        return label_loss(logits, examples)

    def outputs(self, model, examples: list[Labelled]) -> list[list[float]]:
        """Returns each example's own outputs; several processes share the work."""
        encoded: list = [self.encoded(e) for e in examples]
        found: list = [None] * len(examples)
        with scoring(model):
            for indices in by_length(encoded, self.setup.batch_size):
                batch = self.batch(model, [examples[i] for i in indices])
                rows = classify(model, *batch)[:, self.order].float().tolist()
                for i, row in zip(indices, rows):
                    found[i] = row[examples[i].start:examples[i].start + examples[i].n]
        return joined(found)

    def answers(self, model, examples: list[Labelled]) -> list[int | float]:
        """Returns the likeliest class of each example, or the score that the head gives."""
        return [own[0] if e.is_score else own.index(max(own))
                for e, own in zip(examples, self.outputs(model, examples))]

    def metrics(self, examples: list[Labelled], said: list) -> tuple[dict, dict]:
        """Returns the values and the counts of Scores, from the answers to the examples."""
        raise NotImplementedError

    def score(self, model, examples: list[Labelled]) -> Scores:
        said = self.answers(model, examples)
        rows = [dict(group=e.group, first=e.first, second=e.second, answer=self.say(e, answer),
                     gold=self.say(e, e.label)) for e, answer in zip(examples, said)]
        return Scores(*self.metrics(examples, said), rows)

    def say(self, example: Labelled, label: int | float) -> str | float:
        """Returns the name of a class, or a score as it is."""
        return label if example.is_score else self.labels[example.start + label]

    def show(self, model, folder: Path) -> str:
        example = self.test[0]
        answer = self.say(example, self.answers(model, [example])[0])
        texts = " | ".join(shorten(text) for text in (example.first, example.second) if text)
        right = self.say(example, example.label)
        return f'"{texts}" -> {written(answer)}  (right: {written(right)})'

    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr(self.notes).encode())
        for example in (*self.train, *self.valid, *self.test):
            digest.update(repr((example, self.encoded(example))).encode())
        return digest.hexdigest()

    def counts(self) -> dict[str, dict[str, int]]:
        return {"cut": {"train": sum(self.encoded(e).cut for e in self.train),
                        "held out": sum(self.encoded(e).cut for e in (*self.valid, *self.test))}}


def written(answer: str | float) -> str:
    return answer if isinstance(answer, str) else f"{answer:.2f}"
