"""What a task is: examples of prompt and target, how they become tokens, and the three ways to
score a model on them: is the target what it would write, which of the choices is likeliest, and
what does it write. Each task family has its own file beside this one.
"""
import hashlib
import json
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Iterable, Iterator, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from generate import generate
from support.errors import UserError
from support.processes import completed, rank, world

BATCH_SIZE = 128        # texts that are scored at once, where a command names no other


@dataclass(frozen=True)
class Example:
    """One item: the model reads `prompt` and should write `target`."""
    prompt: str
    target: str
    choices: tuple[str, ...] = ()       # the answers to choose from, where the task has them
    references: tuple[str, ...] = ()    # all acceptable texts, where there are several
    group: str = ""                     # the part of the task that it is scored under
    source: str = field(default="", repr=False, compare=False)      # file and line, for errors


class Sequence(NamedTuple):
    """A tokenized example: the loss counts tokens[start:]."""
    tokens: list[int]
    start: int
    cut: bool = False       # it lost the start of its prompt to the length limit


class Scores(NamedTuple):
    """What a model achieves on a list of examples."""
    values: dict[str, float]        # metric -> value; shares are in [0, 1]
    counts: dict[str, int]          # metric -> the number of items that it is a share of
    predictions: list[dict]         # of each item what --predictions writes: prompt, gold, ...


@dataclass
class Task:
    """Three splits and how to score them; a task family overrides score().

    `train` is learnt from, `valid` may steer choices (learning rates, steps), `test` is scored
    once before and once after.
    """
    name: str
    train: list
    valid: list
    test: list
    max_length: int                                 # tokens of an example
    loss_on: str = "answer"                         # or "all": the loss counts the prompt too
    defaults: dict = field(default_factory=dict)    # flag -> value where the user gives none
    notes: dict = field(default_factory=dict)       # what result.json says of the data

    def score(self, model, tokenizer, examples: list, batch_size: int) -> Scores:
        raise NotImplementedError

    def sequences(self, example, tokenizer, model) -> list[Sequence]:
        """What score() makes of an example; a run looks at it before it begins, for what is cut
        and what does not fit. Overridden where that is not prompt and target."""
        return [encode(example, tokenizer, self.max_length)]


def data_fingerprint(examples: list, sequences: list, notes: dict) -> str:
    """sha256 of a split: each example, the tokens that it becomes, and the task's notes."""
    digest = hashlib.sha256(repr(notes).encode())
    for pair in zip(examples, sequences, strict=True):
        digest.update(repr(pair).encode())
    return digest.hexdigest()


def opening(tokenizer) -> list[int]:
    """What every sequence begins with: bos, where the tokenizer has one."""
    return [] if tokenizer.bos is None else [tokenizer.bos]


def encode_targets(example: Example, targets: Iterable[str], tokenizer, max_length: int,
                   loss_on: str = "answer", eos: bool = True) -> list[Sequence]:
    """For each target: bos, the example's prompt, target, eos (each special token where the
    tokenizer has one).

    Prompt and target are tokenized as one text, since tokens can straddle their border; the
    target starts at the first token that the prompt alone does not have. Where the longest is
    longer than max_length, all lose as much of the start of the prompt, never its end and nothing
    of a target: so they are compared after the same prompt.
    Raises UserError, which names the example's line, if a target does not fit in max_length or
    nothing stands before it.
    """
    prompt, where = example.prompt, f"{example.source}: " * bool(example.source)
    head, tail = opening(tokenizer), [tokenizer.eos] if eos and tokenizer.eos is not None else []
    alone, rows = head + tokenizer.encode(prompt), []
    for target in targets:
        tokens = head + tokenizer.encode(prompt + target) + tail
        start = 0
        while start < min(len(alone), len(tokens)) and alone[start] == tokens[start]:
            start += 1
        rows.append((tokens, start, target))
    lost = max(0, max(len(tokens) for tokens, _, _ in rows) - max_length)
    first = min(start for _, start, _ in rows)
    if first == 0:                      # the first target token needs one that predicts it
        raise UserError(f"{where}an empty prompt needs a tokenizer with a bos token, to begin "
                        f"with: {rows[0][2][:60]!r}")
    if lost >= first:                   # bos, or the first token where there is none, stays
        size, target = max((len(tokens) - start, target) for tokens, start, target in rows)
        raise UserError(f"{where}a target of {size} tokens does not fit in --max-length "
                        f"{max_length}: {target[:60]!r}")
    return [Sequence(tokens[:1] + tokens[1 + lost:], 1 if loss_on == "all" else start - lost,
                     cut=lost > 0) for tokens, start, _ in rows]


