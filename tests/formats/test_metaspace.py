"""BPE with "▁" for a space gives the ids and the texts of transformers and tokenizers."""
import json
import random

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import (CORPUS, SNIPPETS, agree, ids_of, llama_json, llama_pieces, quick,
                              texts, trained_sentencepiece, write_json)
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from formats.tokenizer import load_tokenizer
from support.errors import UserError

TEXTS = ["", "a", " a", "  a  b ", "the mayor ", "\n\na\t b\r\n", "<s>the", "the</s>the",
         " <s> the</s> the", "<tool>>the<tool>", "<tool> the", "😀👨\u200d👩\u200d👧 北京 Ω≈ç√", "x" * 300,
         "▁a ▁ b", "   ", " " * 50 + "the mayor", "<unk>a<unk>", "é e\u0301", "<0x0A>\n\x00\ufeff",
         "12345 I'VE", CORPUS, "".join(SNIPPETS)]
SPACE = {"String": " "}
REPLACE = {"type": "Replace", "pattern": SPACE, "content": "▁"}
LEGACY = {"pre_tokenizer": None, "normalizer": {"type": "Sequence", "normalizers": [
    {"type": "Prepend", "prepend": "▁"}, REPLACE]}}


def metaspace(scheme, split):
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split}


LAYOUTS = {
    "Prepend and Replace": LEGACY,
    **{f"Metaspace {scheme}{' split' * split}": {"pre_tokenizer": metaspace(scheme, split)}
       for scheme in ("always", "first", "never") for split in (False, True)},
    "Metaspace decoder": {"pre_tokenizer": metaspace("first", True),
                          "decoder": metaspace("first", True)},
    "Gemma": {"normalizer": REPLACE, "pre_tokenizer": {
        "type": "Split", "pattern": SPACE, "behavior": "MergedWithPrevious", "invert": False}},
}
LAYOUTS["Gemma"]["decoder"] = {"type": "Sequence", "decoders": [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
    {"type": "Fuse"}]}


def both(folder):
    return load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_ids_and_text_are_those_of_transformers(tmp_path, layout):
    mine, reference = both(write_json(tmp_path, tokenizer=json.loads(llama_json()) | layout))
    assert (reference.bos_token_id, mine.vocab_size) == (mine.bos, 402)
    for text in TEXTS:
        agree(mine, reference, text)


@pytest.mark.parametrize("settings", [
    {}, {"legacy": False}, {"legacy": True}, {"add_prefix_space": False}, {"legacy": None},
    {"legacy": True, "add_prefix_space": True}, {"legacy": True, "add_prefix_space": False}], ids=str)
@pytest.mark.parametrize("files", ["tokenizer.model", "tokenizer.json", "both"])
def test_legacy_and_add_prefix_space_count_as_in_llama_tokenizer(tmp_path, files, settings):
    """The class disregards the steps of tokenizer.json."""
    if files != "tokenizer.json":
        (tmp_path / "tokenizer.model").write_bytes(llama_pieces())
    if files != "tokenizer.model":
        write_json(tmp_path, tokenizer=json.loads(llama_json()) | LEGACY)
    write_json(tmp_path, config={"model_type": "llama"},
               tokenizer_config=settings | {"tokenizer_class": "LlamaTokenizerFast"})
    mine, reference = both(tmp_path)
    for text in TEXTS:
        agree(mine, reference, text)
    assert (mine.bos, mine.eos, mine.pad) == (1, 2, None)


@pytest.mark.parametrize("config, settings", [
    ({"tokenizer_class": "LlamaTokenizer"}, {"legacy": True}),
    ({"tokenizer_class": "LlamaTokenizer"}, {}),
    ({}, {"tokenizer_class": "CodeLlamaTokenizer", "legacy": True}),
    ({}, {"tokenizer_class": "CodeLlamaTokenizerFast"})])
def test_the_class_may_stand_in_config_json_and_be_code_llama_s(tmp_path, config, settings):
    write_json(tmp_path, tokenizer=json.loads(llama_json()) | LEGACY, tokenizer_config=settings,
               config={"model_type": "llama"} | config)
    mine, reference = both(tmp_path)
    for text in TEXTS:
        agree(mine, reference, text)


