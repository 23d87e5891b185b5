"""Byte-level BPE gives the ids of tokenizers, transformers and tiktoken, whatever the files."""
import json
import random
import shutil

import pytest
import tiktoken
from conftest import SHARED, needs
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import (CORPUS, SNIPPETS, SPLITTERS, agree, byte_level, gpt2_pair, ids_of,
                              json_pair, llama3_pair, quick, qwen_pair, ranks, texts, trained_json,
                              write_json)
from tiktoken._educational import bpe_train
from tiktoken.load import load_tiktoken_bpe
from tokenizers import Tokenizer, decoders, models
from tokenizers import pre_tokenizers as pre
from transformers import GPT2Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

from formats.bpe import GPT2_SPLIT, LLAMA3_SPLIT, QWEN_SPLIT
from formats.bpe_files import LLAMA3_NAMES, save_ranks
from formats.bpe_training import train_bpe
from formats.tokenizer import load_tokenizer
from support.errors import UserError

needs_shared = needs(SHARED)
ODD = CORPUS + "".join(SNIPPETS)
ALPHABET = {c: i for i, c in enumerate(sorted(pre.ByteLevel.alphabet()))}
PAIRS = {
    **{f"tokenizer.json, {kind}": lambda kind=kind: json_pair(kind) for kind in SPLITTERS},
    "tokenizer.json, missing bytes": lambda: json_pair("gpt2", all_bytes=False),
    "vocab and merges, gpt2": gpt2_pair,
    "vocab and merges, qwen": qwen_pair,
    "ranks, llama3": llama3_pair,
}
pairs = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)


# ---- all layouts

@pairs
def test_ids_and_text_are_those_of_the_reference(pair):
    agree(*pair(), ODD)


@pairs
@pytest.mark.slow
@quick
@given(text=texts)
def test_ids_of_any_text_are_those_of_the_reference(pair, text):
    agree(*pair(), text)


@pytest.mark.slow
@pytest.mark.parametrize("all_bytes", [True, False], ids=["", "missing bytes"])
@pytest.mark.parametrize("kind", SPLITTERS)
@quick
@given(data=st.data())
def test_any_ids_give_the_text_of_the_reference(kind, all_bytes, data):
    mine, reference = json_pair(kind, all_bytes)
    ids = data.draw(st.lists(st.integers(0, mine.vocab_size - 1), max_size=12))
    assert mine.decode(ids) == reference.decode(ids, skip_special_tokens=False)


@pytest.mark.slow
@pytest.mark.parametrize("text", ["a" * 10**6, "ab" * 10**5, " " * 10**6 + "the", " \n" * 10**5],
                         ids=lambda text: f"{len(text)} of {text[:2]!r}")
def test_very_long_runs_without_a_break_give_the_ids_of_tokenizers(text):
    """tiktoken's own splitting stops with an error at a million spaces."""
    for mine, reference in (gpt2_pair(), llama3_pair()):
        assert mine.encode(text) == ids_of(reference, text)


# ---- merges

def test_bpe_by_hand(tmp_path):
    """h u g s, merges u+g then h+ug: hugs -> hug s, ugh -> ug h."""
    vocab = ALPHABET | {"ug": 300, "hug": 301}
    write_json(tmp_path, vocab=vocab)
    (tmp_path / "merges.txt").write_text("#version: 0.2\nu g\nh ug\n")
    mine = load_tokenizer(tmp_path)
    assert mine.encode("hugs") == [301, vocab["s"]]
    assert mine.encode("ugh") == [300, vocab["h"]]
    assert mine.encode("") == [] and mine.decode([]) == "" and mine.decode([301, 300]) == "hugug"


MERGES = [("a", "b"), ("b", "c"), ("a", "bc"), ("ab", "ab"), ("c", "ab"), ("aa", "a"), ("a", "a"),
          ("b", "ca"), ("bc", "a"), ("Ġ", "a"), ("Ġa", "b"), ("Ġ", "ab"), ("abab", "c"),
          ("ab", "abc"), ("ab", "c")]


