"""Makes tasks `glue/...`: eight sets of GLUE (Wang et al. 2019, arXiv:1804.07461).

On an encoder, or with --head, a trained head gives the label (data/labels.py). STS-B's score is its
one output as it is, and the loss is the squared error. --recipe sets what the papers did
(data/recipes.py).

Else a template asks for the label in words. A model's answer is the likeliest choice after the
prompt, by the sum of log p over the choice's tokens and eos. Training makes this sum large, so it
is not divided by the number of tokens, which would favour long words. An untrained model may prefer
a choice of fewer tokens.

--data-dir is the folder of one set, as GLUE ships it or as the raw corpus
does (SETS, below). GLUE's test.tsv has no labels, so the dev file is the test split. A tenth of
train, at most 1,000 rows, is held out for validation. Rows of SST-2 share phrases and rows of QQP
share questions, so the validation scores of both are too high.
"""
import math
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, NamedTuple, Sequence

import torch

from data.labels import HeadTask, Labelled, uses_head
from data.reading import hold_out, numbered_lines
from data.scoring import choice_losses
from data.task import Example, Scores, Setup, Task, TextTask, encode_targets
from support.errors import UserError, require


# ---- metrics: gold are the right choices' numbers, said the model's; for STS-B both are scores
def accuracy(gold: Sequence[int], said: Sequence[int]) -> float:
    """Returns the share of items where both agree."""
    return sum(g == s for g, s in zip(gold, said)) / len(gold)


def confusion(gold: Sequence[int], said: Sequence[int]) -> tuple[int, int, int, int]:
    """Counts true positives, false positives, false negatives, true negatives; 1 is positive."""
    pairs = Counter(zip(gold, said))
    return pairs[1, 1], pairs[0, 1], pairs[1, 0], pairs[0, 0]


def f1(gold: Sequence[int], said: Sequence[int]) -> float:
    """Returns F1, 2 tp / (2 tp + fp + fn), in [0, 1]; 0 without true positives."""
    tp, fp, fn, _ = confusion(gold, said)
    return 2 * tp / (2 * tp + fp + fn) if tp else 0.0


def matthews(gold: Sequence[int], said: Sequence[int]) -> float:
    """Returns Matthews' correlation, in [-1, 1]; 0 if the model or the file has one label only.

        (tp tn - fp fn) / sqrt((tp + fp)(tp + fn)(tn + fp)(tn + fn))
    """
    tp, fp, fn, tn = confusion(gold, said)
    square = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return (tp * tn - fp * fn) / math.sqrt(square) if square else 0.0


def pearson(gold: Sequence[float], said: Sequence[float]) -> float:
    """Returns Pearson's correlation, in [-1, 1]."""
    return correlation("pearsonr", gold, said)


def spearman(gold: Sequence[float], said: Sequence[float]) -> float:
    """Returns Pearson's correlation of the ranks; equal values share the mean of their ranks."""
    return correlation("spearmanr", gold, said)


def correlation(kind: str, gold: Sequence[float], said: Sequence[float]) -> float:
    """Returns a correlation of scipy.stats, in [-1, 1]."""
    from scipy import stats  # here, since it takes most of a second and only STS-B needs it
    if min(gold) == max(gold) or min(said) == max(said):
        return 0.0      # undefined: one score for all pairs tells nothing about them
    return float(getattr(stats, kind)(gold, said).statistic)


# ---- the sets
class Layout(NamedTuple):
    """Says in which files and columns a folder holds a set.

    `columns` are those of the texts, then that of the label: names in the file's header, or numbers
    from 0 if the file has no header. Then `widths` is not empty.
    """
    columns: tuple
    train: str = "train.tsv"
    valid: str = ""                             # "": some rows of train
    test: tuple[str, ...] = ("dev.tsv",)
    widths: tuple[int, ...] = ()                # the numbers of columns that a row may have

    def files(self) -> list[str]:
        return [name for name in (self.train, self.valid, *self.test) if name]


class GlueSet(NamedTuple):
    """Says how a set is asked, answered, scored and stored."""
    template: str
    words: dict[str, str]               # label in the file -> choice; the second is positive
    labels: tuple[str, ...]             # the same labels, as checkpoints' heads name them
    metrics: tuple[Callable, ...]
    layouts: tuple[Layout, ...]         # the first whose files are all there is read
    graded: bool = False                # a label is any score in [0, 5], a choice a whole one