def test_user_defined_pieces_of_a_model_are_tokens_of_their_own(tmp_path):
    write_json(tmp_path, config={"model_type": "llama"},
               tokenizer_config={"tokenizer_class": "LlamaTokenizer"})
    (tmp_path / "tokenizer.model").write_bytes(trained_sentencepiece(
        user_defined_symbols="<sym>,zz"))
    mine, reference = both(tmp_path)
    for text in ("<sym><sym>", "the <sym>mayor zzz", "<sym>", " a<sym> b"):
        agree(mine, reference, text)
    assert mine.encode("<sym>") == [mine.added["<sym>"]]


def test_a_mistral_goes_by_tokenizer_json_whatever_class_is_named(tmp_path):
    write_json(tmp_path, tokenizer=json.loads(llama_json()) | LEGACY, config={
        "model_type": "mistral"}, tokenizer_config={"tokenizer_class": "LlamaTokenizer"})
    mine, reference = both(tmp_path)
    for text in TEXTS:
        agree(mine, reference, text)
    assert mine.encode("</s>the") == [2, *mine.encode("the")]


def test_text_without_added_tokens_has_the_ids_of_sentencepiece(tmp_path):
    mine = load_tokenizer(write_json(tmp_path, tokenizer=json.loads(llama_json()) | LEGACY))
    reference = sentencepiece.SentencePieceProcessor(model_proto=llama_pieces())
    for text in [t for t in TEXTS if "<" not in t]:
        assert mine.encode(text) == reference.encode(text)
        assert mine.decode(reference.encode(text)) == text.replace("▁", " ")


@pytest.mark.slow
@quick
@given(data=st.data(), text=texts)
def test_any_text_and_any_ids_agree_with_transformers(tmp_path_factory, data, text):
    layout = data.draw(st.sampled_from([*LAYOUTS.values()]))
    folder = tmp_path_factory.mktemp("any")
    mine, reference = both(write_json(folder, tokenizer=json.loads(llama_json()) | layout))
    agree(mine, reference, text)
    ids = data.draw(st.lists(st.integers(0, mine.vocab_size - 1) | st.integers(3, 258), max_size=12))
    assert mine.decode(ids) == reference.decode(ids, skip_special_tokens=False)


def spec_of(vocab, merges, **model):
    return json.loads(llama_json()) | LAYOUTS["Metaspace never"] | {
        "added_tokens": [], "model": {"type": "BPE", "vocab": vocab, "merges": merges} | model}


def test_bpe_by_hand(tmp_path):
    """ug, hug, ▁hug in this order: "hug hugs" -> ▁hug, ▁hug, s; é -> its bytes C3 A9; and ugh."""
    vocab = {t: i for i, t in enumerate(["▁", "h", "u", "g", "s", "ug", "hug", "▁hug", "<0xC3>",
                                         "<0xA9>"])}
    spec = spec_of(vocab, ["u g", "h ug", "▁ hug"], byte_fallback=True) | LEGACY
    mine = load_tokenizer(write_json(tmp_path, tokenizer=spec))
    assert mine.encode("hug hugs") == [7, 7, 4] and mine.encode("éugh") == [0, 8, 9, 5, 1]
    assert mine.decode([7, 7, 8, 9, 4]) == "hug hugés" and mine.decode([7, 8, 4]) == "hug\ufffds"
    assert mine.encode("xyz") == [0] and mine.encode("") == [] and mine.decode([]) == ""


MERGES = [("a", "b"), ("b", "c"), ("a", "bc"), ("ab", "ab"), ("aa", "a"), ("a", "a"), ("▁", "a"),
          ("▁a", "b"), ("▁", "▁"), ("b", "▁"), ("b▁", "a"), ("ab", "c"), ("▁▁", "▁▁"), ("c", "▁a"),
          ("<0xC3>", "<0xA9>"), ("<unk>", "a"), ("<0xA9>", "a"), ("a", "<unk>")]


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(merges=st.lists(st.sampled_from(MERGES), max_size=12), seed=st.integers(0, 99),
       text=st.text("abc éΩ", max_size=40), split=st.booleans(), fuse=st.booleans(),
       byte=st.booleans(), unk=st.sampled_from(["<unk>", None]))
