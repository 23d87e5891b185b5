"""Judges the papers' claims by our runs: seen, not seen or opposite."""
from statistics import fmean
from typing import NamedTuple

from experiments.learnt import Sweep
from experiments.plots import LABELS
from experiments.results import difference

CEILING = 0.98          # two scores above this are not compared: nothing was left to learn
MARGIN = 0.02           # a score this far below another still matches it


class Verdict(NamedTuple):
    """Holds a row of the table of claims."""
    claim: str
    paper: str
    runs: str           # the parts whose runs it rests on
    here: str
    verdict: str        # seen, not seen, opposite


# (method, rank) -> a score for each seed
ScoresByRank = dict[tuple[str, int | None], list[float]]
# part and rank -> the scores of two methods there
Pairs = dict[str, tuple[list[float], list[float]]]


def scores_by_rank(sweep: Sweep) -> ScoresByRank:
    """Reads the main metric on the test split of the runs with the chosen learning rates."""
    return {key: [run.result["after"][sweep.metric] for run in runs]
            for key, runs in sweep.chosen.items()}


def pairs(a: str, b: str, parts: dict[str, ScoresByRank]) -> Pairs:
    """Pairs the scores of methods a and b at every part and rank that both have."""
    return {f"{part} {rank}": (scores[a, rank], scores[b, rank]) for part, scores in parts.items()
            for rank in sorted({rank for method, rank in scores if method == a and rank})
            if (b, rank) in scores}


def at_ceiling(a: list[float], b: list[float]) -> bool:
    """Tells whether both means are above CEILING."""
    return min(fmean(a), fmean(b)) > CEILING


def beyond_noise(compared: Pairs) -> tuple[int, int, int]:
    """Counts the pairs whose 95 % interval of the difference is above 0, below 0, and all pairs.

    Pairs at the ceiling do not count.
    """
    limits = [difference(a, b)[1:] for a, b in compared.values() if not at_ceiling(a, b)]
    return sum(low > 0 for low, _ in limits), sum(high < 0 for _, high in limits), len(limits)


def higher(compared: Pairs, every: bool = False) -> str:
    """Judges whether the first of each pair is better.

    seen: better beyond noise in more than half of the pairs that count (with `every` in all), and
        worse in none.
    opposite: worse beyond noise in more than half of them, and better in none.
    """
    above, below, n = beyond_noise(compared)
    return ("seen" if above > (n - 1 if every else n / 2) and not below else
            "opposite" if below > n / 2 and not above else "not seen")


def as_good(compared: Pairs) -> str:
    """Judges whether the first of each pair matches the second.

    seen: no 95 % interval of a difference reaches below -MARGIN.
    opposite: all intervals lie below -MARGIN.
    """
    limits = [difference(a, b)[1:] for a, b in compared.values()]
    return ("seen" if all(low >= -MARGIN for low, _ in limits) else
            "opposite" if all(high < -MARGIN for _, high in limits) else "not seen")


def difference_text(a: list[float], b: list[float]) -> str:
    """Writes the difference of the means ± half the width of Welch's 95 % interval."""
    mean, _, high = difference(a, b)
    return f"{mean:+.3f} ± {high - mean:.3f}"


def differences_text(compared: Pairs) -> str:
    """Writes each difference, those at the ceiling in brackets."""
    return ", ".join(f"({pair} {difference_text(a, b)})" if at_ceiling(a, b) else
                     f"{pair} {difference_text(a, b)}" for pair, (a, b) in compared.items())


