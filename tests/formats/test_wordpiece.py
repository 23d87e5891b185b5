"""WordPiece gives the ids of the tokenizers library, from vocab.txt and from tokenizer.json."""
import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_tokenizers import (BERT_MARKS, CORPUS, SNIPPETS, bert_pair, ids_of, new_folder, quick,
                              save_wordpieces, wordpieces, write_json)
from tokenizers import Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers as pre
from transformers import AutoTokenizer, BertTokenizer

from formats.tokenizer import load_tokenizer
from support.errors import UserError

SETTINGS = {"uncased": {}, "cased": {"do_lower_case": False},
            "lower case with accents": {"strip_accents": False},
            "capitals without accents": {"do_lower_case": False, "strip_accents": True},
            "Chinese words": {"tokenize_chinese_chars": False}}
every_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
ODD = ["İstanbul DİYARBAKIR ıI", "STRASSE ẞß ΣΊΣΥΦΟΣ ςσ", "ᲐᲑᲒ აბგ Ⴀ", "e\u0301 E\u0301 \u0301 a\u0338b",
       "naïve Bäcker Ångström ﬁ Ǆ", "北京的天气 東京タワー 한국어 \uf900\U0002f800\U00020000\U0002b821",
       "a\x00b\x01c\x7f d\ufffde\u200bf\u200dg\ufeffh\xadi", "a\tb\nc\rd\x0be\x0cf\x85g\xa0h\u2028i\u3000j",
       "$1+1=2^3 `~|<> don't e-mail!?… ¿qué? «x» 、。", "😀👍🏽👨\u200d👩\u200d👧", "[MASK][CLS] [mask] [MAS K]",
       "x" * 100, "x" * 101, "the" * 33 + "e", "é" * 100, "", " ", "\n", "##the # #"]


def old(char: str) -> bool:
    """Says if a character is in Unicode 3.2 as it is now: the libraries agree on these."""
    return unicodedata.category(char) == unicodedata.ucd_3_2_0.category(char)


old_text = st.text(st.characters(exclude_categories=["Cs", "Cn"]).filter(old), max_size=6)
texts = st.lists(st.sampled_from(SNIPPETS + ODD) | old_text, max_size=12).map("".join)


def test_the_longest_pieces_from_the_left_by_hand(tmp_path):
    """un ##aff ##able: the word of the paper's own code; unaffablex has no piece for its end."""
    tokens = [*BERT_MARKS, "un", "unb", "##a", "##aff", "##able", "##ablex", "!", "##!"]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens))
    mine = load_tokenizer(tmp_path)
    assert mine.encode("Unaffable!") == [5, 8, 9, 11]
    assert mine.encode("unaffablexx un") == [1, 5]
    assert mine.encode("") == [] and mine.decode([]) == ""
    assert mine.decode([5, 8, 9, 11]) == "unaffable !"


def test_letters_are_lower_cased_one_by_one(tmp_path):
    """The last sigma of a word is written another way in Greek, but not here."""
    (tmp_path / "vocab.txt").write_text("\n".join([*BERT_MARKS, "σα", "##σ", "##ς", "i", "##̇"]))
    mine = load_tokenizer(tmp_path)
    assert mine.encode("ΣΑΣ σας") == [5, 6, 5, 7] and mine.encode("İ") == [8]
    write_json(tmp_path, tokenizer_config={"strip_accents": False})
    assert load_tokenizer(tmp_path).encode("İ") == [8, 9]


@every_setting
def test_ids_are_those_of_transformers(settings):
    mine, reference = bert_pair(**settings)
    for text in [CORPUS, *SNIPPETS, *ODD, "".join(ODD), " ".join(SNIPPETS)]:
        assert mine.encode(text) == ids_of(reference, text), text


@every_setting
@pytest.mark.slow
@quick
@given(text=texts)
def test_ids_of_any_text_are_those_of_transformers(settings, text):
    mine, reference = bert_pair(**settings)
    assert mine.encode(text) == ids_of(reference, text)


