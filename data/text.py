"""Tasks on the user's own file: `text` (next-token loss on plain text) and `jsonl` (one object a
line with "prompt" and "target"). Of either, the last two tenths are held out, in the file's order:
one for validation, one for the test score."""
import math

from data.task import (Example, Scores, Sequence, Task, encode_all, numbered_lines, opening,
                       parse_json, read_text, score_targets, split_file)
from support.errors import UserError


class Text(Task):
    def score(self, model, tokenizer, examples: list, batch_size: int) -> Scores:
        """Mean loss in nats a target token, and its exponential; of jsonl also the share of
        examples whose target, eos included, greedy decoding writes exactly."""
        sequences = encode_all(examples, tokenizer, model, self.max_length)
        scores = score_targets(model, sequences, batch_size)
        loss = math.fsum(s.loss for s in scores) / sum(s.tokens for s in scores)
        values, counts = {"loss": loss, "perplexity": math.exp(min(loss, 700))}, {}
        if self.name == "jsonl":
            values["exact"] = sum(s.right for s in scores) / len(scores)
            counts["exact"] = len(scores)
        rows = [dict(prompt=e.prompt, gold=e.target, loss=s.loss, right=s.right)
                for e, s in zip(examples, scores) if isinstance(e, Example)]
        return Scores(values, counts, rows)


def load_text(tokenizer, max_length: int, data: str) -> Task:
    """Blocks of max_length tokens, each opened by bos, every token in one block; without a bos a
    last block of a single token, which nothing stands before, is dropped."""
    ids = tokenizer.encode(read_text(data))
    if len(ids) < 20:
        raise UserError(f"{data}: {len(ids)} tokens of text are too few to train on and hold out")
    head = opening(tokenizer)
    size = max_length - len(head)
    if max_length < 2:
        raise UserError(f"--max-length {max_length}: text needs at least 2 tokens an example")

    def blocks(part: list[int]) -> list[Sequence]:
        return [Sequence(head + part[i:i + size], 1) for i in range(0, len(part), size)
                if len(head + part[i:i + size]) > 1]

    train, valid, test = map(blocks, split_file(ids))
    return Text("text", train, valid, test, max_length, loss_on="all",
                defaults={"epochs": 1, "batch_size": 16})


def load_jsonl(tokenizer, max_length: int, data: str) -> Task:
    """One example a line; blank lines are skipped, any other wrong line is named."""
    examples = []
    for number, line in numbered_lines(data):
        row = parse_json(line, f"{data}:{number}")
        try:
            prompt, target = row["prompt"], row["target"]
        except (TypeError, KeyError):
            raise UserError(f'{data}:{number}: not a JSON object with "prompt" and "target"'
                            ) from None
        if not isinstance(prompt, str) or not isinstance(target, str) or not target:
            raise UserError(f"{data}:{number}: prompt and target must be text, target not empty")
        examples.append(Example(prompt, target, source=f"{data}:{number}"))
    if len(examples) < 3:
        raise UserError(f"{data}: {len(examples)} examples; train, valid and test need one each")
    return Text("jsonl", *split_file(examples), max_length,
                defaults={"epochs": 3, "batch_size": 16})
