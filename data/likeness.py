"""Reads a picture of data/pictures.py back to its scene, and measures how like a subject it is.

Both search for the scene whose drawing has the least squared error from the picture. So a score
needs no judge that was trained. Pictures that the world drew are read back without an error (100 of
100, with noise of .1 too). The search moves in steps of .3 pixels, so a subject's own drawing gets
20 to 30 dB.
"""
import math
from functools import lru_cache
from itertools import product
from typing import Iterable, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data.pictures import COLOURS, GROWTH, KINDS, PATTERNS, PLACES, SHIFT, SIDE, Scene, draw, rgb

STARTS = 2              # kinds that the search at full resolution begins from
STEPS = ((-1.0, 0), (1.0, 0), (-0.4, 0), (0.4, 0), (0, -0.8), (0, 0.8), (0, -0.3), (0, 0.3))


def best(scenes: Iterable[Scene], picture: Tensor, where: Tensor | None = None
         ) -> tuple[float, Scene]:
    """Returns the least mean squared error of the scenes' drawings, and the scene that has it.

    picture: (3, side, side). where: (side, side) or (scenes, side, side) bool, the pixels that
    count; None: all.
    """
    scenes = list(scenes)
    errors = (draw(scenes, picture.shape[-1]) - picture).square().mean(1)   # (scenes, side, side)
    if where is None:
        errors = errors.mean((1, 2))
    else:
        errors = (errors * where).sum((1, 2)) / where.expand_as(errors).sum((1, 2)).clamp(min=1)
    i = int(errors.argmin())
    return errors[i].item(), scenes[i]


@lru_cache
def beside() -> Tensor:
    """Marks the columns that no figure but a tail reaches: (SIDE, SIDE) bool."""
    column = torch.arange(SIDE)
    return ((column < 5) | (column > 26)).expand(SIDE, SIDE)


# ---- what a picture shows
def read_place(picture: Tensor) -> Scene:
    """Finds the place of a picture (3, SIDE, SIDE) from its two sides; the figure is any."""
    drifts = (-2.5, -1.5, -0.5, 0.5, 1.5, 2.5)
    return best((Scene("cat", "grey", place, drift=drift)
                 for place, drift in product(PLACES, drifts)), picture, beside())[1]


def read_scene(picture: Tensor) -> Scene:
    """Finds the scene of a picture (3, SIDE, SIDE), of all that a caption can say.

    First the place. Then each kind is tried at half the resolution, and the best STARTS of them at
    full resolution. climb() finds the rest.
    """
    scene = read_place(picture)
    small, found = F.avg_pool2d(picture, 2), []
    for kind in KINDS:
        _, start = best((scene._replace(kind=kind, fur=fur, x=x) for fur in COLOURS
                         for x in (-1.5, 0.0, 1.5)), small)
        found.append(climb(start, small, rounds=1))
    found.sort(key=lambda pair: pair[0])
    return min((climb(start, picture) for _, start in found[:STARTS]),
               key=lambda pair: pair[0])[1]


def climb(scene: Scene, picture: Tensor, rounds: int = 8) -> tuple[float, Scene]:
    """Changes one part of the scene at a time for the better, for some rounds or until none helps.

    Returns the error and the scene.
    """
    for _ in range(rounds):
        before = scene
        for changes in (moves, furs, necks, hats, moves, drifts):
            error, scene = best([scene, *(scene._replace(**change) for change in changes(scene))],
                                picture)
        if scene == before:
            break
    return error, scene


# ---- changes of a scene that climb() tries
def moves(scene: Scene) -> list[dict]:
    """Lists small shifts of the figure, and small changes of its size."""
    return [dict(x=scene.x + dx, y=scene.y + dy) for dx, dy in STEPS] + [
        dict(size=min(1 + GROWTH, max(1 - GROWTH, scene.size + by))) for by in (-0.03, 0.03)]


def furs(scene: Scene) -> list[dict]:
    return [dict(fur=fur, pattern=pattern) for fur in COLOURS for pattern in PATTERNS]


def necks(scene: Scene) -> list[dict]:
    return [dict(neck=None), *(dict(neck=neck, neck_colour=colour)
                               for neck in ("scarf", "bow") for colour in COLOURS)]


def hats(scene: Scene) -> list[dict]:
    return [dict(hat=colour) for colour in (None, *COLOURS)]


def drifts(scene: Scene) -> list[dict]:
    return [dict(drift=scene.drift + by) for by in (-0.5, -0.2, 0.2, 0.5)]


def attributes(scene: Scene) -> dict[str, object]:
    """Names what a caption can say of a scene."""
    return {"kind": scene.kind, "fur": scene.fur, "pattern": scene.pattern, "hat": scene.hat,
            "neck": scene.neck and (scene.neck, scene.neck_colour), "place": scene.place}


# ---- how like a subject
OWN = ("fur", "half", "ear", "star", "hat", "neck_colour")      # fields that hold a colour
NEAR = 0.2              # a part has its colour if its mean is at most this far off in each channel
CLEAR = 0.85            # a pixel belongs to a part that decides this share of its colour


def painted(scene: Scene, part: str) -> Tensor:
    """Marks the pixels that have the colour of one part: (SIDE, SIDE) bool.

    They are those that turn from black to white with it. The cat's ear has four of them.
    """
    light, dark = draw([scene._replace(**{part: name}) for name in ("white", "black")])
    return (light - dark).mean(0) > CLEAR


def silhouette(scenes: list[Scene]) -> Tensor:
    """Marks the pixels that look the same on the beach and at night: (n, SIDE, SIDE) bool."""
    day, night = (draw([s._replace(place=place) for s in scenes]) for place in ("beach", "night"))
    return (day - night).abs().amax(1) < 0.02


class Likeness(NamedTuple):
    """Holds how like a subject a picture is."""
    psnr: float         # in dB, within the subject's silhouette, at the best place that was found
    parts: float        # share of its parts that have their colour


def likeness(picture: Tensor, subject: Scene) -> Likeness:
    """Compares a picture (3, SIDE, SIDE) with a subject, wherever it stands in it.

        psnr = -10 log10(mean squared difference over the silhouette), at most 60
    """
    _, found = best_fit([subject._replace(x=x, y=y, size=size)
                         for x in (-SHIFT, -1.5, -0.5, 0.5, 1.5, SHIFT)
                         for y in (-0.7, 0.7) for size in (0.95, 1.05)], picture)
    for _ in range(4):
        error, found = best_fit([found, *(found._replace(**move) for move in moves(found))],
                                picture)
    right = []
    for name in OWN:
        colour = getattr(found, name)
        if colour is None or name == "neck_colour" and found.neck is None:
            continue
        off = picture[:, painted(found, name)].mean(1) - rgb([colour])[0]
        right.append(bool(off.abs().max() <= NEAR))
    return Likeness(-10 * math.log10(max(error, 1e-6)), sum(right) / len(right))


def best_fit(scenes: list[Scene], picture: Tensor) -> tuple[float, Scene]:
    """Does best() within each scene's own silhouette."""
    return best(scenes, picture, silhouette(scenes))
