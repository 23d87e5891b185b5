"""Draws the world of task subject: animals and vases in six places, pictures of 32 x 32 pixels.

>>> scene = Scene("cat", "red", "beach", pattern="striped", hat="blue")
>>> caption(scene)
'striped red cat with blue hat on the beach'
>>> draw([scene]).shape                 # pictures x red, green, blue x rows x columns, in [0, 1]
torch.Size([1, 3, 32, 32])

Each place and each kind has one function, which paints shapes over shapes (data/brush.py). They
always look the same, so that a small model can learn them. A scene says what varies: colours, what
is worn, and the position, size and drift of jitter().
"""
import random
from collections import defaultdict
from typing import Collection, NamedTuple

import torch
from torch import Tensor

from data.brush import SIDE, Brush

COLOURS = {                 # the eight that captions name
    "red": (220, 52, 46), "orange": (247, 142, 36), "yellow": (252, 214, 64),
    "green": (76, 168, 72), "blue": (62, 110, 220), "pink": (248, 150, 190),
    "grey": (138, 140, 150), "white": (246, 244, 240),
}
UNNAMED = {                 # and those that no caption names
    "lilac": (150, 92, 208), "gold": (255, 216, 70), "teal": (22, 128, 126),
    "brown": (104, 68, 46), "cream": (248, 226, 178), "lime": (164, 222, 52),
    "navy": (34, 44, 104), "black": (0, 0, 0),
}
KINDS = ("cat", "dog", "rabbit", "bear", "frog", "owl", "vase")     # each has a function below
PATTERNS = ("plain", "striped", "spotted")
PLACES = {                  # name of a function below -> as a caption says it
    "beach": "on the beach", "snow": "in the snow", "forest": "in the forest",
    "night": "at night", "room": "in the room", "meadow": "on the meadow",
}
WORN = ("hat", "flower", "scarf", "bow")        # the flower is a vase's, which has no hat
PARTS = ("fur", "pattern", "hat", "neck", "place")      # what a caption may leave out
# How far a figure may stand from the middle and from its ground, differ in size, and the sun drift.
SHIFT, LIFT, GROWTH, DRIFT = 2.5, 1.0, 0.08, 3.0


class Scene(NamedTuple):
    """Holds all that a picture shows. Colours are names; lengths are pixels of a 32 x 32 picture."""
    kind: str
    fur: str                        # the figure's main colour, also a vase's
    place: str
    pattern: str = "plain"
    hat: str | None = None          # colour of the hat, or of a vase's flower
    neck: str | None = None         # "scarf" or "bow"
    neck_colour: str = "red"
    x: float = 0.0                  # how far the figure stands right of the middle
    y: float = 0.0                  # how far below its usual ground
    size: float = 1.0
    drift: float = 0.0              # how far right the sun, moon, tree or window is
    # Not in captions:
    ear: str | None = None          # colour of the ear on the right
    star: str | None = None         # colour of a star on the chest
    half: str | None = None         # colour of the right half


SUBJECTS = {                # a word that the model never read -> what it is to mean, anywhere
    "zib": Scene("cat", "lilac", "beach", neck="scarf", neck_colour="teal", ear="orange",
                 star="gold"),
    "dax": Scene("dog", "brown", "beach", neck="bow", neck_colour="lime", ear="cream"),
    "wug": Scene("vase", "teal", "beach", hat="lilac", half="cream"),
    "blick": Scene("owl", "navy", "beach", hat="lime", star="gold"),
    "toma": Scene("rabbit", "cream", "beach", neck="bow", neck_colour="teal", half="brown",
                  ear="lilac"),
    "fep": Scene("frog", "lilac", "beach", hat="red", half="lime"),
}
VOCABULARY = (*KINDS, *COLOURS, *PATTERNS[1:], *WORN, *PLACES, *SUBJECTS)


def rgb(names: list[str]) -> Tensor:
    """Returns the colours (n, 3), in [0, 1]. Raises KeyError for an unknown name."""
    return torch.tensor([(COLOURS | UNNAMED)[name] for name in names]) / 255


