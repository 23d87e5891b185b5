"""Trains small tokenizers of every published layout on one text, to compare with."""
import base64
import json
import tempfile
from functools import cache
from io import BytesIO
from pathlib import Path

import sentencepiece
from hypothesis import settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers as pre
from tokenizers import processors, trainers
from transformers import (AutoTokenizer, BertTokenizer, DebertaTokenizer, GPT2Tokenizer,
                          Qwen2Tokenizer, RobertaTokenizer)
from transformers.convert_slow_tokenizer import TikTokenConverter

from formats.bpe import LLAMA3_SPLIT, QWEN_SPLIT
from formats.bpe_files import LLAMA3_NAMES, save_ranks
from formats.bpe_training import train_bpe
from formats.tokenizer import load_tokenizer

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
    "llama3": split(LLAMA3_SPLIT),
    "qwen": split(QWEN_SPLIT),
    "smollm": pre.Sequence([pre.Digits(individual_digits=True), byte_level(True)]),
    "a split with gaps": split(r"\p{L}+|\d"),
    "a split that drops the gaps": split(r"\p{L}+|\d", "removed", invert=True),
}


FOLDERS = []            # keeps the objects: a folder is deleted when its object is


def new_folder() -> Path:
    FOLDERS.append(tempfile.TemporaryDirectory(prefix="tokenizer"))
    return Path(FOLDERS[-1].name)


@cache
def trained_json(kind: str, all_bytes: bool = True) -> str:
    """Returns the tokenizer.json of a tokenizer trained on CORPUS; SPECIAL are its last tokens.

    `kind` names its pre-tokenizer.
    """
    reference = Tokenizer(models.BPE())
    reference.pre_tokenizer, reference.decoder = SPLITTERS[kind], decoders.ByteLevel()
    alphabet = pre.ByteLevel.alphabet() if all_bytes else []
    reference.train_from_iterator([CORPUS], trainers.BpeTrainer(
        vocab_size=len(alphabet) + 200, initial_alphabet=sorted(alphabet), show_progress=False))
    reference.normalizer = normalizers.NFC() if kind == "qwen" else None
    reference.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIAL])
    return reference.to_str()


def save_trained(kind: str, folder: Path) -> None:
    (folder / "tokenizer.json").write_text(trained_json(kind), encoding="utf-8")


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


def rank_lines(*last):
    """Returns a rank file: a line for each of the 256 bytes, then the lines `last`."""
    single = [f"{base64.b64encode(bytes([i])).decode()} {i}" for i in range(256)]
    return "\n".join([*single, *last])


# ---- pairs: ours and the reference, each read from the same files once

@cache
def json_pair(kind: str, all_bytes: bool = True):
    folder = new_folder()
    (folder / "tokenizer.json").write_text(trained_json(kind, all_bytes), encoding="utf-8")
    return load_tokenizer(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))


def save_vocab_merges(kind, folder, special=()):
    """Writes vocab.json and merges.txt; returns their folder and the number of tokens."""
    model = json.loads(trained_json(kind))["model"]
    vocab = model["vocab"] | {text: len(model["vocab"]) + i for i, text in enumerate(special)}
    merges = "".join(" ".join(m) + "\n" for m in model["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
    return write_json(folder, vocab=vocab), len(vocab)


@cache
def gpt2_pair():
    folder, size = save_vocab_merges("gpt2", new_folder(), SPECIAL[:1])
    write_json(folder, added_tokens={"<|im_start|>": size, "<tool>": size + 1})
    return load_tokenizer(folder), GPT2Tokenizer.from_pretrained(folder)


@cache
def qwen_pair():
    folder, size = save_vocab_merges("qwen", new_folder())
    flags = dict(lstrip=False, rstrip=False, single_word=False, normalized=False, special=True)
    added = {str(size + i): {"content": text, **flags} for i, text in enumerate(SPECIAL)}
    write_json(folder, tokenizer_config={
        "tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added, "bos_token": None,
        "eos_token": "<|im_start|>", "pad_token": "<|endoftext|>", "add_prefix_space": False})
    return load_tokenizer(folder), Qwen2Tokenizer.from_pretrained(folder)


@cache
def ranks() -> dict[bytes, int]:
    return train_bpe(CORPUS, 400)


@cache
def llama3_pair():
    folder = new_folder()
    save_ranks(ranks(), folder / "tokenizer.model")
    names = [f"<|{name}|>" for name in LLAMA3_NAMES]
    return load_tokenizer(folder), TikTokenConverter(
        str(folder / "tokenizer.model"), LLAMA3_SPLIT, extra_special_tokens=names).converted()


@cache
def trained_sentencepiece(**settings) -> bytes:
    file = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines()), model_writer=file, minloglevel=2,
        **{"vocab_size": 400, "model_type": "bpe", "byte_fallback": True} | settings)
    return file.getvalue()


