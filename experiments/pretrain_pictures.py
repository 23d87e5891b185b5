"""Trains data/pictures, the small text-to-image model that ships, on the drawn world.

    python -m experiments.pretrain_pictures                 # the shipped model, from nothing
    python -m experiments.pretrain_pictures --steps 300 --out /tmp/pictures     # a quick look
A killed run goes on from its last checkpoint, since a step's scenes depend on the seed and the step
alone. Optimizer and schedule are those of experiments/pretrain.py, at another peak. Captions leave
out each part of a scene with probability .1, so that "cat at night" means any cat. A tenth of them
is empty, for guidance. The words of data.pictures.SUBJECTS have embeddings, but are never read.
"""
import itertools
import random
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor

from data.likeness import attributes, read_scene
from data.pictures import PARTS, VOCABULARY, Scene, caption, draw, random_scene
from data.subject import draw_captions
from diffusion import PictureConfig, PictureModel, flow_loss
from experiments.pretrain import parse_flags, train
from formats.checkpoint import save_pretrained
from formats.pictures import Words, save_words
from support.errors import exit_on_user_error
from support.run import ROOT

STEPS = 6000
PICTURES = 64               # of a step
PEAK_LR = 3e-3              # in a trial of 250 steps, 1e-3 learnt more slowly
UNSAID, EMPTY = 0.1, 0.1    # shares of the parts that a caption leaves out, and of empty captions
EVERY, HELD_OUT = 1500, 200  # steps between two reports, and prompts of a report


def scenes_of_step(seed: int, step: int) -> tuple[list[Scene], list[str]]:
    """Makes the scenes of one step, and a caption for each."""
    rng = random.Random(f"pictures-{seed}-{step}")
    scenes = [random_scene(rng) for _ in range(PICTURES)]
    said = [caption(scene, [part for part in PARTS if rng.random() > UNSAID])
            if rng.random() > EMPTY else "" for scene in scenes]
    return scenes, said


def batch_of_step(words: Words, length: int, seed: int, step: int) -> tuple[Tensor, ...]:
    """Draws the scenes of one step, the arguments of flow_loss() after the model.

    Returns pictures (B, 3, S, S) in [-1, 1], captions (B, length), times (B,) and noise.
    """
    scenes, said = scenes_of_step(seed, step)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    pictures = 2 * draw(scenes) - 1
    t = torch.randn(PICTURES, generator=generator).sigmoid()        # most are near the middle
    noise = torch.randn(pictures.shape, generator=generator)
    return pictures, words.batch(said, length), t, noise


def report_scores(model: PictureModel, words: Words, seen: set[str] = frozenset(),
                  n: int = HELD_OUT) -> dict[str, float]:
    """Draws n captions that are not in `seen`; returns the share of pictures with each part right.
    """
    rng, generator = random.Random("pictures-report"), torch.Generator().manual_seed(0)
    scenes = list(itertools.islice((scene for scene in iter(lambda: random_scene(rng), None)
                                    if caption(scene) not in seen), n))
    c = model.config
    noise = torch.randn(n, 3, c.side, c.side, generator=generator)
    drawn = draw_captions(model, words, list(map(caption, scenes)), noise)
    right = [[said[part] == read[part] for part in said] for said, read in
             ((attributes(scene), attributes(read_scene(picture)))
              for scene, picture in zip(scenes, drawn))]
    return {part: sum(column) / n for part, column in zip(attributes(scenes[0]), zip(*right))}


def save_base(model: PictureModel, words: Words, folder: Path) -> None:
    """Writes the model in half precision, and its words."""
    save_pretrained(deepcopy(model).half(), folder)
    save_words(words, folder / "words.txt")


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    args = parse_flags(__doc__, STEPS, f"{PICTURES} pictures", ROOT / "data" / "pictures", argv)
    config, words = PictureConfig(n_words=1 + len(VOCABULARY)), Words(VOCABULARY)
    model = PictureModel(config).init_weights(torch.Generator().manual_seed(args.seed))

    def add_gradients(step: int) -> float:
        loss = flow_loss(model, *batch_of_step(words, config.caption, args.seed, step)).mean()
        loss.backward()
        return loss.item()

    seen = {text for step in range(args.steps) for text in scenes_of_step(args.seed, step)[1]}
    recipe = config, VOCABULARY, PICTURES, PEAK_LR, UNSAID, EMPTY
    train(model, args, recipe, add_gradients, lambda: report_scores(model, words, seen),
          lambda: save_base(model, words, args.out), PEAK_LR, EVERY)


if __name__ == "__main__":
    main()
