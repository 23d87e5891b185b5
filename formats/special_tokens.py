"""Cuts special tokens out of the text, and finds out which of them are bos, eos and pad.

A tokenizer learns its tokens from text. Others are added to it by hand: <|endoftext|>, or the
marks of a chat. They are matched as they stand, before the text between them is tokenized.
Several files may name them, and may disagree. build_tokenizer() says which file counts.
"""
from pathlib import Path
from typing import Callable, Iterable

import regex

from formats.json_files import expected_layout, read_json_if_there
from formats.pairs import Family, find_family, join
from support.errors import UserError

ROLES = ("bos", "eos", "pad")
MARKS = ("cls", "sep", "mask", "unk")           # roles that encoders have
# White space as Unicode has it. (str.strip takes four separators of ASCII too.)
WHITE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200b)))
MOST_IDS = 2**24        # 60 times the largest published vocabulary


class Tokenizer:
    """Encodes and decodes added tokens, and leaves the text between them to a subclass.

    path: the vocabulary's file, for messages. added: text -> id. size: every other id is below it.
    vocab_size: every id is below it. bos, eos, pad, cls, sep, mask, unk: ids, or None. RoBERTa and
    DeBERTa have cls and sep as bos and eos too, as in transformers; BERT has no bos and eos.
    special: ids of added tokens that are marks, such as <|endoftext|>, and no text. lstrip, rstrip:
    texts of added tokens that take the white space before them, or after. family: says how two
    sentences are joined, or None. A subclass has encode_plain(text, at_start) and
    decode_plain(ids), for what lies between two added tokens. at_start: no added token is before
    it. normalizes: encode_plain cleans the text; an added token looked for later is refused.
    """
    bos = eos = pad = cls = sep = mask = unk = family = None
    special: set[int] = set()
    lstrip = rstrip = frozenset()
    normalizes = False

    def __init__(self, path: Path, added: dict[str, int], size: int):
        self.path, self.added = path, added
        self.vocab_size = max([size - 1, *added.values()]) + 1
        self._text_of = {i: text for text, i in added.items()}
        longest_first = sorted(added, key=len, reverse=True)
        self._any_added = regex.compile(f"({'|'.join(map(regex.escape, longest_first)) or '(?!)'})")

    def encode(self, text: str) -> list[int]:
        """Encodes `text` without adding bos and eos.

        A special token that is written in the text gets its own id. A lone surrogate, which UTF-8
        cannot hold, counts as U+FFFD.
        """
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        parts, ids = self._any_added.split(text), []
        for n in range(1, len(parts), 2):        # what the pattern found is at the odd places
            if parts[n] in self.lstrip:
                parts[n - 1] = parts[n - 1].rstrip(WHITE)
            if parts[n] in self.rstrip:
                parts[n + 1] = parts[n + 1].lstrip(WHITE)
        for n, part in enumerate(parts):
            if n % 2:
                ids.append(self.added[part])
            elif part:
                ids += self.encode_plain(part, at_start=n == 0)
        return ids

    def decode(self, ids: Iterable[int], special: bool = True) -> str:
        """Decodes `ids`, with or without special tokens.

        U+FFFD stands for bytes that are not UTF-8. An id that no token uses gives no text. Raises
        UserError if an id is outside the vocabulary.
        """
        texts, run = [], []                      # run: plain ids not decoded yet
        for i in map(int, ids):
            if not 0 <= i < self.vocab_size:
                raise UserError(f"{self.path}: token id {i} is outside its {self.vocab_size} ids")
            if i in self.special and not special:
                continue
            if i in self._text_of:
                texts += [self.decode_plain(run), self._text_of[i]]
                run = []
            else:
                run.append(i)
        return "".join(texts) + self.decode_plain(run)

    def pair(self, a: str, b: str | None, max_length: int) -> tuple[list[int], list[int]]:
        """Encodes one sentence, or two, as an encoder reads them -> ids and types.

        Cuts them to `max_length` ids with cls and sep. pairs.py says how, and when it fails.
        """
        return join(self, self.encode(a), None if b is None else self.encode(b), max_length)


def build_tokenizer(make: Callable, path: Path, vocab: dict[str, int], listed: list[dict],
                    roles: dict[str, int | None], family: Family | None = None) -> Tokenizer:
    """Builds a tokenizer with make(path, added), and gives it its special tokens and its family.

    vocab: token -> id. listed: the added tokens that the vocabulary's own file lists. roles: bos,
    eos and so on as that file or the tokenizer's class has them. family: if None, the one that the
    folder names.
    The first of these that names a role counts. The first three are transformers' rule.
        special_tokens_map.json, if tokenizer_config.json has no added_tokens_decoder
        bos_token and so on in tokenizer_config.json (null means that there is none)
        the family
        `roles`
        config.json
        generation_config.json
    Raises UserError if a special token of the family is not in the vocabulary.
    """
    family = family or find_family(path.parent)
    named = read_named(path.parent, family)
    tokens = collect_added(path, vocab, listed, named)
    added = {text: token["id"] for text, token in tokens.items()}
    with expected_layout(path):
        tokenizer = make(path, added)
    tokenizer.family = family
    tokenizer.special = {token["id"] for token in tokens.values() if token["special"]}
    tokenizer.lstrip, tokenizer.rstrip = (
        {text for text in tokens if tokens[text].get(side)} for side in ("lstrip", "rstrip"))
    for text, token in tokens.items():
        if tokenizer.normalizes and token.get("normalized", not token["special"]):
            raise UserError(f"{path}: the added token {text!r} is looked for in the cleaned text: "
                            "that is not supported (normalized)")
    config = read_ids(path.parent)
    tokenizer.vocab_size = max(tokenizer.vocab_size, config.get("vocab_size", 0))
    for role in ROLES + MARKS:
        name = named.get(f"{role}_token", {"content": ""})["content"]
        usual = config.get(role) if roles.get(role) is None else roles[role]
        setattr(tokenizer, role, None if name is None else added.get(name, usual))
        if family and role in family.names and role != "unk" and name not in (None, *added):
            raise UserError(f"{path}: no token {str(name)[:80]!r}, which is the {role}_token")
    return tokenizer


