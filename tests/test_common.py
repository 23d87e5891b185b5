import pytest

from common import Parser, UserError, atomic_write, exit_on_user_error, nearest


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


def test_other_errors_are_not_hidden():
    @exit_on_user_error
    def main():
        raise KeyError("bug")
    with pytest.raises(KeyError):
        main()


def test_an_unknown_flag_or_word_is_told_its_nearest_neighbour():
    parser = Parser("docs")
    parser.add_argument("--rank", type=int)
    for flags, said in ((["--rnak", "3"], "did you mean --rank"), (["--rank", "x"], "--rank"),
                        (["--ran", "3"], "--ran")):
        with pytest.raises(UserError, match=said):
            parser.parse_args(flags)
    assert nearest("zzz", ["lora", "dual"]) == "; known: lora, dual"