def caption(scene: Scene, told: Collection[str] = PARTS) -> str:
    """Says in words what the scene shows; `told` names those of PARTS that it may say."""
    words = [scene.pattern] if scene.pattern != "plain" and "pattern" in told else []
    words += [scene.fur] if "fur" in told else []
    worn = []
    if scene.hat and "hat" in told:
        worn.append(f"{scene.hat} {'flower' if scene.kind == 'vase' else 'hat'}")
    if scene.neck and "neck" in told:
        worn.append(f"{scene.neck_colour} {scene.neck}")
    words += [scene.kind, *(["with " + " and ".join(worn)] if worn else [])]
    return " ".join(words + ([PLACES[scene.place]] if "place" in told else []))


def random_scene(rng: random.Random, **fixed) -> Scene:
    """Draws a scene that a caption can say; `fixed` sets some fields of Scene."""
    names = list(COLOURS)
    drawn = dict(kind=rng.choice(KINDS), fur=rng.choice(names), place=rng.choice(list(PLACES)),
                 pattern=rng.choice(PATTERNS), hat=rng.choice([None, rng.choice(names)]),
                 neck=rng.choice([None, "scarf", "bow"]), neck_colour=rng.choice(names))
    return Scene(**drawn | jitter(rng) | fixed)


def jitter(rng: random.Random) -> dict[str, float]:
    """Draws where the figure stands, how large it is, and where the sun or the window is."""
    return dict(x=rng.uniform(-SHIFT, SHIFT), y=rng.uniform(-LIFT, LIFT),
                size=1 + rng.uniform(-GROWTH, GROWTH), drift=rng.uniform(-DRIFT, DRIFT))


# ---- places: one thing of each stands at the brush `at`, which drifts
def beach(b: Brush, at: Brush) -> None:
    b.fill((132, 206, 250))
    b.paint(at.oval(25, 5.5, 3.2, 3.2), (255, 226, 92))
    b.paint(b.below(14), (36, 128, 206))
    wave = 0.8 * (b.x * 0.6).sin()
    b.paint(b.below(20.5 + wave), (240, 250, 252))
    b.paint(b.below(21.8 + wave), (244, 214, 150))


def snow(b: Brush, at: Brush) -> None:
    b.fill((190, 206, 232))
    for y, w in ((18, 5.0), (14.5, 3.8), (11.5, 2.6)):
        b.paint(at.triangle((26, y - 5.5), (26 + w, y), (26 - w, y)), (72, 126, 120))
    b.paint(at.triangle((26, 6), (27.4, 8.6), (24.6, 8.6)), (250, 252, 255))
    b.paint(b.oval(6, 31, 16, 12), (226, 234, 248))
    b.paint(b.oval(24, 33, 22, 14), (250, 252, 255))


def forest(b: Brush, at: Brush) -> None:
    b.fill((112, 164, 104))
    for i in range(5):
        b.paint(at.box(3.2 + 7 * i, 14, 1.3, 14), (110, 78, 54))
    b.paint(b.above(6.5 + 1.1 * (at.x * 0.9).sin()), (36, 92, 50))
    b.paint(b.below(23), (52, 106, 52))


def night(b: Brush, at: Brush) -> None:
    b.fill((22, 22, 62))
    b.paint(b.below(15), (44, 40, 98))
    b.paint(torch.maximum(at.oval(25, 6, 3.4, 3.4), -at.oval(23.4, 5, 3, 3)), (255, 244, 196))
    for x, y in ((4, 4), (10, 8.5), (15, 3), (3.5, 13), (29, 14)):
        b.paint(b.oval(x, y, 0.75, 0.75), (250, 246, 220))
    b.paint(b.oval(7, 30, 14, 9), (24, 34, 50))
    b.paint(b.below(24.5), (30, 44, 58))


def room(b: Brush, at: Brush) -> None:
    b.fill((242, 210, 172))
    b.paint(at.box(24.5, 7.5, 4.2, 4.7), (150, 98, 62))
    b.paint(at.box(24.5, 7.5, 3.2, 3.7), (160, 216, 250))
    b.paint(at.box(24.5, 7.5, 0.5, 4.0), (150, 98, 62))
    b.paint(at.box(24.5, 7.5, 3.5, 0.5), (150, 98, 62))
    b.paint(b.below(22.5), (158, 100, 68))
    b.paint(b.oval(16, 28, 12, 2.8), (196, 62, 84))


