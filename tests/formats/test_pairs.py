"""One sentence or two become the ids and types that transformers gives the encoder."""
import itertools
import json
import shutil

import pytest
from conftest import SHARED, needs
from hypothesis import given
from hypothesis import strategies as st
from small_tokenizers import (CORPUS, DEBERTA_MARKS, ROBERTA_MARKS, SNIPPETS, bert_pair,
                              deberta_pair, gpt2_pair, ids_of, quick, roberta_pair, save_marked,
                              save_wordpieces, sentencepiece_pair, spm_pair, texts, trained_json,
                              wordpieces, write_json)
from tokenizers import AddedToken
from transformers import AutoTokenizer, BertTokenizer, DebertaV2Tokenizer, RobertaTokenizer

from formats.pairs import shorten
from formats.tokenizer import load_tokenizer
from support.errors import UserError

PAIRS = {"bert": bert_pair, "roberta": roberta_pair, "deberta": deberta_pair}
each = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
WORDS = "the mayor's house isn't far they'll say".split()
MASKED = ["a <mask> b", "a \t\u3000\n<mask>  b", "<mask><mask> <mask>", " <mask>", "a \x1c<mask>",
          "a [MASK] b", " [MASK]\u00a0[MASK]", "a <s> </s>b <pad><unk>", "[CLS] [SEP] [PAD] [UNK]",
          "<mask>\u3000\t\x85b", "<|endoftext|>", "a <mask", "\u2028<mask>\u180e <mask>\u200b<mask>"]


def in_transformers(reference, a, b, max_length):
    """Encodes in a batch: alone, transformers takes an empty second sentence for none."""
    batch = reference([a], None if b is None else [b], truncation=True, max_length=max_length,
                      return_token_type_ids=True)
    return batch["input_ids"][0], batch["token_type_ids"][0]


# ---- special tokens

@each
def test_text_with_special_tokens_has_the_ids_of_transformers(pair):
    mine, reference = pair()
    for text in [CORPUS, *SNIPPETS, *MASKED]:
        assert mine.encode(text) == ids_of(reference, text), text


@each
@pytest.mark.slow
@quick
@given(parts=st.lists(st.sampled_from(MASKED) | texts, max_size=4))
def test_any_text_with_special_tokens_has_the_ids_of_transformers(pair, parts):
    if pair is not bert_pair:       # its texts are in test_wordpiece.py
        mine, reference = pair()
        assert mine.encode("".join(parts)) == ids_of(reference, "".join(parts))


@each
def test_roles_are_those_of_transformers(pair):
    mine, reference = pair()
    for role in ("bos", "eos", "pad", "cls", "sep", "mask", "unk"):
        assert getattr(mine, role) == getattr(reference, f"{role}_token_id")


def test_the_special_tokens_are_left_out_of_the_text():
    for mine, reference in (roberta_pair(), deberta_pair()):
        ids, _ = mine.pair("the mayor", "isn't far", 99)
        assert mine.decode(ids, special=False) == reference.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("flags", [{"lstrip": False}, {"lstrip": True, "rstrip": True},
                                   {"rstrip": True}], ids=str)
@pytest.mark.parametrize("place", ["special_tokens_map", "tokenizer.json"])
def test_a_mask_takes_the_white_space_that_its_file_says(tmp_path, flags, place):
    folder = save_marked("roberta", ROBERTA_MARKS, tmp_path)
    token = {"content": "<mask>", "lstrip": False, "rstrip": False, "normalized": False} | flags
    if place == "tokenizer.json":
        token |= {"id": 435, "special": True, "single_word": False}
        model = json.loads(trained_json("gpt2"))["model"]
        vocab = json.loads((folder / "vocab.json").read_text())
        (folder / "vocab.json").unlink()
        (folder / "merges.txt").unlink()
        spec = json.loads(trained_json("gpt2")) | {"model": model | {"vocab": vocab}}
        write_json(folder, tokenizer=spec | {"added_tokens": [token], "post_processor": {
            "type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 0],
            "trim_offsets": True, "add_prefix_space": False}})
    else:
        write_json(folder, special_tokens_map={"mask_token": token})
    mine, reference = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for text in MASKED:
        assert mine.encode(text) == ids_of(reference, text), text
    assert mine.pair("a", "b", 9) == in_transformers(reference, "a", "b", 9)


@pytest.mark.parametrize("prefix", [False, True])
def test_roberta_goes_by_add_prefix_space_of_tokenizer_config(tmp_path, prefix):
    folder = save_marked("roberta", ROBERTA_MARKS, tmp_path)
    RobertaTokenizer.from_pretrained(folder, add_prefix_space=not prefix).save_pretrained(folder)
    write_json(folder, tokenizer_config={"add_prefix_space": prefix})
    for _ in range(2):
        mine, reference = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
        assert ids_of(reference, "the") == mine.encode("the")
        (folder / "tokenizer.json").unlink(missing_ok=True)


def test_names_may_be_others_and_the_class_counts_before_the_model_type(tmp_path):
    folder = save_wordpieces(tmp_path, tokenizer_class="BertTokenizer", sep_token="the",
                             mask_token=None)
    write_json(folder, config={"model_type": "roberta"})
    mine, reference = load_tokenizer(folder), BertTokenizer.from_pretrained(folder)
    assert mine.sep == reference.sep_token_id == wordpieces().index("the") and mine.mask is None
    assert mine.pair("a", "b", 9) == in_transformers(reference, "a", "b", 9)