@quick
@given(ids=st.lists(st.integers(0, len(wordpieces()) - 1), max_size=12))
def test_any_ids_give_the_text_of_transformers_without_a_clean_up(ids):
    mine, reference = bert_pair()
    decoder = decoders.WordPiece(prefix="##", cleanup=False)
    assert mine.decode(ids) == decoder.decode(reference.convert_ids_to_tokens(ids))
    kept = reference.convert_ids_to_tokens(ids, skip_special_tokens=True)
    assert mine.decode(ids, special=False) == decoder.decode(kept)


def test_every_character_is_dropped_a_space_apart_or_a_letter_as_in_tokenizers():
    """a and b around it are then one word, two words, three words, or an unknown one."""
    vocab = {token: i for i, token in enumerate([*BERT_MARKS, "a", "b", "##a", "##b"])}
    folder = new_folder()
    (folder / "vocab.txt").write_text("\n".join(vocab))
    mine, reference = load_tokenizer(folder), BertTokenizer.from_pretrained(folder)
    chars = [c for c in map(chr, range(0x30000)) if old(c)
             and unicodedata.category(c) not in ("Lo", "Cn", "Cs", "Co")]
    chars += map(chr, [0x33ff, 0x3400, 0x4dbf, 0x4dc0, 0x9fff, 0xac00, 0x2a6df, 0x2f7ff, 0x2f800,
                       0x2fa1f, 0xe000, 0xfb00])
    texts = [f"a{char}b" for char in chars]
    expected = reference.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    assert len(texts) > 5000
    for text, encoding in zip(texts, expected):
        assert mine.encode(text) == encoding.ids, ascii(text)


# ---- tokenizer.json

def spec_of(**changes):
    """Returns a tokenizer.json of WordPiece that keeps capital letters."""
    vocab = {token: i for i, token in enumerate(wordpieces())}
    reference = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=50))
    reference.normalizer = normalizers.BertNormalizer(lowercase=False)
    reference.pre_tokenizer = pre.BertPreTokenizer()
    reference.add_special_tokens(BERT_MARKS)
    reference.enable_padding(length=128)
    reference.enable_truncation(5)
    spec = json.loads(reference.to_str())
    for name, value in changes.items():
        (spec["model"] if name in spec["model"] else spec)[name] = value
    return spec


def same_as_auto(folder):
    mine, reference = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    reference.backend_tokenizer.no_truncation()
    reference.backend_tokenizer.no_padding()
    for text in [CORPUS, *ODD, "x" * 50, "x" * 51]:
        assert mine.encode(text) == ids_of(reference, text), text
    return mine


def test_tokenizer_json_alone_gives_the_ids_of_its_own_settings(tmp_path):
    write_json(tmp_path, tokenizer=spec_of())
    mine, reference = load_tokenizer(tmp_path), Tokenizer.from_str(json.dumps(spec_of()))
    reference.no_truncation()
    reference.no_padding()
    for text in [CORPUS, *ODD, "x" * 50, "x" * 51]:
        assert mine.encode(text) == ids_of(reference, text), text
    with pytest.raises(UserError, match="joins no sentences"):
        mine.pair("a", "b", 9)


