"""Tasks `e2e` and `mini-e2e`: a text from a list of attributes, scored against several references.

    python train.py --method lora --task mini-e2e                         about a minute
    python train.py --method lora --task e2e --data-dir DIR --model openai-community/gpt2-medium \\
        --targets q,v --rank 4 --alpha 32 --dropout 0.1 --lr 2e-4 --weight-decay 0.01 \\
        --warmup 500 --beams 10
The second is the recipe of LoRA's paper (Hu et al. 2021, table 11; batches of 8 and 5 epochs are
the task's defaults), less its label smoothing of 0.1, which this project does not have, and with
gradients clipped at 1, which LoRA's code does not do here. Each validation writes 547 texts with
all the beams: --max-eval 100 makes it quicker.

`e2e` is the E2E NLG challenge (Novikova et al. 2017): restaurants, 8 attributes at most. DIR holds
    train.txt, valid.txt, test.txt               lines `meaning representation||reference`, as in
                                                 microsoft/LoRA: texts with a space before each stop
    trainset.csv, devset.csv, testset_w_refs.csv     the challenge's own, columns mr and ref
and where it holds both, the first are read. Prompts are the same for both, texts stay as they are:
so a model trained on one of them should be scored on the same one.
A meaning representation of the training split gives an example for each of its texts; of the other
splits it is one example with all its texts as references.

`mini-e2e` has that shape on people and towns of the built-in world, the subjects of each split its
own. The base model was pretrained on descriptions of one to four attributes, in the prompt's order
and in a plain style. Here are three to five, told in another order than the prompt's, in a style of
two sentences with phrases of its own. So the scores before tell how far telling all attributes in
any way goes, and the gain is what fine-tuning learnt of the style; references are four at least.
"""
import csv
import io
import random
import re
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

from data.pretraining_text import describe_subject, list_attributes
from data.task import (Example, Scores, Sequence, Task, encode_prompt, numbered_lines, read_text,
                       write)
from data.text_metrics import text_scores
from data.wordings import RELATIONS
from data.world import VERSION, World, pick_one, pick_several, shuffled
from support.errors import UserError, require

# As LoRA's README. In GPT-2's tokens, less than 1 reference of 1,000 is longer (89 at most); where
# a tokenizer cuts words finer, as many new tokens as the longest training text takes.
NEW_TOKENS = 64
# LoRA's paper; its README has 0.8. It matters with beams only.
LENGTH_PENALTY = 0.9

PACKAGES = ("sacrebleu", "nltk", "rouge_score")          # of the metrics
FILES = {"txt": ("train.txt", "valid.txt", "test.txt"),
         "csv": ("trainset.csv", "devset.csv", "testset_w_refs.csv")}
# The attributes whose names differ between the challenge's files and LoRA's.
NAMES = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}


@dataclass
class E2E(Task):
    beams: int = 1
    new_tokens: int = NEW_TOKENS

    def sequences(self, example: Example, tokenizer, model) -> list[Sequence]:
        return [encode_prompt(example, tokenizer, model, self.max_length, self.new_tokens)]

    def score(self, model, tokenizer, examples: list[Example], batch_size: int) -> Scores:
        """Of the first line that the model writes: bleu, nist, meteor, rouge_l, cider.

        No 4-gram is written twice; those of the prompt are free, since nearly every reference
        holds one (a name of several tokens).
        """
        texts = write(model, tokenizer, examples, batch_size, self.max_length, self.new_tokens,
                      beams=self.beams, length_penalty=LENGTH_PENALTY, no_repeat_ngram=4,
                      copy_prompt=True)
        outputs = [(text.strip() or " ").splitlines()[0].strip() for text in texts]
        values = text_scores(outputs, [e.references for e in examples])
        if "meteor" not in values and "meteor" not in self.notes:
            self.notes["meteor"] = "left out: nltk has no WordNet data here"
            print("meteor is left out; to have it: python -m nltk.downloader wordnet",
                  file=sys.stderr)
        rows = [dict(prompt=e.prompt, output=output, references=list(e.references))
                for e, output in zip(examples, outputs)]
        return Scores(values, {}, rows)


# ---- the challenge
def load(tokenizer, max_length: int, data_dir: str, beams: int = 1) -> Task:
    """UserError: a file that is missing or empty; a wrong line, with its number."""
    require(*PACKAGES)
    folder = Path(data_dir)
    kind = next((kind for kind, names in FILES.items() if (folder / names[0]).exists()), None)
    if kind is None:
        raise UserError(f"--data-dir {folder}: holds neither train.txt nor trainset.csv")
    read = {"txt": read_txt, "csv": read_csv}[kind]
    splits = [read(folder / name) for name in FILES[kind]]
    train = [example(mr, [text], source) for mr, text, source in splits[0]]
    new = max(NEW_TOKENS, 1 + max(len(tokenizer.encode(e.target)) for e in train))
    return E2E("e2e", train, grouped(splits[1]), grouped(splits[2]), max_length, beams=beams,
               new_tokens=new, defaults={"epochs": 5, "batch_size": 8},
               notes={"files": kind, "new_tokens": new})


