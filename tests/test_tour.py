"""tour.ipynb runs from top to bottom, and what is stored in it is what a reader should see."""
import ast
import re
import shutil
import sys
import tempfile
from pathlib import Path

import nbclient
import nbformat
import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow

TOUR = ROOT / "tour.ipynb"
LENGTHS = "STEPS, SEEDS = 300, (0, 1, 2)"       # the cell that makes the runs long


def read():
    return nbformat.read(TOUR, as_version=4)


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def files_in(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if "__pycache__" not in path.parts}


def printed_or_drawn(cell) -> list[str]:
    """The kinds of output that the cell asks for; a function it defines asks when it is called."""
    found, kinds = set(), {"print": "stream", "plt.show": "display_data"}
    todo = list(ast.parse(re.sub(r"(?m)^%.*$", "", cell.source)).body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef):
            continue
        if isinstance(node, ast.Call) and ast.unparse(node.func) in kinds:
            found.add(kinds[ast.unparse(node.func)])
        todo += ast.iter_child_nodes(node)
    return sorted(found)


def test_it_runs_from_top_to_bottom_and_writes_into_temporary_folders_alone(tmp_path, monkeypatch):
    house = tmp_path / "house"                  # the code, and none of what lies beside it
    for folder in ("data", "support", "formats", "experiments"):
        shutil.copytree(ROOT / folder, house / folder,
                        ignore=shutil.ignore_patterns("__pycache__", "*.pt"))
    for file in ROOT.glob("*.py"):
        shutil.copy(file, house)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, tempfile.mkdtemp(dir=tmp_path))
    before = files_in(house)
    notebook = read()
    [cell] = [cell for cell in notebook.cells if LENGTHS in cell.source]
    cell.source = cell.source.replace(LENGTHS, "STEPS, SEEDS = 8, (0, 1)")
    client = nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3",
                                     resources={"metadata": {"path": str(house)}})
    client.execute()                            # raises CellExecutionError, which shows the cell
    assert files_in(house) == before
    assert_as_a_reader_should_see(notebook)


def test_what_is_stored_is_what_a_reader_should_see():
    assert_as_a_reader_should_see(read())


def assert_as_a_reader_should_see(notebook) -> None:
    for number, cell in enumerate(code_cells(notebook), 1):
        assert cell.execution_count == number, cell.source          # run once, in order
        assert sorted({output.output_type for output in cell.outputs}) == \
            sorted(printed_or_drawn(cell)), cell.source             # no error, nothing by accident
        for output in cell.outputs:
            assert output.get("name", "stdout") == "stdout", output.text    # no bar, no warning
            assert ("image/png" in output.get("data", {})) == (
                output.output_type == "display_data")
            text = output.get("text", "") + output.get("data", {}).get("text/plain", "")
            assert not re.search(r"(?i)/(home|tmp|root|users|work|var)/|[a-z]:\\|warning", text)


def test_a_machine_s_name_and_python_are_not_in_it():
    assert read().metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"}}
    text = TOUR.read_text(encoding="utf-8")
    assert str(ROOT) not in text and sys.prefix not in text


def test_it_is_small_and_its_cells_are_short():
    assert TOUR.stat().st_size < 1_000_000
    for cell in code_cells(read()):
        lines = cell.source.splitlines()
        assert len(lines) <= 15 and max(map(len, lines)) <= 100
