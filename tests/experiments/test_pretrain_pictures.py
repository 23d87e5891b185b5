"""How the picture model is trained: scenes that depend on the step alone, captions with gaps."""
from collections import Counter

import pytest
import torch
from PIL import Image
from runs import interrupt
from safetensors.torch import load_file

from data import PICTURES
from data.pictures import KINDS, PARTS, SUBJECTS, VOCABULARY
from diffusion import PictureConfig, PictureModel
from experiments import picture_sheet
from experiments import pretrain_pictures as ours
from formats.checkpoint import load_pretrained
from formats.pictures import Words

WORDS = Words(VOCABULARY)


def test_a_step_s_scenes_depend_on_the_seed_and_the_step_alone():
    one, again, other, later = (ours.batch_of_step(WORDS, 8, *numbers)
                                for numbers in ((0, 5), (0, 5), (1, 5), (0, 6)))
    assert all(torch.equal(a, b) for a, b in zip(one, again))
    for different in (other, later):
        assert not any(torch.equal(a, b) for a, b in zip(one, different))
    pictures, words, t, noise = one
    assert pictures.shape == noise.shape == (ours.PICTURES, 3, 32, 32) and words.shape[1] == 8
    assert pictures.min() >= -1 and pictures.max() <= 1 and 0 < t.min() < t.max() < 1


def test_a_tenth_of_the_captions_is_empty_and_the_others_leave_parts_out():
    words = torch.cat([ours.batch_of_step(WORDS, 8, 0, step)[1] for step in range(20)])
    assert (words == 0).all(1).float().mean() == pytest.approx(ours.EMPTY, abs=0.03)
    said = Counter(WORDS.words[i - 1] for row in words.tolist() for i in row if i)
    told = sum(said[kind] for kind in KINDS)
    for part in ("beach", "night"):         # each place in a sixth of the captions that say one
        assert said[part] / told == pytest.approx((1 - ours.UNSAID) / 6, abs=0.04)
    assert not said.keys() & SUBJECTS.keys()


def test_the_report_asks_for_no_caption_that_was_trained_on(monkeypatch):
    asked = []
    monkeypatch.setattr(ours, "draw_captions", lambda model, words, captions, noise: (
        asked.append(captions) or torch.zeros(len(captions), 3, 32, 32)))
    model = PictureModel(PictureConfig(n_words=len(VOCABULARY) + 1, d_model=16, n_layers=1,
                                       n_heads=2, d_ff=24))
    ours.report_scores(model, WORDS, n=2)
    ours.report_scores(model, WORDS, {asked[0][0]}, n=1)
    assert asked[1] == [asked[0][1]]


def test_the_report_has_a_share_for_every_part(monkeypatch):
    model = PictureModel(PictureConfig(n_words=len(VOCABULARY) + 1, d_model=16, n_layers=1,
                                       n_heads=2, d_ff=24)).init_weights()
    scores = ours.report_scores(model, WORDS, n=3)
    assert list(scores) == ["kind", *PARTS] and all(0 <= share <= 1 for share in scores.values())


def test_a_stopped_run_goes_on_to_the_same_model(tmp_path, monkeypatch):
    monkeypatch.setattr(ours, "PICTURES", 2)
    monkeypatch.setattr(ours, "EVERY", 2)
    monkeypatch.setattr(ours, "report_scores", lambda *_: {})
    ours.main(["--steps", "4", "--out", str(tmp_path / "whole")])
    calls = interrupt(monkeypatch, ours, "batch_of_step", 4)
    with pytest.raises(SystemExit):
        ours.main(["--steps", "4", "--out", str(tmp_path / "stopped")])
    ours.main(["--steps", "4", "--out", str(tmp_path / "stopped")])
    assert [args[-1] for args in calls] == [0, 1, 2, 3, 2, 3]
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert all(tensor.dtype == torch.float16 for tensor in one.values())
    model, words = load_pretrained(tmp_path / "whole")
    assert words.words == list(VOCABULARY) and model.config.n_words == len(VOCABULARY) + 1


@pytest.fixture(scope="module")
def shipped():
    return load_pretrained(PICTURES, torch.float32)


def test_the_model_that_ships_knows_the_world_s_words_and_no_subject(shipped):
    model, words = shipped
    assert words.words == list(VOCABULARY)
    assert model.config == PictureConfig(n_words=len(VOCABULARY) + 1)
    untouched = ours.PictureModel(model.config).init_weights(torch.Generator().manual_seed(0))
    for word in SUBJECTS:
        row, start = (m.embed.weight[words.numbers[word]] for m in (model, untouched))
        assert torch.nn.functional.cosine_similarity(row, start, dim=0) > 0.99


@pytest.mark.slow
def test_the_model_that_ships_draws_what_is_said(shipped):
    scores = ours.report_scores(*shipped, n=40)
    assert scores["kind"] >= 0.95 and scores["fur"] >= 0.95 and scores["place"] >= 0.95
    assert scores["pattern"] >= 0.9 and min(scores["hat"], scores["neck"]) >= 0.85


def test_the_sheet_has_every_kind(tmp_path, capsys):
    picture_sheet.main(["--out", str(tmp_path)])
    assert Image.open(tmp_path / "world.png").width > 7 * 32 * 4
