"""Paints shapes with smooth edges, for data/pictures.py.

A shape is its signed distance: how far each pixel is outside it, negative inside. So the same shape
can be drawn at any size. A pixel is covered about as far as its square lies inside.
"""
import math
from copy import copy

import torch
from torch import Tensor

SIDE = 32           # rows and columns of a picture, unless it is drawn larger


class Brush:
    """Paints n pictures (n, 3, side, side) at once, into `image`, with values in [0, 1].

    A picture is SIDE units wide, whatever its side. x and y (n, side, side) are the places of the
    pixels' middles, from the top left corner.
    """

    def __init__(self, n: int, side: int):
        middles = (torch.arange(side) + 0.5) * SIDE / side
        self.x = middles[None, None, :].expand(n, side, side)
        self.y = middles[None, :, None].expand(n, side, side)
        self.pixel = torch.full((n, 1, 1), SIDE / side)     # the edge of a pixel, in units
        self.image = torch.zeros(n, 3, side, side)

    def moved(self, x: Tensor, y: Tensor | float = 0.0, size: Tensor | float = 1.0) -> "Brush":
        """Returns a brush that paints on the same image, with its zero at (x, y).

        Its units are `size` times as long. x, y, size: numbers, or (n, 1, 1).
        """
        other = copy(self)
        other.x, other.y, other.pixel = (self.x - x) / size, (self.y - y) / size, self.pixel / size
        return other

    def paint(self, distance: Tensor, colour: Tensor | tuple[int, int, int],
              only: Tensor | float = 1.0) -> Tensor:
        """Lays a colour over a shape, in `image`; returns the cover of each pixel (n, side, side).

        distance: (n, side, side). colour: (n, 3) in [0, 1], or three numbers from 0 to 255.
        only: paints this share of the shape; a number, (n, 1, 1) or (n, side, side).
        """
        if not torch.is_tensor(colour):
            colour = torch.tensor([colour]) / 255
        cover = (0.5 - distance / self.pixel).clamp(0, 1) * only
        self.image.add_(cover[:, None] * (colour[:, :, None, None] - self.image))
        return cover

    def fill(self, colour: tuple[int, int, int]) -> None:
        """Paints all of the pictures."""
        self.paint(torch.full_like(self.x, -SIDE), colour)

    # ---- signed distances (n, side, side), true along edges, near the truth at corners.
    # pair=True draws a shape at x > 0 a second time, mirrored at x = 0.
    def across(self, pair: bool) -> Tensor:
        return self.x.abs() if pair else self.x

    def oval(self, x, y, rx, ry, pair=False) -> Tensor:
        """Returns the distance of an ellipse about (x, y), with half axes rx and ry.

        With length l = |((x - x0) / rx, (y - y0) / ry)| it is (l - 1) / |gradient of l|.
        """
        u2 = ((self.across(pair) - x) / rx).square()
        v2 = ((self.y - y) / ry).square()
        length = (u2 + v2).sqrt().clamp(min=1e-6)               # 0 in the very middle
        slope = (u2 / rx ** 2 + v2 / ry ** 2).sqrt().clamp(min=1e-6 / max(rx, ry))
        return (length - 1) * length / slope

    def box(self, x, y, w, h, pair=False) -> Tensor:
        """Returns the distance of a rectangle about (x, y), 2 w wide and 2 h high."""
        return torch.maximum((self.across(pair) - x).abs() - w, (self.y - y).abs() - h)

    def line(self, x0, y0, x1, y1, r, pair=False) -> Tensor:
        """Returns the distance of a line with round ends, 2 r thick."""
        px, py, dx, dy = self.across(pair) - x0, self.y - y0, x1 - x0, y1 - y0
        along = ((px * dx + py * dy) / (dx * dx + dy * dy)).clamp(0, 1)
        return ((px - along * dx) ** 2 + (py - along * dy) ** 2).sqrt() - r

    def triangle(self, a, b, c, pair=False) -> Tensor:
        """Returns the distance of a triangle; its corners turn clockwise, as one sees the picture."""
        px, sides = self.across(pair), []
        for (x0, y0), (x1, y1) in ((a, b), (b, c), (c, a)):
            dx, dy = x1 - x0, y1 - y0
            sides.append(((px - x0) * dy - (self.y - y0) * dx) / math.hypot(dx, dy))
        return torch.stack(sides).amax(0)

    def star(self, x, y, r) -> Tensor:
        """Returns about the distance of a star of five round tips, r from its middle to a tip."""
        px, py = self.x - x, self.y - y
        wave = 0.72 + 0.28 * (5 * torch.atan2(px, -py)).cos()           # .44 r between the tips
        return ((px * px + py * py).sqrt() - r * wave) * 0.8            # .8: the edge is slanted

    def above(self, y) -> Tensor:
        """Returns the distance of all that lies above y, a number or (n, side, side)."""
        return self.y - y

    def below(self, y) -> Tensor:
        """Returns the distance of all that lies below y."""
        return y - self.y
