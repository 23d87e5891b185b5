"""tokenizer.py gives the ids and texts of tokenizers, transformers, sentencepiece and tiktoken.

Small tokenizers are trained here, one for each published layout; the real files in ../shared/data
are used where they are there.
"""
import base64
import json
import random
import shutil
import sys
import unicodedata
from io import BytesIO

import pytest
import sentencepiece
import tiktoken
from conftest import SHARED, needs
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken._educational import bpe_train
from tiktoken.load import load_tiktoken_bpe
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers as pre
from tokenizers import trainers
from transformers import AutoTokenizer, GPT2Tokenizer, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

from formats import tokenizer as ours
from formats.tokenizer import load_tokenizer, save_ranks, train_bpe
from support.errors import UserError

needs_shared = needs(SHARED)

CORPUS = ("The mayor's house isn't far; they'll say it's 12345 steps, I'VE counted.\n\n"
          "def area(r):\n    return 3.14159 * r ** 2  # naïve\n\tpass\n"
          "Der Bäcker grüßt. 北京的天气很好。 東京タワー 한국어 Здравствуйте 😀👍🏽 ½ ² ٣٤\n") * 4
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<tool>", "<tool>>"]
SNIPPETS = [*SPECIAL, "<|im_start", " ", "  ", " " * 40, "\n", "\n\n", "\r\n", "\t", "\u00a0",
            "\u3000", "'s", "'S", "'ſ", "'ll", "12345", " 7", "٣", "½", "e\u0301", "\u0301", "é",
            "\u0338", "ﬁ", "한", "\u1112\u1161", "北京", "😀", "👨\u200d👩\u200d👧", "the", " the mayor",
            "def f(x):\n    return x", "The", "!!", "\x00", "\ufeff"]
# Characters too new for this Python (Cn) are left out: each library has its own Unicode version.
some_text = st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=6)
texts = st.lists(st.sampled_from(SNIPPETS) | some_text, max_size=12).map("".join)
quick = settings(max_examples=60, deadline=None)


def byte_level(use_regex, prefix=False):
    return pre.ByteLevel(add_prefix_space=prefix, use_regex=use_regex)


def split(pattern, behavior="isolated", invert=False):
    return pre.Sequence([pre.Split(Regex(pattern), behavior, invert), byte_level(False)])


SPLITTERS = {
    "gpt2": byte_level(True),
    "prefix space": byte_level(True, prefix=True),
    "llama3": split(ours.LLAMA3_SPLIT),
    "qwen": split(ours.QWEN_SPLIT),
    "smollm": pre.Sequence([pre.Digits(individual_digits=True), byte_level(True)]),
    "a split with gaps": split(r"\p{L}+|\d"),
    "a split that drops the gaps": split(r"\p{L}+|\d", "removed", invert=True),
}


def trained(kind, all_bytes=True):
    """A reference tokenizer with this pre-tokenizer, trained on CORPUS; SPECIAL at the end."""
    reference = Tokenizer(models.BPE())
    reference.pre_tokenizer, reference.decoder = SPLITTERS[kind], decoders.ByteLevel()
    alphabet = pre.ByteLevel.alphabet() if all_bytes else []
    reference.train_from_iterator([CORPUS], trainers.BpeTrainer(
        vocab_size=len(alphabet) + 200, initial_alphabet=sorted(alphabet), show_progress=False))
    reference.normalizer = normalizers.NFC() if kind == "qwen" else None
    reference.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIAL])
    return reference


def write_json(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return folder


def ids_of(reference, text):
    ids = reference.encode(text, add_special_tokens=False)
    return ids if isinstance(ids, list) else ids.ids


def agree(mine, reference, text):
    ids = mine.encode(text)
    assert ids == ids_of(reference, text)
    assert mine.decode(ids) == reference.decode(ids, skip_special_tokens=False)


# tokenizer.json

@pytest.fixture(scope="module", params=[*SPLITTERS, "missing bytes"])
def pair(request, tmp_path_factory):
    """(ours, tokenizers') of one tokenizer.json."""
    missing = request.param == "missing bytes"
    reference = trained("gpt2" if missing else request.param, all_bytes=not missing)
    folder = tmp_path_factory.mktemp("json")
    reference.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))


@quick
@given(text=texts)
def test_tokenizer_json_gives_the_ids_and_the_text_of_tokenizers(pair, text):
    agree(*pair, text)


@quick
@given(data=st.data())
def test_decode_takes_any_ids_as_tokenizers_does(pair, data):
    mine, reference = pair
    ids = data.draw(st.lists(st.integers(0, mine.vocab_size - 1), max_size=12))
    assert mine.decode(ids) == reference.decode(ids, skip_special_tokens=False)