def read_named(folder: Path, family: Family | None) -> dict[str | int, dict]:
    """Reads the special tokens that the family and the settings name.

    Returns bos_token and so on -> the token's content and flags. content: None if there is none.
    """
    settings = read_json_if_there(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in settings:
        settings = settings | read_json_if_there(folder / "special_tokens_map.json")
    named = {f"{role}_token": {"content": name} for role, name in family.names.items()
             } if family else {}
    if family and family.mask_lstrip:
        named["mask_token"]["lstrip"] = True
    with expected_layout(folder / "tokenizer_config.json or special_tokens_map.json"):
        found = {key: token for key, token in settings.items() if key.endswith("_token")}
        found |= enumerate(settings.get("additional_special_tokens") or [])
        for key, token in found.items():
            if not isinstance(token, dict):
                token = named.get(key, {}) | {"content": token}
            if isinstance(token["content"], (list, dict)):
                raise TypeError(f"{key} is no text")
            named[key] = token
    return named


def collect_added(path: Path, vocab: dict[str, int], listed: list[dict],
                  named: dict[str | int, dict]) -> dict[str, dict]:
    """Collects the added tokens of all files: text -> id, special, and other flags.

    Takes the `named` tokens that are in the vocabulary, those of added_tokens.json, those `listed`
    in `path`, and those of added_tokens_decoder in tokenizer_config.json. A later one replaces the
    id and the flags that an earlier one of the same text gives. All are special but those of
    added_tokens.json, and those that a file says not to be. A named one is special anyway.
    """
    config, extra = path.with_name("tokenizer_config.json"), path.with_name("added_tokens.json")
    with expected_layout(config):
        decoder = read_json_if_there(config).get("added_tokens_decoder") or {}
        decoder = [token | {"id": int(i)} for i, token in decoder.items()]
    sources = [
        (config, [token | {"id": vocab[token["content"]]} for token in named.values()
                  if token["content"] in vocab]),
        (extra, [{"content": text, "id": i, "special": False}
                 for text, i in read_json_if_there(extra).items()]),
        (path, listed),
        (config, decoder)]
    names, found = {token["content"] for token in named.values()}, {}
    for file, tokens in sources:
        with expected_layout(file):
            for token in tokens:
                text, i = token["content"], token["id"]
                if token.get("single_word"):
                    raise UserError(f"{file}: single_word of {text!r} is not supported")
                if not isinstance(text, str):
                    raise UserError(f"{file}: the content of an added token is {text!r}, no text")
                if text:
                    check_id(file, text, i)
                    found[text] = found.get(text, {}) | {"special": True} | token
                    found[text]["special"] |= text in names
    return found


def check_ids(path: Path, vocab: dict[str, int]) -> None:
    """Raises UserError unless the ids of a vocabulary are right, and each is used once."""
    with expected_layout(path):
        for token, i in vocab.items():
            check_id(path, token, i)
        if len(set(vocab.values())) < len(vocab):
            raise UserError(f"{path}: an id is used twice")


def check_id(path: Path, token: str, i: int) -> int:
    """Returns the id `i` of a token. Raises UserError if it is no whole number, or out of bounds."""
    if type(i) is not int or not 0 <= i < MOST_IDS:
        raise UserError(f"{path}: the id of {token[:80]!r} is {str(i)[:80]}: not a whole number "
                        f"below {MOST_IDS}")
    return i


def read_ids(folder: Path) -> dict:
    """Reads vocab_size, model_type, and the ids of bos, eos and pad from config.json.

    A list of ids counts as its first id, a negative id as none. generation_config.json gives the
    ids that config.json lacks.
    """
    config = read_json_if_there(folder / "config.json")
    with expected_layout(folder / "config.json"):
        found = {"model_type": str(config.get("model_type"))}
        if config.get("vocab_size"):
            found["vocab_size"] = check_id(folder / "config.json", "vocab_size",
                                           config["vocab_size"])
    for path in (folder / "generation_config.json", folder / "config.json"):
        raw = read_json_if_there(path)
        for role in ROLES:
            value = raw.get(f"{role}_token_id")
            value = value[0] if isinstance(value, list) and value else value
            if type(value) is int and value >= 0:
                found[role] = check_id(path, f"{role}_token_id", value)
    return found
