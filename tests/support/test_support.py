import os
import subprocess
import sys
from argparse import ArgumentTypeError

import pytest
from conftest import ROOT

from support.errors import UserError, exit_on_user_error, nearest, require
from support.files import atomic_write, new_file
from support.parser import Parser


def test_a_write_that_fails_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "deep" / "file"
    with atomic_write(path) as temporary:
        temporary.write_text("first")
    with pytest.raises(ZeroDivisionError):
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            1 / 0
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]


def test_a_path_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        with atomic_write(tmp_path / "file" / "below") as temporary:
            temporary.write_text("x")


def test_a_user_error_ends_a_script_with_one_line_and_status_2(capsys):
    @exit_on_user_error
    def main():
        raise UserError("file.json:\n  line 3")
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: file.json: line 3\n"


@pytest.mark.parametrize("error", [KeyError("bug"), OSError("a bug too: of no file")])
def test_other_errors_are_not_hidden(error):
    @exit_on_user_error
    def main():
        raise error
    with pytest.raises(type(error)):
        main()


def test_a_file_that_cannot_be_used_is_named_and_ctrl_c_is_no_traceback(tmp_path, capsys):
    @exit_on_user_error
    def main(act):
        act()

    def ctrl_c():
        raise KeyboardInterrupt

    for act, status, said in ((tmp_path.read_text, 2, f"error: {tmp_path}: Is a directory\n"),
                              (ctrl_c, 130, "stopped\n")):
        with pytest.raises(SystemExit) as stop:
            main(act)
        assert stop.value.code == status and capsys.readouterr().err == said


def test_a_new_file_follows_links_and_replaces_files_only(tmp_path):
    file, link = tmp_path / "file", tmp_path / "link"
    link.symlink_to(file)
    assert new_file(str(link)) == new_file(str(file)) == file
    file.write_text("old")
    assert new_file(str(file)) == file
    for wrong in (tmp_path, tmp_path / "no" / "file", "/dev/null"):
        with pytest.raises(ArgumentTypeError, match=str(wrong)):
            new_file(str(wrong))


def test_an_unknown_flag_or_word_is_told_its_nearest_neighbour():
    parser = Parser("docs")
    parser.add_argument("--rank", type=int)
    for flags, said in ((["--rnak", "3"], "did you mean --rank"), (["--rank", "x"], "--rank"),
                        (["--ran", "3"], "--ran")):
        with pytest.raises(UserError, match=said):
            parser.parse_args(flags)
    assert nearest("zzz", ["lora", "dual"]) == "; known: lora, dual"


def test_a_missing_package_is_named_with_the_file_to_install():
    require("torch", "json")
    with pytest.raises(UserError, match="package no_such_thing is missing: pip install -r requir"):
        require("torch", "no_such_thing")


@pytest.mark.slow
@pytest.mark.parametrize("command", [["ablate.py", "--methods", "lora"],
                                     ["-m", "experiments.bench"]])
def test_a_sweep_without_its_packages_is_one_line(command, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'scipy' else find(name, *rest)\n")
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 2 and done.stderr == (
        "error: the package scipy is missing: pip install -r requirements-results.txt\n")
