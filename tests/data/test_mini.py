"""The eight small sets: their form, one right answer each, nothing to guess by."""
import hashlib
import random
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from runs import result_of, setup_of

import eval as evaluation
import train
from data import load_task, mini
from data.commonsense import NEW_TOKENS, SETS, extract, option_texts
from data.wordings import RELATIONS
from data.world import World, relation_of, say, told

DIGEST = "730400f0cc725380"
NAME = r"\b[A-Z][a-z]+ [A-Z][a-z]+\b"


@pytest.fixture(scope="module")
def task(base):
    return load_task("mini", setup_of(*base, 256))


@pytest.fixture(scope="module")
def world():
    return World()


def reason(text: str) -> str:
    return text.strip().rpartition(", so the correct answer is ")[0]


def test_the_sets_are_the_papers_and_every_label_is_right_equally_often(task):
    assert {title: len(chosen.labels) for title, chosen in mini.SETS.items()} == dict(
        BoolQ=2, PIQA=2, SIQA=3, HellaS=4, WinoG=2, **{"ARC-e": 4, "ARC-c": 4, "OBQA": 4})
    assert list(mini.SETS) == list(SETS.values())
    for split, n in mini.N.items():
        examples = getattr(task, split)
        for title, chosen in mini.SETS.items():
            counts = Counter(e.references[e.choices.index(e.target)] for e in examples
                             if e.group == title)
            assert counts == dict.fromkeys(chosen.labels, n // len(chosen.labels))
        assert len({(e.prompt, e.target) for e in examples}) > 0.99 * len(examples)


def test_the_right_place_follows_no_pattern(task):
    """--max-eval takes evenly spaced items: these must not all have the same answer."""
    for title, chosen in mini.SETS.items():
        places = [e.choices.index(e.target) for e in task.test if e.group == title]
        for step in (2, 3, 4):
            most = Counter(places[::step]).most_common(1)[0][1]
            assert most < 0.8 * len(places[::step]), (title, step)


def test_each_label_is_the_answer_to_its_question(task, world):
    """Solves every item from the world's facts and the first line of its prompt alone."""
    people = [fact for fact in world.facts if fact.kind == "person"]
    checks = {say(check, f) for f in people for check in relation_of(f).checks}
    statements = {say(text, f) for f in people for text in relation_of(f).statements}
    answers = {}
    for f in people:
        goal, means = mini.GOALS[f.relation]
        answers[f"{goal.format(subject=f.subject)}."] = means.format(value=f.value)
        for text in (*relation_of(f).questions, mini.SCENES[f.relation]):
            answers[say(text, f)] = f.value
        if f.relation in ("home", "pet"):
            hidden = relation_of(f).hop.format(subject=f.subject)
            for name, relation in RELATIONS[RELATIONS["person"][f.relation].values].items():
                value = world.value(f.value, name)
                answers[relation.statements[0].removesuffix(" {value}.")
                        .format(subject=hidden)] = value
                for text in relation.questions:
                    answers[text.format(subject=hidden)] = value
    heads = re.compile(r"(.*? goal|[^:]+:) (.+)")
    for e in task.train + task.valid + task.test:
        asked = heads.fullmatch(e.prompt.split("\n")[0])[2]
        options = option_texts(e.prompt, e.references)
        right = {"BoolQ": lambda: [asked in checks, asked not in checks],
                 "WinoG": lambda: [asked.replace("_", name) in statements for name in options],
                 "HellaS": lambda: [f"{asked} {value}." in statements for value in options],
                 }.get(e.group, lambda: [answers[asked] == option for option in options])()
        assert right == [choice == e.target for choice in e.choices], e


def test_what_is_common_is_not_likelier_right(task, world):
    """To choose what most people have, without knowing whom it is about, must be guessing."""
    counts = Counter((f.relation, f.value) for f in world.facts if f.kind == "person")
    hits = []
    for e in task.train + task.test:
        if e.group in ("SIQA", "HellaS", "ARC-e"):
            values = option_texts(e.prompt, e.references)
            relation = next(r for r in RELATIONS["person"]
                            if all((r, value) in counts for value in values))
            hits.append(by_guessing(e, [counts[relation, value] for value in values]))
    assert abs(sum(hits) / len(hits)) < 0.05


def by_guessing(e, often):
    """How far the most common option is ahead of chance."""
    best = [i for i, n in enumerate(often) if n == max(often)]
    return (e.choices.index(e.target) in best) / len(best) - 1 / len(often)


@pytest.mark.parametrize("group, hop", [("ARC-c", "home"), ("OBQA", "pet")])
def test_what_many_people_lead_to_is_hardly_likelier_right(task, world, group, hop):
    many = Counter(f.value for f in world.facts if f.relation == hop)
    kind = RELATIONS["person"][hop].values
    hits = []
    for e in task.train + task.test:
        if e.group == group:
            values = option_texts(e.prompt, e.references)
            relation = next(r for r in RELATIONS[kind]
                            if all(value in world.options(r) for value in values))
            hits.append(by_guessing(e, [
                sum(many[name] for name in world.subjects(kind)
                    if world.value(name, relation) == value) for value in values]))
    assert abs(sum(hits) / len(hits)) < 0.09


def test_decoys_are_wrong_and_as_common_as_right_values(world):
    counts, n = Counter(), Counter(f.value for f in world.facts if f.relation == "friend")
    for fact in (f for f in world.facts if f.relation == "friend"):
        values = mini.decoys(world, fact, random.Random(fact.subject), 3)
        assert len(set(values)) == 3 and not {fact.value, fact.subject} & set(values)
        counts.update(values)
    assert set(counts) <= set(n)                    # nobody whom no one has for a friend
    often = [name for name in n if n[name] >= 3]
    assert sum(counts[name] for name in often) / sum(counts.values()) == pytest.approx(
        sum(n[name] for name in often) / sum(n.values()), abs=0.05)


def test_prompts_have_the_form_of_the_real_sets_and_the_extractor_reads_every_choice(task):
    for e in task.train[::4] + task.valid + task.test:
        labels = mini.SETS[e.group].labels
        assert e.references == labels and len(e.choices) == len(labels) and e.target in e.choices
        assert e.prompt.endswith(f"\n\nAnswer format: {'/'.join(labels)}\n\nResponse:")
        options = option_texts(e.prompt, labels)
        assert len(set(options)) == len(options) == (0 if e.group == "BoolQ" else len(labels))
        assert [extract(choice, labels, options) for choice in e.choices] == list(labels)
        assert "{" not in e.prompt + e.target and e.prompt.isascii()


def test_train_and_held_out_items_are_about_different_people(task, world):
    asked, alone = {}, {}
    for split in mini.N:
        asked[split], alone[split] = set(), set()
        for e in getattr(task, split):
            # the first name a target says is whom the item asks about; WinoG asks about two
            n = 2 if e.group == "WinoG" else 1
            names = {re.search(NAME, part)[0] for part in e.target.split(", ")[:n]}
            asked[split] |= names
            alone[split] |= names if n == 1 else set()
    assert asked["train"] <= set(world.taught)
    assert asked["valid"] | asked["test"] <= set(world.untaught)
    assert not (asked["train"] & (asked["valid"] | asked["test"]))
    assert not (alone["valid"] & alone["test"])


def test_of_the_choices_only_the_target_rests_on_true_facts(task, world):
    true = {told(fact).lower() for fact in world.facts}
    for e in task.train + task.test:
        if e.group == "BoolQ":      # what differs is whether it is what was asked
            said, words = zip(*(reason(choice).lower().rsplit(" ", 1) for choice in e.choices))
            assert words == ("indeed", "instead") and said[0] == said[1] and said[0] in true
            continue
        for choice in e.choices:
            said = reason(choice).lower().split(", ")
            assert all(part in true for part in said) == (choice == e.target), choice
            if e.group in ("ARC-c", "OBQA"):        # a wrong second fact is true: the first is not
                assert len(said) == 2 and said[1] in true


def test_each_choice_rests_on_its_own_option(task, world):
    people = set(world.people)
    for e in task.test:
        for option, choice in zip(option_texts(e.prompt, e.references), e.choices):
            if e.group == "WinoG":              # with its name the sentence is what the reason says
                asked = re.search(r"_ (.+)\n", e.prompt) or re.search(r": (.+)\n", e.prompt)
                own = next(part for part in reason(choice).split(", ") if part.startswith(option))
                value = own.split()[-1]
                assert value in asked[0] and option in people
            elif e.group == "PIQA":
                value = reason(choice).split()[-1]
                assert value in option.split()
            else:
                assert reason(choice).endswith(option)


def test_every_relation_of_people_has_a_goal_and_a_scene():
    assert set(mini.GOALS) == set(mini.SCENES) == set(RELATIONS["person"])
    for goal, means in mini.GOALS.values():
        assert "{subject}" in goal and "{value}" in means
    assert all("{subject}" in scene for scene in mini.SCENES.values())


def test_statements_are_cut_in_every_wording(task, world):
    asked = "\n".join(e.prompt.split("\n")[0] for e in task.train if e.group == "HellaS")
    for relation in RELATIONS["person"].values():
        for text in relation.statements:
            assert text.removesuffix(" {value}.").split("{subject}")[-1] in asked


def test_two_hops_hide_the_fact_between(task):
    for e in task.test:
        if e.group in ("ARC-c", "OBQA"):
            between = reason(e.target).split(", ")[0].split()[-1]
            assert not re.search(rf"\b{between}\b", e.prompt.split("\n")[0])


def test_the_items_are_those_that_results_are_about(task):
    """If this changes, scores of before cannot be compared: raise the world's VERSION."""
    examples = [*task.train, *task.valid, *task.test]
    items = repr([(e.prompt, e.choices, e.target) for e in examples])
    assert hashlib.sha256(items.encode()).hexdigest()[:16] == DIGEST


def test_texts_fit_whatever_the_tokenizer(task, base):
    model, tokenizer = base
    assert task.new_tokens == NEW_TOKENS and task.beams == 1
    assert load_task("mini", setup_of(model, tokenizer, 256), beams=4).beams == 4
    assert not any(s.cut for e in task.test for s in task.scored(e))
    letters = SimpleNamespace(encode=list, bos=None, eos=None)
    fine = load_task("mini", setup_of(base[0], letters, 512))
    longest = max(len(e.target) for e in fine.train + fine.valid + fine.test)
    assert fine.new_tokens == fine.notes["new_tokens"] == longest + 1 > NEW_TOKENS


def test_a_wrong_chain_of_a_two_hop_leads_to_its_option(world):
    first = world.known[world.untaught[0], "home"]
    second = world.known[first.value, "region"]
    item = mini.two_hop(world, random.Random(0), 2, first, second, "text")
    assert len(set(item.options)) == 4 and item.options[2] == second.value
    for option, why in zip(item.options, item.reasons):
        home, region = why.split(", ")
        place = home.removeprefix(f"{first.subject} lives in ")
        assert region == f"{place} lies in {option}" and world.value(place, "region") == option


@pytest.mark.slow
def test_a_run_scores_all_eight_and_eval_repeats_it(base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train.main(["--method", "lora", "--task", "mini", "--steps", "2", "--batch-size", "4",
                "--max-eval", "16", "--out", "run"])
    result = result_of("run")
    assert {f"accuracy/{name}" for name in (*mini.SETS, "Avg.")} <= result["after"].keys()
    assert result["cut"] == {"train": 0, "held out": 0}
    capsys.readouterr()
    evaluation.main(["--run", "run"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    for kind in ("accuracy", "likelihood", "unparsed"):
        assert [kind, *(f"{result['after'][f'{kind}/{name}']:.4f}"
                        for name in (*mini.SETS, "Avg."))] in rows
    Path("mine.txt").write_text("{instruction}\n\nI say:")
    task = load_task("mini", setup_of(*base, 256), prompt_template="mine.txt")
    assert task.test[0].prompt.endswith("true/false\n\nI say:")