NO_YES = {"0": " no", "1": " yes"}
FOLLOWS = {"not_entailment": " no", "entailment": " yes"}
MRPC = ("#1 String", "#2 String", "Quality")
# STS-B has six whole scores as choices, since each is one token in most tokenizers. Finer scores
# would make answers longer and scoring slower. Rounded gold scores correlate with the exact ones at
# 0.98 (both correlations), and a model's expected score lies between the whole ones anyway.
SETS = {
    "glue/sst2": GlueSet("Review: {}\nIs it negative or positive?",
                         {"0": " negative", "1": " positive"}, ("negative", "positive"),
                         (accuracy,), (Layout(("sentence", "label")),)),
    "glue/cola": GlueSet("Sentence: {}\nIs it acceptable English?", NO_YES,
                         ("unacceptable", "acceptable"), (matthews, accuracy),
                         (Layout((3, 1), widths=(4,)),
                          Layout((3, 1), "in_domain_train.tsv", "in_domain_dev.tsv",
                                 ("out_of_domain_dev.tsv",), widths=(4,)))),
    "glue/mrpc": GlueSet("First: {}\nSecond: {}\nDo both say the same?", NO_YES,
                         ("not_equivalent", "equivalent"), (accuracy, f1),
                         (Layout(MRPC),
                          Layout(MRPC, "msr_paraphrase_train.txt",
                                 test=("msr_paraphrase_test.txt",)))),
    "glue/qqp": GlueSet("First: {}\nSecond: {}\nDo both ask the same?", NO_YES,
                        ("not_duplicate", "duplicate"), (accuracy, f1),
                        (Layout(("question1", "question2", "is_duplicate")),)),
    "glue/rte": GlueSet("Text: {}\nClaim: {}\nDoes the claim follow from the text?",
                        FOLLOWS, tuple(FOLLOWS), (accuracy,),
                        (Layout(("sentence1", "sentence2", "label")),)),
    "glue/qnli": GlueSet("Query: {}\nText: {}\nDoes the text answer the query?",
                         FOLLOWS, tuple(FOLLOWS), (accuracy,),
                         (Layout(("question", "sentence", "label")),)),
    "glue/mnli": GlueSet("Text: {}\nClaim: {}\nGiven the text, is the claim true?",
                         {"contradiction": " no", "entailment": " yes", "neutral": " maybe"},
                         ("contradiction", "entailment", "neutral"), (accuracy,),
                         (Layout(("sentence1", "sentence2", "gold_label"),
                                 test=("dev_matched.tsv", "dev_mismatched.tsv")),)),
    "glue/stsb": GlueSet("First: {}\nSecond: {}\nHow close are they in meaning, from 0 to 5?",
                         {str(i): f" {i}" for i in range(6)}, ("score",),
                         (pearson, spearman),
                         (Layout(("sentence1", "sentence2", "score")),
                          Layout((5, 6, 4), "sts-train.csv", "sts-dev.csv", ("sts-test.csv",),
                                 widths=(7, 9))), graded=True),
}
GROUPS = {"dev_matched.tsv": "matched", "dev_mismatched.tsv": "mismatched"}


# ---- the task
@dataclass(frozen=True)
class Graded(Example):
    """Holds an example with a score in [0, 5]; its target is the nearest whole score."""
    score: float = 0.0


def expected_score(losses: list[float], scores: list[float]) -> float:
    """Returns the mean score of a model, sum_i p_i score_i, p = softmax(-losses), in nats."""
    p = torch.softmax(-torch.tensor(losses, dtype=torch.float64), 0)
    return (p @ torch.tensor(scores, dtype=torch.float64)).item()


def official(name: str, groups: list[str], gold: list, said: list) -> tuple[dict, dict]:
    """Returns a set's official metrics and their counts; for MNLI, those of each dev file."""
    pairs = defaultdict(list)
    for group, *pair in zip(groups, gold, said):
        pairs[group].append(pair)
    values, counts = {}, {}
    for group, of_group in pairs.items():
        for metric in SETS[name].metrics:
            title = f"{metric.__name__}_{group}" if group else metric.__name__
            values[title] = metric(*zip(*of_group))
            if metric is accuracy:          # the one that is a share of the items
                counts[title] = len(of_group)
    return values, counts


class GlueByHead(HeadTask):
    """Scores a set of GLUE by a trained head."""

    def metrics(self, examples: list[Labelled], said: list) -> tuple[dict, dict]:
        return official(self.name, [e.group for e in examples], [e.label for e in examples], said)


class Glue(TextTask):
    """Scores a set of GLUE by the likeliest choice."""

    def scored(self, example: Example) -> list:
        return encode_targets(example, example.choices, self.setup.tokenizer,
                              self.setup.max_length)

    def score(self, model, examples: list[Example]) -> Scores:
        losses = choice_losses(model, self.setup, examples)
        rows, gold, said = [], [], []
        for e, loss in zip(examples, losses):
            if isinstance(e, Graded):
                gold.append(e.score)
                said.append(expected_score(loss, [float(word) for word in e.choices]))
                row = dict(answer=said[-1], gold=e.score)
            else:
                gold.append(e.choices.index(e.target))
                said.append(loss.index(min(loss)))
                row = dict(answer=e.choices[said[-1]], gold=e.target)
            rows.append(dict(group=e.group, prompt=e.prompt) | row)
        return Scores(*official(self.name, [e.group for e in examples], gold, said), rows)


