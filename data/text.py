"""Makes the tasks on a user's file: `text` and `jsonl`.

`text` learns plain text, token by token. `jsonl` learns targets after prompts; rows.py reads them.
The last two tenths of the file are held out: one for validation, one for the test.
"""
import math

from data.reading import read_text, split_file
from data.rows import read_examples
from data.scoring import score_targets
from data.task import Example, Scores, Sequence, Setup, TextTask, encode_start, first_tokens
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
    head = first_tokens(setup.tokenizer)
    ids = encode_start(read_text(data), setup.tokenizer)[len(head):]
    if len(ids) < 20:
        raise UserError(f"{data}: {len(ids)} tokens of text are too few to train on and hold out")
    size = setup.max_length - len(head)
    if setup.max_length < 2:
        raise UserError(f"--max-length {setup.max_length}: text needs at least 2 tokens an example")

    def blocks(part: list[int]) -> list[Sequence]:
        return [Sequence(head + part[i:i + size], 1) for i in range(0, len(part), size)
                if len(head + part[i:i + size]) > 1]

    return Text("text", *map(blocks, split_file(ids)), setup, {"epochs": 1, "batch_size": 16},
                loss_on="all")


def load_jsonl(setup: Setup, data: str) -> Text:
    """Reads the examples of a file, as rows.py does.

    Raises UserError if a row, which it names, is no example, or if there are fewer than three.
    """
    examples, notes = read_examples(data, setup.tokenizer)
    if len(examples) < 3:
        raise UserError(f"{data}: {len(examples)} examples; train, valid and test need one each")
    train, valid, test = split_file(examples)
    n, held = len(train), len(test)
    notes["held_out"] = (f"rows {n + 1} to {n + held} for validation, rows {n + held + 1} to "
                         f"{n + 2 * held}, the last, for the test")
    return Text("jsonl", train, valid, test, setup, {"epochs": 3, "batch_size": 16}, notes)
