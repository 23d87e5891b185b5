"""Makes task `subject`: a creature learnt from four pictures, drawn where it was never seen.

The four pictures show the subject in four places, each with a caption such as "zib cat on the
beach". The word was never read in pretraining, and its embedding keeps its random start: the
adapters learn what to do with it. Before training the base draws prior pictures of all kinds. They
train beside the four, so that the model keeps what it could draw (DreamBooth: Ruiz et al. 2022,
arXiv 2208.12242, section 3.3; there the prior shows one kind only):
    loss = loss(subject) + loss(prior)        each of flow_loss() in diffusion.py
The world also draws the true picture of each held-out caption. The loss on validation is that of
these pictures, without a prior.
"""
import hashlib
import itertools
import random
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from data.brush import SIDE
from data.likeness import attributes, likeness, read_place, read_scene
from data.pictures import SUBJECTS, Scene, caption, draw, jitter, random_scene
from data.sheets import save_sheet
from data.task import PictureTask, Scores, Setup, device_of, scoring
from diffusion import flow_loss, sample
from formats.pictures import Words
from support.errors import UserError, nearest, require
from support.processes import is_main, joined, process_count, process_number

SEEN = ("beach", "snow", "forest", "room")      # the places of the four pictures
UNSEEN = ("night", "meadow")
PRIOR = 24                                      # pictures that the base draws
NOISES = 4800           # training examples, each with a noise of its own: enough for 600 steps
# The first number of the noises of each: those of training begin at 0.
VALID_NOISE, TEST_NOISE, PRIOR_NOISE, SHOWN_NOISE = (i * 10 ** 6 for i in (1, 2, 3, 4))
N = {"valid": 4, "test": 40}                    # prompts of each group
BATCH = 32                                      # pictures that are drawn at once


class Shot(NamedTuple):
    """Holds a caption, the scene that it tells, and the number of its noise."""
    caption: str
    scene: Scene
    group: str              # subject, kept, leak, or outside the splits: prior, shown
    noise: int
    prior: int = -1         # the number of the prior picture that trains beside it, -1 for none


