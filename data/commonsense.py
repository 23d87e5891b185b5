"""Makes task `commonsense`: eight sets on which the papers compare, in the format of LLM-Adapters.

    python train.py --method dora --model PATH --task commonsense --data-dir DIR --rank 32 \\
        --lr 1e-4 --loss-on all --dropout 0.05 --warmup 100 --batch-size 16 --epochs 3
This is DoRA's recipe, with its learning rate for LLaMA-7B and LLaMA3-8B. The papers' code
(LLM-Adapters) takes the loss on prompt and answer; the default here is the answer alone. The tests
are DIR/<set>/test.json. Training reads DIR/commonsense_170k.json, or every DIR/<set>/train.json if
there is no such file. Each file is a list of {"instruction", "input", "output": "the correct answer
is answer2", "answer": "answer2"}. Missing sets are named and left out of the average. The scores:
    accuracy    share of right answers in the texts that the model writes, as extract() reads them;
                written greedily, or with --beams 4 as in the papers
    likelihood  share of questions whose right answer is the likeliest choice; no text is parsed
    unparsed    share of written texts without an answer, which accuracy counts as wrong
The prompt's form is data/prompt.txt, or --prompt-template. 480 training rows, evenly spread, are
for validation.
"""
import re
from pathlib import Path

from data.reading import hold_out, parse_json, read_template, read_text
from data.scoring import choice_losses, shares, write_texts
from data.task import Example, Scores, Sequence, Setup, WritingTask, encode_prompt, encode_targets
from support.errors import UserError

SETS = {    # folder -> the papers' name
    "boolq": "BoolQ", "piqa": "PIQA", "social_i_qa": "SIQA", "hellaswag": "HellaS",
    "winogrande": "WinoG", "ARC-Easy": "ARC-e", "ARC-Challenge": "ARC-c", "openbookqa": "OBQA",
}
VALID = 480
NEW_TOKENS = 32


# ---- from the text that a model wrote to its answer
def label_pattern(label: str) -> str:
    """Returns a regex for "answer2" that also finds "Answer 2", "answer-2", "answer (2)"."""
    word, number = re.fullmatch(r"(.*?)(\d*)", label).groups()
    gap = r"[\s_=-]*[(\[#]?" if number else ""
    return rf"(?i:(?<![a-z0-9]){re.escape(word)}{gap}{number}(?![a-z0-9]))"


# Must follow a label: "answer2 is wrong" is no answer.
DENIED = r"(?!\s+(?:is|was)(?:n't|\s+(?:not|wrong|incorrect|false))\b)"


def label_at_start(text: str, labels: tuple[str, ...]) -> str | None:
    """Returns the label that `text` begins with, by name, number or letter: "answer2", "2", "(b)".

    A number or letter must not be part of something else: "a dog", "2 apples", "1. It".
    """
    text = re.sub(r"^[\s:\"'*#(\[\u2018\u201c]+", "", text)
    for label in labels:
        if re.match(label_pattern(label) + DENIED, text):
            return label
    if labels == ("true", "false"):
        word = re.match(r"(?i:(yes)\b|no(?=\s*(?:[.,;:!)]|$)))", text)
        return word and ("true" if word[1] else "false")
    text = re.sub(r"^(?i:option|choice)\s*", "", text)
    mark = re.match(r"(?:(\d)|([a-eA-E]))"
                    r"(?:[)\]]|[\"'*.:,\u2019\u201d]*[ \t]*(?:\n|$)|\s+(?:because|since)\b)", text)
    if mark is None:
        return None
    place = int(mark[1]) - 1 if mark[1] else "abcde".index(mark[2].lower())
    return labels[place] if 0 <= place < len(labels) else None


def find_label(text: str, label: str) -> re.Match | None:
    """Finds a label in `text` that is not denied, as in "not answer2", "answer2 is wrong"."""
    return re.search(rf"(?<!\bnot )(?<!n't ){label_pattern(label)}{DENIED}", text)