MERGES = [("a", "b"), ("b", "c"), ("a", "bc"), ("ab", "ab"), ("c", "ab"), ("aa", "a"), ("a", "a"),
          ("b", "ca"), ("bc", "a"), ("Ġ", "a"), ("Ġa", "b"), ("Ġ", "ab"), ("abab", "c"),
          ("ab", "abc"), ("ab", "c")]


@settings(max_examples=120, deadline=None)
@given(merges=st.lists(st.sampled_from(MERGES), min_size=1, max_size=12), seed=st.integers(0, 99),
       words=st.text("abc ", max_size=60))
def test_any_merges_and_any_ids_give_the_ids_of_tokenizers(tmp_path_factory, merges, seed, words):
    """tokenizers merges in list order, tiktoken by the union's rank: also where no training could
    have given the list, where a merge repeats, and where two merges have one union."""
    tokens = sorted({*pre.ByteLevel.alphabet(), *(t for l, r in merges for t in (l, r, l + r))})
    ids = random.Random(seed).sample(range(len(tokens)), len(tokens))
    reference = Tokenizer(models.BPE(vocab=dict(zip(tokens, ids)), merges=merges))
    reference.pre_tokenizer, reference.decoder = byte_level(True), decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("merges")
    reference.save(str(folder / "tokenizer.json"))
    agree(load_tokenizer(folder), reference, words)


def test_of_a_repeated_merge_the_last_place_counts(tmp_path):
    vocab = {c: i for i, c in enumerate(sorted(pre.ByteLevel.alphabet()))} | {"ab": 300, "bc": 301}
    spec = json.loads(trained("gpt2").to_str()) | {"added_tokens": []}
    spec["model"] |= {"vocab": vocab, "merges": [("a", "b"), ("b", "c"), ("a", "b")]}
    mine = load_tokenizer(write_json(tmp_path, tokenizer=spec))
    agree(mine, Tokenizer.from_str(json.dumps(spec)), "abc")
    assert mine.encode("abc") == [vocab["a"], 301]


def test_bpe_by_hand(tmp_path):
    """h u g s, merges u+g then h+ug: hugs -> hug s, ugh -> ug h."""
    vocab = {c: i for i, c in enumerate(sorted(pre.ByteLevel.alphabet()))} | {"ug": 300, "hug": 301}
    write_json(tmp_path, vocab=vocab)
    (tmp_path / "merges.txt").write_text("#version: 0.2\nu g\nh ug\n")
    mine = load_tokenizer(tmp_path)
    assert mine.encode("hugs") == [301, vocab["s"]]
    assert mine.encode("ugh") == [300, vocab["h"]]
    assert mine.encode("") == [] and mine.decode([]) == "" and mine.decode([301, 300]) == "hugug"


def test_a_word_that_no_merges_make_is_still_one_token_with_ignore_merges(tmp_path):
    spec = json.loads(trained("llama3").to_str())
    spec["model"]["vocab"]["zebra"] = 900
    for ignore in (True, False):
        spec["model"]["ignore_merges"] = ignore
        mine = load_tokenizer(write_json(tmp_path, tokenizer=spec))
        reference = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        for text in ("zebra", "the zebra", "zebra zebras\nzebra", "zebrazebra"):
            agree(mine, reference, text)
        assert (mine.encode("zebra") == [900]) == ignore


# vocab.json + merges.txt

