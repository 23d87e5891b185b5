"""Defines a task: three splits of examples, the loss that trains on them, and the score.

The loop in train.py knows neither tokens nor targets: a task computes the loss. Task is the
contract. TextTask holds what all tasks of prompt and target share. Each family of tasks has its own
file beside this one. A new task is one such file and one line in data/__init__.py:

    from data.reading import split_file
    from data.scoring import recall
    from data.task import Example, TextTask

    class Reverse(TextTask):
        meaning = {"exact": "words that it writes backwards"}

        def score(self, model, examples):
            return recall(model, self.setup, examples)

    def load(setup):        # an argument of its own would be a flag, listed in data/__init__.py
        examples = [Example(f"Reverse: {word}", f" {word[::-1]}") for word in WORDS]
        return Reverse("reverse", *split_file(examples), setup, {"steps": 300, "batch_size": 32})
"""
import hashlib
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Iterable, Iterator, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from generate import generate
from support.errors import UserError
from support.processes import process_count, process_number, summed

BATCH_SIZE = 128        # examples that are scored at once, unless a command says otherwise


@dataclass(frozen=True)
class Example:
    """Holds one item: the model reads `prompt` and should write `target`."""
    prompt: str
    target: str
    choices: tuple[str, ...] = ()       # the answers to choose from, if the task has them
    references: tuple[str, ...] = ()    # all texts that are right, if there are several
    group: str = ""                     # the part of the task that the item counts in
    source: str = field(default="", repr=False, compare=False)      # file and line, for errors


class Sequence(NamedTuple):
    """Holds an example as tokens; the loss counts tokens[start:]."""
    tokens: list[int]
    start: int
    cut: bool = False       # the prompt lost its start to the length limit
    apart: bool = False     # the tokenizer would join the prompt's end with the target's start


class Scores(NamedTuple):
    """Holds the scores of a model on a list of examples."""
    values: dict[str, float]        # metric -> value; shares are in [0, 1]
    counts: dict[str, int]          # metric that is a share of items -> number of these items
    predictions: list[dict]         # for each item prompt, gold, ..., as --predictions writes them


class Setup(NamedTuple):
    """Holds what a task needs to know about the model and the run."""
    tokenizer: object
    config: object                      # the model's, with vocab_size and max_positions
    max_length: int                     # most tokens of an example
    batch_size: int = BATCH_SIZE        # examples that are scored at once
    loss_on: str | None = None          # "answer", "all" (the prompt too) or None: the task's own
    compile: bool = False               # run the loss through torch.compile


class Task:
    """Declares the contract of a task; a family of tasks overrides what raises NotImplementedError.

    `train` is learnt from. `valid` may steer choices, as of the learning rate. `test` is scored
    once before training and once after. `defaults` holds flags of train.py that the user may leave
    out: batch_size, and steps or epochs. `notes` holds facts on the data for result.json.
    """
    loss_on = "all"
    look = "--prompt TEXT"              # the flag of eval.py that shows what a run has learnt
    meaning: dict[str, str] = {}        # metric, or its part before a slash -> its explanation

    def __init__(self, name: str, train: list, valid: list, test: list, setup: Setup,
                 defaults: dict, notes: dict | None = None):
        self.name, self.setup = name, setup
        self.train, self.valid, self.test = train, valid, test
        self.defaults, self.notes = defaults, notes or {}

    def begin(self, model) -> None:
        """Lets a task see the model as it starts, before any training."""

    def loss(self, model, examples: list) -> Tensor:
        """Returns the summed loss of the examples, a scalar with a gradient.

        TextTask sums over target tokens.
        """
        raise NotImplementedError

    def size(self, examples: list) -> int:
        """Returns the number of terms in the sum; the loop divides a batch's loss by it."""
        raise NotImplementedError

    def score(self, model, examples: list) -> Scores:
        """Returns the task's metrics, on the examples given."""
        raise NotImplementedError

    def show(self, model, folder: Path) -> str:
        """Returns one test example with the model's answer; may put a picture into the folder."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Returns the sha256 of all three splits as the model reads them, and of the notes.

        Raises UserError, which names file and line, if an example does not fit.
        """
        raise NotImplementedError

    def counts(self) -> dict[str, dict[str, int]]:
        """Counts odd examples for result.json and the header: what -> split -> number.

        TextTask counts `cut` and `apart`, as Sequence has them, in train and in the other splits.
        """
        return {}

    def mean_loss(self, model, examples: list) -> float:
        """Returns loss / size, without gradients; each process computes its share."""
        share, n = examples[process_number()::process_count()], self.setup.batch_size
        with scoring(model):
            total = sum(self.loss(model, share[i:i + n]).item() for i in range(0, len(share), n))
        return summed([total], device_of(model))[0] / self.size(examples)


