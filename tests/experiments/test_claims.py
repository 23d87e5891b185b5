"""The verdicts by hand, and that every part is a sweep that ablate.py takes."""
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
from runs import refused

import ablate
import lora
import train
from experiments import claims, grid, pages
from experiments.claims import CHOICES, PARTS
from experiments.grid import Setting, parse_sweep
from experiments.pages import (PAGES, equation_of, put_table, row_of_choices, split_page,
                               table_of_methods)
from experiments.verdicts import (CEILING, as_good, at_ceiling, beyond_noise, differences_text,
                                  higher, pairs, ranges, scores_by_rank, verdict_on_overlap,
                                  verdict_on_positions, verdict_on_spectra, verdicts_on_scores,
                                  verdicts_on_slopes, verdicts_on_tuning)
from lora import AdapterLinear
from methods import METHODS, Method
from support.errors import UserError

LOW, MIDDLE, HIGH = [0.1, 0.11, 0.12], [0.5, 0.51, 0.52], [0.8, 0.81, 0.82]
TOP = [0.99, 0.99, 1.0]
SHORT = "--steps 4 --batch-size 8 --max-eval 3"
HEAD = ("| method | update | file (lines) | trainable | `new` | `kept` |\n"
        "|---|---|---|---|---|---|\n")

@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# ---- the rules
def compared(*scores) -> dict:
    return {f"facts {2 ** i}": pair for i, pair in enumerate(scores, 1)}


def test_higher_needs_most_intervals_on_one_side_and_none_on_the_other():
    assert higher(compared((MIDDLE, LOW), (HIGH, MIDDLE), (LOW, LOW))) == "seen"
    assert higher(compared((LOW, MIDDLE), (MIDDLE, HIGH), (LOW, LOW))) == "opposite"
    assert higher(compared((MIDDLE, LOW), (LOW, LOW))) == "not seen"        # no more than half
    assert higher(compared((MIDDLE, LOW), (HIGH, LOW), (LOW, HIGH))) == "not seen"
    assert higher(compared((HIGH[:1], LOW))) == "not seen"          # one seed decides nothing


def test_scores_at_the_ceiling_are_not_compared():
    assert min(TOP) > CEILING
    assert higher(compared((MIDDLE, LOW), (TOP, TOP), (TOP, TOP))) == "seen"
    assert higher(compared((TOP, TOP))) == "not seen"
    assert beyond_noise(compared((MIDDLE, LOW), (TOP, TOP), (LOW, HIGH))) == (1, 1, 2)


def test_a_match_is_an_interval_above_the_margin():
    def around(mean):
        return [mean - 1e-4, mean, mean + 1e-4]
    assert as_good(compared((around(0.785), around(0.8)), (HIGH, LOW))) == "seen"
    assert as_good(compared((around(0.775), around(0.8)), (HIGH, LOW))) == "not seen"
    assert as_good(compared((around(0.775), around(0.8)), (LOW, HIGH))) == "opposite"
    wide = compared(([0.6, 0.8, 0.9], [0.7, 0.75, 0.8]))
    assert as_good(wide) == "not seen"                              # too wide to tell


def test_differences_are_shown_with_half_the_width_of_their_interval():
    differences = compared(([0.2, 0.4], [0.1, 0.1]), (TOP[:2], TOP[:2]))    # t = 12.706, 1 degree
    assert differences_text(differences) == "facts 2 +0.200 ± 1.271, (facts 4 +0.000 ± 0.000)"


def test_methods_are_paired_at_every_rank_that_both_have():
    facts = {("lora", 2): LOW, ("lora", 8): HIGH, ("dual", 8): MIDDLE, ("full", None): TOP}
    mini = {("lora", 8): TOP, ("dual", 8): LOW}
    assert pairs("dual", "lora", {"facts": facts, "mini": mini}) == {
        "facts 8": (MIDDLE, HIGH), "mini 8": (LOW, TOP)}