def splits(word: str) -> dict[str, list[Shot]]:
    """Makes the examples: the four pictures, each with many noises, and prompts of three groups.

    subject: the subject in places unseen. kept: other scenes in any place, with all that a caption
    can say. leak: the subject's kind in places unseen, without its word.
    """
    rng, subject = random.Random(f"subject {word}"), SUBJECTS[word]

    def placed(place: str) -> Scene:
        return subject._replace(place=place, **jitter(rng))

    given = [placed(place) for place in SEEN]
    train = [Shot(named(word, given[i % 4]), given[i % 4], "subject", i,
                  (i + i // PRIOR) % PRIOR) for i in range(NOISES)]
    held_out = {}
    for first_noise, (split, n) in zip((VALID_NOISE, TEST_NOISE), N.items()):
        shots = []
        for i in range(n):
            place = UNSEEN[i % len(UNSEEN)]
            own, other = placed(place), random_scene(rng)
            same_kind = random_scene(rng, kind=subject.kind, place=place)
            shots += [Shot(named(word, own), own, "subject", 0),
                      Shot(caption(other), other, "kept", 0),
                      Shot(caption(same_kind, ["place"]), same_kind, "leak", 0)]
        held_out[split] = [shot._replace(noise=first_noise + i) for i, shot in enumerate(shots)]
    return {"train": train, **held_out}


def named(word: str, scene: Scene) -> str:
    """Says where the subject is, by its word: "zib cat on the beach"."""
    return f"{word} {caption(scene, ['place'])}"


def noise_of(shots: list[Shot]) -> tuple[Tensor, Tensor]:
    """Draws each shot's time and noise from its number: (n,), (n, 3, SIDE, SIDE).

    So an example has the same noise in any batch, process and run.
    """
    times, noises = [], []
    for shot in shots:
        own = torch.Generator().manual_seed(shot.noise)
        times.append(torch.randn((), generator=own).sigmoid())
        noises.append(torch.randn(3, SIDE, SIDE, generator=own))
    return torch.stack(times), torch.stack(noises)


def draw_captions(model, words: Words, captions: list[str], noise: Tensor) -> Tensor:
    """Draws a picture for each caption from its noise -> (n, 3, side, side) in [0, 1], on the CPU.

    Raises UserError if the model does not know a word, or a caption is too long for it.
    """
    device = device_of(model)
    rows = words.batch(captions, model.config.caption)
    with scoring(model):
        return torch.cat([sample(model, *(part.to(device) for part in parts)).cpu() / 2 + 0.5
                          for parts in zip(rows.split(BATCH), noise.split(BATCH))])


def draw_four(model, words: Words, caption: str) -> Tensor:
    """Draws a caption from four noises, the same in every call -> (4, 3, side, side)."""
    side = model.config.side
    noise = torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(0))
    return draw_captions(model, words, [caption] * 4, noise)


class Subject(PictureTask):
    """Trains on the four pictures; scores pictures by fitting our renderer (data/likeness.py).

    An example is a picture of the subject, with its prior picture.
    """
    look = '--prompt "{word} {kind} on the beach"'
    meaning = {
        "score": "mean of parts, place, kept and 1 - leak",
        "parts": "parts of the subject that have its colours, drawn in places unseen",
        "psnr": "likeness within the subject's silhouette, in dB",
        "place": "pictures of the subject in the place that was asked for",
        "kept": "parts of other captions that are drawn rightly",
        "leak": "parts of the subject in pictures of its kind without its word"}

    def __init__(self, word: str, setup: Setup):
        subject = SUBJECTS[word]
        super().__init__("subject", **splits(word), setup=setup,
                         defaults={"steps": 150, "batch_size": 8}, notes={"subject": word})
        self.subject = subject
        self.look = self.look.format(word=word, kind=subject.kind)
        self.flow_loss = torch.compile(flow_loss) if setup.compile else flow_loss
        rng = random.Random(f"prior {word}")
        self.prior_shots = [Shot(caption(scene), scene, "prior", PRIOR_NOISE + i)
                            for i, scene in enumerate(random_scene(rng) for _ in range(PRIOR))]
        other = random_scene(rng, place="meadow")
        told = [*(named(word, subject._replace(place=place)) for place in (*SEEN, *UNSEEN)),
                f"{subject.kind} at night", caption(other)]
        self.shown = [Shot(text, subject, "shown", SHOWN_NOISE + i) for i, text in enumerate(told)]
        self.prior = self.before = None         # pictures that the base draws: see begin()

    def begin(self, model) -> None:
        """Lets the base draw the prior pictures, and the row of show() before training.

        loss() on training examples and show() need it.
        """
        self.prior = 2 * self.pictures(model, self.prior_shots) - 1
        self.before = self.pictures(model, self.shown)

    def pictures(self, model, shots: list[Shot]) -> Tensor:
        """Draws the shots' captions by the model -> (n, 3, side, side) in [0, 1]."""
        return draw_captions(model, self.setup.tokenizer, [shot.caption for shot in shots],
                             noise_of(shots)[1])

    def loss(self, model, examples: list[Shot]) -> Tensor:
        t, noise = noise_of(examples)
        pictures = 2 * draw([shot.scene for shot in examples]) - 1
        captions = [shot.caption for shot in examples]
        prior = [shot.prior for shot in examples if shot.prior >= 0]
        if prior:                                               # all of them train, or none
            pictures = torch.cat((pictures, self.prior[prior]))
            captions += [self.prior_shots[i].caption for i in prior]
            t, noise = torch.cat((t, t)), torch.cat((noise, noise))     # the same for both
        words = self.setup.tokenizer.batch(captions, self.setup.config.caption)
        return self.flow_loss(model, *(part.to(device_of(model)) for part in (
            pictures, words, t, noise))).sum()

    def score(self, model, examples: list[Shot]) -> Scores:
        own = list(range(len(examples)))[process_number()::process_count()]
        shots, rows = [examples[i] for i in own], [None] * len(examples)
        drawn = self.pictures(model, shots) if own else []
        for i, shot, picture in zip(own, shots, tqdm(drawn, "reading", leave=False,
                                                     disable=not is_main())):
            rows[i] = self.judge(shot, picture)
        rows = joined(rows)

        def shares(group: str, key: str) -> list[float]:
            return [row[key] for row in rows if row["group"] == group]

        groups = {"parts": shares("subject", "parts"), "psnr": shares("subject", "psnr"),
                  "place": shares("subject", "right"), "kept": shares("kept", "right"),
                  "leak": shares("leak", "parts")}
        values = {key: sum(found) / len(found) for key, found in groups.items() if found}
        if len(values) == len(groups):              # --max-eval may leave a group out
            values = {"score": (values["parts"] + values["place"] + values["kept"]
                                + 1 - values["leak"]) / 4} | values
        # Wilson's interval is for shares of yes or no. These are means of fractions, which spread
        # no more, so the interval is not too narrow.
        return Scores(values, {key: len(groups[key]) for key in ("parts", "place", "kept", "leak")
                               if groups[key]}, rows)

    def judge(self, shot: Shot, picture: Tensor) -> dict:
        """Measures one picture, (3, side, side) in [0, 1], as its group asks."""
        row = {"group": shot.group, "prompt": shot.caption}
        if shot.group == "kept":
            scene = read_scene(picture)
            asked, found = attributes(shot.scene), attributes(scene)
            return row | {"read": caption(scene),
                          "right": sum(asked[key] == found[key] for key in asked) / len(asked)}
        place = read_place(picture)
        found = likeness(picture, self.subject._replace(place=place.place, drift=place.drift))
        right = place.place == shot.scene.place
        return row | found._asdict() | {"read": place.place, "right": right}

    def show(self, model, folder: Path) -> str:
        """Draws the subject in six places, its kind, and another scene; writes pictures.png."""
        given = [shot.scene for shot in self.train[:len(SEEN)]]
        now = self.pictures(model, self.shown)
        rows = {"the four pictures": draw(given),
                "before training": self.before}
        if not torch.equal(now, self.before):
            rows["after training"] = now
        path = folder / "pictures.png"
        if is_main():
            save_sheet(path, rows, [shot.caption for shot in self.shown])
        return str(path)

    def fingerprint(self) -> str:
        shots = self.train, self.valid, self.test, self.prior_shots
        captions = [shot.caption for shot in itertools.chain(*shots, self.shown)]
        self.setup.tokenizer.batch(captions, self.setup.config.caption)     # raises if one is unfit
        return hashlib.sha256(repr((self.notes, shots)).encode()).hexdigest()


def load(setup: Setup, subject: str = "zib") -> Subject:
    """Builds the task.

    Raises UserError for an unknown subject, for a model of another size than our pictures, or if
    Pillow is missing.
    """
    if setup.config.side != SIDE:
        raise UserError(f"--task subject: the model draws {setup.config.side} x "
                        f"{setup.config.side} points, the task {SIDE} x {SIDE}")
    if subject not in SUBJECTS:
        raise UserError(f"--subject {subject}: unknown{nearest(subject, SUBJECTS)}")
    require("PIL")
    return Subject(subject, setup)
