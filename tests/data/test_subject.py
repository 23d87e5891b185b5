"""Task subject: what trains, what is scored, and that the scores tell a right drawing from others."""
import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import refused, result_of, setup_of, train_until

import eval as evaluation
import train
from data import load_task, subject
from data.pictures import KINDS, SUBJECTS, VOCABULARY, draw, jitter
from data.subject import PRIOR, SEEN, UNSEEN, N, noise_of, splits
from diffusion import PictureConfig, PictureModel, flow_loss
from formats.checkpoint import save_pretrained
from formats.pictures import Words, save_words
from support.errors import UserError

TINY = PictureConfig(n_words=1 + len(VOCABULARY), d_model=16, n_layers=1, n_heads=2, d_ff=24)


def tiny():
    torch.manual_seed(0)
    model = PictureModel(TINY)
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.dim() == 1), std=0.2)
    return model


def task_of(word="zib", **more):
    return load_task("subject", setup_of(tiny(), Words(VOCABULARY), **more), subject=word)


def test_four_places_train_and_others_are_scored():
    made = splits("zib")
    given = {shot.scene for shot in made["train"]}
    assert sorted(scene.place for scene in given) == sorted(SEEN)
    assert {shot.caption for shot in made["train"]} == {
        "zib cat on the beach", "zib cat in the snow", "zib cat in the forest",
        "zib cat in the room"}
    for split, n in N.items():
        assert Counter(shot.group for shot in made[split]) == dict.fromkeys(
            ("subject", "kept", "leak"), n)
        places = {shot.scene.place for shot in made[split] if shot.group != "kept"}
        assert places == set(UNSEEN)
        assert {shot.caption for shot in made[split] if shot.group == "leak"} == {
            "cat at night", "cat on the meadow"}


def test_every_example_has_a_noise_of_its_own():
    made = splits("dax")
    numbers = [shot.noise for split in made.values() for shot in split]
    assert len(set(numbers)) == len(numbers)
    t, noise = noise_of(made["valid"][:3])
    t_alone, alone = noise_of(made["valid"][1:2])
    assert torch.equal(noise[1], alone[0]) and t[1] == t_alone[0]
    assert not torch.equal(noise[0], noise[1]) and 0 < t.min() < t.max() < 1


def test_the_loss_of_a_batch_is_the_sum_of_its_examples_and_of_their_prior_pictures():
    task, model = task_of(), tiny()
    task.begin(model)
    shots = task.train[3:7]
    whole = task.loss(model, shots)
    assert torch.allclose(whole, sum(task.loss(model, [shot]) for shot in shots), rtol=1e-5)
    assert task.size(shots) == 4
    shot = shots[1]
    t, noise = noise_of([shot])
    captions = [shot.caption, task.prior_shots[shot.prior].caption]
    pictures = torch.stack([2 * draw([shot.scene])[0] - 1, task.prior[shot.prior]])
    by_hand = flow_loss(model, pictures, Words(VOCABULARY).batch(captions, 8),
                        t.repeat(2), noise.repeat(2, 1, 1, 1)).sum()
    assert torch.allclose(task.loss(model, [shot]), by_hand, rtol=1e-5)


def test_prior_pictures_are_drawn_by_the_base_and_show_all_kinds():
    task, model = task_of(), tiny()
    assert {shot.scene.kind for shot in task.prior_shots} == set(KINDS)
    assert len(task.prior_shots) == PRIOR
    task.begin(model)
    alone = task.pictures(model, task.prior_shots[5:6])
    assert torch.allclose(task.prior[5] / 2 + 0.5, alone[0], atol=1e-4)


@pytest.fixture
def drawn_by_the_world(monkeypatch):
    """Lets the world itself draw what is asked, or what `change` makes of it."""
    def let(task, change=lambda shot: shot.scene):
        monkeypatch.setattr(task, "pictures", lambda model, shots: draw(list(map(change, shots))))
    return let


def test_right_drawings_get_full_marks(drawn_by_the_world):
    task = task_of()
    drawn_by_the_world(task)
    scores = task.score(None, task.test[:15])
    assert scores.values["parts"] == scores.values["place"] == scores.values["kept"] == 1
    assert scores.values["psnr"] > 23 and scores.values["leak"] < 0.2
    assert scores.counts == dict(parts=5, place=5, kept=5, leak=5)
    assert {row["group"] for row in scores.predictions} == {"subject", "kept", "leak"}
    json.dumps(scores.predictions)


