"""A sentencepiece model gives the ids and the texts of sentencepiece itself."""
import json
import shutil
import sys
import unicodedata

import pytest
import sentencepiece
from conftest import SHARED, needs
from hypothesis import given
from hypothesis import strategies as st
from small_tokenizers import (CORPUS, SNIPPETS, quick, save_spm, sentencepiece_pair, spm_pair,
                              texts, trained_sentencepiece, write_json)
from tokenizers import Tokenizer, models, normalizers
from tokenizers import pre_tokenizers as pre
from transformers import DebertaV2Tokenizer

from formats.tokenizer import load_tokenizer
from support.errors import UserError

needs_shared = needs(SHARED)


def same_between_special_tokens(parts):
    mine, reference = sentencepiece_pair()
    expected = [i for part in parts for i in [*reference.encode(part), 2]][:-1]
    assert mine.encode("</s>".join(parts)) == expected
    assert mine.decode(reference.encode(parts[0])) == reference.decode(reference.encode(parts[0]))
    assert mine.decode(expected) == "</s>".join(
        reference.decode(reference.encode(part)) for part in parts)


def test_what_lies_between_the_special_tokens_is_encoded():
    same_between_special_tokens([CORPUS, "", " the mayor "])
    same_between_special_tokens(SNIPPETS)


@pytest.mark.slow
@quick
@given(parts=st.lists(texts, min_size=1, max_size=3))
def test_whatever_lies_between_the_special_tokens_is_encoded(parts):
    same_between_special_tokens(parts)


@pytest.mark.slow
@given(ids=st.lists(st.integers(3, 399), max_size=12))
def test_any_ids_are_decoded(ids):
    mine, reference = sentencepiece_pair()
    assert mine.decode(ids) == reference.decode(ids)


def test_bos_and_eos_are_the_models_own_and_added_tokens_come_on_top():
    mine, _ = sentencepiece_pair()
    assert (mine.bos, mine.eos, mine.pad, mine.vocab_size) == (1, 2, None, 401)
    assert mine.encode("<s><pad><unk>") == [1, 400, 0] and mine.decode([1, 400]) == "<s><pad>"
    assert mine.encode("") == []


@pytest.mark.parametrize("model", [
    models.BPE(vocab={"<unk>": 0, "▁": 1}, merges=[], byte_fallback=True),
    models.Unigram([("<unk>", 0.0), ("▁", -1.0)], unk_id=0)], ids=["BPE", "Unigram"])
def test_a_tokenizer_json_of_another_layout_leaves_it_to_tokenizer_model(tmp_path, model):
    reference = Tokenizer(model)
    reference.normalizer, reference.pre_tokenizer = normalizers.NFKC(), pre.Metaspace()
    reference.add_tokens(["<extra>"])
    reference.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="tokenizer.json: .*tokenizer.model beside it"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(trained_sentencepiece())
    mine = load_tokenizer(tmp_path)
    assert type(mine).__name__ == "SentencePieceTokenizer" and mine.encode("<extra>") == [2]


