"""What the figures share: a name and a colour a method, and the numbers beside each picture."""
import json
from collections import defaultdict
from pathlib import Path

import matplotlib
from PIL import Image

from support.files import atomic_write

matplotlib.use("Agg")           # files only: no window, no display needed
from matplotlib import pyplot as plt  # noqa: E402


class Labels(dict):
    """A method of one's own is called what METHODS calls it."""

    def __missing__(self, method: str) -> str:
        return method


LABELS = Labels({
    "full": "full", "lora": "LoRA", "lora+": "LoRA+", "dora": "DoRA", "adalora": "AdaLoRA",
    "dash": "LoRA-Dash", "dual": "Dual LoRA", "frozen": "frozen layer"})
# Okabe and Ito's palette, which colour-blind readers can tell apart; markers for print. Methods of
# one's own share what is left.
COLOURS = defaultdict(lambda: "#882255", {
    "full": "#000000", "lora": "#0072B2", "lora+": "#56B4E9", "dora": "#009E73",
    "adalora": "#E69F00", "dash": "#CC79A7", "dual": "#D55E00", "frozen": "#999999"})
MARKERS = defaultdict(lambda: "X", {
    "full": "s", "lora": "o", "lora+": "P", "dora": "^", "adalora": "D", "dash": "v", "dual": "*",
    "frozen": "."})


def line_of(method: str) -> dict:
    """plot()'s arguments for the method's line."""
    return {"color": COLOURS[method], "marker": MARKERS[method], "markersize": 5, "linewidth": 1.4}


def save_figure(figure: plt.Figure, path: Path, numbers) -> None:
    """Writes the PNG, and what it shows as JSON beside it."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
        colours = Image.open(temporary).convert("RGB").quantize(256)     # a third of the bytes
        colours.save(temporary, format="png", optimize=True)
    plt.close(figure)
    with atomic_write(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