def save_vocab_merges(reference, folder, special=SPECIAL[:1]):
    model = json.loads(reference.to_str())["model"]
    vocab = model["vocab"] | {text: len(model["vocab"]) + i for i, text in enumerate(special)}
    merges = "".join(" ".join(m) + "\n" for m in model["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
    return write_json(folder, vocab=vocab), len(vocab)


@pytest.fixture(scope="module")
def gpt2_pair(tmp_path_factory):
    folder, size = save_vocab_merges(trained("gpt2"), tmp_path_factory.mktemp("gpt2"))
    write_json(folder, added_tokens={"<|im_start|>": size, "<tool>": size + 1})
    return load_tokenizer(folder), GPT2Tokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def qwen_pair(tmp_path_factory):
    folder, size = save_vocab_merges(trained("qwen"), tmp_path_factory.mktemp("qwen"), special=[])
    flags = dict(lstrip=False, rstrip=False, single_word=False, normalized=False, special=True)
    added = {str(size + i): {"content": text, **flags} for i, text in enumerate(SPECIAL)}
    write_json(folder, tokenizer_config={
        "tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added, "bos_token": None,
        "eos_token": "<|im_start|>", "pad_token": "<|endoftext|>", "add_prefix_space": False})
    return load_tokenizer(folder), Qwen2Tokenizer.from_pretrained(folder)


@quick
@given(text=texts)
def test_vocab_and_merges_give_the_ids_of_transformers_gpt2(gpt2_pair, text):
    agree(*gpt2_pair, text)


@quick
@given(text=texts)
def test_vocab_and_merges_give_the_ids_of_transformers_qwen2(qwen_pair, text):
    agree(*qwen_pair, text)


def test_bos_eos_and_pad_are_those_of_transformers(gpt2_pair, qwen_pair):
    for mine, reference in (gpt2_pair, qwen_pair):
        assert (mine.bos, mine.eos, mine.pad) == (
            reference.bos_token_id, reference.eos_token_id, reference.pad_token_id)


@pytest.mark.parametrize("config, mapped", [
    ({"bos_token": "<tool>>", "eos_token": {"__type": "AddedToken", "content": "<tool>"}}, None),
    ({"bos_token": "<tool>>", "pad_token": None}, {"bos_token": "<tool>", "pad_token": "<tool>>"}),
    ({"bos_token": "<|im_start|>", "added_tokens_decoder": {}}, {"bos_token": "<tool>"}),
    ({"eos_token": "<tool>"}, {"pad_token": {"content": "<|im_start|>", "lstrip": False}}),
])
def test_the_files_that_name_special_tokens_count_in_transformers_order(tmp_path, config, mapped):
    trained("llama3").save(str(tmp_path / "tokenizer.json"))
    config |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    write_json(tmp_path, tokenizer_config=config)
    if mapped:
        write_json(tmp_path, special_tokens_map=mapped)
    mine, reference = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert (mine.bos, mine.eos, mine.pad) == (
        reference.bos_token_id, reference.eos_token_id, reference.pad_token_id)


def test_ids_in_config_json_count_where_no_token_is_named(tmp_path):
    trained("llama3").save(str(tmp_path / "tokenizer.json"))
    write_json(tmp_path, config={"bos_token_id": 5, "eos_token_id": [7, 8], "pad_token_id": None},
               generation_config={"bos_token_id": 6, "pad_token_id": 9})
    assert (lambda t: (t.bos, t.eos, t.pad))(load_tokenizer(tmp_path)) == (5, 7, 9)
    write_json(tmp_path, tokenizer_config={"bos_token": None}, config={"pad_token_id": -1})
    assert (lambda t: (t.bos, t.eos, t.pad))(load_tokenizer(tmp_path)) == (None, None, 9)


# Rank files, and training them

@pytest.fixture(scope="module")
def ranks():
    return train_bpe(CORPUS, 400)


def test_training_gives_the_ranks_of_tiktokens_own_trainer(ranks):
    assert ranks == bpe_train(CORPUS, 400, ours.GPT2_SPLIT, visualise=None)
    assert list(ranks.values()) == list(range(400)) and train_bpe(CORPUS, 400) == ranks
    repeats = "aaaa aaa aaaaa abab\n\n\n\n"                   # pairs that overlap themselves
    assert train_bpe(repeats, 264) == bpe_train(repeats, 264, ours.GPT2_SPLIT, visualise=None)


@pytest.mark.parametrize("text, size", [("abc", 255), ("ab", 258), ("", 257)])
def test_training_refuses_a_size_that_the_text_cannot_give(text, size):
    with pytest.raises(UserError, match=str(size)):
        train_bpe(text, size)


def test_saved_ranks_are_read_by_tiktoken(ranks, tmp_path):
    save_ranks(ranks, tmp_path / "base.tiktoken")
    assert load_tiktoken_bpe(str(tmp_path / "base.tiktoken")) == ranks
    assert [path.name for path in tmp_path.iterdir()] == ["base.tiktoken"]


@pytest.fixture(scope="module")
def llama3_pair(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama3")
    save_ranks(ranks, folder / "tokenizer.model")
    names = [f"<|{name}|>" for name in ours.LLAMA3_NAMES]
    return load_tokenizer(folder), TikTokenConverter(
        str(folder / "tokenizer.model"), ours.LLAMA3_SPLIT, extra_special_tokens=names).converted()


@quick
@given(text=texts, special=st.sampled_from(ours.LLAMA3_NAMES))
def test_llama3_rank_file_gives_the_ids_of_transformers(llama3_pair, text, special):
    agree(*llama3_pair, f"{text}<|{special}|>{text}")


def test_llama3_special_tokens_have_the_published_places(llama3_pair):
    mine = llama3_pair[0]
    names = ["begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id"]
    assert mine.encode("".join(f"<|{name}|>" for name in names)) == [400, 401, 406, 407, 409]
    assert (mine.bos, mine.eos, mine.pad, mine.vocab_size) == (400, 401, None, 656)


@quick
@given(text=texts)
def test_llama3_tokenizer_json_equals_its_rank_file(llama3_pair, tmp_path_factory, text):
    mine, reference = llama3_pair                    # the same tokens as merges, every split listed
    folder = tmp_path_factory.mktemp("json")
    reference.save(str(folder / "tokenizer.json"))
    assert load_tokenizer(folder).encode(text) == mine.encode(text)


@pytest.mark.parametrize("model_type, pattern", [
    pytest.param("llama", ours.GPT2_SPLIT, id="llama"),
    pytest.param("qwen", ours.QWEN_SPLIT, id="qwen")])
def test_a_tiktoken_file_alone_takes_its_special_tokens_from_config_json(
        ranks, tmp_path, model_type, pattern):
    save_ranks(ranks, tmp_path / "base.tiktoken")
    write_json(tmp_path, config={"model_type": model_type, "bos_token_id": 400, "eos_token_id": 401,
                                 "pad_token_id": 401, "vocab_size": 512})
    mine = load_tokenizer(tmp_path)
    assert (mine.bos, mine.eos, mine.pad, mine.vocab_size) == (400, 401, 401, 512)
    reference = tiktoken.Encoding("reference", pat_str=pattern, mergeable_ranks=ranks,
                                  special_tokens={"<|bos|>": 400, "<|eos|>": 401})
    text = CORPUS + "<|bos|>I'VE 123<|eos|><|pad|>"
    assert mine.encode(text) == reference.encode(text, allowed_special="all")
    assert mine.decode(mine.encode(text)) == text
    assert mine.decode([405]) == "" and mine.decode([240, 159]) == "\ufffd"


# sentencepiece

def train_sentencepiece():
    file = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines()), model_writer=file, vocab_size=400,
        model_type="bpe", byte_fallback=True, minloglevel=2)
    return file.getvalue()


@pytest.fixture(scope="module")
def sentencepiece_pair(tmp_path_factory):
    folder = write_json(tmp_path_factory.mktemp("spm"), added_tokens={"<pad>": 400})
    (folder / "tokenizer.model").write_bytes(train_sentencepiece())
    return load_tokenizer(folder), sentencepiece.SentencePieceProcessor(
        model_file=str(folder / "tokenizer.model"))


@quick
@given(parts=st.lists(texts, min_size=1, max_size=3))
def test_sentencepiece_encodes_what_lies_between_the_special_tokens(sentencepiece_pair, parts):
    mine, reference = sentencepiece_pair
    expected = [i for part in parts for i in [*reference.encode(part), 2]][:-1]
    assert mine.encode("</s>".join(parts)) == expected
    assert mine.decode(reference.encode(parts[0])) == reference.decode(reference.encode(parts[0]))
    assert mine.decode(expected) == "</s>".join(
        reference.decode(reference.encode(part)) for part in parts)


@given(ids=st.lists(st.integers(3, 399), max_size=12))
def test_sentencepiece_decodes_any_ids(sentencepiece_pair, ids):
    assert sentencepiece_pair[0].decode(ids) == sentencepiece_pair[1].decode(ids)


def test_sentencepiece_has_its_own_bos_and_eos_and_takes_added_tokens(sentencepiece_pair):
    mine = sentencepiece_pair[0]
    assert (mine.bos, mine.eos, mine.pad, mine.vocab_size) == (1, 2, None, 401)
    assert mine.encode("<s><pad><unk>") == [1, 400, 0] and mine.decode([1, 400]) == "<s><pad>"
    assert mine.encode("") == []


def test_a_tokenizer_json_that_is_not_byte_level_leaves_it_to_tokenizer_model(tmp_path):
    reference = Tokenizer(models.BPE(vocab={"<unk>": 0, "▁": 1}, merges=[], byte_fallback=True))
    reference.pre_tokenizer = pre.Metaspace()
    reference.add_tokens(["<extra>"])
    reference.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="tokenizer.json: 'BPE' with pre-tokenizer .'Metaspace'"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece())
    mine = load_tokenizer(tmp_path)
    assert type(mine).__name__ == "SentencePieceTokenizer" and mine.encode("<extra>") == [2]