def example(mr: str, texts: list[str], source: str = "") -> Example:
    return Example(f"{mr}\nDescription:", f" {texts[0]}", references=tuple(texts), source=source)


class Row(NamedTuple):
    mr: str             # the meaning representation
    text: str           # a reference
    source: str         # file and line


def grouped(rows: list[Row]) -> list[Example]:
    """One example for each meaning representation, in the order of their first lines."""
    same: dict[str, list[Row]] = {}
    for row in rows:
        same.setdefault(row.mr, []).append(row)
    return [example(mr, [row.text for row in of_mr], of_mr[0].source)
            for mr, of_mr in same.items()]


def read_txt(path: Path) -> list[Row]:
    """A row for each line; blank lines are skipped."""
    pairs = []
    for number, line in numbered_lines(path):
        mr, bars, text = line.partition("||")
        if not bars:
            raise UserError(f"{path}:{number}: no || between attributes and reference")
        pairs.append(checked(f"{path}:{number}", mr, text))
    return not_empty(path, pairs)


def read_csv(path: Path) -> list[Row]:
    """Meaning representations are written as in the .txt files."""
    rows = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    pairs = []
    try:
        header = next(rows, [])
        if [title.strip() for title in header] != ["mr", "ref"]:
            raise UserError(f"{path}:1: the columns must be mr and ref, not {', '.join(header)}")
        for row in rows:
            where = f"{path}:{rows.line_num}"
            if len(row) not in (0, 2):
                raise UserError(f"{where}: {len(row)} columns instead of 2")
            if row:
                pairs.append(checked(where, normal_form(where, row[0]), row[1]))
    except csv.Error as error:
        raise UserError(f"{path}:{rows.line_num}: {error}") from None
    return not_empty(path, pairs)


def checked(where: str, mr: str, text: str) -> Row:
    """Both with single spaces, so that a reference is one line."""
    mr, text = " ".join(mr.split()), " ".join(text.split())
    if not mr or not text:
        raise UserError(f"{where}: the {'reference' if mr else 'meaning representation'} is empty")
    return Row(mr, text, where)


def not_empty(path: Path, pairs: list) -> list:
    if not pairs:
        raise UserError(f"{path}: holds no examples")
    return pairs


def normal_form(where: str, mr: str) -> str:
    """name[The Mill], priceRange[£20-25] -> name : The Mill | price : £ 20 - 25"""
    if not re.fullmatch(r"([^][,]+\[[^][]*\](, *|$))+", mr.strip()):
        raise UserError(f"{where}: not a list of name[value]: {mr[:60]!r}")
    pairs = re.findall(r"([^][,]+)\[([^][]*)\]", mr)
    return " | ".join(f"{NAMES.get(name.strip(), name.strip())} : {spaced(value)}"
                      for name, value in pairs)


def spaced(value: str) -> str:
    """A price as LoRA's files write it: £20-25 -> £ 20 - 25."""
    return re.sub(r"(?<=\d)-(?=\d)", " - ", value.replace("£", "£ "))


# ---- the built-in world
MEET = {"person": ("Meet {name}, who", "This is {name}, who", "Let me introduce {name}, who"),
        "place": ("Welcome to {name}, which", "This is {name}, which",
                  "On your left is {name}, which")}
ALSO = ("What is more,", "Besides,", "And there is more:")


def load_mini(tokenizer, max_length: int, beams: int = 1) -> Task:
    """The same task in every run: a run's --seed changes nothing of it."""
    require(*PACKAGES)
    world, rng = World(), random.Random(f"mini-e2e {VERSION}")
    subjects = shuffled(rng, [*product(["person"], world.people),
                              *product(["place"], world.places)])
    train = [Example(e.prompt, f" {text}") for e in described_all(world, subjects[:340], 3, rng)
             for text in e.references[:2]]
    valid, test = (described_all(world, part, 2, rng) for part in (subjects[340:370],
                                                                   subjects[370:]))
    return E2E("mini-e2e", train, valid, test, max_length, beams=beams,
               defaults={"steps": 200, "batch_size": 32})


def described_all(world: World, subjects: list, n: int, rng: random.Random) -> list[Example]:
    """n lists of three to five attributes of each subject, each with up to six texts; a list
    that comes twice is one example."""
    examples = {}
    for (kind, name), _ in product(subjects, range(n)):
        names = pick_several(rng, RELATIONS[kind], 3 + int(3 * rng.random()))
        mr = list_attributes(world, name, [r for r in RELATIONS[kind] if r in names])
        texts = dict.fromkeys(styled(world, kind, name, shuffled(rng, names), rng)
                              for _ in range(6))
        examples[mr] = example(mr, list(texts))
    return list(examples.values())


def styled(world: World, kind: str, name: str, names: list[str], rng: random.Random) -> str:
    """Ada Kelsen keeps a dog. She ... -> Meet Ada Kelsen, who keeps a dog. Besides, she ..."""
    first, stop, second = describe_subject(world, name, names, rng)[1].strip().partition(". ")
    text = pick_one(rng, MEET[kind]).format(name=name) + first.removeprefix(name) + stop
    if second and not second.startswith(name):
        second = second[0].lower() + second[1:]                 # a pronoun
    return text + (f"{pick_one(rng, ALSO)} {second}" if second else "")
