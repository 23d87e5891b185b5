"""Task `commonsense`: the eight sets on which the LoRA papers compare, in the LLM-Adapters format.

    python train.py --method dora --model PATH --task commonsense --data-dir DIR --rank 32 \\
        --lr 1e-4 --loss-on all --dropout 0.05 --warmup 100 --batch-size 16 --epochs 3
This is DoRA's recipe, with its learning rate for LLaMA-7B and LLaMA3-8B. The papers' code
(LLM-Adapters) takes the loss on prompt and answer; the default here is the answer alone.
DIR/<set>/test.json, and for training DIR/commonsense_170k.json or every DIR/<set>/train.json there
is: lists of {"instruction", "input", "output": "the correct answer is answer2", "answer":
"answer2"}. Missing sets are named and left out of the average. Each set gets three numbers:
    accuracy    what the model writes (greedy, or --beams 4 as in the papers), by extract()
    likelihood  the likeliest of the option labels, which needs no parsing
    unparsed    share of written texts without an answer, which accuracy counts as wrong
The prompt is a file, data/prompt.txt or --prompt-template. 480 training rows, evenly spread, are
for validation.
"""
import re
from pathlib import Path

from data.reading import hold_out, parse_json, read_text
from data.scoring import choice_losses, shares, write
from data.task import Example, Scores, Sequence, Setup, TextTask, encode_prompt, encode_targets
from support.errors import UserError

SETS = {    # folder -> the papers' name
    "boolq": "BoolQ", "piqa": "PIQA", "social_i_qa": "SIQA", "hellaswag": "HellaS",
    "winogrande": "WinoG", "ARC-Easy": "ARC-e", "ARC-Challenge": "ARC-c", "openbookqa": "OBQA",
}
VALID = 480
NEW_TOKENS = 32


# ---- what a model wrote -> its answer
def pattern_of(label: str) -> str:
    """A regex for "answer2" that also finds "Answer 2", "answer-2", "answer (2)"."""
    word, number = re.fullmatch(r"(.*?)(\d*)", label).groups()
    gap = r"[\s_=-]*[(\[#]?" if number else ""
    return rf"(?i:(?<![a-z0-9]){re.escape(word)}{gap}{number}(?![a-z0-9]))"


# Behind a label: "answer2 is wrong" does not answer with it.
DENIED = r"(?!\s+(?:is|was)(?:n't|\s+(?:not|wrong|incorrect|false))\b)"


def leading(text: str, labels: tuple[str, ...]) -> str | None:
    """The label that `text` begins with, by its name, number or letter: "answer2", "2", "(b)".

    Nothing may follow that would make it a word, a quantity, a list: "a dog", "2 apples", "1. It".
    """
    text = re.sub(r"^[\s:\"'*#(\[\u2018\u201c]+", "", text)
    for label in labels:
        if re.match(pattern_of(label) + DENIED, text):
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


def named(text: str, label: str) -> re.Match | None:
    """Where `text` names a label without denying it ("not answer2", "answer2 is wrong")."""
    return re.search(rf"(?<!\bnot )(?<!n't ){pattern_of(label)}{DENIED}", text)


def quoted(text: str, labels: tuple[str, ...], options: tuple[str, ...], start: bool) -> str | None:
    """The label whose option stands in `text`, or at its start; of "a fish" and "red fish" only
    the longer counts where both do. Upper and lower case tell options apart if they must."""
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
    """The label that a model answered with, or None. Case does not matter.

    Paragraph by paragraph ("###" begins one too), so that what a model goes on to write after its
    answer does not count, the first of these that applies:
    1. after "answer is" or "answer:" comes an option's own text (`options`, one a label), or its
       label, number or letter, as in "the correct answer is answer2"; two joined by "/" or "or",
       as in a prompt's list of labels, are no answer;
    2. one label is named, and no other; what is denied ("not answer2") is not named;
    3. it begins with a number or a letter, "2", "(2)", "b)"; for true/false with yes or no;
    4. it holds one option's own text, and no other's.
    """
    for part in re.split(r"\n\s*\n|###", text.strip()):
        for stated in re.finditer(r"(?i)\banswer(?:\s+is\b|\s*:)", part):
            rest = part[stated.end():]
            label = quoted(rest, labels, options, start=True) or leading(rest, labels)
            if label is None:
                continue
            either = re.match(r"\W*(?:{0})\s*(?:/|\bor\b)\s*(?:{0})".format(
                "|".join(map(pattern_of, labels))), rest)
            return None if either else label
        said = [label for label in labels if named(part, label)]
        if said:
            return said[0] if len(said) == 1 else None
        label = leading(part, labels) or quoted(part, labels, options, start=False)
        if label is not None:
            return label
    return None


# ---- rows of a file -> examples
def read_rows(path: Path) -> list[dict]:
    """UserError: not JSON, or not a list with anything in it."""
    rows = parse_json(read_text(path), str(path))
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path}: must be a list of rows, and not empty")
    return rows


def example(row: dict, template: str, group: str, where: str) -> Example:
    """One row; `where` names it in a UserError. Its choices are the labels of its last line,
    "Answer format: true/false", each in the place of the answer in the row's output."""
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
    """The options as the prompt lists them, "Answer1: ..."; none where it does not."""
    places = [prompt.rfind(f"{label.capitalize()}:") for label in labels]
    ends = [*places[1:], prompt.rfind("Answer format:")]
    if -1 in places or places != sorted(places) or ends[-1] < places[-1]:
        return ()
    return tuple(prompt[start + len(label) + 1:end].strip()
                 for start, end, label in zip(places, ends, labels))


def read_template(path: str | None) -> str:
    path = Path(__file__).with_name("prompt.txt") if path is None else Path(path)
    template = read_text(path).rstrip()
    if template.count("{instruction}") != 1:
        raise UserError(f"{path}: a prompt template must hold {{instruction}} once")
    return template


# ---- the task
class Choices(TextTask):
    """Sets of questions with labelled options; an example's `references` are its labels."""
    meaning = {"accuracy": "right answers in what it writes",
               "likelihood": "questions whose right answer is the likeliest choice",
               "unparsed": "written texts without an answer, counted as wrong"}

    def __init__(self, *args, beams: int = 1, new_tokens: int = NEW_TOKENS, **more):
        super().__init__(*args, **more)
        self.beams, self.new_tokens = beams, new_tokens

    def scored(self, example: Example) -> list[Sequence]:
        return [encode_prompt(example, self.setup, self.new_tokens),
                *encode_targets(example, example.choices, self.setup.tokenizer,
                                self.setup.max_length)]

    def score(self, model, examples: list[Example]) -> Scores:
        texts = write(model, self.setup, examples, self.new_tokens, beams=self.beams)
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
            values[f"{name}/{average(len(by_group))}"] = sum(by_group.values()) / len(by_group)
        rows = [dict(group=e.group, prompt=e.prompt, output=text, answer=a, likeliest=l, gold=g)
                for e, text, a, l, g in zip(examples, texts, answers, likeliest, gold)]
        return Scores(values, counts, rows)


def average(n: int) -> str:
    """The title of the average, which says how many sets it covers when not all eight."""
    return "Avg." if n == len(SETS) else f"Avg. of {n}"


def load(setup: Setup, data_dir: str, prompt_template: str | None = None,
         beams: int = 1) -> Choices:
    folder, template = Path(data_dir), read_template(prompt_template)
    if not folder.is_dir():
        raise UserError(f"--data-dir {data_dir}: not a folder")

    def examples(path: Path, group: str) -> list[Example]:
        return [example(row, template, group, f"{path}, row {i}")
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
                   notes, beams=beams)