def test_a_missing_sentencepiece_is_named_with_its_package(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\xff")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UserError, match="tokenizer.model: .*pip install sentencepiece"):
        load_tokenizer(tmp_path)


# Edges and errors

@pytest.mark.parametrize("text", ["a" * 10**6, "ab" * 10**5, " " * 10**6 + "the", " \n" * 10**5],
                         ids=lambda text: f"{len(text)} of {text[:2]!r}")
def test_very_long_runs_without_a_break_give_the_ids_of_tokenizers(gpt2_pair, llama3_pair, text):
    """tiktoken's own splitting stops with an error at a million spaces."""
    for mine, reference in (gpt2_pair, llama3_pair):
        assert mine.encode(text) == ids_of(reference, text)


def test_a_folder_without_tokenizer_files_has_no_tokenizer(tmp_path):
    write_json(tmp_path, config={}, tokenizer_config={"bos_token": "<s>"})
    assert load_tokenizer(tmp_path) is None
    with pytest.raises(UserError, match="nowhere"):
        load_tokenizer(tmp_path / "nowhere")


def test_a_lone_surrogate_counts_as_the_replacement_character(gpt2_pair, sentencepiece_pair):
    for mine in (gpt2_pair[0], sentencepiece_pair[0]):
        assert mine.encode("a\ud83d") == mine.encode("a\ufffd")
        assert mine.encode("\ud83d\ude00") == mine.encode("😀")      # a pair written as two


@pytest.mark.parametrize("beyond", [-1, 10**6, 2**70])
def test_an_id_outside_the_vocabulary_is_a_user_error(gpt2_pair, sentencepiece_pair, beyond):
    for mine in (gpt2_pair[0], sentencepiece_pair[0]):
        with pytest.raises(UserError, match=f"{mine.path.name}: token id {beyond} "):
            mine.decode([0, beyond])


def edited(**changes):
    """tokenizer.json with some of its model's fields, or of its own, replaced."""
    spec = json.loads(trained("gpt2").to_str())
    for name, value in changes.items():
        (spec["model"] if name in spec["model"] else spec)[name] = value
    return {"tokenizer.json": json.dumps(spec)}


def rank_lines(*last):
    single = [f"{base64.b64encode(bytes([i])).decode()} {i}" for i in range(256)]
    return "\n".join([*single, *last])


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
        trained("llama3").to_str().replace(r"\\p{N}{1,3}", r"\\p{N}{1,3}("))["pre_tokenizer"]),
    "a pattern that matches nothing": edited(pre_tokenizer={"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "a*"}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]}),
    "dropout": edited(dropout=0.1),
    "an end-of-word suffix": edited(end_of_word_suffix="</w>"),
    "a token that strips": edited(added_tokens=[{"id": 500, "content": "<m>", "lstrip": True}]),
    "a token without an id": edited(added_tokens=[{"content": "<m>"}]),
    "no merges": {"merges.txt": None, "vocab.json": VOCAB},
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
    assert next(iter(files)) in message and "\n" not in message


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


# Real files

@pytest.fixture(scope="module")
def real_gpt2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    shutil.copy(SHARED / "tokenizers/gpt2/encoder.json", folder / "vocab.json")
    shutil.copy(SHARED / "tokenizers/gpt2/vocab.bpe", folder / "merges.txt")
    return load_tokenizer(SHARED / "tokenizers/gpt2"), GPT2Tokenizer.from_pretrained(folder)


@needs_shared
def test_gpt2_files_give_the_ids_of_transformers(real_gpt2):
    mine, reference = real_gpt2
    assert (mine.bos, mine.eos, mine.pad, mine.vocab_size) == (50256, 50256, None, 50257)
    assert mine.encode("Hello world<|endoftext|>") == [15496, 995, 50256]
    shakespeare = (SHARED / "text/tinyshakespeare_input.txt").read_text(encoding="utf-8")
    agree(mine, reference, shakespeare[:200_000])
    agree(mine, reference, CORPUS + "".join(SNIPPETS))


@needs_shared
@quick
@given(text=texts)
def test_gpt2_files_give_the_ids_of_transformers_on_any_text(real_gpt2, text):
    agree(*real_gpt2, text)


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
    reference = TikTokenConverter(str(tmp_path / "tokenizer.model"), ours.LLAMA3_SPLIT).converted()
    text = CORPUS + "".join(SNIPPETS)
    assert load_tokenizer(tmp_path).encode(text) == ids_of(reference, text)


@needs_shared
def test_a_real_sentencepiece_model_gives_the_ids_of_sentencepiece(tmp_path):
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
