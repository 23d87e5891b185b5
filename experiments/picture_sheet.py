"""Draws README's sheet of the picture world: each kind by the world, and by data/pictures.

    python -m experiments.picture_sheet --out assets        # world.png
"""
import random
from pathlib import Path

import torch

from data import PICTURES
from data.pictures import KINDS, caption, draw, random_scene
from data.sheets import save_sheet
from data.subject import draw_captions
from formats.checkpoint import load_pretrained
from support.errors import exit_on_user_error
from support.parser import Parser


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("."), help="the folder of world.png (.)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the scenes and the noise (0)")
    args = parser.parse_args(argv)
    rng, generator = random.Random(args.seed), torch.Generator().manual_seed(args.seed)
    scenes = [random_scene(rng, kind=kind) for kind in KINDS]
    captions = list(map(caption, scenes))
    model, words = load_pretrained(PICTURES, torch.float32)
    noise = torch.randn(len(scenes), 3, model.config.side, model.config.side, generator=generator)
    save_sheet(args.out / "world.png", {
        "drawn by the world": draw(scenes),
        "drawn by the model": draw_captions(model, words, captions, noise)}, captions)
    print(args.out / "world.png")


if __name__ == "__main__":
    main()
