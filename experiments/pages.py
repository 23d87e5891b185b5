"""Makes the tables of README.md and RESULTS.md and writes them between their marks."""
import re
import sys
from pathlib import Path
from statistics import fmean
from textwrap import fill

from experiments.grid import typed
from experiments.results import SavedRun, within_noise
from experiments.table import Found, at_edge, edge, markdown, metric_of, plus_minus, rows_of
from methods import METHODS
from support.errors import UserError
from support.files import atomic_write
from support.run import ROOT

# The page of each table. A table in RESULTS.md has the name of the part whose runs it shows.
PAGES = {"methods": "README.md", "claims": "RESULTS.md", "facts": "RESULTS.md",
         "mini": "RESULTS.md", "choices": "RESULTS.md", "defaults": "RESULTS.md"}
NOT_MEASURED = "not measured"


# ---- marks
def split_page(name: str) -> tuple[str, str, str]:
    """Cuts a page at the two marks of a table: text before, table, text after.

    Raises UserError if the marks do not each stand there once, in order.
    """
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
    page = ROOT / PAGES[name]
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    table, found, after = rest.partition(end)
    if not found or begin in rest or end in before + after:
        raise UserError(f"{page}: needs {begin.strip()} and, later, {end.strip()}, each once")
    return before + begin, table, end + after


def put_table(name: str, table: str) -> None:
    """Replaces a table on its page."""
    before, _, after = split_page(name)
    with atomic_write(ROOT / PAGES[name]) as path:
        path.write_text(before + table + after, encoding="utf-8")


# ---- tables
def table_of_part(found: Found, best: Found) -> str:
    """Makes ablate.py's table of the chosen runs, by rank, with a note on its rates and commits."""
    order = list(METHODS)
    best = dict(sorted(best.items(), key=lambda item: (int(item[0].rank or 0),
                                                       order.index(item[0].method))))
    commits = sorted({(run.result["versions"].get("commit") or "unknown")[:7]
                      for runs in best.values() for run in runs})
    note = (f"Best at the lowest or highest rate tried: "
            f"{', '.join(at_edge(found, best)) or 'none'}. Commit {', '.join(commits)}.")
    return (markdown(rows_of(best, metric_of(found, None)))
            + "\n" + fill(note, 120) + "\n")


def row_of_choices(found: Found, best: Found) -> dict[str, str]:
    """Makes the row of a method's settings, each with its best learning rate, the best first.

    The scores are on validation. Bold marks a difference beyond noise from the method as it is.
    A ^ says that no higher rate was tried, a v that no lower one was.
    """
    as_it_is = next(iter(best))
    scores = {setting: [run.result["valid"]["new"] for run in runs]
              for setting, runs in best.items()}
    told = []
    for setting in sorted(best, key=lambda setting: fmean(scores[setting]), reverse=True):
        flags = " ".join(typed(name, value) for name, value in setting.varied if value)
        score = plus_minus(best[setting], "new", split="valid")
        bold = "" if within_noise(scores[setting], scores[as_it_is]) else "**"
        told.append(f"{f'`{flags}`' if flags else 'as it is'} {bold}{score}{bold}"
                    + edge(found[setting], best[setting]))
    return {"method": f"`{as_it_is.method}`", "validation `new`": "; ".join(told)}


def table_of_methods(old: str, runs: dict[str, list[SavedRun]]) -> str:
    """Makes the table of METHODS: update, file, trainable parameters, test scores.

    A formula that stands in the old table is kept, and so are the numbers of a method without
    `runs`. A new method gets the equation of its docstring.
    """
    head, rule, *rows = old.splitlines()
    known = {cells[0]: cells for cells in map(cells_of, rows)}
    columns, lines, seen = cells_of(head), [head, rule], set()
    for name, method in METHODS.items():
        cells = known.get(f"`{name}`") or [f"`{name}`", "", "",
                                           *[NOT_MEASURED] * (len(columns) - 3)]
        cells[1] = cells[1] or equation_of(method.layer)
        cells[2] = file_of(method.layer, with_length=method.layer not in seen)
        seen.add(method.layer)
        if name in runs:
            cells[3:] = [f"{runs[name][0].result['trainable']:,}",
                         *(plus_minus(runs[name], column.strip("`")) for column in columns[4:])]
        lines.append(f"| {' | '.join(cells)} |".replace("|  |", "| |"))
    return "\n".join(lines) + "\n"


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def file_of(layer: type | None, with_length: bool) -> str:
    """Names the file of a method's class, with its number of lines: `lora.py` (162)."""
    if layer is None:
        return ""
    name = f"`{layer.__module__.replace('.', '/')}.py`"
    if not with_length:
        return name
    text = Path(sys.modules[layer.__module__].__file__).read_text(encoding="utf-8")
    return f"{name} ({len(text.splitlines())})"


def equation_of(layer: type | None) -> str:
    """Finds a method's update: the last "W' = ..." in the docstring of its file, or of its class.

    A note after two spaces, a colon or a semicolon is left out. A bar would end the cell, so it
    becomes another sign.
    """
    if layer is None:
        return ""
    for doc in (sys.modules[layer.__module__].__doc__, layer.__doc__):
        equations = re.findall(r"W' = (.*?)(?:  |: |; |$)", doc or "", re.MULTILINE)
        if equations:
            return equations[-1].strip(" .:;,").replace("||", "‖").replace("|", "∣")
    return ""