def test_the_range_of_methods_is_best_less_worst_of_each_seed():
    scores = {("lora", 8): [0.5, 0.7, 0.1], ("dora", 8): [0.9, 0.6], ("dual", 8): [0.6, 0.65]}
    assert ranges(scores, ["lora", "dora", "dual"], 8, 2) == pytest.approx([0.4, 0.1])


# ---- the claims
def parts(better: str) -> dict:
    """Scores in which one method has HIGH everywhere and the others have MIDDLE."""
    def score(method):
        return HIGH if method == better else MIDDLE
    facts = {(method, rank): score(method) for method in METHODS for rank in (2, 4, 8, 16)}
    return {"facts": facts, "mini": {key: facts[key] for key in facts if key[1] == 8},
            "rank-1": {("dash", 1): score("dash")},
            "one-rate": {(method, 8): LOW if method == "dual" else HIGH
                         for method in ("lora", "dora", "adalora", "dash", "dual")}}


@pytest.mark.parametrize("better, verdicts", [
    ("dual", ["seen"] * 3 + ["not seen"] * 4 + ["seen", "not seen"]),
    ("lora", ["opposite", "not seen", "not seen", "opposite", "opposite", "opposite", "opposite",
              "seen", "opposite"]),
    ("dash", ["not seen"] * 3 + ["not seen", "seen", "seen", "not seen", "seen", "opposite"]),
    ("adalora", ["not seen"] * 3 + ["seen"] + ["not seen"] * 3 + ["seen", "opposite"])])
def test_claims_about_scores(better, verdicts):
    found = verdicts_on_scores(parts(better))
    assert [row.verdict for row in found] == verdicts
    assert "better beyond noise in 5, worse in 0 of 5" in found[0].here or better != "dual"
    assert found[6].here.count("less LoRA's") == 3                  # ranks 2, 4 and 8


def test_every_budget_is_every_one():
    almost = compared((MIDDLE, LOW), (HIGH, LOW), (LOW, LOW))
    assert higher(almost) == "seen" and higher(almost, every=True) == "not seen"
    assert higher(compared((MIDDLE, LOW), (TOP, TOP)), every=True) == "seen"


def test_the_ceiling_takes_both():
    assert at_ceiling(TOP, TOP) and not at_ceiling(TOP, MIDDLE)


def test_scores_are_of_the_test_split_and_one_a_seed():
    runs = [SimpleNamespace(result={"after": {"new": after}, "valid": {"new": 0.1}})
            for after in LOW]
    sweep = SimpleNamespace(metric="new", chosen={("lora", 8): runs})
    assert scores_by_rank(sweep) == {("lora", 8): LOW}


def test_tuning_is_told_for_all_and_without_the_method_that_matters_most():
    methods = ("lora", "dora", "dash", "dual")
    def verdicts(*at_one_rate):
        one_rate = {(method, 8): scores for method, scores in zip(methods, at_one_rate)}
        return verdicts_on_tuning(one_rate, {(method, 8): HIGH for method in methods})
    assert [row.verdict for row in verdicts(HIGH, HIGH, LOW, LOW)] == ["seen", "seen"]
    alone = verdicts(HIGH, HIGH, HIGH, LOW)
    assert [row.verdict for row in alone] == ["seen", "not seen"]
    assert "0.700 to 0.000 (-0.700 ± 0.000)" in alone[0].here
    assert alone[1].claim.endswith(", Dual LoRA left out") and "0.000 to 0.000" in alone[1].here
    assert [row.verdict for row in verdicts(HIGH, HIGH, HIGH, HIGH)] == ["not seen"] * 2


def test_a_full_rank_is_nine_tenths_of_the_singular_values():
    def numbers(dual, sign=10):
        found = {"Dual LoRA": dual, "Dual: Sign(DC)": sign, "random dW": 6, "random Sign(DC)": 5,
                 "full": 10, "LoRA": 2}
        return {name: {"numerical_rank": [n, n], "effective_rank": [n / 2], "median": [1.0] * 10}
                for name, n in found.items()}
    assert verdict_on_spectra(numbers(9)).verdict == "seen"
    assert verdict_on_spectra(numbers(8)).verdict == "not seen"
    assert verdict_on_spectra(numbers(9, 8)).verdict == "not seen"
    here = verdict_on_spectra(numbers(9)).here
    assert "above 1 %: 9 and 10 of 10 (of random factors 6 and 5)" in here