def label_of_option(text: str, labels: tuple[str, ...], options: tuple[str, ...],
                    start: bool) -> str | None:
    """Returns the label of the option that stands in `text`; with `start`, at its start.

    If both "fish" and "red fish" stand there, the longer counts. Case counts first; if that finds
    no single option, case is ignored.
    """
    before = r"\A[\s:\"'*(]*" if start else r"(?<!\w)"
    for flags in (0, re.I):
        found = {option.strip(): label for label, option in zip(labels, options) if option.strip()
                 and re.search(rf"{before}{re.escape(option.strip())}(?!\w)", text, flags)}
        longest = [option for option in found
                   if not any(option.lower() in other.lower() for other in found.keys() - {option})]
        if len(longest) == 1:
            return found[longest[0]]
    return None


def extract(text: str, labels: tuple[str, ...], options: tuple[str, ...] = ()) -> str | None:
    """Returns the label that a model answered with, or None; case does not matter.

    The first paragraph with an answer counts, since a model may write on after it; "###" begins a
    paragraph too. In a paragraph the first of these rules that applies gives the answer:
    1. "answer is" or "answer:" stands before an option's text (`options`, one for each label), or
       before its label, number or letter, as in "the correct answer is answer2". Two labels joined
       by "/" or "or", as in a prompt's list of labels, are no answer.
    2. It names one label, and no other. A denied label ("not answer2") is not named.
    3. It begins with a number or a letter, "2", "(2)", "b)"; for true/false with yes or no.
    4. It holds the text of one option, and of no other.
    """
    for part in re.split(r"\n\s*\n|###", text.strip()):
        for stated in re.finditer(r"(?i)\banswer(?:\s+is\b|\s*:)", part):
            rest = part[stated.end():]
            label = (label_of_option(rest, labels, options, start=True)
                     or label_at_start(rest, labels))
            if label is None:
                continue
            either = re.match(r"\W*(?:{0})\s*(?:/|\bor\b)\s*(?:{0})".format(
                "|".join(map(label_pattern, labels))), rest)
            return None if either else label
        named = [label for label in labels if find_label(part, label)]
        if named:
            return named[0] if len(named) == 1 else None
        label = label_at_start(part, labels) or label_of_option(part, labels, options, start=False)
        if label is not None:
            return label
    return None


# ---- from rows of a file to examples
def read_rows(path: Path) -> list[dict]:
    """Reads a JSON list; raises UserError if the file holds anything else, or an empty list."""
    rows = parse_json(read_text(path), str(path))
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path}: must be a list of rows, and not empty")
    return rows


def example_of_row(row: dict, template: str, group: str, where: str) -> Example:
    """Makes an example; its choices are the row's output with each label in place of the answer.

    The labels stand in the instruction's last line, "Answer format: true/false". Raises UserError,
    which begins with `where`, if a text is missing or the answer is no label.
    """
    if not isinstance(row, dict) or not all(
            isinstance(row.get(key), str) for key in ("instruction", "output", "answer")):
        raise UserError(f'{where}: needs "instruction", "output" and "answer", each a text')
    instruction, answer = row["instruction"].strip(), row["answer"].strip()
    question, heading, form = instruction.rpartition("Answer format:")
    if row.get("input"):
        instruction = f"{question.strip()}\n\n{row['input']}\n\n{heading}{form}"
    labels = tuple(re.split(r"\s*/\s*", form.strip()))
    before, found, after = row["output"].strip().rpartition(answer or "(nothing)")
    if answer not in labels or not found:
        raise UserError(f"{where}: answer {answer!r} must be one of the labels after "
                        f"\"Answer format:\" ({'/'.join(labels)[:60]}) and stand in the output")
    return Example(template.replace("{instruction}", instruction),
                   f" {before}{answer}{after}",
                   tuple(f" {before}{label}{after}" for label in labels), labels, group, where)