def verdicts_on_scores(parts: dict[str, ScoresByRank]) -> list[Verdict]:
    """Judges the claims about scores."""
    facts = parts["facts"]
    found = []
    for a, b, which in (
            ("dual", "lora", " at equal parameters, at every budget"),
            ("dual", "lora+", " at every budget"), ("dual", "dora", " at every budget"),
            ("adalora", "lora", " at the same final budget"), ("dash", "lora", "")):
        compared = pairs(a, b, {"facts": facts, "mini": parts["mini"]})
        above, below, n = beyond_noise(compared)
        found.append(Verdict(
            f"{LABELS[a]} beats {LABELS[b]}{which}", LABELS[a], "facts, mini",
            f"{differences_text(compared)}: better beyond noise in {above}, worse in {below} of "
            f"{n}",
            higher(compared, every="every" in which)))
    small = {f"LoRA's {rank}": (parts["rank-1"]["dash", 1], facts["lora", rank])
             for rank in (8, 16)}
    found.append(Verdict(
        "LoRA-Dash reaches LoRA's score with 8 to 16 times fewer parameters", "LoRA-Dash",
        "facts, rank-1", f"rank 1, {fmean(parts['rank-1']['dash', 1]):.3f}, less "
        f"{differences_text(small)}", as_good(small)))
    half = {f"rank {rank} less LoRA's {2 * rank}": (facts["dora", rank], facts["lora", 2 * rank])
            for method, rank in sorted(facts, key=str)
            if method == "dora" and ("lora", 2 * rank) in facts}
    found.append(Verdict("DoRA at half the rank matches LoRA", "DoRA", "facts",
                         differences_text(half), as_good(half)))
    return found + verdicts_on_tuning(parts["one-rate"], facts)


def ranges(by_rank: ScoresByRank, methods: list[str], rank: int, seeds: int) -> list[float]:
    """Computes best minus worst method for each seed."""
    scores = [by_rank[method, rank][:seeds] for method in methods]
    return [max(of_seed) - min(of_seed) for of_seed in zip(*scores, strict=True)]


def verdicts_on_tuning(one_rate: ScoresByRank, facts: ScoresByRank) -> list[Verdict]:
    """Judges whether tuned learning rates bring the methods closer together.

    One verdict is on all methods, one without the method that matters most.
    seen: with its own rate for each, best and worst are closer together beyond noise.
    opposite: they are farther apart beyond noise.
    """
    methods, (rank, *_) = zip(*one_rate)
    seeds = min(map(len, one_rate.values()))
    found = {}
    for left_out in (None, *methods):
        rest = [method for method in methods if method != left_out]
        found[left_out] = [ranges(scores, rest, rank, seeds) for scores in (facts, one_rate)]
    least = max(methods, key=lambda left_out: difference(*found[left_out])[0])
    rows = []
    for left_out, without in ((None, ""), (least, f", {LABELS[least]} left out")):
        after, before = found[left_out]
        _, low, high = difference(after, before)
        names = ", ".join(LABELS[method] for method in methods if method != left_out)
        rows.append(Verdict(
            f"Tuned learning rates shrink the differences{without}", "2602.04998",
            "facts, one-rate", f"best less worst of {names} at rank {rank}, from one rate for all, "
            f"LoRA's own, to each its own: {fmean(before):.3f} to {fmean(after):.3f} "
            f"({difference_text(after, before)})",
            "seen" if high < 0 else "opposite" if low > 0 else "not seen"))
    return rows


def verdict_on_spectra(numbers: dict) -> Verdict:
    """Judges whether Dual LoRA's update, and its matrix of signs, are nearly of full rank.

    seen: in both, at least nine tenths of the singular values are above 1 % of the largest.
    A random product as thin, and its signs, stand beside them.
    """
    k = len(numbers["full"]["median"])
    above, effective = ({label: fmean(row[name]) for label, row in numbers.items()}
                        for name in ("numerical_rank", "effective_rank"))
    dual, sign = "Dual LoRA", "Dual: Sign(DC)"
    return Verdict(
        "Dual LoRA's update, and its matrix of signs, are nearly of full rank", dual, "facts",
        f"singular values above 1 %: {above[dual]:.0f} and {above[sign]:.0f} of {k} (of random "
        f"factors {above['random dW']:.0f} and {above['random Sign(DC)']:.0f}), LoRA's "
        f"{above['LoRA']:.0f}; effective rank {effective[dual]:.0f} and {effective[sign]:.0f} "
        f"({effective['random dW']:.0f} and {effective['random Sign(DC)']:.0f}), full's "
        f"{effective['full']:.0f}, LoRA's "
        f"{effective['LoRA']:.0f}", "seen" if min(above[dual], above[sign]) >= 0.9 * k
        else "not seen")


