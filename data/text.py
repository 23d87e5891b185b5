"""Tasks on the user's own file: `text` (next-token loss on plain text) and `jsonl` (one object a
line with "prompt" and "target"). Of either, the last two tenths are held out, in the file's order:
one for validation, one for the test score."""
import json
import math
from pathlib import Path

from common import UserError
from data.task import Example, Score, Sequence, Task, encode_all, score_targets, split_file


def read(data: str | None, task: str) -> str:
    if data is None:
        raise UserError(f"--task {task} needs --data FILE")
    try:
        return Path(data).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{data}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{data}: not UTF-8 text at byte {error.start}") from None


def perplexity(model, tokenizer, examples: list, batch_size: int,
               max_length: int) -> dict[str, float]:
    """Mean loss in nats a target token, and its exponential."""
    sequences = encode_all(examples, tokenizer, model, max_length)
    return mean_loss(score_targets(model, sequences, batch_size))


def perplexity_and_exact(model, tokenizer, examples: list, batch_size: int,
                         max_length: int) -> dict[str, float]:
    """Also the share of examples whose target, eos included, greedy decoding writes exactly."""
    sequences = encode_all(examples, tokenizer, model, max_length)
    scores = score_targets(model, sequences, batch_size)
    return mean_loss(scores) | {"exact": sum(s.right for s in scores) / len(scores)}


def mean_loss(scores: list[Score]) -> dict[str, float]:
    loss = math.fsum(s.loss for s in scores) / sum(s.tokens for s in scores)
    return {"loss": loss, "perplexity": math.exp(min(loss, 700))}


def load_text(tokenizer, max_length: int, data: str | None) -> Task:
    """Blocks of max_length tokens, each opened by bos; no token is left out or seen twice."""
    ids = tokenizer.encode(read(data, "text"))
    if len(ids) < 20:
        raise UserError(f"{data}: {len(ids)} tokens of text are too few to train on and hold out")
    head = [] if tokenizer.bos is None else [tokenizer.bos]
    size = max_length - len(head)
    if max_length < 2:
        raise UserError(f"--max-length {max_length}: text needs at least 2 tokens an example")

    def blocks(part: list[int]) -> list[Sequence]:
        return [Sequence(head + part[i:i + size], 1) for i in range(0, len(part), size)
                if len(head + part[i:i + size]) > 1]

    train, valid, test = map(blocks, split_file(ids))
    return Task("text", train, valid, test, perplexity, max_length, loss_on="all",
                defaults={"epochs": 1, "batch_size": 16})


def load_jsonl(tokenizer, max_length: int, data: str | None) -> Task:
    """One example a line; blank lines are skipped, any other wrong line is named."""
    examples = []
    for number, line in enumerate(read(data, "jsonl").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt, target = row["prompt"], row["target"]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise UserError(f'{data}:{number}: not a JSON object with "prompt" and "target"'
                            ) from None
        if not isinstance(prompt, str) or not isinstance(target, str) or not target:
            raise UserError(f"{data}:{number}: prompt and target must be text, target not empty")
        examples.append(Example(prompt, target))
    if len(examples) < 3:
        raise UserError(f"{data}: {len(examples)} examples; train, valid and test need one each")
    return Task("jsonl", *split_file(examples), perplexity_and_exact, max_length,
                defaults={"epochs": 3, "batch_size": 16})
