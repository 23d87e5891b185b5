"""Draws figures of what the methods learnt, from the folders of saved runs.

    python -m experiments.analyze runs    # every figure that these runs allow, into runs/figures
    python -m experiments.analyze runs --figures loss,spectra --out assets
    python -m experiments.analyze runs/facts-dual-r8-s0     # one run alone

The runs are those of a sweep (ablate.py). A figure of one rank takes the rank with the most runs;
of several such ranks the largest. A figure by step needs snapshots: give train.py or ablate.py
--snapshot-every. Beside each PNG stand its numbers as JSON. The docstring of a figure's function
says what they are.
"""
from pathlib import Path

from experiments.figures.directions import draw_budget, draw_directions
from experiments.figures.inside import draw_dora, draw_signs, draw_spectra
from experiments.figures.pictures import draw_pictures
from experiments.figures.scores import draw_loss, draw_rates, draw_score, draw_tradeoff
from experiments.figures.updates import draw_updates
from experiments.learnt import Lacking, read_sweep
from experiments.plots import save_figure
from support.errors import UserError, exit_on_user_error, nearest
from support.parser import Parser

FIGURES = {"updates": draw_updates, "loss": draw_loss, "score": draw_score, "rates": draw_rates,
           "tradeoff": draw_tradeoff, "spectra": draw_spectra, "dora": draw_dora,
           "budget": draw_budget, "directions": draw_directions, "signs": draw_signs,
           "pictures": draw_pictures}


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("runs", help="the folder that holds the runs' folders, or one of these")
    parser.add_argument("--figures", help=f"comma-separated: {', '.join(FIGURES)} (all that the "
                                          "runs allow)")
    parser.add_argument("--out", type=Path, help="the folder of the figures (RUNS/figures)")
    args = parser.parse_args(argv)
    asked = list(FIGURES) if args.figures is None else args.figures.split(",")
    for name in asked:
        if name not in FIGURES:
            raise UserError(f"--figures {name}: unknown{nearest(name, FIGURES)}")
    sweep = read_sweep(args.runs)
    for name in asked:
        try:
            figure, numbers = FIGURES[name](sweep)
        except Lacking as error:
            if args.figures is not None:
                raise UserError(f"{name}: {error}") from None
            print(f"{name}: {error}")
            continue
        path = (args.out or Path(args.runs, "figures")) / f"{name}.png"
        save_figure(figure, path, numbers)
        print(path)


if __name__ == "__main__":
    main()