@pytest.mark.parametrize("model_type, marks", [("roberta", ROBERTA_MARKS),
                                               ("deberta", DEBERTA_MARKS)])
def test_a_missing_special_token_is_named_with_the_file(tmp_path, model_type, marks):
    for lacking in (marks[0], marks[2], marks[4]):
        folder = save_marked(model_type, [m.replace(lacking, "x y") for m in marks], tmp_path)
        with pytest.raises(UserError) as caught:
            load_tokenizer(folder)
        assert "vocab.json" in str(caught.value) and lacking in str(caught.value)


# ---- pairs

@each
def test_pairs_are_those_of_transformers_at_every_length(pair):
    mine, reference = pair()
    sentences = [" ".join(WORDS[:n]) for n in range(5)]
    for a, b in itertools.product(sentences, [*sentences, None]):
        full = len(mine.pair(a, b, 999)[0])
        for length in range(4, full + 2):
            assert mine.pair(a, b, length) == in_transformers(reference, a, b, length)


@each
@pytest.mark.slow
@quick
@given(a=texts, b=st.none() | texts, length=st.integers(4, 40))
def test_pairs_of_any_text_are_those_of_transformers(pair, a, b, length):
    mine, reference = pair()
    if mine.encode(a) == ids_of(reference, a) and (not b or mine.encode(b) == ids_of(reference, b)):
        assert mine.pair(a, b, length) == in_transformers(reference, a, b, length)


def test_pairs_of_deberta_v3_are_those_of_transformers():
    """ASCII only: transformers 5 leaves out the normalization that the model itself asks for."""
    mine, _ = spm_pair()
    reference = DebertaV2Tokenizer.from_pretrained(mine.path.parent)
    for a, b in itertools.product(("the mayor's house", "def area [MASK]", ""), ("pass", "", None)):
        for length in range(4, 40):
            assert mine.pair(a, b, length) == in_transformers(reference, a, b, length)


def test_a_pair_by_hand():
    """RoBERTa: <s> 0, </s> 2, and b c in the middle; BERT: [CLS] 2, [SEP] 3."""
    roberta, bert = roberta_pair()[0], bert_pair()[0]
    b, c = roberta.encode("b") + roberta.encode("c")
    assert roberta.pair("b", "c", 9) == ([0, b, 2, 2, c, 2], [0] * 6)
    assert roberta.pair("bbbbb", None, 4) == ([0, b, b, 2], [0] * 4)
    b, c = bert.encode("b") + bert.encode("c")
    assert bert.pair("b", "c", 9) == ([2, b, 3, c, 3], [0, 0, 0, 1, 1])
    assert bert.pair("", "", 3) == ([2, 3, 3], [0, 0, 1])


@pytest.mark.parametrize("lengths, room, kept", [
    ((3, 4), 7, (3, 4)), ((10, 3), 8, (5, 3)), ((3, 10), 8, (3, 5)), ((10, 4), 8, (4, 4)),
    ((10, 5), 9, (5, 4)), ((5, 10), 9, (4, 5)), ((7, 7), 9, (4, 5)), ((7, 0), 5, (5, 0)),
    ((9, 9), 1, (0, 1)), ((9, 8), 1, (1, 0)), ((4, 4), 0, (0, 0))])
def test_the_longer_sentence_is_cut_first(lengths, room, kept):
    assert shorten(*lengths, room) == kept


def test_no_room_for_the_special_tokens_is_a_user_error():
    for pair, least in ((bert_pair, 3), (roberta_pair, 4), (deberta_pair, 3), (spm_pair, 3)):
        mine, _ = pair()
        assert len(mine.pair("a", "b", least)[0]) == least and len(mine.pair("a", None, 2)[0]) == 2
        for too_few in (least - 1, 0, -1):
            with pytest.raises(UserError, match=f"{mine.path.name}: {too_few} tokens at most"):
                mine.pair("a", "b", too_few)
        with pytest.raises(UserError, match="special tokens alone are 2"):
            mine.pair("a", None, 1)


def test_a_decoder_joins_no_sentences():
    for mine, _ in (gpt2_pair(), sentencepiece_pair()):
        with pytest.raises(UserError, match=f"{mine.path.name}: .*joins no sentences"):
            mine.pair("a", "b", 9)


# ---- public files

ROBERTA, GPT2 = (SHARED / "tokenizers" / name for name in ("roberta/vocab.json", "gpt2/vocab.bpe"))


@needs(ROBERTA)
@needs(GPT2)
def test_roberta_s_own_vocabulary(tmp_path):
    """Hello world is 31414 232 in the documentation of transformers."""
    shutil.copy(ROBERTA, tmp_path)
    shutil.copy(GPT2, tmp_path / "merges.txt")
    write_json(tmp_path, config={"model_type": "roberta"})
    mine = load_tokenizer(tmp_path)
    assert mine.pair("Hello world", None, 9) == ([0, 31414, 232, 2], [0] * 4)
    assert mine.pair("Hello <mask>", " world", 9)[0] == [0, 31414, 50264, 2, 2, 232, 2]
    assert (mine.cls, mine.pad, mine.sep, mine.unk, mine.mask) == (0, 1, 2, 3, 50264)
    assert mine.vocab_size == 50265
    reference = RobertaTokenizer.from_pretrained(
        tmp_path, mask_token=AddedToken("<mask>", lstrip=True, special=True))
    for text in [CORPUS, *SNIPPETS, *MASKED]:
        assert mine.encode(text) == ids_of(reference, text)