@pytest.mark.slow
@settings(max_examples=120, deadline=None)
@given(merges=st.lists(st.sampled_from(MERGES), min_size=1, max_size=12), seed=st.integers(0, 99),
       words=st.text("abc ", max_size=60))
def test_any_merges_and_any_ids_give_the_ids_of_tokenizers(tmp_path_factory, merges, seed, words):
    """tokenizers merges in list order, tiktoken by the union's rank: also where no training could
    have given the list, where a merge repeats, and where two merges have one union."""
    tokens = sorted({*ALPHABET, *(t for l, r in merges for t in (l, r, l + r))})
    ids = random.Random(seed).sample(range(len(tokens)), len(tokens))
    reference = Tokenizer(models.BPE(vocab=dict(zip(tokens, ids)), merges=merges))
    reference.pre_tokenizer, reference.decoder = byte_level(True), decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("merges")
    reference.save(str(folder / "tokenizer.json"))
    agree(load_tokenizer(folder), reference, words)


def test_of_a_repeated_merge_the_last_place_counts(tmp_path):
    vocab = ALPHABET | {"ab": 300, "bc": 301}
    spec = json.loads(trained_json("gpt2")) | {"added_tokens": []}
    spec["model"] |= {"vocab": vocab, "merges": [("a", "b"), ("b", "c"), ("a", "b")]}
    mine = load_tokenizer(write_json(tmp_path, tokenizer=spec))
    agree(mine, Tokenizer.from_str(json.dumps(spec)), "abc")
    assert mine.encode("abc") == [vocab["a"], 301]


def test_a_word_that_no_merges_make_is_still_one_token_with_ignore_merges(tmp_path):
    spec = json.loads(trained_json("llama3"))
    spec["model"]["vocab"]["zebra"] = 900
    for ignore in (True, False):
        spec["model"]["ignore_merges"] = ignore
        mine = load_tokenizer(write_json(tmp_path, tokenizer=spec))
        reference = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        for text in ("zebra", "the zebra", "zebra zebras\nzebra", "zebrazebra"):
            agree(mine, reference, text)
        assert (mine.encode("zebra") == [900]) == ignore


# ---- rank files, and training them

