"""The drawn world: exact covers, the same picture at any time, captions that say what is there."""
import random
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from data.brush import Brush
from data.pictures import (COLOURS, KINDS, PARTS, PLACES, SUBJECTS, UNNAMED, VOCABULARY, Scene,
                           caption, draw, jitter, random_scene)
from diffusion import PictureConfig
from formats.pictures import Words


def test_a_box_covers_each_point_by_its_share_of_it():
    brush = Brush(1, 4)                                 # 4 points of 8 units each
    brush.paint(brush.box(12, 16, 6, 16), (255, 255, 255))          # x from 6 to 18, all rows
    assert brush.image[0, 0, 2].tolist() == [0.25, 1, 0.25, 0]


def test_distances_are_those_of_the_shapes():
    brush = Brush(1, 32)

    def at(distance, x, y):             # the middle of a point is at .5
        return distance[0, int(y), int(x)].item()

    assert at(brush.box(10, 10, 4, 2), 20.5, 10.5) == 6.5           # 10.5 right of it, 4 inside
    assert at(brush.line(5, 10.5, 9, 10.5, 2), 15.5, 10.5) == 4.5
    assert at(brush.oval(10.5, 10.5, 3, 3), 18.5, 10.5) == pytest.approx(5, rel=1e-5)
    assert at(brush.triangle((10, 0), (20, 20), (0, 20)), 10.5, 25.5) == 5.5
    assert at(brush.triangle((10, 0), (20, 20), (0, 20)), 10.5, 15.5) < 0
    assert torch.equal(brush.moved(3.0).box(0, 9, 1, 1), brush.box(3, 9, 1, 1))
    assert torch.allclose(brush.moved(4.0, 4.0, 2.0).pixel, torch.tensor(0.5))
    middle = brush.oval(10.5, 10.5, 6, 3)[0, 10]
    assert middle[10] < middle[11] < -1                     # no hole where the direction is none
    two = brush.moved(16.0).oval(5, 10, 2, 2, pair=True)
    assert torch.equal(two, two.flip(2))


def test_a_scene_is_drawn_alike_alone_and_among_others_in_numbers_from_0_to_1():
    rng = random.Random(0)
    scenes = [random_scene(rng) for _ in range(20)] + list(SUBJECTS.values())
    pictures = draw(scenes)
    assert pictures.shape == (26, 3, 32, 32) and pictures.min() >= 0 and pictures.max() <= 1
    for i in (0, 7, 25):
        assert torch.allclose(draw([scenes[i]])[0], pictures[i], atol=1e-6)


def test_an_unknown_name_draws_nothing():
    for change in (dict(kind="cow"), dict(place="moon"), dict(fur="mauve"), dict(hat="mauve")):
        with pytest.raises(KeyError):
            draw([Scene("cat", "red", "beach")._replace(**change)])


def test_a_random_scene_has_what_is_asked_for():
    scene = random_scene(random.Random(0), kind="owl", x=2.0)
    assert (scene.kind, scene.x) == ("owl", 2.0) and random_scene(random.Random(0)).x != 2.0


def test_a_large_picture_shows_the_same_as_a_small_one():
    rng = random.Random(1)
    scenes = [random_scene(rng) for _ in range(12)]
    assert (F.avg_pool2d(draw(scenes, 256), 8) - draw(scenes)).abs().mean() < 0.01


def test_every_part_of_a_scene_changes_the_picture():
    usual = Scene("cat", "red", "beach", hat="blue", neck="bow")
    changes = [dict(kind=kind) for kind in KINDS[1:]] + [dict(place=p) for p in list(PLACES)[1:]]
    changes += [dict(fur="green"), dict(pattern="striped"), dict(pattern="spotted"), dict(hat=None),
                dict(hat="pink"), dict(neck=None), dict(neck="scarf"), dict(neck_colour="grey"),
                dict(x=1.0), dict(y=1.0), dict(size=1.05), dict(drift=2.0), dict(ear="gold"),
                dict(star="gold"), dict(half="teal")]
    pictures = draw([usual, *(usual._replace(**change) for change in changes)])
    for change, picture in zip(changes, pictures[1:]):
        assert (picture - pictures[0]).abs().max() > 0.1, change


def test_captions_say_what_is_there_in_words_that_the_model_reads():
    scene = Scene("vase", "grey", "night", "spotted", hat="red", neck="scarf", neck_colour="pink")
    assert caption(scene) == "spotted grey vase with red flower and pink scarf at night"
    assert caption(scene, ["hat"]) == "vase with red flower" and caption(scene, []) == "vase"
    words, rng = Words(VOCABULARY), random.Random(2)
    longest = max(len(words.encode(caption(random_scene(rng)))) for _ in range(300))
    assert longest == PictureConfig(n_words=1).caption


def test_captions_of_different_scenes_differ():
    rng = random.Random(3)
    by_caption = {}
    for _ in range(400):
        scene = random_scene(rng)
        told = scene._replace(x=0, y=0, size=1, drift=0,
                              neck_colour=scene.neck_colour if scene.neck else "red")
        assert by_caption.setdefault(caption(scene), told) == told


def test_no_caption_can_say_a_subject():
    rng = random.Random(4)
    said = {word for _ in range(500) for word in caption(random_scene(rng), PARTS).split()}
    assert not said & (SUBJECTS.keys() | UNNAMED.keys())
    for subject in SUBJECTS.values():
        assert {subject.fur, subject.ear, subject.star, subject.half} & UNNAMED.keys()
    assert not COLOURS.keys() & UNNAMED.keys()


def test_figures_stay_in_the_picture_wherever_they_stand():
    """Only ears, a flower and a hat on a frog may touch the upper edge."""
    for kind, place in product(KINDS, ("beach", "night")):
        rng = random.Random(5)
        many = draw([Scene(kind, "pink", place, hat="red", neck="scarf")._replace(
            **jitter(rng) | {"drift": 0.0}) for _ in range(30)])
        spread = many.std(0).amax(0)
        assert max(spread[-1].max(), spread[:, 0].max(), spread[:, -1].max()) < 0.01, kind
        assert (spread[0] > 0.01).sum() <= (16 if kind in ("rabbit", "frog", "vase") else 0), kind
