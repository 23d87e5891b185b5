"""load_tokenizer finds a folder's tokenizer, or refuses it in one line that names the file."""
import json

import pytest
from small_tokenizers import rank_lines, trained_json, write_json
from tokenizers import pre_tokenizers as pre

from formats.tokenizer import load_tokenizer
from support.errors import UserError


def test_a_folder_without_tokenizer_files_has_no_tokenizer(tmp_path):
    write_json(tmp_path, config={}, tokenizer_config={"bos_token": "<s>"})
    assert load_tokenizer(tmp_path) is None
    with pytest.raises(UserError, match="nowhere"):
        load_tokenizer(tmp_path / "nowhere")


def edited(**changes):
    """tokenizer.json with some of its model's fields, or of its own, replaced."""
    spec = json.loads(trained_json("gpt2"))
    for name, value in changes.items():
        (spec["model"] if name in spec["model"] else spec)[name] = value
    return {"tokenizer.json": json.dumps(spec)}


def split_at(pattern):
    """tokenizer.json with another split pattern."""
    return edited(pre_tokenizer={"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Removed", "invert": True},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]})


BAD_IDS = [-1, 1.5, float("inf"), float("nan"), 2**24, 2**31, 10**30, True, "1x"]
VOCAB = json.dumps({c: i for i, c in enumerate(sorted(pre.ByteLevel.alphabet()))})
BAD_FILES = {                                         # the first file is the one to be named
    "malformed JSON": {"tokenizer.json": "{"},
    "an empty file": {"tokenizer.json": ""},
    "not an object": {"tokenizer.json": "[1]"},
    "nothing in it": {"tokenizer.json": "{}"},
    "a model that is a list": {"tokenizer.json": '{"model": []}'},
    "another kind of model": {"tokenizer.json": '{"model": {"type": "WordPiece"}}'},
    "a merge of three": edited(merges=[["a", "b", "c"]]),
    "a merge whose union is missing": edited(merges=[["q", "q"]]),
    "an id used twice": edited(vocab={**json.loads(VOCAB), "ab": 0}, merges=[]),
    "an id that is no number": edited(vocab={**json.loads(VOCAB), "ab": "x"}, merges=[]),
    "an unknown normalizer": edited(normalizer={"type": "Lowercase"}),
    "an unknown pre-tokenizer": edited(pre_tokenizer={"type": "Sequence", "pretokenizers": [
        {"type": "Whitespace"}, {"type": "ByteLevel", "add_prefix_space": False}]}),
    "a pattern that does not compile": edited(pre_tokenizer=json.loads(
        trained_json("llama3").replace(r"\\p{N}{1,3}", r"\\p{N}{1,3}("))["pre_tokenizer"]),
    "a pattern that matches nothing": edited(pre_tokenizer={"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "a*"}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]}),
    "a pattern of 20,000 characters": split_at("a|b|" * 5000 + "c"),
    "a repeat of a repeat": split_at("(a{1000}){1000}"),
    "repeats without an end": split_at("x{0}((a{1000,}){1000,}){1000,}"),
    "a count of 9,000 digits": split_at(f"a{{{'9' * 9000}}}"),
    "a count above all memory": split_at("a{3,4000000000}"),
    "a nested pattern": split_at("(" * 4000 + "a" + ")" * 4000),
    "a pattern within itself": split_at(r"(?R)?a"),
    "dropout": edited(dropout=0.1),
    "an end-of-word suffix": edited(end_of_word_suffix="</w>"),
    "a token that is a word": edited(
        added_tokens=[{"id": 500, "content": "<m>", "single_word": True}]),
    "a token without an id": edited(added_tokens=[{"content": "<m>"}]),
    **{f"an added token with the id {i}": edited(added_tokens=[{"id": i, "content": "<m>"}])
       for i in BAD_IDS},
    **{f"the id {i} in added_tokens.json": {
        "added_tokens.json": json.dumps({"<a>": i}), "base.tiktoken": rank_lines()}
       for i in BAD_IDS},
    **{f"the id {i} in tokenizer_config.json": {"tokenizer_config.json": json.dumps(
        {"added_tokens_decoder": {i: {"content": "<a>"}}}), "base.tiktoken": rank_lines()}
       for i in BAD_IDS if i is not True},
    **{f"the id {i} in the vocabulary": edited(vocab={**json.loads(VOCAB), "ab": i}, merges=[])
       for i in BAD_IDS},
    **{f"the vocab_size {i}": {"config.json": json.dumps({"vocab_size": i}),
                               "base.tiktoken": rank_lines()} for i in BAD_IDS},
    "an eos that is too large": {"config.json": json.dumps({"eos_token_id": 2**31}),
                                 "base.tiktoken": rank_lines()},
    "a generation_config with too large an eos": {
        "generation_config.json": json.dumps({"eos_token_id": [2**31]}),
        "base.tiktoken": rank_lines()},
    "an added token that is a number": edited(added_tokens=[{"id": 500, "content": 5}]),
    "an added token that is a list": {
        "tokenizer_config.json": json.dumps({"added_tokens_decoder": {"300": {"content": ["a"]}}}),
        "base.tiktoken": rank_lines()},
    "a special token that is a number": {
        "special_tokens_map.json": json.dumps({"bos_token": {"content": ["a"]}}),
        "base.tiktoken": rank_lines()},
    **{f"100,000 brackets in {name}": {name: "[" * 10**5 + "]" * 10**5,
                                       "base.tiktoken": rank_lines()}
       for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                    "added_tokens.json", "config.json", "generation_config.json")},
    "100,000 brackets in vocab.json": {"vocab.json": "[" * 10**5, "merges.txt": "a b"},
    "no merges": {"merges.txt": None, "vocab.json": '{"a": 0, "b": 1, "ab": 2}'},
    "no vocabulary": {"vocab.json": None, "merges.txt": "a b\n"},
    "a line of merges with one token": {"merges.txt": "#version: 0.2\nab\n", "vocab.json": VOCAB},
    "a config that is no JSON": {"tokenizer_config.json": "no", "base.tiktoken": rank_lines()},
    "an odd vocab_size": {"config.json": '{"vocab_size": [1]}', "base.tiktoken": rank_lines()},
    "an added token's odd id": {"added_tokens.json": '{"<a>": []}', "base.tiktoken": rank_lines()},
    "an empty rank file": {"base.tiktoken": "\n"},
    "a rank file cut short": {"base.tiktoken": rank_lines("YWI= 256", "YWJj")},
    "a rank file that is not base64": {"base.tiktoken": rank_lines("a*b= 256")},
    "a rank missing": {"base.tiktoken": rank_lines("YWI= 257")},
    "a token twice": {"base.tiktoken": rank_lines("YQ== 256")},
    "bytes missing": {"base.tiktoken": "YQ== 0\nYg== 1\n"},
    "neither ranks nor sentencepiece": {"tokenizer.model": "ab\xff" * 50},
}


@pytest.mark.parametrize("files", BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_one_line_that_names_it(tmp_path, files):
    for name, text in files.items():
        if text is not None:
            (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_tokenizer(tmp_path)
    message = str(caught.value)
    assert next(iter(files)) in message and "\n" not in message and len(message) < 600


@pytest.mark.parametrize("pattern, text", [
    pytest.param(r"(?:(a|aa)+)(?=b)|\S", "a" * 60, id="tiktoken gives up and regex takes too long"),
    pytest.param(r"(?:\w|\w\w){1,16}(?=\x00)|\S", "a" * 300, id="tiktoken takes too long")])
def test_a_split_pattern_that_takes_too_long_is_given_up(tmp_path, monkeypatch, pattern, text):
    monkeypatch.setattr("formats.bpe.PATIENCE", 0.2)
    for name, content in split_at(pattern).items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=r"tokenizer\.json: split pattern .* takes too long"):
        load_tokenizer(tmp_path).encode(text)


def test_a_split_pattern_that_matches_between_characters_is_refused(tmp_path):
    """The b would be lost."""
    for name, content in split_at(r"a|(?=b)").items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=r"tokenizer\.json: .* matches the empty text"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("line", ["YWJj", "a*b= 257", "YWI= x"])
def test_a_bad_line_of_a_rank_file_is_named_by_its_number(tmp_path, line):
    (tmp_path / "base.tiktoken").write_text(rank_lines("YWI= 256", line))
    with pytest.raises(UserError, match="base.tiktoken: line 258:"):
        load_tokenizer(tmp_path)


def test_two_rank_files_are_one_too_many(tmp_path):
    for name in ("a.tiktoken", "b.tiktoken"):
        (tmp_path / name).write_text(rank_lines())
    with pytest.raises(UserError, match="more than one"):
        load_tokenizer(tmp_path)