def test_tokenizer_json_of_another_class_gives_the_ids_of_its_own_settings(tmp_path):
    mine = same_as_auto(write_json(
        tmp_path, tokenizer=spec_of(), config={"model_type": "bert"},
        tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast"}))
    assert mine.encode("[MASK]The") != mine.encode("[MASK]the")


@pytest.mark.parametrize("config", [{}, {"do_lower_case": False, "strip_accents": True}, {
    "tokenizer_class": "BertTokenizerFast", "tokenize_chinese_chars": False}])
def test_the_class_of_bert_goes_by_tokenizer_config_alone(tmp_path, config):
    spec = spec_of(max_input_chars_per_word=100)
    del spec["model"]["type"]                           # as older files have it
    write_json(tmp_path, tokenizer=spec, config={"model_type": "bert"}, tokenizer_config=config)
    spec["model"]["type"] = "WordPiece"                 # transformers 5 wants it
    mine = load_tokenizer(tmp_path)
    write_json(tmp_path, tokenizer=spec)
    same_as_auto(tmp_path)
    assert mine.encode(CORPUS) == load_tokenizer(tmp_path).encode(CORPUS)


# ---- faults

def lines(*tokens):
    return "\n".join(tokens)


BERT_LINES = lines(*BERT_MARKS, "a")
BAD_FILES = {                                         # the first file is the one to be named
    "an empty vocabulary": {"vocab.txt": "\n"},
    "a token twice": {"vocab.txt": lines(*BERT_MARKS, "a", "b", "a")},
    "an empty line": {"vocab.txt": lines(*BERT_MARKS, "", "a")},
    "no [UNK]": {"vocab.txt": lines("[PAD]", "[CLS]", "[SEP]", "[MASK]", "a")},
    "no [SEP]": {"vocab.txt": lines("[PAD]", "[UNK]", "[CLS]", "[MASK]", "a")},
    "no [MASK]": {"vocab.txt": lines("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a")},
    "bytes that are no text": {"vocab.txt": b"[PAD]\n\xff\xfe\n"},
    "lower case that is a number": {"tokenizer_config.json": '{"do_lower_case": 1}',
                                    "vocab.txt": BERT_LINES},
    "accents that are a list": {"tokenizer_config.json": '{"strip_accents": []}',
                                "vocab.txt": BERT_LINES},
    "a token looked for in the cleaned text": {"vocab.txt": BERT_LINES,
                                               "added_tokens.json": '{"Covid": 6}'},
    "a class that cuts into words of its own": {
        "vocab.txt": BERT_LINES, "config.json": '{"tokenizer_class": "BertJapaneseTokenizer"}'},
    **{f"tokenizer.json: {name}": {"tokenizer.json": json.dumps(spec)} for name, spec in {
        "another prefix": spec_of(continuing_subword_prefix="@@"),
        "unk is missing": spec_of(unk_token="<unk>"),
        "no unk": spec_of(unk_token=None),
        "a longest word that is a text": spec_of(max_input_chars_per_word="100"),
        "a longest word of nothing": spec_of(max_input_chars_per_word=0),
        "another normalizer": spec_of(normalizer={"type": "Lowercase"}),
        "no normalizer": spec_of(normalizer=None),
        "control characters are kept": spec_of(normalizer={
            "type": "BertNormalizer", "clean_text": False, "handle_chinese_chars": True,
            "strip_accents": None, "lowercase": True}),
        "half a normalizer": spec_of(normalizer={"type": "BertNormalizer"}),
        "another pre-tokenizer": spec_of(pre_tokenizer={"type": "Whitespace"}),
        "a vocabulary that is a list": spec_of(vocab=["a"]),
        "nothing in the vocabulary": spec_of(vocab={}),
        "an id used twice": spec_of(vocab={"[UNK]": 0, "a": 0}),
        "a token looked for in the cleaned text": spec_of(added_tokens=[
            {"id": 500, "content": "Covid", "normalized": True, "special": False}])}.items()},
}


@pytest.mark.parametrize("files", BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_one_line_that_names_it(tmp_path, files):
    for name, text in files.items():
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as caught:
        load_tokenizer(tmp_path)
    message = str(caught.value)
    assert next(iter(files)) in message and "\n" not in message and len(message) < 600


def test_a_repeated_line_is_named_by_its_number(tmp_path):
    (tmp_path / "vocab.txt").write_text(lines(*BERT_MARKS, "a", "b", "a") + "\n")
    with pytest.raises(UserError, match="vocab.txt: line 8: 'a'"):
        load_tokenizer(tmp_path)


def test_an_added_token_that_is_found_as_it_stands_is_allowed(tmp_path):
    token = {"content": "Covid", "normalized": False, "special": False, "lstrip": False}
    folder = save_wordpieces(tmp_path, added_tokens_decoder={str(len(wordpieces())): token})
    mine, reference = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for text in ("the Covid covid", "Covidthe"):
        assert mine.encode(text) == ids_of(reference, text)


def test_lines_may_end_as_on_windows(tmp_path):
    (tmp_path / "vocab.txt").write_bytes(BERT_LINES.replace("\n", "\r\n").encode() + b"\r\n")
    assert load_tokenizer(tmp_path).encode("a [SEP]") == [5, 3]