def encode(example: Example | Sequence, tokenizer, max_length: int, **options) -> Sequence:
    """The example's prompt and target, as encode_targets() makes them of its options. Plain text
    comes as a Sequence already and passes unchanged."""
    if isinstance(example, Sequence):
        return example
    return encode_targets(example, [example.target], tokenizer, max_length, **options)[0]


def encode_all(examples: list, tokenizer, model, max_length: int, **options) -> list[Sequence]:
    """Every example as encode() makes it. UserError also for a token the model does not have."""
    return known([encode(example, tokenizer, max_length, **options) for example in examples],
                 model)


def encode_prompt(example: Example, tokenizer, model, max_length: int,
                  max_new_tokens: int) -> Sequence:
    """bos and prompt, to be written on by write(). A prompt longer than max_length, or than the
    positions that max_new_tokens leave, loses its start."""
    head, tokens = opening(tokenizer), tokenizer.encode(example.prompt)
    room = min(max_length, model.config.max_positions - max_new_tokens) - len(head)
    if room < 1:
        raise UserError(f"the model's {model.config.max_positions} positions leave no room for a "
                        f"prompt beside the {max_new_tokens} new tokens of this task")
    return Sequence(head + tokens[-room:], 0, cut=len(tokens) > room)


def known(sequences: list[Sequence], model) -> list[Sequence]:
    """The sequences, if the model has all their tokens; a UserError otherwise."""
    largest = max((max(s.tokens) for s in sequences), default=0)
    if largest >= model.config.vocab_size:
        raise UserError(f"the tokenizer gives token {largest}, the model has only "
                        f"{model.config.vocab_size}: they do not belong together")
    return sequences


def collate(sequences: list[Sequence], device="cpu") -> tuple[Tensor, Tensor]:
    """-> tokens (B, T), padded on the right (which causal attention never sees), and
    is_target (B, T) bool, True where the token counts."""
    T = max(len(s.tokens) for s in sequences)
    tokens = torch.zeros(len(sequences), T, dtype=torch.long)
    is_target = torch.zeros(len(sequences), T, dtype=torch.bool)
    for i, (ids, start, _) in enumerate(sequences):
        tokens[i, :len(ids)] = torch.tensor(ids)
        is_target[i, start:len(ids)] = True
    return tokens.to(device), is_target.to(device)


def target_hidden(model, tokens: Tensor, is_target: Tensor) -> tuple[Tensor, Tensor]:
    """-> what stands before each of the N target tokens, (N, C), and these tokens, (N,). Only
    these positions need to pass the output head, which is wide where the vocabulary is large."""
    keep = is_target[:, 1:]
    return model.hidden(tokens[:, :-1])[keep], tokens[:, 1:][keep]


def target_loss(model, tokens: Tensor, is_target: Tensor) -> Tensor:
    """Sum over the target tokens of -log p(token | all before it), in nats."""
    hidden, gold = target_hidden(model, tokens, is_target)
    return F.cross_entropy(model.logits(hidden).float(), gold, reduction="sum")


class Score(NamedTuple):
    loss: float         # sum of -log p over the target tokens, in nats
    tokens: int         # number of target tokens
    right: bool         # greedy decoding would write exactly the target