def verdict_on_positions(numbers: dict) -> Verdict:
    """Judges the positions of task-specific directions among the singular values.

    seen: in each seed most lie in the smaller half, and among the s smallest lie at most half as
        many as for a Gaussian update.
    """
    s, k = numbers["s"], len(numbers["rates"]["full"])

    def shares(name: str, least: float) -> list[float]:
        """Computes for each seed the share of directions at positions of at least `least`."""
        n = s * len(numbers["layers"])
        positions = numbers["where"][name]              # seed by seed, s for each layer
        return [fmean(position >= least for position in positions[i:i + n])
                for i in range(0, len(positions), n)]

    small, smallest = (shares("task-specific", least) for least in (0.5, 1 - s / k))
    null = fmean(shares("of a Gaussian dW", 1 - s / k))
    return Verdict(
        "Task-specific directions sit at small but not the smallest singular values", "LoRA-Dash",
        "facts",
        f"{fmean(small):.0%} in the smaller half, {fmean(smallest):.0%} among the {s} smallest of "
        f"{k} (of a Gaussian update {null:.0%})",
        "seen" if min(small) > 0.5 and max(smallest) <= null / 2 else "not seen")


def verdict_on_overlap(numbers: dict) -> Verdict:
    """Judges the overlap of LoRA's directions with the task-specific ones of full fine-tuning.

    seen: it is larger than that of the smallest singular values, which need no training, at every
        rank, step and seed, and in most layers.
    """
    ranks, steps = ([share for seeds in numbers[name].values() for share in seeds]
                    for name in ("ranks", "steps"))
    layers, null, chance, another = (numbers["by layer"][name] for name in (
        "LoRA", "smallest sigma", "chance", "another seed of full"))
    beaten = sum(a > b for a, b in zip(layers, null))
    seen = min(ranks + steps) > fmean(null) and 2 * beaten > len(layers)
    return Verdict(
        "Directions predicted from LoRA overlap with the task-specific ones, whatever the rank, "
        "step, layer", "LoRA-Dash", "facts",
        f"{min(ranks):.2f} to {max(ranks):.2f} over ranks, {min(steps):.2f} to {max(steps):.2f} "
        f"over steps; the smallest singular values alone {fmean(null):.2f}, which LoRA exceeds in "
        f"{beaten} of {len(layers)} layers; chance {fmean(chance):.2f}; another seed of full "
        f"{fmean(another):.2f}", "seen" if seen else "not seen")


def verdicts_on_slopes(numbers: dict) -> list[Verdict]:
    """Judges the sign of the slope of magnitude change over direction change.

    seen: r has the claimed sign in every seed, and on average among the layers at one step. Over
        steps both changes grow from 0, which alone makes r positive.
    opposite: r has the other sign in all of these.
    """
    rows = []
    for method, sign in (("full", "negative"), ("lora", "positive"), ("dora", "negative")):
        line = numbers[method]["lines"]["q"]
        seeds, at_one_step = line["r of each seed"], fmean(line["r of each step and seed"])
        claimed = [-r if sign == "negative" else r for r in (*seeds, at_one_step)]
        rows.append(Verdict(
            f"Change of magnitude against change of direction: {sign} slope for {LABELS[method]}",
            "DoRA", "facts", f"query weights: r = {line['r']:+.2f}, of a seed {min(seeds):+.2f} to "
            f"{max(seeds):+.2f}; at one step {at_one_step:+.2f} on average",
            "seen" if min(claimed) > 0 else "opposite" if max(claimed) < 0 else "not seen"))
    return rows
