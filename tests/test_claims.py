"""The verdicts by hand, and that every part is a sweep that ablate.py takes."""
import shlex
from pathlib import Path

import pytest

import ablate
import claims
import train
from claims import (CEILING, PARTS, as_good, higher, inside, of_overlap, of_places, of_scores,
                    of_slopes, of_spectra, pairs, ranges, replaced, shown, with_scores)
from methods import METHODS
from runs import refused

LOW, MIDDLE, HIGH = [0.1, 0.11, 0.12], [0.5, 0.51, 0.52], [0.8, 0.81, 0.82]
TOP = [0.99, 0.99, 1.0]
SHORT = "--steps 4 --batch-size 8 --max-eval 3"


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# ---- the rules
def test_higher_needs_most_intervals_on_one_side_and_none_on_the_other():
    assert higher([(MIDDLE, LOW), (HIGH, MIDDLE), (LOW, LOW)]) == "seen"
    assert higher([(LOW, MIDDLE), (MIDDLE, HIGH), (LOW, LOW)]) == "opposite"
    assert higher([(MIDDLE, LOW), (LOW, LOW)]) == "not seen"            # no more than half
    assert higher([(MIDDLE, LOW), (HIGH, LOW), (LOW, HIGH)]) == "not seen"
    assert higher([(HIGH[:1], LOW)]) == "not seen"                      # one seed decides nothing


def test_scores_at_the_ceiling_are_not_compared():
    assert min(TOP) > CEILING
    assert higher([(MIDDLE, LOW), (TOP, TOP), (TOP, TOP)]) == "seen"
    assert higher([(TOP, TOP)]) == "not seen"


def test_a_score_within_the_margin_is_as_good():
    assert as_good([([0.79, 0.80], HIGH), (HIGH, LOW)]) == "seen"
    assert as_good([([0.78, 0.79], HIGH), (HIGH, LOW)]) == "not seen"


def test_differences_are_shown_with_half_the_width_of_their_interval():
    assert shown([([2.0, 4.0], [1.0, 1.0])]) == "+2.000 ± 12.706"      # t = 12.706, 1 degree


def test_methods_are_paired_at_every_rank_that_both_have():
    facts = {("lora", 2): LOW, ("lora", 8): HIGH, ("dual", 8): MIDDLE, ("full", None): TOP}
    mini = {("lora", 8): TOP, ("dual", 8): LOW}
    assert pairs("dual", "lora", [facts, mini]) == [(MIDDLE, HIGH), (LOW, TOP)]


def test_the_range_of_methods_is_best_less_worst_of_each_seed():
    table = {("lora", 8): [0.5, 0.7, 0.1], ("dora", 8): [0.9, 0.6], ("dual", 8): [0.6, 0.65]}
    assert ranges(table, ["lora", "dora", "dual"], 2) == pytest.approx([0.4, 0.1])


# ---- the claims
def parts(better: str) -> dict:
    """Scores in which one method has HIGH everywhere and the others have MIDDLE."""
    def score(method):
        return HIGH if method == better else MIDDLE
    facts = {(method, rank): score(method) for method in METHODS for rank in (2, 4, 8, 16)}
    return {"facts": facts, "mini": {key: facts[key] for key in facts if key[1] == 8},
            "rank-1": {("dash", 1): score("dash")},
            "one-rate": {(method, 8): LOW if method == "dual" else HIGH
                         for method in ("dora", "adalora", "dash", "dual")}}


@pytest.mark.parametrize("better, verdicts", [
    ("dual", ["seen", "not seen", "not seen", "seen", "seen", "seen"]),
    ("lora", ["not seen", "opposite", "opposite", "not seen", "not seen", "seen"]),
    ("dash", ["not seen", "not seen", "seen", "seen", "seen", "seen"]),
    ("adalora", ["not seen", "seen", "not seen", "seen", "seen", "seen"])])
def test_claims_about_scores(better, verdicts):
    found = of_scores(parts(better))
    assert [row.verdict for row in found] == verdicts
    assert found[5].here.startswith("best less worst of 5 adapters at rank 8, seeds 0 to 2: "
                                    "0.700 ± 0.000 at one rate")


def test_dual_below_two_of_its_three_rivals_is_the_opposite_of_the_claim():
    worst = parts("lora")
    for table in worst.values():
        for key in table:
            table[key] = LOW if key[0] == "dual" else MIDDLE
    row = of_scores(worst)[0]
    assert row.verdict == "opposite" and row.here.count("-0.400 ± ") == 3 * 5


def test_a_full_rank_is_nine_tenths_of_the_singular_values():
    def numbers(dual):
        found = {"Dual LoRA": dual, "Dual: Sign(DC)": 10, "full": 10, "LoRA": 2}
        return {name: {"numerical_rank": [n, n], "effective_rank": [n / 2], "median": [1.0] * 10}
                for name, n in found.items()}
    assert of_spectra(numbers(9)).verdict == "seen"
    assert of_spectra(numbers(8)).verdict == "not seen"
    assert "above 1 %: 9 and 10 of 10, LoRA's 2" in of_spectra(numbers(9)).here


def test_directions_at_the_very_smallest_values_are_not_what_was_claimed():
    def verdict(places):
        return of_places({"s": 1, "rates": {"full": [1.0] * 10}, "where": {
            "task-specific": places, "of a Gaussian dW": [0.9, 0.9, 0.8, 0.7]}}).verdict
    assert verdict([0.6, 0.7, 0.8, 0.9]) == "seen"
    assert verdict([0.7, 0.8, 0.9, 0.9]) == "not seen"
    assert verdict([0.1, 0.2, 0.3, 0.7]) == "not seen"


