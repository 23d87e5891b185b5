"""WordPiece, BERT's tokenizer: words are cut into the longest pieces of a vocabulary.

Devlin et al., 2019, arXiv:1810.04805. The text is cleaned, lower-cased and cut into words. Each
word is cut from the left: the longest piece that fits, then the longest of the rest, and so on. A
piece that does not begin a word is spelt with ##. With un, ##aff and ##able in the vocabulary:
    Unaffable!   unaffable !   un ##aff ##able !
The steps are those of google-research/bert, tokenization.py, as huggingface/tokenizers has them
(normalizers/bert.rs, pre_tokenizers/bert.rs, models/wordpiece). That library's tables know Unicode
up to 8.0. Here the few marks and signs that came later count as this Python knows them.
"""
import json
import unicodedata
from functools import partial
from pathlib import Path
from typing import Callable

from formats.bpe_files import list_steps
from formats.json_files import expected_layout, read_bytes, read_json_if_there
from formats.pairs import FAMILIES, check_class, find_class, find_family
from formats.special_tokens import Tokenizer, build_tokenizer, check_ids
from support.errors import UserError

MORE = "##"                                     # spells a piece that goes on with a word
LONGEST_WORD = 100                              # characters; a longer word is unknown
CACHED_WORDS = 2**16
BERT_CLASSES = ("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer")     # they do the same
# The Chinese characters; Korean and Japanese letters are not among them. (bert.rs begins the last
# block but two at 2B920; tokenization.py has 2B820.)
IDEOGRAPHS = [(0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F),
              (0x2B740, 0x2B81F), (0x2B920, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F)]


class Table(dict):
    """Maps each character by a function, which is called once: a table for str.translate."""

    def __init__(self, function: Callable[[str], str]):
        self.function = function

    def __missing__(self, code: int) -> str:
        self[code] = self.function(chr(code))
        return self[code]


def clean(char: str) -> str:
    """Drops a control character, and makes any white space a space."""
    category = unicodedata.category(char)
    if char in "\t\n\r" or category.startswith("Z"):
        return " "
    return "" if char == "\ufffd" or category in ("Cc", "Cf", "Co") else char


def set_ideograph_apart(char: str) -> str:
    """Puts spaces around a Chinese character: these are not written as words."""
    return f" {char} " if any(a <= ord(char) <= b for a, b in IDEOGRAPHS) else char


def strip_accent(char: str) -> str:
    """Drops a mark that stands over or under the letter before it."""
    return "" if unicodedata.category(char) == "Mn" else char


def set_punctuation_apart(char: str) -> str:
    """Puts spaces around punctuation. All signs of ASCII count, also $ and +."""
    sign = char.isascii() and char.isprintable() and not char.isalnum() and char != " "
    return f" {char} " if sign or unicodedata.category(char).startswith("P") else char


CLEAN, IDEOGRAPH, ACCENT, PUNCTUATION = map(Table, (clean, set_ideograph_apart, strip_accent,
                                                    set_punctuation_apart))
LOWER = Table(str.lower)        # one by one: str.lower of a word would end it with another sigma


class WordPieceTokenizer(Tokenizer):
    """Runs WordPiece on the text between the added tokens.

    vocab: token -> id. lower: lower-case the text. accents: keep them. ideographs: set Chinese
    characters apart. longest: a word of more characters is unknown.
    Decoding puts a space before each token but one with ##. It does not remove the spaces that
    stood in no text, such as the one before a full stop.
    """
    normalizes = True

    def __init__(self, path: Path, added: dict[str, int], vocab: dict[str, int], lower: bool,
                 accents: bool, ideographs: bool, longest: int = LONGEST_WORD):
        check_ids(path, vocab)
        super().__init__(path, added, max(vocab.values()) + 1)
        self._vocab, self._lower, self._accents = vocab, lower, accents
        self._ideographs, self._longest = ideographs, longest
        self._token_of = {i: token for token, i in (vocab | added).items()}
        self._text_of = {}                      # so that decode_plain() gets added tokens too
        self._known: dict[str, list[int]] = {}                      # word -> ids

    def encode_plain(self, text: str, at_start: bool) -> list[int]:
        ids = []
        for word in self._cut(text):
            if word not in self._known:
                if len(self._known) >= CACHED_WORDS:
                    self._known.clear()
                self._known[word] = self._match(word)
            ids += self._known[word]
        return ids

    def _cut(self, text: str) -> list[str]:
        """Cleans the text and cuts it into words."""
        text = text.translate(CLEAN)
        if self._ideographs:
            text = text.translate(IDEOGRAPH)
        if not self._accents:                   # NFD writes an accent as a character of its own
            text = unicodedata.normalize("NFD", text).translate(ACCENT)
        if self._lower:
            text = text.translate(LOWER)
        return text.translate(PUNCTUATION).split()

    def _match(self, word: str) -> list[int]:
        """Cuts a word into the longest pieces from the left. If one is missing, it is unknown."""
        if len(word) > self._longest:
            return [self.unk]
        ids, start = [], 0
        while start < len(word):
            prefix = MORE if start else ""
            for end in range(len(word), start, -1):
                if (piece := prefix + word[start:end]) in self._vocab:
                    ids.append(self._vocab[piece])
                    start = end
                    break
            else:
                return [self.unk]
        return ids

    def decode_plain(self, ids: list[int]) -> str:
        first, *rest = [self._token_of[i] for i in ids if i in self._token_of] or [""]
        return first + "".join(token[2:] if token.startswith(MORE) else " " + token
                               for token in rest)