def test_directions_at_the_very_smallest_values_are_not_what_was_claimed():
    def verdict(*positions):
        return verdict_on_positions({
            "s": 1, "layers": ["q"] * 4, "rates": {"full": [1.0] * 10},
            "where": {"task-specific": positions,
                      "of a Gaussian dW": [0.9, 0.9, 0.8, 0.7] * 2}}).verdict
    seen = [0.6, 0.7, 0.8, 0.9]
    assert verdict(*seen, *seen) == "seen"
    assert verdict(*seen, 0.7, 0.8, 0.9, 0.9) == "not seen"
    assert verdict(*seen, 0.1, 0.2, 0.6, 0.7) == "not seen"             # half of one seed's


def test_an_overlap_no_larger_than_that_of_the_smallest_values_is_none():
    def verdict(ranks, steps, layers):
        return verdict_on_overlap({"ranks": {2: ranks}, "steps": {5: steps}, "by layer": {
            "LoRA": layers, "smallest sigma": [0.5] * 3, "chance": [0.1] * 3,
            "another seed of full": [0.7] * 3}}).verdict
    assert verdict([0.6, 0.6], [0.6], [0.5, 0.6, 0.7]) == "seen"
    assert verdict([0.6, 0.5], [0.6], [0.5, 0.6, 0.7]) == "not seen"
    assert verdict([0.6, 0.6], [0.4], [0.5, 0.6, 0.7]) == "not seen"
    assert verdict([0.6, 0.6], [0.6], [0.5, 0.5, 0.9]) == "not seen"


def test_a_slope_needs_its_sign_in_every_seed():
    def lines(*seeds, at_one_step=(-0.4, -0.1)):
        return {"lines": {"q": {"r": seeds[0], "r of each seed": seeds,
                                "r of each step and seed": at_one_step}}}
    full, lora, dora = verdicts_on_slopes({"full": lines(-0.6, -0.1), "lora": lines(0.8, -0.1),
                                  "dora": lines(0.3, 0.2, at_one_step=[0.1])})
    assert [full.verdict, lora.verdict, dora.verdict] == ["seen", "not seen", "opposite"]
    assert full.here == ("query weights: r = -0.60, of a seed -0.60 to -0.10; at one step -0.25 on "
                         "average")
    _, lora, _ = verdicts_on_slopes({"full": lines(1), "lora": lines(0.8, 0.9), "dora": lines(1)})
    assert lora.verdict == "not seen"                       # not at one step


# ---- the runs
@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_every_part_is_a_sweep_that_ablate_takes(part, capsys):
    for line in PARTS[part]:
        ablate.main([*shlex.split(line), "--list"])
    assert capsys.readouterr().out.count("train.py") >= 3


def test_every_method_has_as_many_trials_of_its_choices():
    counts = set()
    for line in PARTS["choices"]:
        args = parse_sweep(shlex.split(line))
        counts.add(len(grid.settings(args)))
    assert len(counts) == 1 and len(PARTS["choices"]) == len(CHOICES)


# ---- the tables
MARKED = "a\n<!-- facts: begin -->\nold\n<!-- facts: end -->\nb\n"


