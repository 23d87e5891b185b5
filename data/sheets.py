"""Writes rows of pictures, with their titles, into one PNG file."""
import textwrap
from pathlib import Path

import torch
from torch import Tensor

from support.files import atomic_write

CELL, GAP, LINE = 128, 8, 12    # points of a small picture's side, between two, and of a text line


def save_sheet(path: Path, rows: dict[str, Tensor], titles: list[str]) -> None:
    """Writes pictures as large squares: each row has its name above it, the first columns a title.

    rows: name -> pictures (n, 3, side, side) in [0, 1], of any n.
    """
    from PIL import Image, ImageDraw  # here, since only pictures need it
    side = next(iter(rows.values())).shape[-1]
    cell = side * max(1, CELL // side)
    lines = [textwrap.wrap(title, cell // 7) for title in titles]
    foot = LINE * max(map(len, lines), default=0)
    columns = max(len(titles), *map(len, rows.values()))
    tall, wide = cell + LINE + GAP, cell + GAP
    sheet = Image.new("RGB", (GAP + wide * columns, GAP + tall * len(rows) + foot), "white")
    pen = ImageDraw.Draw(sheet)
    for r, (name, pictures) in enumerate(rows.items()):
        pen.text((GAP, GAP + r * tall), name, fill="black")
        for c, picture in enumerate(pictures):
            points = (picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
            large = Image.fromarray(points.numpy()).resize((cell, cell), Image.Resampling.NEAREST)
            sheet.paste(large, (GAP + c * wide, GAP + r * tall + LINE))
    for c, text in enumerate(lines):
        pen.text((GAP + c * wide, GAP + tall * len(rows)), "\n".join(text), fill="black", spacing=1)
    with atomic_write(path) as temporary:
        sheet.save(temporary, "PNG")
