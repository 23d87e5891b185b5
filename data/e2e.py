"""Makes tasks `e2e` and `mini-e2e`: a text from a list of attributes, scored by several references.

    python train.py --method lora --task mini-e2e                       # about a minute
    python train.py --method lora --task e2e --data-dir DIR --model openai-community/gpt2-medium \\
        --targets q,v --rank 4 --alpha 32 --dropout 0.1 --lr 2e-4 --weight-decay 0.01 \\
        --warmup 500 --beams 10
The second is the recipe of LoRA's paper (Hu et al. 2021, table 11). Its batches of 8 and its
5 epochs are the task's defaults. Two things differ: this project has no label smoothing (the paper
has 0.1), and it clips gradients at 1 (LoRA's code does not). Each validation writes 547 texts with
all the beams. --max-eval 100 makes it quicker.

`e2e` is the E2E NLG challenge (Novikova et al. 2017): restaurants with up to 8 attributes. DIR
holds one of these sets of files. If it holds several, the first is read.
    train.txt, valid.txt, test.txt               lines `meaning representation||reference`, as in
                                                 microsoft/LoRA: texts with a space before each stop
    trainset.csv, devset.csv, testset_w_refs.csv     the challenge's own, columns mr and ref
    train-fixed.no-ol.csv, devel-fixed.no-ol.csv, test-fixed.csv     the same with wrong attributes
                                                 corrected (Dusek et al. 2019, 1911.03905)
All give prompts of the same form, but the texts stay as they are. So score a model on the kind of
files that it was trained on. In the training split each text is an example. In the other splits
each meaning representation is one example, with all its texts as references.

`mini-e2e` has that shape, about people and towns of the built-in world. Each split has its own
subjects. Pretraining had descriptions of one to four attributes, in the prompt's order and in a
plain style. This task has three to five attributes, in another order than the prompt's. Its style
has two sentences and phrases of its own. So the scores before fine-tuning tell how far the plain
style goes, and the gain is the style that fine-tuning taught. Each prompt has at least four
references.
"""
import csv
import io
import random
import re
import sys
from itertools import product
from pathlib import Path
from typing import NamedTuple

from data.pretraining_text import describe_subject, list_attributes
from data.reading import numbered_lines, read_text
from data.scoring import write_texts
from data.task import Example, Scores, Sequence, Setup, WritingTask, encode_prompt
from data.text_metrics import text_scores
from data.wordings import RELATIONS
from data.world import VERSION, World, pick_one, pick_several, shuffled
from support.errors import UserError, require

# As in LoRA's README. Fewer than 1 reference of 1,000 is longer in GPT-2's tokens (89 at most). A
# tokenizer may cut words finer: then as many as the longest training text takes.
NEW_TOKENS = 64
# As in LoRA's paper; its README has 0.8. It matters with beams only.
LENGTH_PENALTY = 0.9

PACKAGES = ("sacrebleu", "nltk", "rouge_score")          # of the metrics
CHALLENGE_FILES = {"txt": ("train.txt", "valid.txt", "test.txt"),
                   "csv": ("trainset.csv", "devset.csv", "testset_w_refs.csv"),
                   "cleaned csv": ("train-fixed.no-ol.csv", "devel-fixed.no-ol.csv",
                                   "test-fixed.csv")}
# The attributes whose names differ between the challenge's files and LoRA's.
NAMES = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}


class E2E(WritingTask):
    meaning = {"bleu": "words in a row shared with the references; 100 at most",
               "nist": "the same, rare words counting more; no fixed end",
               "meteor": "words shared, synonyms too; 100 at most",
               "rouge_l": "longest common subsequence; 100 at most",
               "cider": "words in a row shared, weighed by rarity; no fixed end"}

    def scored(self, example: Example) -> list[Sequence]:
        return [encode_prompt(example, self.setup, self.new_tokens)]

    def score(self, model, examples: list[Example]) -> Scores:
        """Scores the first line that the model writes: bleu, nist, meteor, rouge_l, cider.

        No 4-gram is written twice; those of the prompt are free, since nearly every reference
        holds one (a name of several tokens).
        """
        texts = write_texts(model, self.setup, examples, self.new_tokens, beams=self.beams,
                      length_penalty=LENGTH_PENALTY, no_repeat_ngram=4, copy_prompt=True)
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
def load(setup: Setup, data_dir: str, beams: int = 1) -> E2E:
    """Reads the challenge's folder.

    Raises UserError if a file is missing or empty, or a line, which it names, is wrong.
    """
    require(*PACKAGES)
    folder = Path(data_dir)
    kind = next((kind for kind, names in CHALLENGE_FILES.items()
                 if (folder / names[0]).exists()), None)
    if kind is None:
        firsts = ", ".join(names[0] for names in CHALLENGE_FILES.values())
        raise UserError(f"--data-dir {folder}: holds none of {firsts}")
    read = read_txt if kind == "txt" else read_csv
    splits = [read(folder / name) for name in CHALLENGE_FILES[kind]]
    train = [example(mr, [text], source) for mr, text, source in splits[0]]
    new = max(NEW_TOKENS, 1 + max(len(setup.tokenizer.encode(e.target)) for e in train))
    return E2E("e2e", train, grouped(splits[1]), grouped(splits[2]), setup,
               {"epochs": 5, "batch_size": 8}, {"files": kind, "new_tokens": new}, beams=beams,
               new_tokens=new)


def example(mr: str, texts: list[str], source: str = "") -> Example:
    """Asks for a description of `mr`. The first text is the target, all are references."""
    return Example(f"{mr}\nDescription:", f" {texts[0]}", references=tuple(texts), source=source)