@pytest.fixture
def page(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    return tmp_path / PAGES["facts"]


def test_a_table_is_replaced_between_its_marks(page):
    page.write_text(MARKED)
    assert split_page("facts")[1] == "old\n"
    put_table("facts", "new\n")
    assert page.read_text() == MARKED.replace("old", "new")


@pytest.mark.parametrize("text", ["", MARKED + MARKED, MARKED.replace("facts: end", "fact: end"),
                                  MARKED.replace("begin", "x").replace("end", "begin")
                                  .replace("x", "end")])
def test_a_page_without_the_marks_is_refused(page, text):
    page.write_text(text)
    with pytest.raises(UserError, match="RESULTS.md: needs <!-- facts: begin -->"):
        put_table("facts", "new\n")
    assert page.read_text() == text


def train_one(folder: str, *flags: str) -> None:
    train.main([*SHORT.split(), "--out", f"runs/claims/{folder}", *flags])


@pytest.mark.slow
def test_writing_puts_runs_into_the_pages_and_leaves_other_parts(page, monkeypatch, capsys):
    kept = "kept\n"
    for name, file in PAGES.items():
        with open(page.with_name(file), "a") as text:
            text.write(f"<!-- {name}: begin -->\n{HEAD if name == 'methods' else kept}"
                       f"<!-- {name}: end -->\n")
    defaults = ("--methods lora,full --ranks 2 --seeds 0,1 --lrs 1e-3,1e-2 --search-seeds 0 "
                f"{SHORT} --out runs/claims/defaults")
    monkeypatch.setattr(claims, "CHOICES", ["lora"])
    monkeypatch.setattr(claims, "PARTS", {
        "choices": [f"--methods lora --one-at-a-time --vary warmup=1 --lrs 1e-3 {SHORT} "
                    "--out runs/claims/choices"],
        "defaults": [defaults], "mini": [defaults.replace("1e-2", "3e-2")]})
    for warmup in ("", "1"):
        train_one(f"choices/facts-lora-r8-{'warmup1-' * bool(warmup)}lr0.001-s0", "--lr", "1e-3",
                  "--method", "lora", "--rank", "8", *([f"--warmup={warmup}"] if warmup else []))
    claims.main(["choices"])                                # finds them finished
    for lr, seed in (("0.001", "0"), ("0.01", "0")):
        train_one(f"defaults/facts-full-lr{lr}-s{seed}", "--method", "full", "--lr", lr)
        train_one(f"defaults/facts-lora-r2-lr{lr}-s{seed}", "--method", "lora", "--rank", "2",
                  "--lr", lr)
    claims.main(["write"])
    said = capsys.readouterr().out
    assert "s1: no finished run; first: python -m experiments.claims defaults" in said
    assert "lr0.03-s0: no finished run; first: python -m experiments.claims mini" in said
    assert "RESULTS.md: choices written\nRESULTS.md: defaults left as it was\n" in said
    assert split_page("defaults")[1] == "kept\n"
    for method in (["full"], ["lora", "--rank", "2"]):
        for lr in ("0.001", "0.01"):                        # of which one was chosen
            train_one(f"defaults/facts-{method[0]}-{'r2-' * (len(method) > 1)}lr{lr}-s1",
                      "--method", *method, "--lr", lr, "--seed", "1")
    claims.main(["write"])
    assert {split_page(name)[1] for name in ("facts", "claims", "mini")} == {kept}
    full, lora, _, note = split_page("defaults")[1].splitlines()[2:]
    assert full.startswith("| full |  | ") and lora.startswith("| lora | 2 | ")
    assert full.split(" | ")[3] == lora.split(" | ")[3] == "2"              # seeds
    assert note.startswith("Best at the lowest or highest rate tried: full, lora rank 2. Commit ")
    row = split_page("choices")[1].splitlines()[2]
    assert row == "| `lora` | as it is 0.000; `--warmup=1` 0.000 |"
    (page.parent / "runs/claims/defaults/facts-full-lr0.01-s0/result.json").write_text("{")
    before = page.read_text()
    with pytest.raises(SystemExit) as stop:
        claims.main(["write"])
    assert stop.value.code == 2 and page.read_text() == before
    assert "lr0.01-s0/result.json: not what a run" in capsys.readouterr().err


def test_choices_are_in_order_bold_beyond_the_noise_of_the_method_as_it_is_and_told_at_an_edge():
    def runs(lr, *values):
        return [SimpleNamespace(args=SimpleNamespace(lr=lr), result={"valid": {"new": value}})
                for value in values]
    as_it_is, clip, std = (Setting("lora", "8", (("init_std", std), ("clip", clip)))
                           for std, clip in ((None, None), (None, "no"), ("2", None)))
    best = {as_it_is: runs(2, *MIDDLE), clip: runs(1, 0.5, 0.5, 0.5), std: runs(4, *HIGH)}
    tried = {setting: best[setting] + runs(1, 0) + runs(2, 0) + runs(4, 0) for setting in best}
    text = ("`--init-std=2` **0.810 ± 0.010**^; as it is 0.510 ± 0.010; "
            "`--no-clip` 0.500 ± 0.000v")
    assert row_of_choices(tried, best) == {"method": "`lora`", "validation `new`": text}
    assert row_of_choices(best, best)["validation `new`"] == re.sub("[v^]", "", text)


def test_the_table_of_methods_keeps_formulas_and_numbers_and_gets_new_scores():
    run = SimpleNamespace(result={"trainable": 12345, "after": {"new": 0.5, "kept": 0.25}})
    old = HEAD + ("| `lora` | W0 + s B A | `lora.py` (1) | 1 | 2 | 3 |\n"
                  "| `full` | all | | 4 | 5 | 6 |\n")
    rows = table_of_methods(old, {"lora": [run]}).splitlines()
    assert rows[:2] == HEAD.splitlines()
    assert rows[2] == "| `full` | all | | 4 | 5 | 6 |"
    length = len(Path(lora.__file__).read_text().splitlines())
    assert rows[3] == f"| `lora` | W0 + s B A | `lora.py` ({length}) | 12,345 | 0.500 | 0.250 |"
    assert len(rows) == 2 + len(METHODS)
    assert table_of_methods("\n".join(rows), {}).splitlines() == rows       # and as it was


def test_a_method_that_a_reader_adds_gets_its_row_from_its_file(monkeypatch):
    class Mine(AdapterLinear):
        """W' = W0 + diag(b) |B| A: A (rank, in)."""

    monkeypatch.setitem(METHODS, "mine", Method(Mine, lr=1e-3))
    row = table_of_methods(HEAD, {}).splitlines()[-1]
    assert row.startswith("| `mine` | W0 + diag(b) ∣B∣ A | `test_claims.py` (")
    assert row.endswith(") | not measured | not measured | not measured |")
    assert equation_of(METHODS["lora"].layer) == "W0 + alpha/r * B A"
    assert equation_of(METHODS["dora"].layer) == "m W / ‖W‖"
    assert equation_of(METHODS["dash"].layer) == "W0 + alpha/r * B A + sum_i c_i u_i v_i^T"


@pytest.mark.slow
def test_one_command_measures_a_method_and_another_writes_its_row(page, monkeypatch, capsys):
    monkeypatch.setattr(claims, "PLAIN_FLAGS", f"--lrs x1 --seeds 0,1 {SHORT}")
    for name, file in PAGES.items():
        with open(page.with_name(file), "a") as text:
            text.write(f"<!-- {name}: begin -->\n{HEAD}<!-- {name}: end -->\n")
    claims.main(["plain", "--methods", "dora", "--jobs", "2"])
    assert "| dora | 8 |" in Path("runs/claims/plain/table.md").read_text()
    claims.main(["write"])
    said = capsys.readouterr().out
    assert "first: python -m experiments.claims plain --methods lora+\n" in said
    rows = {row.split("`")[1]: row for row in split_page("methods")[1].splitlines()[2:]}
    assert "| 58,752 | 0.000 ± 0.000 |" in rows["dora"] and "not measured" in rows["lora"]


def test_a_part_that_does_not_exist_is_refused_with_the_nearest(capsys):
    assert "part plain alone" in refused(capsys, "facts", "--methods", "lora", main=claims.main)
    assert "did you mean dora?" in refused(capsys, "plain", "--methods", "dra", main=claims.main)
    assert "did you mean facts?" in refused(capsys, "fact", main=claims.main)
    assert not Path("runs").exists()