def meadow(b: Brush, at: Brush) -> None:
    b.fill((150, 212, 252))
    for x, y, r in ((21.9, 6.1, 1.9), (24.5, 5.5, 2.6), (27.3, 6.2, 1.8)):
        b.paint(at.oval(x, y, r * 1.3, r), (252, 254, 255))
    b.paint(b.oval(5, 32, 16, 15), (112, 188, 96))
    b.paint(b.oval(25, 34, 20, 14.5), (132, 206, 96))
    b.paint(b.below(24.5), (132, 206, 96))
    for i, (x, y) in enumerate(((3, 26), (7, 29.5), (26, 26.5), (29, 30), (23, 30))):
        b.paint(b.oval(x, y, 0.9, 0.9), [(255, 240, 120), (250, 150, 190)][i % 2])


# ---- kinds: each returns the distances of body, head and ears, and a function that paints the
# face. A vase has only a body. (0, 0) is the ground below the figure, y is negative above it.
def dot_eyes(b: Brush, y: float = -13.2, x: float = 2.6) -> None:
    b.paint(b.oval(x, y, 1.15, 1.45, pair=True), (30, 26, 34))
    b.paint(b.oval(x - 0.35, y - 0.6, 0.5, 0.5, pair=True), (255, 255, 255))


def paws(b: Brush) -> Tensor:
    return b.oval(2.9, -1.0, 2.3, 1.5, pair=True)


def torso(b: Brush) -> Tensor:
    return torch.minimum(b.oval(0, -5.6, 5.0, 5.6), paws(b))


def cat(b: Brush):
    def face():
        b.paint(b.triangle((4.9, -19.6), (5.6, -16.6), (3.2, -17.6), pair=True), (250, 176, 186))
        dot_eyes(b)
        b.paint(b.triangle((-1, -11.4), (1, -11.4), (0, -10.2)), (238, 110, 130))
        b.paint(b.line(2.6, -10.6, 6.6, -11.2, 0.22, pair=True), (60, 50, 60), 0.7)
    tail = torch.minimum(b.line(4, -2.2, 8.2, -3.2, 1.3), b.line(8.2, -3.2, 8.8, -8.2, 1.3))
    ears = b.triangle((5.9, -21.6), (6.4, -14.4), (1.6, -17.4), pair=True)
    return torch.minimum(torso(b), tail), b.oval(0, -12.8, 6.6, 5.3), ears, face


def dog(b: Brush):
    def face():
        b.paint(b.oval(0, -10.4, 3.1, 2.3), (252, 240, 226))
        dot_eyes(b, -13.8)
        b.paint(b.oval(0, -11.6, 1.3, 0.95), (36, 30, 36))
        b.paint(b.oval(0, -9.0, 0.8, 1.1), (240, 104, 120))
    tail = b.line(4, -3, 8.6, -6.6, 1.2)
    return (torch.minimum(torso(b), tail), b.oval(0, -12.8, 5.9, 5.5),
            b.oval(6.6, -12.0, 1.9, 4.6, pair=True), face)


def rabbit(b: Brush):
    def face():
        b.paint(b.line(2.7, -18.2, 3.3, -22.6, 0.7, pair=True), (250, 176, 186))
        dot_eyes(b)
        b.paint(b.oval(0, -11.2, 0.9, 0.65), (238, 110, 130))
        b.paint(b.box(0, -9.2, 0.8, 0.8), (255, 255, 255))
        b.paint(b.oval(6.2, -3.0, 2.0, 2.0), (255, 255, 255))
    return (torso(b), b.oval(0, -12.4, 6.0, 5.2),
            b.line(2.6, -16.5, 3.4, -23.2, 1.7, pair=True), face)