def load_vocab_txt(path: Path) -> Tokenizer:
    """Loads a vocab.txt: a line for each token, whose id is the number of lines before it.

    Raises UserError if a token stands there twice, or one of the special tokens does not, or the
    folder names a class that does something else with the file.
    """
    check_class(path, *BERT_CLASSES)
    try:
        lines = read_bytes(path).decode().replace("\r\n", "\n").rstrip("\n").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8: {error}") from error
    vocab: dict[str, int] = {}
    for number, token in enumerate(lines):
        if not token or token in vocab:
            raise UserError(f"{path}: line {number + 1}: {token[:80]!r}: not a new token")
        vocab[token] = number
    family = find_family(path.parent) or FAMILIES["BertTokenizer"]
    make = partial(WordPieceTokenizer, vocab=vocab, **read_steps(path.parent))
    return check_unk(build_tokenizer(make, path, vocab, [], {}, family))


def load_wordpiece_json(path: Path, spec: dict) -> Tokenizer:
    """Loads a tokenizer.json of WordPiece, whose contents are `spec`.

    Its padding, truncation and post-processor are left out: see Tokenizer.pair(). Raises UserError
    if a setting would change the ids in a way that is not known here.
    """
    with expected_layout(path):
        model = spec["model"]
        if model.get("continuing_subword_prefix", MORE) != MORE:
            raise UserError(f"{path}: continuing_subword_prefix "
                            f"{model['continuing_subword_prefix']!r} is not supported")
        normalizers = list_steps(spec.get("normalizer"), "normalizers")
        cutters = list_steps(spec.get("pre_tokenizer"), "pretokenizers")
        if ([step["type"] for step in normalizers + cutters] != ["BertNormalizer",
                                                                 "BertPreTokenizer"]
                or not normalizers[0].get("clean_text", True)):
            part = {name: spec.get(name) for name in ("normalizer", "pre_tokenizer")}
            raise UserError(f"{path}: {json.dumps(part)[:300]} is not supported")
        step = normalizers[0]
        steps = order_steps(path, step["lowercase"], step["strip_accents"],
                            step["handle_chinese_chars"])
        if find_class(path.parent) in BERT_CLASSES:
            steps = read_steps(path.parent)     # these classes disregard the normalizer
        longest = model.get("max_input_chars_per_word", LONGEST_WORD)
        if type(longest) is not int or not 0 < longest <= 10**4:
            raise UserError(f"{path}: max_input_chars_per_word {str(longest)[:80]} is not "
                            "supported")
        make = partial(WordPieceTokenizer, vocab=model["vocab"], longest=longest, **steps)
        unk = model["vocab"].get(model.get("unk_token"))
    return check_unk(build_tokenizer(make, path, model["vocab"], spec.get("added_tokens") or [],
                                     {"unk": unk}))


def check_unk(tokenizer: Tokenizer) -> Tokenizer:
    """Returns the tokenizer. Raises UserError if it has no token for a word that is unknown."""
    if tokenizer.unk is None:
        raise UserError(f"{tokenizer.path}: no token for an unknown word, such as [UNK]")
    return tokenizer


def read_steps(folder: Path) -> dict[str, bool]:
    """Reads how BertTokenizer cleans a text from tokenizer_config.json, with the class's defaults.

    Returns lower, accents and ideographs of WordPieceTokenizer.
    """
    path = folder / "tokenizer_config.json"
    settings = read_json_if_there(path)
    return order_steps(path, settings.get("do_lower_case", True), settings.get("strip_accents"),
                       settings.get("tokenize_chinese_chars", True))


def order_steps(path: Path, lower, strip_accents, ideographs) -> dict[str, bool]:
    """Checks the settings of cleaning. Accents are stripped with lower case, if nothing is said."""
    strip_accents = lower if strip_accents is None else strip_accents
    for value in (lower, strip_accents, ideographs):
        if type(value) is not bool:
            raise UserError(f"{path}: {str(value)[:80]!r} is neither true nor false: lower case, "
                            "accents or Chinese characters")
    return {"lower": lower, "accents": not strip_accents, "ideographs": ideographs}
