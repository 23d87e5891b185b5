"""Byte-pair encoding (BPE) on bytes: text <-> token ids, by tiktoken.

Sennrich et al., 2016, arXiv:1508.07909. BPE cuts the text into words by a regular expression and
starts each word as its UTF-8 bytes. Then it joins the neighbouring pair that was learnt first,
again and again, until no learnt pair is left. With the merges u+g, then h+ug:
    hugs   h u g s -> h ug s -> hug s
tiktoken runs that loop. It wants a split pattern, and the tokens in the order learnt. This file
has the patterns of the model families, and order_tokens(), which finds the order.
"""
import unicodedata
from math import inf, prod
from pathlib import Path
from typing import Iterable

import regex
import tiktoken

from formats.json_files import expected_layout
from formats.special_tokens import Tokenizer, check_ids
from support.errors import UserError, within

# Split patterns. GPT-2: openai/gpt-2, src/encoder.py. LLaMA-3: meta-llama/llama-models,
# models/llama3/tokenizer.py (openai/tiktoken's cl100k_base splits the same). Qwen: transformers,
# models/qwen2/tokenization_qwen2.py: each digit is a word.
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
# SmolLM cuts the digits out, then splits the text between them like GPT-2, to which a digit is
# then the end of the text.
DIGITS_SPLIT = GPT2_SPLIT.replace(r" ?\p{N}+", r"\p{N}").replace(r"\S", r"[^\s\p{N}]")
PUBLISHED = (GPT2_SPLIT, LLAMA3_SPLIT, QWEN_SPLIT, DIGITS_SPLIT)   # quick, and they leave no gaps
# vocab.json writes a byte as one visible character: itself, or else the next from U+0100 on.
_VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_HIDDEN = [byte for byte in range(256) if byte not in _VISIBLE]
_BYTE_OF = dict.fromkeys(_HIDDEN, "\uffff") | {256 + n: chr(b) for n, b in enumerate(_HIDDEN)}
MOST_PATTERN, MOST_REPEATS = 10**4, 10**5       # a longer pattern, or one of more, is refused
PATIENCE = 2            # seconds in which the shortest text must be cut into words
ASCII = "".join(map(chr, range(128)))
BYTES = [bytes([byte]) for byte in range(256)]


class BPETokenizer(Tokenizer):
    """Runs byte-level BPE on the text between the added tokens.

    tokens: bytes -> id, in the order learnt. Every single byte is among them, with id None if the
    vocabulary lacks it. vocab: all of vocab.json, to decode tokens that BPE never makes.
    nfc: normalize the text (Unicode's NFC) first. prefix_space: begin the text with a space.
    """

    def __init__(self, path: Path, added: dict[str, int], split: str,
                 tokens: dict[bytes, int | None], vocab: dict[str, int], nfc: bool = False,
                 prefix_space: bool = False):
        self._nfc, self._prefix_space = nfc, prefix_space
        self._bytes_of = {i: data for data, i in tokens.items() if i is not None}
        for token, i in vocab.items():
            self._bytes_of[i] = to_bytes(token) or token.encode()
        super().__init__(path, added, max(self._bytes_of) + 1)
        self._split, self._published = compile_split(path, split), split in PUBLISHED
        try:
            self._encoding = tiktoken.Encoding(
                path.name, pat_str=split, special_tokens={},
                mergeable_ranks={token: rank for rank, token in enumerate(tokens)})
        except ValueError as error:
            raise UserError(f"{path}: split pattern {split[:200]!r} does not compile: "
                            f"{' '.join(str(error).split())[:200]}") from error
        self._id_of_rank = list(tokens.values())
        self._missing = b"".join(byte for byte in BYTES if tokens[byte] is None)
        self._cut(ASCII + ASCII)    # refuses empty matches, at which tiktoken drops characters

    def encode_plain(self, text: str, at_start: bool) -> list[int]:
        text = unicodedata.normalize("NFC", text) if self._nfc else text
        if self._prefix_space and not text.startswith(" "):
            text = " " + text
        data, ranks = text.encode(), None
        if len(data.translate(None, self._missing)) == len(data):
            ranks = self._encode_by_tiktoken(text)
        if ranks is None:
            # Word by word instead. From each word the tokenizers library drops the bytes that the
            # vocabulary lacks; so does this. (The regex module knows letters of Unicode 17 and
            # later, which tiktoken takes for symbols.)
            words = (word.encode().translate(None, self._missing) for word in self._cut(text))
            ranks = [rank for word in words if word
                     for rank in self._encoding._encode_single_piece(word)]
        return [self._id_of_rank[rank] for rank in ranks]

    def _encode_by_tiktoken(self, text: str) -> list[int] | None:
        """Encodes the text to ranks, or returns None if tiktoken's regular expressions give up.

        They do on 10^6 spaces in a row. tiktoken knows no limit of time, but lets other threads
        run. So an unknown pattern gets a thread of its own.
        """
        def encode() -> list[int]:
            return self._encoding.encode(text, disallowed_special=())

        try:
            return encode() if self._published else within(time_for(text), encode)
        except TimeoutError:
            raise UserError(self._too_long(text)) from None
        except ValueError:
            return None

    def _cut(self, text: str) -> list[str]:
        """Cuts the text into words. Raises UserError if the pattern takes too long over it."""
        try:
            words = [match.group() for match in self._split.finditer(text, timeout=time_for(text))]
        except (TimeoutError, MemoryError) as error:
            raise UserError(self._too_long(text)) from error
        if not all(words):
            raise UserError(f"{self.path}: split pattern {self._split.pattern[:200]!r} matches the "
                            "empty text")
        return words

    def _too_long(self, text: str) -> str:
        return (f"{self.path}: split pattern {self._split.pattern[:200]!r} takes too long or too "
                f"much memory for a text of {len(text)} characters")

    def decode_plain(self, ids: list[int]) -> str:
        return b"".join(self._bytes_of.get(i, b"") for i in ids).decode("utf-8", errors="replace")