def bear(b: Brush):
    def face():
        b.paint(b.oval(5.2, -17.6, 1.2, 1.2, pair=True), (250, 206, 180))
        b.paint(b.oval(0, -10.6, 2.9, 2.2), (252, 232, 208))
        dot_eyes(b, -13.8)
        b.paint(b.oval(0, -11.5, 1.2, 0.85), (36, 30, 36))
    return (torch.minimum(torso(b), b.oval(5.0, -6.2, 1.9, 2.6, pair=True)),
            b.oval(0, -12.8, 6.5, 5.5), b.oval(5.2, -17.6, 2.4, 2.4, pair=True), face)


def frog(b: Brush):
    def face():
        b.paint(b.oval(3.9, -17.6, 1.8, 1.8, pair=True), (255, 255, 255))
        b.paint(b.oval(3.7, -17.5, 0.95, 1.1, pair=True), (30, 26, 34))
        b.paint(b.line(0, -10.6, 4.2, -11.8, 0.42, pair=True), (60, 34, 44))
        b.paint(b.oval(4.9, -12.9, 1.1, 0.8, pair=True), (250, 150, 160))
    legs = b.oval(5.6, -2.4, 2.4, 2.6, pair=True)
    return (torch.minimum(torso(b), legs), b.oval(0, -12.4, 7.0, 4.6),
            b.oval(3.9, -17.4, 2.6, 2.6, pair=True), face)


def owl(b: Brush):
    def face():
        b.paint(b.oval(2.8, -13.4, 2.7, 2.7, pair=True), (255, 255, 255))
        b.paint(b.oval(2.5, -13.3, 1.3, 1.4, pair=True), (30, 26, 34))
        b.paint(b.triangle((-1.3, -11.6), (1.3, -11.6), (0, -8.8)), (248, 170, 40))
        b.paint(b.oval(2.2, -0.6, 1.7, 1.0, pair=True), (248, 170, 40))
    return (torch.minimum(b.oval(0, -6.4, 6.0, 6.2), b.oval(5.6, -6.4, 1.7, 4.4, pair=True)),
            b.oval(0, -12.8, 6.4, 5.2), b.triangle((5.4, -20), (6, -14), (2, -17), pair=True), face)


def vase(b: Brush):
    neck = torch.minimum(b.box(0, -13.4, 2.2, 3.2), b.box(0, -16.4, 3.4, 0.9))
    return torch.minimum(b.oval(0, -6.2, 6.6, 6.2), neck), None, None, lambda: None


# ---- what they wear: colour (n, 3); shown (n, 1, 1), 1.0 for the scenes that have it; y of the neck
def hat(b: Brush, colour: Tensor, shown: Tensor) -> None:
    b.paint(torch.minimum(b.box(0, -19.6, 3.6, 2.6), b.box(0, -17.2, 6.2, 1.4)), colour * 0.35,
            shown)
    b.paint(torch.minimum(b.box(0, -19.6, 3.0, 2.0), b.box(0, -17.2, 5.6, 0.8)), colour, shown)
    b.paint(b.box(0, -18.5, 3.0, 0.5), colour * 0.55, shown)


def flower(b: Brush, colour: Tensor, shown: Tensor) -> None:
    b.paint(b.line(0, -17.5, 0, -21, 0.6), (60, 140, 60), shown)
    b.paint(b.star(0, -22.6, 4.4), colour * 0.45, shown)
    b.paint(b.star(0, -22.6, 3.7), colour, shown)
    b.paint(b.oval(0, -22.6, 1.2, 1.2), (255, 216, 70), shown)


def scarf(b: Brush, y: float, colour: Tensor, shown: Tensor) -> None:
    for grown, tint in ((0.6, 0.4), (0.0, 1.0)):
        shape = torch.minimum(b.line(-3.4, y, 3.4, y, 1.5 + grown),
                              b.line(2.6, y + 1, 3.2, y + 4.4, 1.2 + grown))
        b.paint(shape, colour * tint, shown)