def option_texts(prompt: str, labels: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the options that the prompt lists as "Answer1: ...", or () if it lists none."""
    starts = [prompt.rfind(f"{label.capitalize()}:") for label in labels]
    ends = [*starts[1:], prompt.rfind("Answer format:")]
    if -1 in starts or starts != sorted(starts) or ends[-1] < starts[-1]:
        return ()
    return tuple(prompt[start + len(label) + 1:end].strip()
                 for start, end, label in zip(starts, ends, labels))


# ---- the task
class Choices(WritingTask):
    """Scores questions with labelled options; an example's `references` are its labels."""
    meaning = {"accuracy": "right answers in what it writes",
               "likelihood": "questions whose right answer is the likeliest choice",
               "unparsed": "written texts without an answer, counted as wrong"}

    def scored(self, example: Example) -> list[Sequence]:
        return [encode_prompt(example, self.setup, self.new_tokens),
                *encode_targets(example, example.choices, self.setup.tokenizer,
                                self.setup.max_length)]

    def score(self, model, examples: list[Example]) -> Scores:
        texts = write_texts(model, self.setup, examples, self.new_tokens, beams=self.beams)
        answers = [extract(text, e.references, option_texts(e.prompt, e.references))
                   for text, e in zip(texts, examples)]
        losses = choice_losses(model, self.setup, examples)
        likeliest = [e.references[row.index(min(row))] for e, row in zip(examples, losses)]
        gold = [e.references[e.choices.index(e.target)] for e in examples]
        groups = [e.group for e in examples]
        values, counts = {}, {}
        for name, right in (("accuracy", [a == g for a, g in zip(answers, gold)]),
                            ("likelihood", [a == g for a, g in zip(likeliest, gold)]),
                            ("unparsed", [a is None for a in answers])):
            by_group, n = shares(groups, right)
            values |= {f"{name}/{group}": value for group, value in by_group.items()}
            counts |= {f"{name}/{group}": n[group] for group in by_group if name != "unparsed"}
            average = sum(by_group.values()) / len(by_group)
            values[f"{name}/{average_title(len(by_group))}"] = average
        rows = [dict(group=e.group, prompt=e.prompt, output=text, answer=a, likeliest=l, gold=g)
                for e, text, a, l, g in zip(examples, texts, answers, likeliest, gold)]
        return Scores(values, counts, rows)


def average_title(n: int) -> str:
    """Returns the title of the average, with the number of sets if they are not all eight."""
    return "Avg." if n == len(SETS) else f"Avg. of {n}"


def load(setup: Setup, data_dir: str, prompt_template: str | None = None,
         beams: int = 1) -> Choices:
    """Reads the folder; raises UserError if it has no test or no training file, or a wrong row."""
    folder, template = Path(data_dir), read_template(prompt_template)
    if not folder.is_dir():
        raise UserError(f"--data-dir {data_dir}: not a folder")

    def examples(path: Path, group: str) -> list[Example]:
        return [example_of_row(row, template, group, f"{path}, row {i}")
                for i, row in enumerate(read_rows(path), 1)]

    tests = {name: folder / name / "test.json" for name in SETS}
    missing = [name for name, path in tests.items() if not path.exists()]
    if len(missing) == len(SETS):
        raise UserError(f"--data-dir {data_dir}: holds none of {', '.join(SETS)} with a test.json")
    merged = folder / "commonsense_170k.json"
    files = {merged: "train"} if merged.exists() else {
        folder / name / "train.json": title for name, title in SETS.items()
        if (folder / name / "train.json").exists()}
    if not files:
        raise UserError(f"--data-dir {data_dir}: holds neither commonsense_170k.json nor any "
                        f"set's train.json")
    train, valid = hold_out([e for path, group in files.items() for e in examples(path, group)],
                          VALID, f"--data-dir {data_dir}")
    test = [e for name, path in tests.items() if name not in missing
            for e in examples(path, SETS[name])]
    notes = {"trained_on": [str(path.relative_to(folder)) for path in files]}
    if missing:
        notes["missing"] = f"{', '.join(missing)}: not there, so not in the average"
    return Choices("commonsense", train, valid, test, setup, {"epochs": 3, "batch_size": 16},
                   notes, beams=beams, new_tokens=NEW_TOKENS)
