"""Scores a model on examples, in three ways.

score_targets and recall: would greedy decoding write the target? choice_losses: how likely is each
choice? write_texts: the text that the model writes. With several processes each scores its share of
the examples, and all get the whole result.
"""
from typing import Iterator, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data.task import (Example, Scores, Sequence, Setup, checked_sequence, collate, device_of,
                       encode, encode_prompt, encode_targets, scoring, target_hidden)
from generate import generate
from support.processes import is_main, joined, process_count, process_number


class Score(NamedTuple):
    """Holds the score of one sequence."""
    loss: float         # sum of -log p over the target tokens, in nats
    tokens: int         # number of target tokens
    right: bool         # greedy decoding would write exactly the target


def score_targets(model, sequences: list[Sequence], batch_size: int) -> list[Score]:
    """Returns the score of each sequence, in their order."""
    scores: list = [None] * len(sequences)
    with scoring(model):
        for indices in by_length(sequences, batch_size):
            tokens, is_target = collate([sequences[i] for i in indices], device_of(model))
            found = scores_of(model, *target_hidden(model, tokens, is_target), is_target)
            for i, score in zip(indices, found):
                scores[i] = score
    return joined(scores)


def scores_of(model, hidden: Tensor, gold: Tensor, is_target: Tensor) -> list[Score]:
    """Scores each row of a batch, from hidden (N, C) and gold (N,) of target_hidden().

    Writing stops at any eos of the model, so each of them is right in the place of another.
    """
    loss, right, eos = [], [], torch.tensor(model.config.eos, device=gold.device)
    for states, tokens in zip(hidden.split(4096), gold.split(4096)):    # logits take much memory
        logits = model.logits(states).float()
        loss.append(F.cross_entropy(logits, tokens, reduction="none"))
        said = logits.argmax(-1)
        right.append((said == tokens) | torch.isin(said, eos) & torch.isin(tokens, eos))
    counts = is_target[:, 1:].sum(1).tolist()
    return [Score(l.double().sum().item(), len(l), bool(r.all()))
            for l, r in zip(torch.cat(loss).split(counts), torch.cat(right).split(counts))]


def by_length(sequences: list[Sequence], batch_size: int,
              title: str = "scoring") -> Iterator[list[int]]:
    """Yields batches of indices; a batch has sequences of similar length.

    With several processes each gets its share of the batches.
    """
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i].tokens))
    starts = range(0, len(order), batch_size)[process_number()::process_count()]
    for i in tqdm(starts, desc=title, leave=False, disable=len(starts) < 20 or not is_main()):
        yield order[i:i + batch_size]


def shares(groups: list[str], right: list[bool]) -> tuple[dict[str, float], dict[str, int]]:
    """Returns for each group the share of items that are right, and the number of items."""
    counts = {name: groups.count(name) for name in dict.fromkeys(groups)}
    return {name: sum(r for g, r in zip(groups, right) if g == name) / n
            for name, n in counts.items()}, counts


def recall(model, setup: Setup, examples: list[Example]) -> Scores:
    """Returns for each group the share of examples whose target greedy decoding writes.

    An example without a group counts as `exact`. The target may go on: eos is trained, not asked.
    """
    sequences = [checked_sequence(encode(e, setup.tokenizer, setup.max_length, eos=False), setup)
                 for e in examples]
    right = [score.right for score in score_targets(model, sequences, setup.batch_size)]
    groups = [e.group or "exact" for e in examples]
    rows = [dict(group=group, prompt=e.prompt, gold=e.target, right=r)
            for group, e, r in zip(groups, examples, right)]
    return Scores(*shares(groups, right), rows)


def choice_losses(model, setup: Setup, examples: list[Example]) -> list[list[float]]:
    """Returns -log p(choice | prompt) for each choice of each example, in nats."""
    rows = [[checked_sequence(s, setup) for s in encode_targets(e, e.choices, setup.tokenizer,
                                                     setup.max_length)] for e in examples]
    losses: list = [None] * len(rows)
    widest = max((len(row) for row in rows), default=1)
    with scoring(model):
        for indices in by_length([row[0] for row in rows], max(1, setup.batch_size // widest)):
            found = iter(score_choices(model, [rows[i] for i in indices]))
            for i in indices:
                losses[i] = [next(found).loss for _ in rows[i]]
    return joined(losses)


def score_choices(model, rows: list[list[Sequence]]) -> list[Score]:
    """Scores the sequences of all rows, in order.

    The sequences of a row begin with the same tokens. These pass the model once. Their keys and
    values are cached, and repeated for each sequence.
    """
    device = device_of(model)
    shared = [row[0].start - 1 for row in rows]     # one before the first target token
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


def write_texts(model, setup: Setup, examples: list[Example], max_new_tokens: int,
          **options) -> list[str]:
    """Returns the text that the model writes after each prompt; `options` go to generate()."""
    prompts = [encode_prompt(e, setup, max_new_tokens) for e in examples]
    texts: list = [None] * len(examples)
    rows = max(1, setup.batch_size // options.get("beams", 1))      # each beam is a row of its own
    for indices in by_length(prompts, rows, "writing"):
        new = generate(model, [prompts[i].tokens for i in indices], max_new_tokens, **options)
        for i, ids in zip(indices, new):
            texts[i] = setup.tokenizer.decode(ids)
    return joined(texts)