# ---- reading
def read_columns(path: Path, layout: Layout) -> list[tuple[int, list[str]]]:
    """Reads for each row its line number and its fields in layout.columns.

    Lines are cut at tabs and nowhere else, since quotes are part of the text in all of these files.
    Lines with a wrong number of columns are left out, with a message. Raises UserError if they are
    more than one in a thousand, if a column is missing, or if there are no rows.
    """
    rows = [(number, [field.strip() for field in line.split("\t")])
            for number, line in numbered_lines(path)]
    columns, widths = layout.columns, layout.widths
    if not widths and rows:
        (number, header), *rows = rows
        for name in layout.columns:
            if name not in header:
                raise UserError(f"{path}:{number}: no column {name!r} in the header, only "
                                f"{', '.join(header)[:200]}")
        columns, widths = [header.index(name) for name in layout.columns], (len(header),)
    if not rows:
        raise UserError(f"{path}: no examples")
    wrong = [(number, len(row)) for number, row in rows if len(row) not in widths]
    if wrong:
        said = (f"{path}:{wrong[0][0]}: {wrong[0][1]} columns instead of "
                f"{' or '.join(map(str, widths))}"
                + (f"; {len(wrong) - 1} more lines are as wrong" if wrong[1:] else ""))
        if len(wrong) > len(rows) / 1000:
            raise UserError(said)
        print(f"left out: {said}", file=sys.stderr)     # GLUE's own QQP has such lines
        rows = [(number, row) for number, row in rows if len(row) in widths]
    return [(number, [row[column] for column in columns]) for number, row in rows]


def read_examples(path: Path, layout: Layout, spec: GlueSet) -> list[Labelled]:
    """Reads the examples of a file.

    Raises UserError as read_columns() does, or if a row has no text, or no label of the set.
    """
    examples, labels = [], list(spec.words)
    for number, (*texts, label) in read_columns(path, layout):
        if not any(texts):          # one text of a pair may be empty
            raise UserError(f"{path}:{number}: no text")
        source = f"{path}:{number}"
        if not spec.graded and label not in labels:
            raise UserError(f"{source}: label {label[:60]!r} is none of {', '.join(labels)}")
        value = grade(label, source) if spec.graded else labels.index(label)
        examples.append(Labelled(texts[0], texts[1] if texts[1:] else None, value,
                                 n=len(spec.labels), group=GROUPS.get(path.name, ""),
                                 source=source))
    return examples


def in_words(example: Labelled, spec: GlueSet) -> Example:
    """Asks for an example's label by the set's template."""
    texts = [text for text in (example.first, example.second) if text is not None]
    prompt, choices = spec.template.format(*texts) + "\nAnswer:", tuple(spec.words.values())
    if not spec.graded:
        return Example(prompt, choices[example.label], choices, group=example.group,
                       source=example.source)
    nearest = min(choices, key=lambda word: abs(float(word) - example.label))   # or the lower
    return Graded(prompt, nearest, choices, source=example.source, score=example.label)


def grade(label: str, where: str) -> float:
    """Reads a score; raises UserError if it is not a number from 0 to 5."""
    try:
        score = float(label)
    except ValueError:
        score = math.nan
    if not 0 <= score <= 5:
        raise UserError(f"{where}: score {label[:60]!r} is not a number from 0 to 5")
    return score


def load(name: str, setup: Setup, data_dir: str, head: bool | None = None) -> Task:
    """Reads a set of SETS from its folder.

    head: answer by a trained head; None: on an encoder only.
    Raises UserError if the folder lacks the set's files, or if a line of them is wrong.
    """
    spec, folder = SETS[name], Path(data_dir)
    if spec.graded:
        require("scipy")
    for layout in spec.layouts:
        if all((folder / file).is_file() for file in layout.files()):
            break
    else:
        there = [file for layout in spec.layouts for file in layout.files()
                 if (folder / file).is_file()]
        wanted = ", or ".join(" and ".join(layout.files()) for layout in spec.layouts)
        raise UserError(f"{data_dir}: {name} needs {wanted}; "
                        f"there is {' and '.join(there) + ' alone' if there else 'none of them'}")
    train = read_examples(folder / layout.train, layout, spec)
    if layout.valid:
        valid = read_examples(folder / layout.valid, layout, spec)
    else:
        train, valid = hold_out(train, 1000, folder / layout.train)
    test = [example for file in layout.test
            for example in read_examples(folder / file, layout, spec)]
    defaults, notes = {"epochs": 3, "batch_size": 16}, {"files": layout.files()}
    if uses_head(setup.config, head):
        return GlueByHead(name, train, valid, test, setup, defaults, spec.labels, notes)
    splits = ([in_words(e, spec) for e in split] for split in (train, valid, test))
    return Glue(name, *splits, setup, defaults, notes | {"template": spec.template,
                                                         "choices": list(spec.words.values())})
