"""Checks that the rows people have become the examples that they mean."""
import json
from pathlib import Path

import pytest
from runs import refused, result_of, setup_of
from small_tokenizers import save_trained, write_json
from transformers import PreTrainedTokenizerFast

import train
from data import load_task
from data.rows import BY_TEMPLATE, read_examples
from data.task import encode
from formats.tokenizer import load_tokenizer
from support.errors import UserError

CHAT = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi, you"},
        {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "And <b>now</b>?"},
        {"role": "assistant", "content": "Bye, see you"}]
TEMPLATES = {
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
              "{{ '<|endoftext|>\n' }}{% endfor %}"
              "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "bos, a filter and blocks that are trimmed":
        "{{ bos_token }}\n    {%- for m in messages %}\n    {%- if m.role == 'system' %}\n"
        "        {%- continue %}\n    {%- endif %}\n"
        "{{ m.role | upper }} {{ m | tojson }}\n    {% endfor %}\n"
        "{%- if add_generation_prompt %}ASSISTANT {\"role\": {% endif %}",
    "marks of the assistant's turns":
        "{% for m in messages %}{{ m.role }}: {% generation %}{{ m.content }}{% endgeneration %}\n"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
}


@pytest.fixture
def write(tmp_path):
    """write(rows) makes a file of JSON lines, write(rows, array=True) of one array."""
    def written(rows: list, array: bool = False) -> str:
        lines = json.dumps(rows, indent=1) if array else "\n\n".join(map(json.dumps, rows))
        (tmp_path / "rows.json").write_text(lines)
        return str(tmp_path / "rows.json")
    return written


def chat_folder(tmp_path, **settings) -> Path:
    folder = tmp_path / "tokenizer"
    folder.mkdir(exist_ok=True)
    save_trained("gpt2", folder)
    return write_json(folder, tokenizer_config={
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<tool>",
        "eos_token": "<|endoftext|>"} | settings)


def examples_of(path: str, tokenizer) -> list[tuple[str, str]]:
    return [(e.prompt, e.target) for e in read_examples(path, tokenizer)[0]]


@pytest.mark.parametrize("array", [False, True])
def test_pairs_and_alpaca_rows_stand_together(base, write, array, capsys):
    rows = [{"prompt": "Colour a: ", "target": "red", "more": 1},
            {"instruction": "Add.", "input": "1 2", "output": "3"},
            {"instruction": "Sing.", "input": "", "output": " La\n"},
            {"instruction": "Say nothing.", "input": "", "output": ""},
            {"instruction": "Sing.", "output": "La"}]
    assert examples_of(write(rows, array), base[1]) == [
        ("Colour a: ", "red"), ("Add.\n\n1 2\n\nResponse:", " 3"), ("Sing.\n\nResponse:", " La"),
        ("Sing.\n\nResponse:", " La")]
    assert "1 rows with an empty output" in capsys.readouterr().err


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("place", ["tokenizer_config.json", "a list there", "chat_template.jinja"])
def test_a_chat_is_written_as_transformers_writes_it(tmp_path, write, name, place):
    template = TEMPLATES[name]
    if place == "chat_template.jinja":
        folder = chat_folder(tmp_path, chat_template="not this one")
        (folder / place).write_text(template)
    else:
        listed = [{"name": "tools", "template": "no"}, {"name": "default", "template": template}]
        folder = chat_folder(tmp_path, chat_template=template if "json" in place else listed)
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    (example,), notes = read_examples(write([{"messages": CHAT}]), tokenizer)
    assert example.prompt == theirs.apply_chat_template(CHAT[:-1], add_generation_prompt=True,
                                                        tokenize=False)
    whole = theirs.apply_chat_template(CHAT, tokenize=False)
    assert whole.startswith(example.prompt + example.target)
    assert whole[len(example.prompt + example.target):] in ("", "<|endoftext|>\n")
    assert "Bye" in example.target and notes["chat"] == BY_TEMPLATE
    tokens = encode(example, tokenizer, 999).tokens
    assert tokens.count(tokenizer.bos) == 1 and tokens[-1] == tokenizer.eos
    if name == "chatml":        # all turns end with eos, and so does the target: once
        assert tokens == [tokenizer.bos, *theirs.apply_chat_template(CHAT, return_dict=False)[:-1]]