def test_any_merges_give_the_ids_of_tokenizers(tmp_path_factory, merges, seed, text, split, fuse,
                                               byte, unk):
    """No bytes for Ω: it is unk or dropped, and unk may be joined in merges too."""
    tokens = sorted({"<unk>", "▁", "a", "b", "c", "<0xC3>", "<0xA9>",
                     *(t for l, r in merges for t in (l, r, l + r))})
    ids = random.Random(seed).sample(range(len(tokens)), len(tokens))
    spec = spec_of(dict(zip(tokens, ids)), merges, unk_token=unk, fuse_unk=fuse,
                   byte_fallback=byte) | {"pre_tokenizer": metaspace("always", split)}
    folder = write_json(tmp_path_factory.mktemp("merges"), tokenizer=spec)
    reference = Tokenizer.from_file(str(folder / "tokenizer.json"))
    agree(load_tokenizer(folder), reference, text)


@pytest.mark.parametrize("text", ["a" * 10**5, "ab" * 30_000, " " * 10**5, "é" * 10**5])
def test_a_long_word_without_a_break_takes_no_long_time(tmp_path, text):
    """Each has one word; a loop over the neighbours for each merge would take 100 s."""
    spec = spec_of({t: i for i, t in enumerate(["▁", "▁▁", "a", "b", "ab", "ba", "aa", "aaaa",
                                                "<0xC3>", "<0xA9>"])},
                   ["a a", "a b", "b a", "aa aa", "▁ ▁"], byte_fallback=True)
    folder = write_json(tmp_path, tokenizer=spec)
    reference = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert load_tokenizer(folder).encode(text) == ids_of(reference, text)


def edited(**changes):
    spec = json.loads(llama_json()) | LEGACY
    for name, value in changes.items():
        (spec["model"] if name in spec["model"] else spec)[name] = value
    return spec


BAD = {
    "another normalizer": edited(normalizer={"type": "NFKC"}),
    "a regular expression": edited(normalizer=REPLACE | {"pattern": {"Regex": " {2,}"}}),
    "a charsmap": edited(normalizer={"type": "Precompiled", "precompiled_charsmap": "A" * 10**6}),
    "no step that writes ▁": edited(normalizer=None),
    "another prefix": edited(normalizer={"type": "Prepend", "prepend": "_"}),
    "an odd scheme": edited(pre_tokenizer=metaspace("last", False)),
    "another space": edited(pre_tokenizer=metaspace("first", False) | {"replacement": "_"}),
    "Whitespace": edited(pre_tokenizer={"type": "Whitespace"}),
    "a step that is no object": edited(normalizer={"type": "Sequence", "normalizers": [1]}),
    "no decoder": edited(decoder=None),
    "another decoder": edited(decoder={"type": "WordPiece"}),
    "dropout": edited(dropout=0.1),
    "ignore_merges": edited(ignore_merges=True),
    "a merge of three": edited(merges=[["a", "b", "c"]]),
    "a merge whose union is missing": edited(merges=["q q"]),
    "merges that are numbers": edited(merges=[1, 2]),
    "no vocabulary": edited(vocab={}),
    "a vocabulary that is a list": edited(vocab=[["a", 0.0]]),
    "an id below zero": edited(vocab={"a": -1}, merges=[]),
    "an id used twice": edited(vocab={"a": 1, "b": 1}, merges=[]),
    "an unk that is missing": edited(unk_token="<nothing>"),
    "an unk that is a list": edited(unk_token=[1]),
    "a normalized added token": edited(added_tokens=[
        {"id": 0, "content": "<unk>", "normalized": True}]),
}


@pytest.mark.parametrize("spec", BAD.values(), ids=BAD)
def test_what_is_not_supported_is_one_line_that_names_the_file(tmp_path, spec):
    with pytest.raises(UserError, match=r"tokenizer\.json: ") as caught:
        load_tokenizer(write_json(tmp_path, tokenizer=spec))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
