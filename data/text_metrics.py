"""Computes the five scores of the E2E NLG challenge, of texts with several references each.

Scales are those of the papers' tables: BLEU, METEOR and ROUGE-L go up to 100, NIST and CIDEr have
no fixed end. The challenge's script (github.com/tuetschek/e2e-metrics) takes BLEU and NIST from
mteval-v13a and the others from the COCO caption evaluation. The scores here:
    bleu     by sacrebleu, tokenizer 13a, lower-cased, since mteval ignores case too
    nist     written here, as in mteval. nltk compares with the best single reference, and so gives
             about a point less (for human texts of E2E 7.9 instead of 8.9)
    meteor   by nltk: the metric of 2007, with WordNet. COCO runs METEOR 1.5 in Java, with other
             weights and paraphrases, so do not compare with the papers' tables. It is left out
             without nltk's WordNet data (python -m nltk.downloader wordnet)
    rouge_l  longest common subsequences by rouge-score, combined as in COCO
    cider    written here: CIDEr-D, which COCO calls CIDEr
COCO's tokenizer is Stanford's, in Java. Here it is 13a and then nltk's Penn Treebank rules, all
lower-cased and without punctuation. NIST and CIDEr weigh n-grams by how rare they are among the
references, so compare them only on the same set of items. CIDEr of a single item is 0.
The libraries are imported where they are used, since together they take a second.
"""
import math
from collections import Counter
from functools import cache, lru_cache
from types import SimpleNamespace
from typing import Callable

PUNCTUATION = set("'`\"()[]{}.?!,:;-\\")
Words = list[str]


def text_scores(outputs: list[str], references: list[tuple[str, ...]]) -> dict[str, float]:
    """Returns metric -> value; each item has one output and a tuple of references.

    meteor is left out without WordNet's data. The file's docstring has the scales.
    """
    tokens = [mteval_tokens(text) for text in outputs]
    token_refs = [[mteval_tokens(text) for text in texts] for texts in references]
    words = [caption_words(text) for text in outputs]
    word_refs = [[caption_words(text) for text in texts] for texts in references]
    scores = {"bleu": bleu(outputs, references), "nist": nist(tokens, token_refs),
              "meteor": meteor(words, word_refs), "rouge_l": rouge_l(words, word_refs),
              "cider": cider(words, word_refs)}
    return {name: score for name, score in scores.items() if score is not None}


@cache
def tokenizers() -> tuple[Callable, Callable]:
    """Makes the tokenizers of mteval (13a) and of the Penn Treebank."""
    from nltk.tokenize import TreebankWordTokenizer
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
    return Tokenizer13a(), TreebankWordTokenizer().tokenize


# Cached, since the references come back at every scoring: 9,365 of them in E2E.
@lru_cache(maxsize=2 ** 14)
def mteval_tokens(text: str) -> Words:
    """Cuts a text into lower-case tokens, as mteval does."""
    return tokenizers()[0](text.lower()).split()


@lru_cache(maxsize=2 ** 14)
def caption_words(text: str) -> Words:
    """Cuts mteval's tokens further ("isn't": is, n't), and drops those of punctuation alone."""
    return [word for word in tokenizers()[1](" ".join(mteval_tokens(text)))
            if not set(word) <= PUNCTUATION]


def ngrams(words: Words, n: int) -> Counter:
    """Counts the n-grams of a text."""
    return Counter(tuple(words[i:i + n]) for i in range(len(words) - n + 1))


def bleu(outputs: list[str], references: list[tuple[str, ...]]) -> float:
    """Returns BLEU (Papineni et al. 2002) of the corpus, 0 to 100."""
    from sacrebleu import corpus_bleu
    most = max(map(len, references))    # sacrebleu wants columns of equal length, filled with None
    columns = [[texts[i] if i < len(texts) else None for texts in references]
               for i in range(most)]
    return corpus_bleu(outputs, columns, lowercase=True, tokenize="13a", force=True).score