def test_a_turn_that_the_template_asks_for_in_other_words_keeps_its_own(tmp_path, write):
    folder = chat_folder(tmp_path, chat_template="{{ messages[-1].content }}"
                         "{% if add_generation_prompt %} Think: {% endif %}")
    assert examples_of(write([{"messages": CHAT}]), load_tokenizer(folder)) == [
        ("And <b>now</b>? Think: ", "Bye, see you")]


def test_an_empty_template_is_none_and_a_pad_beyond_the_vocabulary_is_no_fault(tmp_path, write):
    rows = write([{"messages": CHAT}])
    _, notes = read_examples(rows, load_tokenizer(chat_folder(tmp_path, chat_template="")))
    assert "no chat template" in notes["chat"]
    folder = write_json(chat_folder(tmp_path, chat_template=TEMPLATES["chatml"]),
                        config={"pad_token_id": 9999})
    tokenizer = load_tokenizer(folder)
    assert tokenizer.pad == 9999 and len(examples_of(rows, tokenizer)) == 1


def test_without_a_template_each_turn_is_a_paragraph(base, write):
    examples, notes = read_examples(write([{"messages": CHAT}]), base[1])
    assert examples[0].prompt == ("System: Be short.\n\nUser: Hi, you\n\nAssistant: Hello\n\n"
                                  "User: And <b>now</b>?\n\nAssistant:")
    assert examples[0].target == " Bye, see you" and "no chat template" in notes["chat"]


@pytest.mark.parametrize("template, said", [
    ("{{ raise_exception('no system role') }}", "no system role"), ("{% for %}", "Expected"),
    ("{{ nothing.at.all }}", "undefined"), ("{{ 1 / 0 }}", "division"),
    ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ("{% for a in range(5000) %}{% for b in range(5000) %}{% endfor %}{% endfor %}", "longer than"),
    (["x"], "unexpected layout"), (3, "is a int")])
def test_a_template_that_fails_is_one_line(tmp_path, write, template, said, monkeypatch):
    monkeypatch.setattr("formats.chat_template.SECONDS", 0.2)
    tokenizer = load_tokenizer(chat_folder(tmp_path, chat_template=template))
    with pytest.raises(UserError, match=said) as caught:
        read_examples(write([{"messages": CHAT}]), tokenizer)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("row", [
    {"messages": []}, {"messages": "Hi"}, {"messages": [{"role": "user"}]},
    {"messages": CHAT[:2]}, {"messages": [*CHAT[:1], {"role": "assistant", "content": " "}]},
    {"messages": [{"role": "assistant", "content": ["Hi"]}]},
    {"instruction": 3, "output": "x"}, {"instruction": "x", "output": []}, {"instruction": "x"}, {"prompt": "x"}, 3, None, ["x"]])
@pytest.mark.parametrize("array", [False, True])
def test_a_row_of_no_form_is_named(base, write, row, array):
    path = write([{"prompt": "a", "target": "b"}, row], array)
    with pytest.raises(UserError, match=r"rows\.json(, row 2|:3): "):
        load_task("jsonl", setup_of(*base, 256), data=path)


def test_the_header_tells_which_rows_are_held_out_and_how_chats_are_written(
        write, empty_folder, capsys):
    path = write([{"messages": CHAT}] * 30, array=True)
    flags = ["--method", "lora", "--task", "jsonl", "--data", path, "--steps", "1", "--skip-before"]
    train.main([*flags, "--out", "run"])
    printed = capsys.readouterr().out
    assert ("held_out: rows 25 to 27 for validation, rows 28 to 30, the last, for the test"
            in printed)
    assert "chat: the tokenizer has no chat template" in printed
    assert result_of("run")["notes"]["held_out"].startswith("rows 25 to 27")
    assert "rows.json, row 1: " in refused(capsys, *flags, "--max-length", "3", "--out", "other")


def test_a_border_that_the_tokenizer_joins_is_counted_once_and_said(write, empty_folder, capsys):
    path = write([{"prompt": f"Colour {i}: ", "target": "red"} for i in range(10)])
    train.main(["--method", "lora", "--task", "jsonl", "--data", path, "--steps", "1",
                "--skip-before", "--out", "run"])
    assert result_of("run")["apart"] == {"train": 8, "held out": 2}
    assert "8 train and 2 other examples have a target that the" in capsys.readouterr().out
