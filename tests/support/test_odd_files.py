"""Checks that a pipe or a device in the place of any input ends a command at once, in one line."""
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from conftest import BASE
from runs import ITEMS, SHORT, refused

import convert
import eval as evaluation
import train
from experiments import analyze
from formats.checkpoint import load_pretrained, save_pretrained
from formats.peft import export_peft
from methods import inject

MODEL = ["config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json",
         "special_tokens_map.json", "added_tokens.json", "tokenizer.json", "tokenizer.model",
         "vocab.json", "vocab.txt", "spm.model", "x.tiktoken"]
RUN = ["config.json", "adapter.safetensors", "result.json", "log.jsonl"]
PEFT = ["adapter_config.json", "adapter_model.safetensors"]
ROW = {"instruction": "So?\n\nAnswer format: true/false", "output": "it is true", "answer": "true"}
TASKS = {           # task -> its files
    "jsonl": {"items.jsonl": "\n".join(map(json.dumps, ITEMS))},
    "text": {"words.txt": "Some words to learn from. " * 20},
    "commonsense": {"boolq/test.json": json.dumps([ROW] * 2),
                    "boolq/train.json": json.dumps([ROW] * 4)},
    "e2e": {f"{name}.txt": "name : A||A is there .\n" * 3 for name in ("train", "valid", "test")},
    "glue/rte": {name: "index\tsentence1\tsentence2\tlabel\n" + "0\ta\tb\tentailment\n" * 9
                 for name in ("train.tsv", "dev.tsv")},
}


@pytest.fixture(params=["pipe", "device"])
def odd(request):
    """odd(path) puts a pipe that nobody writes to, or /dev/zero, in the place of a file."""
    def put(path: Path) -> None:
        path.unlink(missing_ok=True)
        if request.param == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to("/dev/zero")
    return put


@pytest.fixture(autouse=True)
def in_time():
    """Ends a test that reads on and on."""
    def too_long(*_):
        raise AssertionError("still at work after ten seconds")
    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def check(capsys, path: Path, *flags, main=train.main) -> None:
    line = refused(capsys, *map(str, flags), main=main)
    assert path.name in line and "not a regular file" in line


@pytest.mark.parametrize("name", MODEL)
def test_in_a_model(name, odd, tmp_path, capsys):
    folder = Path(shutil.copytree(BASE, tmp_path / "model"))
    if name in ("tokenizer.json", "vocab.json", "vocab.txt", "x.tiktoken", "tokenizer.model",
                "spm.model"):
        next(folder.glob("*.tiktoken")).unlink()
    odd(folder / name)
    check(capsys, folder / name, "--model", folder, "--prompt", "Hi", main=evaluation.main)


@pytest.mark.parametrize("name", RUN)
def test_in_a_run(name, odd, plain, tmp_path, capsys):
    folder = Path(shutil.copytree(plain("lora"), tmp_path / "run"))
    odd(folder / name)
    if name in ("result.json", "log.jsonl"):
        check(capsys, folder / name, folder, main=analyze.main)
    else:
        check(capsys, folder / name, "--run", folder, "--prompt", "Hi", main=evaluation.main)


@pytest.mark.parametrize("name", ["checkpoint.pt", "log.jsonl", "config.json"])
def test_in_a_run_that_goes_on(name, odd, plain, tmp_path, capsys):
    folder = Path(shutil.copytree(plain("lora"), tmp_path / "run"))
    (folder / "result.json").unlink()
    odd(folder / name)
    check(capsys, folder / name, "--resume", "--out", folder)


@pytest.mark.parametrize("name", PEFT)
def test_in_adapters_of_peft(name, odd, tmp_path, capsys):
    folder = tmp_path / "peft"
    export_peft(inject(load_pretrained(BASE)[0], "lora", ["q"], rank=1), folder)
    odd(folder / name)
    check(capsys, folder / name, "--from-peft", folder, "--model", BASE, "--to", tmp_path / "out",
          main=convert.main)


@pytest.mark.parametrize("task", TASKS)
def test_in_data(task, odd, tmp_path, capsys):
    files = TASKS[task]
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    place = ["--data", tmp_path / next(iter(files))] if len(files) == 1 else ["--data-dir",
                                                                              tmp_path]
    odd(tmp_path / next(iter(files)))
    line = refused(capsys, "--method", "lora", "--task", task, *map(str, place), *SHORT, "--out",
                   str(tmp_path / "run"))
    assert next(iter(files)) in line


def test_a_merge_copies_no_pipe(odd, plain, tmp_path, capsys):
    folder = tmp_path / "model"
    model, _ = load_pretrained(BASE)
    save_pretrained(model, folder)
    shutil.copy(next(BASE.glob("*.tiktoken")), folder)
    run = Path(shutil.copytree(plain("lora"), tmp_path / "run"))
    config = json.loads((run / "config.json").read_text())
    config["args"]["model"] = str(folder)
    (run / "config.json").write_text(json.dumps(config))
    odd(folder / "chat_template.jinja")
    assert "chat_template.jinja: " in refused(capsys, "--run", str(run), "--to",
                                              str(tmp_path / "merged"), main=convert.main)