def bow(b: Brush, y: float, colour: Tensor, shown: Tensor) -> None:
    for grown, tint in ((0.6, 0.4), (0.0, 1.0)):
        b.paint(b.triangle((0, y), (3.6, y - 2.3), (3.6, y + 2.3), pair=True) - grown,
                colour * tint, shown)
    b.paint(b.oval(0, y, 1.1, 1.2), colour * 0.7, shown)


SPOTS = ((-2.6, -3.4), (1.8, -5.4), (3.0, -2.2), (-3.6, -6.6), (-5.0, -15.0), (4.9, -14.6),
         (1.2, -16.6), (-1.9, -17.0))


def spots(b: Brush) -> Tensor:
    return torch.stack([b.oval(x, y, 1.25, 1.25) for x, y in SPOTS]).amin(0)


def stripes(b: Brush) -> Tensor:
    """Returns the distance of lines 1.6 thick, one every 3.6."""
    return ((b.y / 3.6 - 0.1).frac().abs() - 0.5).abs() * 3.6 - 0.8


def figure(b: Brush, kind: str, scenes: list[Scene]) -> None:
    """Paints scenes of one kind with a brush whose (0, 0) is the ground below the figure."""
    def colours(name: str) -> Tensor:           # (n, 3)
        return rgb([getattr(s, name) or "white" for s in scenes])

    def having(name: str, value: str | None = None) -> Tensor | None:
        """Returns 1.0 for scenes that have this, or this value of it: (n, 1, 1); None if none."""
        has = [getattr(s, name) == value if value else bool(getattr(s, name)) for s in scenes]
        return torch.tensor(has)[:, None, None].float() if any(has) else None

    fur, is_vase = colours("fur"), kind == "vase"
    body, head, ears, face = globals()[kind](b)
    b.paint(b.oval(0, 0.2, 7.0, 1.3), (20, 20, 30), 0.3)                # the shadow
    shapes = [body] if is_vase else [torch.minimum(body, ears), head]
    furry = torch.zeros_like(body)                                      # cover, (n, side, side)
    for shape in shapes:
        b.paint(shape - 0.75, fur * 0.38)                               # the outline
        furry = torch.maximum(furry, b.paint(shape, fur))
    right = (b.x / b.pixel + 0.5).clamp(0, 1)                           # cover of the right half
    if (shown := having("half")) is not None:
        b.paint(torch.stack(shapes).amin(0), colours("half"), right * shown)
    if (shown := having("ear")) is not None:
        b.paint(ears, colours("ear"), right * shown)
    if not is_vase:                                                     # no pattern on the face
        furry = furry * (0.5 + b.oval(0, -12.2, 5.0, 3.2)).clamp(0, 1)
    for pattern, distance in (("striped", stripes), ("spotted", spots)):
        if (shown := having("pattern", pattern)) is not None:
            b.paint(distance(b), fur * 0.5, furry * shown)
    face()
    if (shown := having("star")) is not None:
        b.paint(b.star(0, -4.6, 3.3), colours("star"), shown)
    for worn, wear in (("scarf", scarf), ("bow", bow)):
        if (shown := having("neck", worn)) is not None:
            wear(b, -12.2 if is_vase else -7.6, colours("neck_colour"), shown)
    if (shown := having("hat")) is not None:
        top = b.moved(0, -3.6) if kind == "frog" else b                 # above a frog's eyes
        (flower if is_vase else hat)(top, colours("hat"), shown)


def draw(scenes: list[Scene], side: int = SIDE) -> Tensor:
    """Draws scenes -> (n, 3, side, side), values in [0, 1].

    Raises KeyError for an unknown kind, place or colour.
    """
    pictures, alike = torch.empty(len(scenes), 3, side, side), defaultdict(list)
    for i, scene in enumerate(scenes):
        alike[scene.kind, scene.place].append(i)
    for (kind, place), those in alike.items():
        group = [scenes[i] for i in those]
        x, y, size, drift = (torch.tensor([getattr(s, name) for s in group])[:, None, None]
                             for name in ("x", "y", "size", "drift"))
        b = Brush(len(group), side)
        globals()[place](b, b.moved(drift))
        figure(b.moved(16 + x, 28.5 + y, size), kind, group)
        pictures[those] = b.image
    return pictures