def test_training_gives_the_ranks_of_tiktokens_own_trainer():
    few = CORPUS[:len(CORPUS) // 4]
    assert train_bpe(few, 350) == bpe_train(few, 350, GPT2_SPLIT, visualise=None)
    assert list(ranks().values()) == list(range(400)) and train_bpe(CORPUS, 400) == ranks()
    repeats = "aaaa aaa aaaaa abab\n\n\n\n"                   # pairs that overlap themselves
    assert train_bpe(repeats, 264) == bpe_train(repeats, 264, GPT2_SPLIT, visualise=None)


@pytest.mark.parametrize("text, size", [("abc", 255), ("ab", 258), ("", 257)])
def test_training_refuses_a_size_that_the_text_cannot_give(text, size):
    with pytest.raises(UserError, match=str(size)):
        train_bpe(text, size)


def test_saved_ranks_are_read_by_tiktoken(tmp_path):
    save_ranks(ranks(), tmp_path / "base.tiktoken")
    assert load_tiktoken_bpe(str(tmp_path / "base.tiktoken")) == ranks()
    assert [path.name for path in tmp_path.iterdir()] == ["base.tiktoken"]


@pytest.mark.parametrize("kind", ["llama3", "a split with gaps"])
def test_a_letter_newer_than_the_references_unicode_is_split_as_they_do(kind):
    """The regex module takes U+0558 for a letter; tiktoken and tokenizers do not know it yet."""
    mine, reference = json_pair(kind)
    agree(mine, reference, "the\u0558the \U00011de0 1")


def test_llama3_special_tokens_have_the_published_places():
    mine, reference = llama3_pair()
    names = ["begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id"]
    assert mine.encode("".join(f"<|{name}|>" for name in names)) == [400, 401, 406, 407, 409]
    assert (mine.bos, mine.eos, mine.pad, mine.vocab_size) == (400, 401, None, 656)
    agree(mine, reference, "the ".join(f"<|{name}|>" for name in LLAMA3_NAMES))


def test_llama3_tokenizer_json_equals_its_rank_file(tmp_path):
    mine, reference = llama3_pair()                  # the same tokens as merges, every split listed
    reference.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode(ODD) == mine.encode(ODD)


@pytest.mark.parametrize("model_type, pattern", [
    pytest.param("llama", GPT2_SPLIT, id="llama"), pytest.param("qwen", QWEN_SPLIT, id="qwen")])
def test_a_tiktoken_file_alone_takes_its_special_tokens_from_config_json(
        tmp_path, model_type, pattern):
    save_ranks(ranks(), tmp_path / "base.tiktoken")
    write_json(tmp_path, config={"model_type": model_type, "bos_token_id": 400, "eos_token_id": 401,
                                 "pad_token_id": 401, "vocab_size": 512})
    mine = load_tokenizer(tmp_path)
    assert (mine.bos, mine.eos, mine.pad, mine.vocab_size) == (400, 401, 401, 512)
    reference = tiktoken.Encoding("reference", pat_str=pattern, mergeable_ranks=ranks(),
                                  special_tokens={"<|bos|>": 400, "<|eos|>": 401})
    text = CORPUS + "<|bos|>I'VE 123<|eos|><|pad|>"
    assert mine.encode(text) == reference.encode(text, allowed_special="all")
    assert mine.decode(mine.encode(text)) == text
    assert mine.decode([405]) == "" and mine.decode([240, 159]) == "\ufffd"


# ---- public files

@needs_shared
@pytest.mark.slow
def test_gpt2_files_give_the_ids_of_transformers(tmp_path):
    shutil.copy(SHARED / "tokenizers/gpt2/encoder.json", tmp_path / "vocab.json")
    shutil.copy(SHARED / "tokenizers/gpt2/vocab.bpe", tmp_path / "merges.txt")
    mine, reference = (load_tokenizer(SHARED / "tokenizers/gpt2"),
                       GPT2Tokenizer.from_pretrained(tmp_path))
    assert (mine.bos, mine.eos, mine.pad, mine.vocab_size) == (50256, 50256, None, 50257)
    assert mine.encode("Hello world<|endoftext|>") == [15496, 995, 50256]
    shakespeare = (SHARED / "text/tinyshakespeare_input.txt").read_text(encoding="utf-8")
    agree(mine, reference, shakespeare[:200_000])
    agree(mine, reference, ODD)


@needs_shared
@pytest.mark.parametrize("names", [("tokenizer.json",), ("vocab.json", "merges.txt")])
def test_tiny_bpe_which_lacks_160_bytes_drops_what_tokenizers_drops(tmp_path, names):
    for name in names:
        shutil.copy(SHARED / f"tokenizers/tiny/tiny_bpe_{name}", tmp_path / name)
    write_json(tmp_path, config={"model_type": "qwen2"})       # its split is Qwen's
    mine = load_tokenizer(tmp_path)
    reference = Tokenizer.from_file(str(SHARED / "tokenizers/tiny/tiny_bpe_tokenizer.json"))
    assert mine.encode("aéb") == mine.encode("ab") != []
    for text in (CORPUS, "".join(SNIPPETS[4:]), "théto 1２3 \u0301 naïve\n\n"):
        assert mine.encode(text) == ids_of(reference, text)


@needs_shared
def test_tiktoken_small_gives_the_ids_of_transformers(tmp_path):
    shutil.copy(SHARED / "tokenizers/tiny/tiktoken_small.model", tmp_path / "tokenizer.model")
    reference = TikTokenConverter(str(tmp_path / "tokenizer.model"), LLAMA3_SPLIT).converted()
    assert load_tokenizer(tmp_path).encode(ODD) == ids_of(reference, ODD)