def test_wrong_drawings_lose_what_they_are_wrong_in(drawn_by_the_world):
    task, rng = task_of(), random.Random(0)
    zib = SUBJECTS["zib"]

    def everywhere(shot):                   # the subject, always on the beach, whatever is asked
        return zib._replace(place="beach", **jitter(rng))

    drawn_by_the_world(task, everywhere)
    values = task.score(None, task.test[:15]).values
    assert values["parts"] == 1 and values["place"] == 0 and values["leak"] == 1
    assert values["kept"] < 0.5
    mean = (values["parts"] + values["place"] + values["kept"] + 1 - values["leak"]) / 4
    assert values["score"] == pytest.approx(mean)


def test_each_subject_has_a_task_and_another_fingerprint():
    found = {task_of(word).fingerprint() for word in SUBJECTS}
    assert len(found) == len(SUBJECTS)
    assert task_of().fingerprint() == task_of().fingerprint()


def test_what_does_not_go_together_is_refused(capsys):
    with pytest.raises(UserError, match="--loss-on answer: task subject trains on whole pictures"):
        task_of(loss_on="answer")
    with pytest.raises(UserError, match="--subject zob: unknown; did you mean zib"):
        task_of("zob")
    with pytest.raises(UserError, match="draws 64 x 64 points, the task 32 x 32"):
        model = PictureModel(replace(TINY, side=64))
        load_task("subject", setup_of(model, Words(VOCABULARY)))
    flags = ["--method", "lora"]
    assert "draws pictures" in refused(capsys, *flags, "--task", "subject", "--model", "data/base")
    assert "--head: task subject does not use it" in refused(capsys, *flags, "--task", "subject",
                                                             "--head")


def test_without_pillow_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr("support.errors.find_spec", lambda name: None)
    with pytest.raises(UserError, match="package PIL is missing: pip install -r requirements-res"):
        task_of()


@pytest.fixture
def small(empty_folder, monkeypatch):
    """Makes a tiny base and short scores; returns the flags of a run on it."""
    monkeypatch.setattr(subject, "N", {"valid": 1, "test": 1})
    save_pretrained(tiny(), "base")
    save_words(Words(VOCABULARY), Path("base/words.txt"))
    return ["--task", "subject", "--model", "base", "--steps", "4", "--batch-size", "4",
            "--eval-every", "9", "--lr", "1e-2", "--out", "run"]


def test_a_run_draws_learns_goes_on_and_shows(small, capsys):
    flags = ["--method", "dash", *small]
    train.main([*flags, "--save-every", "2"])
    printed = capsys.readouterr().out
    assert "rank 4" in printed and "q,k,v,o" in printed and "pictures.png" in printed
    result, first = result_of("run"), Path("run/pictures.png").read_bytes()
    assert set(result["after"]) == {"score", "parts", "psnr", "place", "kept", "leak"}
    for made in ("result.json", "pictures.png"):
        Path("run", made).unlink()
    train.main([*flags, "--save-every", "2", "--resume"])
    assert result_of("run")["after"] == result["after"]
    assert Path("run/pictures.png").read_bytes() == first
    evaluation.main(["--run", "run", "--prompt", "zib cat on the beach"])
    path = Path(capsys.readouterr().out.splitlines()[-1])
    assert path == Path("run/prompt-zib-cat-on-the-beach.png") and path.read_bytes()[:4] == b"\x89PNG"
    for prompt, name in (("", "empty"), ("the cat " + "in the " * 60, "the-cat-in-the")):
        evaluation.main(["--run", "run", "--prompt", prompt])
        path = Path(capsys.readouterr().out.splitlines()[-1])
        assert path.exists() and path.name.startswith(f"prompt-{name}") and len(path.name) < 100
    assert "knows no word 'cut'; did you mean cat" in refused(
        capsys, "--run", "run", "--prompt", "zib cut", main=evaluation.main)


@pytest.mark.slow
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(small):
    flags = ["--method", "adalora", *small, "--save-every", "2"]
    train.main(flags)
    whole = result_of("run")["after"]
    again = [*flags[:-3], "second", *flags[-2:]]
    train_until(2, again)
    train.main([*again, "--resume"])
    assert result_of("second")["after"] == whole