class Row(NamedTuple):
    """Holds one line or record of a file."""
    mr: str             # the meaning representation
    text: str           # a reference
    source: str         # file and line


def grouped(rows: list[Row]) -> list[Example]:
    """Groups the rows: one example for each meaning representation, in order of first lines."""
    same: dict[str, list[Row]] = {}
    for row in rows:
        same.setdefault(row.mr, []).append(row)
    return [example(mr, [row.text for row in of_mr], of_mr[0].source)
            for mr, of_mr in same.items()]


def read_txt(path: Path) -> list[Row]:
    """Reads a row from each line. Blank lines are skipped."""
    pairs = []
    for number, line in numbered_lines(path):
        mr, bars, text = line.partition("||")
        if not bars:
            raise UserError(f"{path}:{number}: no || between attributes and reference")
        pairs.append(checked(f"{path}:{number}", mr, text))
    return not_empty(path, pairs)


def read_csv(path: Path) -> list[Row]:
    """Reads a row from each record, and writes its meaning representation as .txt files do.

    Other columns than mr and ref may be there: the cleaned files have some.
    """
    rows = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    pairs = []
    try:
        header = [title.strip() for title in next(rows, [])]
        if not {"mr", "ref"} <= set(header):
            raise UserError(f"{path}:1: the columns must include mr and ref; there are "
                            f"{', '.join(header)[:200] or 'none'}")
        mr, ref = header.index("mr"), header.index("ref")
        for row in rows:
            where = f"{path}:{rows.line_num}"
            if len(row) not in (0, len(header)):
                raise UserError(f"{where}: {len(row)} columns instead of {len(header)}")
            if row:
                pairs.append(checked(where, normal_form(where, row[mr]), row[ref]))
    except csv.Error as error:
        raise UserError(f"{path}:{rows.line_num}: {error}") from None
    return not_empty(path, pairs)


def checked(where: str, mr: str, text: str) -> Row:
    """Makes a row of both, with single spaces, so that a reference is one line.

    Raises UserError if one is empty.
    """
    mr, text = " ".join(mr.split()), " ".join(text.split())
    if not mr or not text:
        raise UserError(f"{where}: the {'reference' if mr else 'meaning representation'} is empty")
    return Row(mr, text, where)


def not_empty(path: Path, pairs: list) -> list:
    if not pairs:
        raise UserError(f"{path}: holds no examples")
    return pairs


def normal_form(where: str, mr: str) -> str:
    """Rewrites name[The Mill], priceRange[£20-25] as name : The Mill | price : £ 20 - 25."""
    if not re.fullmatch(r"([^][,]+\[[^][]*\](, *|$))+", mr.strip()):
        raise UserError(f"{where}: not a list of name[value]: {mr[:60]!r}")
    pairs = re.findall(r"([^][,]+)\[([^][]*)\]", mr)
    return " | ".join(f"{NAMES.get(name.strip(), name.strip())} : {spaced(value)}"
                      for name, value in pairs)


def spaced(value: str) -> str:
    """Writes a price as LoRA's files do: £20-25 -> £ 20 - 25."""
    return re.sub(r"(?<=\d)-(?=\d)", " - ", value.replace("£", "£ "))


# ---- the built-in world
MEET = {"person": ("Meet {name}, who", "This is {name}, who", "Let me introduce {name}, who"),
        "place": ("Welcome to {name}, which", "This is {name}, which",
                  "On your left is {name}, which")}
ALSO = ("What is more,", "Besides,", "And there is more:")


def load_mini(setup: Setup, beams: int = 1) -> E2E:
    """Builds the task, the same in every run: a run's --seed does not change it."""
    require(*PACKAGES)
    world, rng = World(), random.Random(f"mini-e2e {VERSION}")
    subjects = shuffled(rng, [*product(["person"], world.people),
                              *product(["place"], world.places)])
    train = [Example(e.prompt, f" {text}") for e in described_all(world, subjects[:340], 3, rng)
             for text in e.references[:2]]
    valid, test = (described_all(world, part, 2, rng) for part in (subjects[340:370],
                                                                   subjects[370:]))
    return E2E("mini-e2e", train, valid, test, setup, {"steps": 200, "batch_size": 32},
               beams=beams, new_tokens=NEW_TOKENS)


def described_all(world: World, subjects: list, n: int, rng: random.Random) -> list[Example]:
    """Makes n lists of three to five attributes of each subject, each with up to six texts.

    A list that comes twice is one example.
    """
    examples = {}
    for (kind, name), _ in product(subjects, range(n)):
        names = pick_several(rng, RELATIONS[kind], 3 + int(3 * rng.random()))
        mr = list_attributes(world, name, [r for r in RELATIONS[kind] if r in names])
        texts = dict.fromkeys(styled(world, kind, name, shuffled(rng, names), rng)
                              for _ in range(6))
        examples[mr] = example(mr, list(texts))
    return list(examples.values())


def styled(world: World, kind: str, name: str, names: list[str], rng: random.Random) -> str:
    """Describes a subject in the task's style.

    Ada Kelsen keeps a dog. She ... -> Meet Ada Kelsen, who keeps a dog. Besides, she ...
    """
    first, stop, second = describe_subject(world, name, names, rng)[1].strip().partition(". ")
    text = pick_one(rng, MEET[kind]).format(name=name) + first.removeprefix(name) + stop
    if second and not second.startswith(name):
        second = second[0].lower() + second[1:]                 # a pronoun
    return text + (f"{pick_one(rng, ALSO)} {second}" if second else "")
