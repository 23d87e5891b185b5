"""Makes the tasks on a user's file: `text` and `jsonl`.

`text` learns plain text, token by token. `jsonl` reads an object with "prompt" and "target" from
each line. The last two tenths of the file are held out: one for validation, one for the test.
"""
import math

from data.reading import numbered_lines, parse_json, read_text, split_file
from data.scoring import score_targets
from data.task import Example, Scores, Sequence, Setup, TextTask, first_tokens
from support.errors import UserError


class Text(TextTask):
    """Scores text by its loss; for `jsonl` also by exact targets."""
    meaning = {"loss": "nats a target token", "perplexity": "exp(loss)",
               "exact": "targets it writes exactly"}

    def score(self, model, examples: list) -> Scores:
        """Returns loss, in nats per target token, and perplexity, its exponential.

        `jsonl` also has `exact`: the share of targets that greedy decoding writes exactly, with
        their eos.
        """
        sequences = [s for example in examples for s in self.scored(example)]
        scores = score_targets(model, sequences, self.setup.batch_size)
        loss = math.fsum(s.loss for s in scores) / sum(s.tokens for s in scores)
        values, counts = {"loss": loss, "perplexity": math.exp(min(loss, 700))}, {}
        if self.name == "jsonl":
            values["exact"] = sum(s.right for s in scores) / len(scores)
            counts["exact"] = len(scores)
        rows = [dict(prompt=e.prompt, gold=e.target, loss=s.loss, right=s.right)
                for e, s in zip(examples, scores) if isinstance(e, Example)]
        return Scores(values, counts, rows)


def load_text(setup: Setup, data: str) -> Text:
    """Cuts the text into blocks of max_length tokens, each with bos as its first.

    No token is lost, but for one case: without a bos, a last block of one token has nothing to
    predict it, and is dropped. Raises UserError if the text or max_length is too short.
    """
    ids = setup.tokenizer.encode(read_text(data))
    if len(ids) < 20:
        raise UserError(f"{data}: {len(ids)} tokens of text are too few to train on and hold out")
    head = first_tokens(setup.tokenizer)
    size = setup.max_length - len(head)
    if setup.max_length < 2:
        raise UserError(f"--max-length {setup.max_length}: text needs at least 2 tokens an example")

    def blocks(part: list[int]) -> list[Sequence]:
        return [Sequence(head + part[i:i + size], 1) for i in range(0, len(part), size)
                if len(head + part[i:i + size]) > 1]

    return Text("text", *map(blocks, split_file(ids)), setup, {"epochs": 1, "batch_size": 16},
                loss_on="all")


def load_jsonl(setup: Setup, data: str) -> Text:
    """Reads an example from each line; skips blank lines.

    Raises UserError, which names the line, if a line is not an example, or if there are fewer
    than three.
    """
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
    return Text("jsonl", *split_file(examples), setup, {"epochs": 3, "batch_size": 16})