@contextmanager
def scoring(model) -> Iterator[None]:
    """In eval mode, without gradients; back in its mode afterwards."""
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        yield
    model.train(was_training)


def score_targets(model, sequences: list[Sequence], batch_size: int) -> list[Score]:
    """Scores every sequence, in order."""
    scores: list = [None] * len(sequences)
    with scoring(model):
        for indices in by_length(sequences, batch_size):
            tokens, is_target = collate([sequences[i] for i in indices], model.embed.weight.device)
            found = scores_of(model, *target_hidden(model, tokens, is_target), is_target)
            for i, score in zip(indices, found):
                scores[i] = score
    return completed(scores)


def scores_of(model, hidden: Tensor, gold: Tensor, is_target: Tensor) -> list[Score]:
    """What target_hidden() gives of a batch -> the score of each row."""
    loss, right = [], []
    for states, tokens in zip(hidden.split(4096), gold.split(4096)):    # logits are wide
        logits = model.logits(states).float()
        loss.append(F.cross_entropy(logits, tokens, reduction="none"))
        right.append(logits.argmax(-1) == tokens)
    counts = is_target[:, 1:].sum(1).tolist()
    return [Score(l.double().sum().item(), len(l), bool(r.all()))
            for l, r in zip(torch.cat(loss).split(counts), torch.cat(right).split(counts))]


def by_length(sequences: list[Sequence], batch_size: int,
              title: str = "scoring") -> Iterator[list[int]]:
    """Batches of indices, sequences of similar length together; of several processes, each gets
    its share of the batches."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i].tokens))
    starts = range(0, len(order), batch_size)[rank()::world()]
    for i in tqdm(starts, desc=title, leave=False, disable=len(starts) < 20 or rank() > 0):
        yield order[i:i + batch_size]


def shares(groups: list[str], right: list[bool]) -> tuple[dict[str, float], dict[str, int]]:
    """-> group -> share of its items that are right, and group -> number of its items."""
    counts = {name: groups.count(name) for name in dict.fromkeys(groups)}
    return {name: sum(r for g, r in zip(groups, right) if g == name) / n
            for name, n in counts.items()}, counts


def recall(model, tokenizer, examples: list[Example], batch_size: int, max_length: int) -> Scores:
    """Of each group, the share of examples whose target greedy decoding writes exactly."""
    sequences = encode_all(examples, tokenizer, model, max_length, eos=False)
    right = [score.right for score in score_targets(model, sequences, batch_size)]
    rows = [dict(group=e.group, prompt=e.prompt, gold=e.target, right=r)
            for e, r in zip(examples, right)]
    return Scores(*shares([e.group for e in examples], right), rows)


def choice_losses(model, tokenizer, examples: list[Example], batch_size: int,
                  max_length: int) -> list[list[float]]:
    """Of each example -log p(choice | prompt) for each of its choices, in nats."""
    rows = [known(encode_targets(e, e.choices, tokenizer, max_length), model) for e in examples]
    losses: list = [None] * len(rows)
    widest = max((len(row) for row in rows), default=1)
    with scoring(model):
        for indices in by_length([row[0] for row in rows], max(1, batch_size // widest)):
            found = iter(score_choices(model, [rows[i] for i in indices]))
            for i in indices:
                losses[i] = [next(found).loss for _ in rows[i]]
    return completed(losses)


def score_choices(model, rows: list[list[Sequence]]) -> list[Score]:
    """The sequences of all rows, one after the other. Those of a row begin with the same tokens,
    which pass the model once: their keys and values are cached, then repeated."""
    device = model.embed.weight.device
    shared = [min(s.start for s in row) - 1 for row in rows]    # one before the first target token
    heads, _ = collate([Sequence(row[0].tokens[:n], n) for row, n in zip(rows, shared)], device)
    tails = [Sequence(s.tokens[n:], s.start - n) for row, n in zip(rows, shared) for s in row]
    tokens, is_target = collate(tails, device)
    cache = model.make_cache(len(rows), heads.shape[1] + tokens.shape[1])
    model.hidden(heads, cache=cache)                            # (padded on the right, like tails)
    counts = torch.tensor([len(row) for row in rows], device=device)
    cache.repeat(counts)

    def real(lengths: list[int], width: int) -> Tensor:         # (len(lengths), width), no padding
        return torch.arange(width, device=device) < torch.tensor(lengths, device=device)[:, None]

    mask = torch.cat((real(shared, heads.shape[1]).repeat_interleave(counts, 0),
                      real([len(s.tokens) for s in tails], tokens.shape[1])[:, 1:]), 1)
    keep = is_target[:, 1:]
    hidden = model.hidden(tokens[:, :-1], mask, cache)[keep]
    return scores_of(model, hidden, tokens[:, 1:][keep], is_target)


def write(model, tokenizer, examples: list[Example], batch_size: int, max_length: int,
          max_new_tokens: int, **options) -> list[str]:
    """What the model writes after each prompt; options: beams and what else generate() takes."""
    prompts = [encode_prompt(e, tokenizer, model, max_length, max_new_tokens) for e in examples]
    texts: list = [None] * len(examples)
    rows = max(1, batch_size // options.get("beams", 1))        # each beam is a row of its own
    for indices in by_length(prompts, rows, "writing"):
        new = generate(model, [prompts[i].tokens for i in indices], max_new_tokens, **options)
        for i, ids in zip(indices, new):
            texts[i] = tokenizer.decode(ids)
    return completed(texts)


def score(model, tokenizer, task: Task, max_eval: int | None = None, split: str = "test",
          batch_size: int = BATCH_SIZE) -> Scores:
    """Scores a task's split, or at most `max_eval` of its examples."""
    return task.score(model, tokenizer, sample(getattr(task, split), max_eval), batch_size)