def time_for(text: str) -> float:
    """Gives the seconds in which a text must be cut into words.

    A pattern of nested repeats can take a time exponential in the text's length. The published
    ones take less than 0.5 s for 10^6 characters.
    """
    return PATIENCE + len(text) / 2e5


def compile_split(path: Path, split: str) -> regex.Pattern:
    """Compiles a split pattern.

    Raises UserError if it is wrong, or so long or so often repeated that it may take all memory:
    (a{1000}){1000} is compiled to 10^6 letters.
    """
    if len(split) > MOST_PATTERN or count_repeats(split) > MOST_REPEATS:
        raise UserError(f"{path}: split pattern {split[:60]!r}...: more than {MOST_PATTERN} "
                        f"characters or {MOST_REPEATS} repeats")
    try:
        return regex.compile(split)
    except (ValueError, regex.error, RecursionError, MemoryError) as error:
        raise UserError(f"{path}: split pattern {split[:200]!r} does not compile: "
                        f"{' '.join(str(error).split())[:200]}") from error


def count_repeats(pattern: str) -> int:
    """Multiplies all counts in the braces of a pattern: it may be compiled to so many copies."""
    counts = regex.findall(r"\{(\d*),?(\d*)\}", pattern)
    return prod(max(1, *(int("0" + digits[:9]) for digits in pair)) for pair in counts)


def to_bytes(token: str) -> bytes | None:
    """Converts a token from vocab.json's spelling, or returns None if it is not spelt that way."""
    try:
        return token.translate(_BYTE_OF).encode("latin-1")
    except UnicodeEncodeError:
        return None


def spell(token: bytes) -> str:
    """Converts a token to vocab.json's spelling."""
    return "".join(chr(256 + _HIDDEN.index(b)) if b in _HIDDEN else chr(b) for b in token)


def order_tokens(vocab_path: Path, vocab: dict[str, int], merges_path: Path,
                 pairs: list[tuple[str, ...]], ignore_merges: bool | None = False,
                 added: Iterable[str] = ()) -> dict[bytes, int | None]:
    """Orders the tokens that BPE makes, so that tiktoken makes the same ones: bytes -> id.

    The tokenizers library joins only the listed pairs, the first listed first. tiktoken joins any
    neighbours whose union is a token, the lowest rank first. Both do the same under two
    conditions. A token stands at the place of the merge that ends the BPE of its own bytes. And a
    token that no such merge ends is left out. This is enough because neighbours in a word have
    been through the very merges that BPE of their union alone goes through.

    With ignore_merges a word that is a token is one id, even if no merges make it (588 tokens of
    LLaMA-3). Such tokens come last. The BPE of each must end in more than two parts, so that
    tiktoken never meets it as two neighbours.
    """
    check_ids(vocab_path, vocab)
    with expected_layout(vocab_path):
        ids = {data: i for token, i in vocab.items() if (data := to_bytes(token))}
    order: dict[tuple[bytes, bytes], int] = {}
    for number, pair in enumerate(pairs):
        left, right = map(to_bytes, pair)
        if left not in ids or right not in ids or left + right not in ids:
            raise UserError(f"{merges_path}: merge {number + 1}, {' '.join(pair)!r}: a part or the "
                            "union is not in the vocabulary")
        order[left, right] = number                      # if a pair is repeated, the last counts
    place, unmade = {}, []
    special = set(map(to_bytes, added))
    for token in ids:
        parts = merge_to_two(token, order)
        if parts in order:
            place[token] = order[parts]
        elif ignore_merges and len(token) > 1 and token not in special:
            unmade.append(token)
            if len(parts) == 2 or not all(byte in ids for byte in BYTES):
                raise UserError(f"{vocab_path}: no merges make {token!r}: ignore_merges is not "
                                "supported then")
    return {t: ids.get(t) for t in [*BYTES, *sorted(place, key=place.__getitem__), *unmade]}


def merge_to_two(token: bytes, order: dict[tuple[bytes, bytes], int]) -> tuple[bytes, ...]:
    """Merges the bytes of `token` until two parts are left.

    Stops earlier, with more parts, if no listed pair is left.
    """
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        places = [order.get(pair, inf) for pair in zip(parts, parts[1:])]
        at = places.index(min(places))
        if (parts[at], parts[at + 1]) not in order:
            break
        parts[at:at + 2] = [parts[at] + parts[at + 1]]
    return tuple(parts)