class WholeTask(Task):
    """Trains on whole examples, not on tokens: loss is a sum over examples, and size their number.

    `trains` says on what, in the error for --loss-on: there are no tokens to choose from.
    """
    trains = "whole examples"

    def __init__(self, name: str, *args, **more):
        super().__init__(name, *args, **more)
        if self.setup.loss_on not in (None, self.loss_on):
            raise UserError(f"--loss-on {self.setup.loss_on}: task {name} trains {self.trains}")

    def size(self, examples: list) -> int:
        return len(examples)


class PictureTask(WholeTask):
    """Names what tasks that draw train on."""
    loss_on, trains = "pictures", "on whole pictures"


class TextTask(Task):
    """Trains on examples of prompt and target, or on plain text as Sequences.

    loss = - sum over the target tokens of log p(token | all before it), in nats. size is the number
    of target tokens. Raises UserError if the loss is to count answers and the task has none.
    """

    def __init__(self, name: str, train: list, valid: list, test: list, setup: Setup,
                 defaults: dict, notes: dict | None = None, loss_on: str = "answer"):
        super().__init__(name, train, valid, test, setup, defaults, notes)
        if loss_on == "all" and setup.loss_on == "answer":
            raise UserError(f"--loss-on answer: task {name} has no answers")
        self.loss_on = setup.loss_on or loss_on
        self.encoded: dict[Example, Sequence] = {}
        self.target_loss = torch.compile(target_loss) if setup.compile else target_loss

    def sequence(self, example: Example | Sequence) -> Sequence:
        """Encodes the example for training, and remembers the result."""
        if isinstance(example, Sequence):
            return checked_sequence(example, self.setup)
        if example not in self.encoded:
            self.encoded[example] = checked_sequence(encode(
                example, self.setup.tokenizer, self.setup.max_length, loss_on=self.loss_on),
                self.setup)
        return self.encoded[example]

    def scored(self, example) -> list[Sequence]:
        """Encodes the example for score(); a task that scores other sequences overrides it."""
        return [encode(example, self.setup.tokenizer, self.setup.max_length)]

    def loss(self, model, examples: list) -> Tensor:
        tokens, is_target = collate([self.sequence(e) for e in examples], device_of(model))
        return self.target_loss(model, tokens, is_target)

    def size(self, examples: list) -> int:
        return sum(len(s.tokens) - s.start for s in map(self.sequence, examples))

    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr(self.notes).encode())
        for example in (*self.train, *self.valid):
            digest.update(repr((example, self.sequence(example))).encode())
        for pair in self.held_out:
            digest.update(repr(pair).encode())
        return digest.hexdigest()

    def counts(self) -> dict[str, dict[str, int]]:
        return {what: {"train": sum(getattr(self.sequence(e), what) for e in self.train),
                       "held out": sum(any(getattr(s, what) for s in row)
                                       for _, row in self.held_out)}
                for what in ("cut", "apart")}

    @cached_property
    def held_out(self) -> list[tuple]:
        """Pairs each example of valid and test with what score() sees."""
        return [(e, self.scored(e)) for e in (*self.valid, *self.test)]

    def show(self, model, folder: Path) -> str:
        """Returns the first test prompt and the line that greedy decoding writes after it."""
        example, new_tokens, right = self.test[0], 32, ""
        if isinstance(example, Example):
            tokens = encode_prompt(example, self.setup, new_tokens).tokens
            prompt, right = example.prompt, f'  (right: "{shorten(example.target)}")'
        else:
            tokens = example.tokens[:max(1, min(len(example.tokens) // 2, 16))]
            prompt = self.setup.tokenizer.decode(tokens)
        with scoring(model):
            new = generate(model, [list(tokens)], new_tokens)[0]
        written = (self.setup.tokenizer.decode(new, special=False).strip().splitlines() or [""])[0]
        return f'"{shorten(prompt)}" -> "{shorten(written)}"{right}'


class WritingTask(TextTask):
    """Scores what the model writes: at most `new_tokens` tokens, found with `beams` beams."""

    def __init__(self, *args, beams: int, new_tokens: int, **more):
        super().__init__(*args, **more)
        self.beams, self.new_tokens = beams, new_tokens


def shorten(text: str) -> str:
    """Returns a text's last 70 characters on one line."""
    text = " ".join(text.split())
    return text if len(text) <= 70 else f"...{text[-67:]}"


def sample(examples: list, n: int | None) -> list:
    """Takes about n examples at even distances, equally many of each group; n = None takes all.

    A group gives at least one, and a small group all it has.
    """
    if n is None or n >= len(examples):
        return examples
    groups = defaultdict(list)
    for example in examples:
        groups[getattr(example, "group", "")].append(example)
    share = max(1, n // len(groups))
    return [group[i] for group in groups.values()
            for i in evenly(min(share, len(group)), len(group))]


def evenly(n: int, total: int) -> list[int]:
    """Returns n of the numbers 0 .. total - 1, at even distances; n is at most total."""
    return [i * total // n for i in range(n)]


# ---- from text to tokens
def first_tokens(tokenizer) -> list[int]:
    """Returns the tokens that every sequence begins with: bos, if the tokenizer has one."""
    return [] if tokenizer.bos is None else [tokenizer.bos]


def encode_start(text: str, tokenizer) -> list[int]:
    """Encodes a text that begins a sequence: bos, once if the text has it too, then its tokens."""
    head, tokens = first_tokens(tokenizer), tokenizer.encode(text)
    return tokens if head and tokens[:1] == head else head + tokens


def encode_targets(example: Example, targets: Iterable[str], tokenizer, max_length: int,
                   loss_on: str = "answer", eos: bool = True) -> list[Sequence]:
    """Encodes bos, the prompt, a target and eos, for each target.

    bos and eos are left out if the tokenizer has none, and stand there once if the text has them.
    The prompt gets the tokens that it has alone, since a model writes after these. The target gets
    those that follow in the two as one text. If a token there would hold the end of the prompt and
    the start of the target, the target too gets the tokens that it has alone.
    If the longest sequence exceeds max_length, all lose the same number of tokens at the start of
    the prompt, so that the targets are compared after the same prompt. A target is never cut.
    Raises UserError, which names the example's line, if a target does not fit in max_length, has
    no token, or has none before it.
    """
    where = f"{example.source}: " * bool(example.source)
    prompt, rows = encode_start(example.prompt, tokenizer), []
    for text in targets:
        joint = encode_start(example.prompt + text, tokenizer)
        apart = joint[:len(prompt)] != prompt
        target = tokenizer.encode(text) if apart else joint[len(prompt):]
        if eos and tokenizer.eos is not None and target[-1:] != [tokenizer.eos]:
            target.append(tokenizer.eos)
        if not target:
            raise UserError(f"{where}a target of no tokens: {text[:60]!r}")
        rows.append((target, apart, text))
    if not prompt:                      # the first target token needs one that predicts it
        raise UserError(f"{where}an empty prompt needs a tokenizer with a bos token, to begin "
                        f"with: {rows[0][2][:60]!r}")
    size, text = max((len(target), text) for target, _, text in rows)
    lost = max(0, len(prompt) + size - max_length)
    if lost >= len(prompt):             # bos, or the first token if there is none, stays
        raise UserError(f"{where}a target of {size} tokens does not fit in --max-length "
                        f"{max_length}: {text[:60]!r}")
    prompt = prompt[:1] + prompt[1 + lost:]
    return [Sequence(prompt + target, 1 if loss_on == "all" else len(prompt), lost > 0, apart)
            for target, apart, _ in rows]


def encode(example: Example | Sequence, tokenizer, max_length: int, **options) -> Sequence:
    """Encodes the example's prompt and target, as encode_targets() does; same options and errors.

    A Sequence, which is plain text, is returned as it is.
    """
    if isinstance(example, Sequence):
        return example
    return encode_targets(example, [example.target], tokenizer, max_length, **options)[0]


def encode_prompt(example: Example, setup: Setup, max_new_tokens: int) -> Sequence:
    """Encodes bos and the prompt, for a model to write after it.

    A prompt is cut at its start if it exceeds max_length, or leaves less than max_new_tokens of the
    model's positions. Raises UserError if there is no position for a prompt.
    """
    tokens = encode_start(example.prompt, setup.tokenizer)
    head = len(first_tokens(setup.tokenizer))
    room = min(setup.max_length, setup.config.max_positions - max_new_tokens)
    if room <= head:
        raise UserError(f"--max-length {setup.max_length} and the model's "
                        f"{setup.config.max_positions} positions leave no room for a prompt beside "
                        f"the {max_new_tokens} new tokens of this task")
    cut = len(tokens) > room
    tokens = tokens[:head] + tokens[head - room:] if cut else tokens
    return checked_sequence(Sequence(tokens, 0, cut), setup)


def checked_sequence(sequence: Sequence, setup: Setup) -> Sequence:
    """Returns the sequence; raises UserError if a token is outside the model's vocabulary."""
    largest = max(sequence.tokens, default=0)
    if largest >= setup.config.vocab_size:
        raise UserError(f"the tokenizer gives token {largest}, the model has only "
                        f"{setup.config.vocab_size}: they do not belong together")
    return sequence


def collate(sequences: list[Sequence], device="cpu") -> tuple[Tensor, Tensor]:
    """Returns tokens (B, T), padded with 0 on the right, and is_target (B, T), a bool.

    Causal attention never sees this padding. is_target is True for tokens that the loss counts.
    """
    T = max(len(s.tokens) for s in sequences)
    tokens = torch.zeros(len(sequences), T, dtype=torch.long)
    is_target = torch.zeros(len(sequences), T, dtype=torch.bool)
    for i, (ids, start, *_) in enumerate(sequences):
        tokens[i, :len(ids)] = torch.tensor(ids)
        is_target[i, start:len(ids)] = True
    return tokens.to(device), is_target.to(device)


# ---- through the model
def device_of(model) -> torch.device:
    return next(model.parameters()).device


@contextmanager
def scoring(model) -> Iterator[None]:
    """Puts the model in eval mode, without gradients, inside the block."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


def target_hidden(model, tokens: Tensor, is_target: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the states (N, C) that predict the N target tokens, and these tokens (N,).

    Only these positions pass the output head, since its product is large.
    """
    keep = is_target[:, 1:]
    return model.hidden(tokens[:, :-1])[keep], tokens[:, 1:][keep]


def target_loss(model, tokens: Tensor, is_target: Tensor) -> Tensor:
    """Sums -log p(token | all before it) over the target tokens, in nats."""
    hidden, gold = target_hidden(model, tokens, is_target)
    return F.cross_entropy(model.logits(hidden).float(), gold, reduction="sum")