def sample(examples: list, n: int | None) -> list:
    """n examples, as many of each group where it has them, evenly spread (at least one of each);
    None: all."""
    if n is None or n >= len(examples):
        return examples
    groups = defaultdict(list)
    for example in examples:
        groups[getattr(example, "group", "")].append(example)
    share = max(1, n // len(groups))
    return [group[i] for group in groups.values()
            for i in evenly(min(share, len(group)), len(group))]


def read_text(path: str | Path) -> str:
    """A UTF-8 file, without byte order mark and with lines that end in \\n. UserError: a file that
    cannot be read, or the line that is not UTF-8."""
    try:
        return Path(path).read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object[:error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8 text") from None


def parse_json(text: str, where: str):
    """UserError, which begins with `where`: not JSON, or half of a surrogate pair in it, which no
    file or terminal can be sent."""
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError:
        raise UserError(f"{where}: holds half of a surrogate pair, \\ud800 to \\udfff") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON: {str(error)[:100]}") from None


def numbered_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """The lines of read_text(path) with their numbers, from 1; those without text are left out."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip(" "):         # not tabs, which make columns
            yield number, line


def evenly(n: int, total: int) -> list[int]:
    """n of the places 0 .. total - 1, evenly spread; n is at most total."""
    return [i * total // n for i in range(n)]


def spread(items: list, n: int, source: str | Path) -> tuple[list, list]:
    """-> the others, and n of the items (at most a tenth of them, at least one), evenly spread,
    since files may be sorted. UserError, which names the source: there is nothing to divide."""
    if len(items) < 2:
        raise UserError(f"{source}: fewer than 2 examples; train and valid need one each")
    taken = set(evenly(max(1, min(n, len(items) // 10)), len(items)))
    return ([item for i, item in enumerate(items) if i not in taken],
            [item for i, item in enumerate(items) if i in taken])


def split_file(items: list) -> tuple[list, list, list]:
    """train, valid, test: the last two tenths of a file are held out, at least one item each."""
    held = max(1, len(items) // 10)
    return items[:-2 * held], items[-2 * held:-held], items[-held:]