def nist(outputs: list[Words], references: list[list[Words]], order: int = 5) -> float:
    """Returns NIST (Doddington 2002, eq. 3) of the corpus: the sum over n = 1 .. order of
        sum of info(g) over the n-grams g that an output shares with its references
        / number of n-grams of all outputs
    times exp(-beta log^2 min(1, L / Lref)), with beta such that L / Lref = 2/3 halves the score.
    info(w1 .. wn) = log2(count(w1 .. wn-1) / count(w1 .. wn)), counted in all references. An
    n-gram is shared at most as often as one reference has it. L is the length of all outputs, in
    tokens. Lref sums the mean length of each item's references.
    """
    count = Counter()
    for reference in (words for item in references for words in item):
        count[()] += len(reference)
        for n in range(1, order + 1):
            count.update(ngrams(reference, n))
    score = 0.0
    for n in range(1, order + 1):
        info, total = 0.0, 0
        for output, item in zip(outputs, references):
            written, known = ngrams(output, n), Counter()
            for reference in item:
                known |= ngrams(reference, n)
            info += sum(k * math.log2(count[g[:-1]] / count[g])
                        for g, k in (written & known).items())
            total += written.total()
        score += info / total if total else 0.0
    length = sum(map(len, outputs))
    expected = sum(sum(map(len, item)) / len(item) for item in references)
    if length == 0 or expected == 0:
        return 0.0
    beta = math.log(2) / math.log(1.5) ** 2
    return score * math.exp(-beta * math.log(min(1.0, length / expected)) ** 2)


def meteor(outputs: list[Words], references: list[list[Words]]) -> float | None:
    """Returns METEOR (Lavie and Agarwal 2007), 0 to 100; None if nltk has no WordNet data.

    An item's score is that of its best reference; the result is the mean over items.
    """
    from nltk.corpus import wordnet
    from nltk.translate.meteor_score import meteor_score
    try:
        wordnet.ensure_loaded()
    except LookupError:
        return None
    return 100 * mean([meteor_score(item, output, wordnet=wordnet)
                       for output, item in zip(outputs, references)])


def rouge_l(outputs: list[Words], references: list[list[Words]], beta: float = 1.2) -> float:
    """Returns ROUGE-L (Lin 2004), 0 to 100, the mean of (1 + beta^2) P R / (R + beta^2 P).

    P is the length of the longest common subsequence over that of the output, R over that of the
    reference. Each is the best over an item's references, perhaps of two different ones.
    """
    from rouge_score.rouge_scorer import RougeScorer
    scorer = RougeScorer(["rougeL"], tokenizer=SimpleNamespace(tokenize=str.split))
    scores = []
    for output, item in zip(outputs, references):
        each = [scorer.score(" ".join(words), " ".join(output))["rougeL"] for words in item]
        P, R = max(e.precision for e in each), max(e.recall for e in each)
        scores.append((1 + beta ** 2) * P * R / (R + beta ** 2 * P) if P and R else 0.0)
    return 100 * mean(scores)


def cider(outputs: list[Words], references: list[list[Words]], sigma: float = 6.0) -> float:
    """Returns CIDEr-D (Vedantam et al. 2015, eq. 4): mean over items, references, n = 1 .. 4 of
        10 exp(-(L - Lref)^2 / 2 sigma^2) sum_g min(v(g), u(g)) u(g) / (|v| |u|)
    where v and u are tf-idf vectors of the n-grams of the output and the reference. v(g) is how
    often g occurs, times log(items / items that have g in a reference). If no item has g, the
    number is taken as 1.
    """
    seen = Counter()
    for item in references:
        seen.update({g for words in item for n in range(1, 5) for g in ngrams(words, n)})

    def vectors(words: Words) -> list[tuple[dict, float]]:
        """Returns the tf-idf vector and its length, for each n."""
        found = [{g: k * math.log(len(references) / max(1, seen[g]))
                  for g, k in ngrams(words, n).items()} for n in range(1, 5)]
        return [(vector, math.hypot(*vector.values())) for vector in found]

    scores = []
    for output, item in zip(outputs, references):
        ours, total = vectors(output), 0.0
        for reference in item:
            penalty = math.exp(-(len(output) - len(reference)) ** 2 / (2 * sigma ** 2))
            for (v, v_norm), (u, u_norm) in zip(ours, vectors(reference)):
                if v_norm and u_norm:
                    common = sum(min(v[g], u[g]) * u[g] for g in v.keys() & u.keys())
                    total += penalty * common / (v_norm * u_norm)
        scores.append(10 * total / (4 * len(item)))
    return mean(scores)


def mean(scores: list[float]) -> float:
    return math.fsum(scores) / len(scores)