def test_a_missing_sentencepiece_is_named_with_its_package(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\xff")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UserError, match="tokenizer.model: .*pip install sentencepiece"):
        load_tokenizer(tmp_path)


# ---- DeBERTa-v2 and v3

@pytest.mark.parametrize("settings", [{}, {"do_lower_case": True}, {"split_by_punct": False}],
                         ids=str)
def test_spm_model_gives_the_ids_of_sentencepiece(settings):
    mine, reference = spm_pair(**settings)
    for text in [CORPUS, *SNIPPETS, "ｆｕｌｌ ① ﬁ  e\u0301", ""]:
        expected = text.lower() if settings.get("do_lower_case") else text
        assert mine.encode(text) == reference.encode(expected), text
    ids = mine.encode("the mayor's house  isn't far;")
    assert mine.decode(ids) == reference.decode(ids) == "the mayor's house isn't far;"
    assert mine.encode("The [MASK] The[SEP][UNK]") == [
        *mine.encode("The"), 90, *mine.encode("The"), 2, 3]


@pytest.mark.slow
@quick
@given(parts=st.lists(texts, min_size=1, max_size=3))
def test_spm_model_gives_the_ids_of_any_text_between_two_masks(parts):
    mine, reference = spm_pair()
    parts = [part.replace("[", "") for part in parts]
    expected = [i for part in parts for i in [*reference.encode(part), 90]][:-1]
    assert mine.encode("[MASK]".join(parts)) == expected


def test_the_mask_is_the_first_id_after_the_model_s_unless_a_file_says_another(tmp_path):
    mine, _ = spm_pair()
    roles = mine.pad, mine.cls, mine.sep, mine.unk, mine.mask, mine.bos, mine.eos, mine.vocab_size
    assert roles == (0, 1, 2, 3, 90, 1, 2, 91)
    folder = save_spm(tmp_path)
    write_json(folder, added_tokens={"[MASK]": 90, "<tool>": 91})
    assert load_tokenizer(folder).encode("[MASK]<tool>") == [90, 91]
    write_json(folder, added_tokens={"[MASK]": 95})
    assert load_tokenizer(folder).mask == 95


def test_a_resaved_deberta_needs_its_spm_model(tmp_path):
    folder = save_spm(tmp_path)
    reference = DebertaV2Tokenizer.from_pretrained(folder)
    reference.save_pretrained(folder)
    assert load_tokenizer(folder).encode("ﬁ [MASK]") == spm_pair()[0].encode("ﬁ [MASK]")
    (folder / "spm.model").unlink()
    with pytest.raises(UserError, match="tokenizer.json: .*spm.model beside it would do"):
        load_tokenizer(folder)


def test_settings_that_change_the_ids_are_refused(tmp_path):
    with pytest.raises(UserError, match="tokenizer_config.json: split_by_punct"):
        load_tokenizer(save_spm(tmp_path, split_by_punct=True))
    with pytest.raises(UserError, match="spm.model: 'AlbertTokenizer' is not supported"):
        load_tokenizer(save_spm(tmp_path, tokenizer_class="AlbertTokenizerFast"))


@pytest.mark.parametrize("model", [b"ab", b"\x0a\xff" * 20, trained_sentencepiece()],
                         ids=["text", "a broken model", "a model without [CLS]"])
def test_a_wrong_spm_model_is_one_line_that_names_it(tmp_path, model):
    (tmp_path / "spm.model").write_bytes(model)
    with pytest.raises(UserError, match=r"spm.model: no [^\n]*$"):
        load_tokenizer(tmp_path)


# ---- public files

@needs_shared
def test_a_public_model_gives_the_ids_of_sentencepiece(tmp_path):
    shutil.copy(SHARED / "tokenizers/tiny/m.model", tmp_path / "tokenizer.model")
    mine = load_tokenizer(tmp_path)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for text in (CORPUS, unicodedata.normalize("NFD", CORPUS), *SNIPPETS, " a " * 20_000):
        assert mine.encode(text) == reference.encode(text)


@needs_shared
def test_stories260k_reads_and_writes_the_text_its_author_published():
    mine = load_tokenizer(SHARED / "stories260K")
    oracle = json.loads((SHARED / "stories260K/oracle.json").read_text(encoding="utf-8"))
    bos, *ids = oracle["greedy_ids"]
    assert mine.encode(oracle["greedy_text"]) == ids and mine.decode(ids) == oracle["greedy_text"]
    assert (mine.bos, mine.eos, mine.pad, mine.vocab_size) == (bos, 2, None, 512)
    pieces = json.loads((SHARED / "stories260K/pieces.json").read_text(encoding="utf-8"))
    assert [mine.processor.id_to_piece(i).replace("▁", " ") for i in range(3, 512)] == [
        piece.replace("▁", " ") for piece in pieces[3:]]