def test_an_overlap_no_larger_than_that_of_the_smallest_values_is_none():
    def verdict(lora):
        return of_overlap({"ranks": {2: [lora]}, "steps": {5: [0.9]}, "by layer": {
            "LoRA": [lora], "smallest sigma": [0.5], "another seed of full": [0.7]}}).verdict
    assert verdict(0.6) == "seen"
    assert verdict(0.4) == "not seen"


@pytest.mark.parametrize("full, lora, dora, verdict", [
    (-0.6, 0.8, -0.3, "seen"), (0.6, -0.8, 0.3, "opposite"), (0.9, 0.9, 0.5, "not seen")])
def test_signs_of_slopes(full, lora, dora, verdict):
    r = {"full": full, "lora": lora, "dora": dora, "dual": 0.1}
    assert of_slopes({method: {"lines": {"q": {"r": value}}}
                      for method, value in r.items()}).verdict == verdict


# ---- the runs
@pytest.mark.parametrize("part", PARTS)
def test_every_part_is_a_sweep_that_ablate_takes(part, capsys):
    for line in PARTS[part]:
        ablate.main([*shlex.split(line), "--list"])
    assert capsys.readouterr().out.count("train.py") >= 3


def test_every_method_has_as_many_trials_of_its_choices():
    counts = set()
    for line in PARTS["choices"]:
        args, _ = ablate.parse(shlex.split(line))
        counts.add(len(ablate.settings(args)))
    assert len(counts) == 1 and len(PARTS["choices"]) == len(METHODS) - 1      # full is at its best


# ---- the README
MARKED = "a\n<!-- t: begin -->\nold\n<!-- t: end -->\nb\n"


def test_a_table_is_replaced_between_its_marks():
    assert inside(MARKED, "t") == "old\n"
    assert replaced(MARKED, "t", "new\n") == MARKED.replace("old", "new")


@pytest.mark.parametrize("text", ["", MARKED + MARKED, MARKED.replace("t: end", "u: end")])
def test_a_readme_without_the_marks_is_refused(text):
    with pytest.raises(claims.UserError, match="<!-- t: begin -->"):
        replaced(text, "t", "new\n")


def train_one(folder: str, *flags: str) -> None:
    train.main([*SHORT.split(), "--out", f"runs/claims/{folder}", *flags])


def test_write_puts_runs_into_the_readme_and_leaves_other_parts(tmp_path, monkeypatch, capsys):
    readme = tmp_path / "README.md"
    marked = {name: f"<!-- {name}: begin -->\nkept\n<!-- {name}: end -->\n"
              for name in ("mini", "defaults", "choices", "facts")}
    readme.write_text("".join(marked.values()))
    monkeypatch.setattr(claims, "README", readme)
    monkeypatch.setattr(claims, "PARTS", {
        "choices": [f"--methods lora --one-at-a-time --vary warmup=1 --lrs 1e-3 {SHORT} "
                    "--out runs/claims/choices/lora"],
        "facts": [],
        "defaults": [f"--methods lora,full --ranks 2 --seeds 0,1 --lrs 1e-3,1e-2 {SHORT} "
                     "--search-seeds 0 --out runs/claims/defaults"]})
    monkeypatch.setattr(claims, "CHOICES", {"lora": "warmup=1"})
    lora = "--method", "lora", "--lr", "0.001"
    train_one("choices/lora/facts-lora-r8-lr0.001-s0", *lora, "--rank", "8", "--seed", "0")
    train_one("choices/lora/facts-lora-r8-warmup1-lr0.001-s0", *lora, "--rank", "8", "--seed", "0",
              "--warmup=1")
    claims.main(["choices"])                                # finds them finished
    for seed in "01":
        train_one(f"defaults/lora-{seed}", *lora, "--rank", "2", "--seed", seed)
    assert "full lacks seed 0, 1: python claims.py defaults" in refused(
        capsys, "write", main=claims.main)
    for seed in "01":
        train_one(f"defaults/full-{seed}", "--method", "full", "--lr", "1e-3", "--seed", seed)
    train_one("defaults/full-fast", "--method", "full", "--lr", "1e-2", "--seed", "0")
    claims.main(["write"])
    text = readme.read_text()
    assert marked["facts"] in text and marked["mini"] in text
    full, lora, _, note = inside(text, "defaults").splitlines()[2:]
    assert full.startswith("| full |  | 0.001 | 2 | ") and lora.startswith("| lora | 2 | 0.001 | 2")
    assert note == "Best at the lowest or highest rate tried: full."
    row = inside(text, "choices").splitlines()[2]
    assert row == "| `lora` | as it is 0.000; warmup 1 0.000 |"


def test_the_table_of_methods_gets_scores_and_keeps_its_formulas(tmp_path):
    for seed in "01":
        train_one(f"facts/lora-{seed}", "--method", "lora", "--seed", seed)
    rows = ("| method | update | file | trainable | n | p | k |\n|---|---|\n"
            "| `lora` | B A | f | 1 | 2 | 3 | 4 |\n")
    *head, lora = with_scores(rows, claims.read_sweep("runs/claims/facts")).splitlines()
    assert head == rows.splitlines()[:2]
    assert lora.startswith("| `lora` | B A | f | 55,296 | 0.000 ± 0.000 | 0.000 ± 0.000 | ")


def test_a_part_that_does_not_exist_is_refused_with_the_nearest(capsys):
    assert "did you mean facts?" in refused(capsys, "fact", main=claims.main)
    assert not Path("runs").exists()