def llama_pieces() -> bytes:
    """Trains a tokenizer.model with the settings of LLaMA's: the text is left as it is."""
    return trained_sentencepiece(
        normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        allow_whitespace_only_pieces=True)


@cache
def llama_json() -> str:
    """Returns the tokenizer.json that transformers makes of llama_pieces(), <tool> added."""
    folder = write_json(new_folder(), tokenizer_config={"tokenizer_class": "LlamaTokenizer"})
    (folder / "tokenizer.model").write_bytes(llama_pieces())
    saved = AutoTokenizer.from_pretrained(folder)
    saved.add_tokens([AddedToken(text, normalized=False) for text in ("<tool>", "<tool>>")])
    saved.save_pretrained(folder)
    return (folder / "tokenizer.json").read_text(encoding="utf-8")


@cache
def sentencepiece_pair():
    folder = write_json(new_folder(), added_tokens={"<pad>": 400})
    (folder / "tokenizer.model").write_bytes(trained_sentencepiece())
    return load_tokenizer(folder), sentencepiece.SentencePieceProcessor(
        model_file=str(folder / "tokenizer.model"))


# ---- encoders

BERT_MARKS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROBERTA_MARKS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
DEBERTA_MARKS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]


@cache
def wordpieces() -> tuple[str, ...]:
    """Returns the pieces of a WordPiece vocabulary of capital and small letters."""
    reference = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    reference.pre_tokenizer = pre.BertPreTokenizer()
    reference.train_from_iterator([CORPUS, CORPUS.lower()], trainers.WordPieceTrainer(
        vocab_size=400, special_tokens=BERT_MARKS, show_progress=False))
    return tuple(sorted(reference.get_vocab(), key=reference.get_vocab().get))


def save_wordpieces(folder: Path, **settings) -> Path:
    (folder / "vocab.txt").write_text("\n".join(wordpieces()) + "\n", encoding="utf-8")
    return write_json(folder, config={"model_type": "bert"}, tokenizer_config=settings)


@cache
def bert_pair(**settings):
    folder = save_wordpieces(new_folder(), **settings)
    return load_tokenizer(folder), BertTokenizer.from_pretrained(folder)


def save_marked(model_type: str, marks: list[str], folder: Path) -> Path:
    """Writes vocab.json and merges.txt with `marks` as the first four ids and the last one."""
    save_vocab_merges("gpt2", folder)
    vocab = json.loads(trained_json("gpt2"))["model"]["vocab"]
    vocab = {token: i for i, token in enumerate([*marks[:4], *vocab, "<|endoftext|>", marks[4]])}
    return write_json(folder, vocab=vocab, config={"model_type": model_type})


@cache
def roberta_pair():
    """RoBERTa, its reference told that <mask> takes the white space before it, as files tell."""
    folder = save_marked("roberta", ROBERTA_MARKS, new_folder())
    return load_tokenizer(folder), RobertaTokenizer.from_pretrained(
        folder, mask_token=AddedToken("<mask>", lstrip=True, special=True))


@cache
def deberta_pair():
    """DeBERTa v1, its reference told of [MASK] too, and of the published form of a pair.

    transformers 5 has lost that form: it puts a second [SEP] in, and gives both the type 0.
    """
    folder = save_marked("deberta", DEBERTA_MARKS, new_folder())
    reference = DebertaTokenizer.from_pretrained(
        folder, mask_token=AddedToken("[MASK]", lstrip=True, special=True))
    reference.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    return load_tokenizer(folder), reference


def deberta_pieces() -> bytes:
    """Trains a spm.model with the settings of DeBERTa-v3's."""
    ids = dict(zip(("pad", "bos", "eos", "unk"), DEBERTA_MARKS))
    return trained_sentencepiece(
        model_type="unigram", byte_fallback=False, vocab_size=90,
        **{f"{role}_id": i for i, role in enumerate(ids)},
        **{f"{role}_piece": piece for role, piece in ids.items()})


def save_spm(folder: Path, **settings) -> Path:
    (folder / "spm.model").write_bytes(deberta_pieces())
    return write_json(folder, config={"model_type": "deberta-v2"}, tokenizer_config=settings)


@cache
def spm_pair(**settings):
    folder = save_spm(new_folder(), **settings)
    return load_tokenizer(folder), sentencepiece.SentencePieceProcessor(
        model_file=str(folder / "spm.model"))
