"""Cuts special tokens out of the text, and finds out which of them are bos, eos and pad.

A tokenizer learns its tokens from text. Others are added to it by hand: <|endoftext|>, or the
marks of a chat. They are matched as they stand, before the text between them is tokenized.
Several files may name them, and may disagree. build_tokenizer() says which file counts.
"""
from pathlib import Path
from typing import Callable, Collection, Iterable

import regex

from formats.json_files import expected_layout, read_json_if_there
from support.errors import UserError

ROLES = ("bos", "eos", "pad")
MOST_IDS = 2**24        # 60 times the largest published vocabulary


class Tokenizer:
    """Encodes and decodes added tokens, and leaves the text between them to a subclass.

    path: the vocabulary's file, for messages. added: text -> id. size: every other id is below it.
    vocab_size: every id is below it. bos, eos, pad: ids, or None. special: ids of added tokens that
    are marks, such as <|endoftext|>, and no text. A subclass has encode_plain(text, at_start) and
    decode_plain(ids), for what lies between two added tokens. at_start: no added token is before
    it.
    """
    bos = eos = pad = None
    special: set[int] = set()

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
        ids = []
        for n, part in enumerate(self._any_added.split(text)):
            if n % 2:                            # what the pattern found is at the odd places
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


def build_tokenizer(make: Callable, path: Path, vocab: dict[str, int], listed: list[dict],
                    roles: dict[str, int | None]) -> Tokenizer:
    """Builds a tokenizer with make(path, added), and gives it bos, eos, pad and special.

    vocab: token -> id. listed: the added tokens that the vocabulary's own file lists. roles: bos,
    eos and pad as that file or the tokenizer's class has them.
    The first of these that names a role counts. The first two are transformers' rule.
        special_tokens_map.json, if tokenizer_config.json has no added_tokens_decoder
        bos_token and so on in tokenizer_config.json (null means that there is none)
        `roles`
        config.json
        generation_config.json
    """
    settings = read_json_if_there(path.with_name("tokenizer_config.json"))
    if "added_tokens_decoder" not in settings:
        settings = settings | read_json_if_there(path.with_name("special_tokens_map.json"))
    with expected_layout(path.with_name("tokenizer_config.json or special_tokens_map.json")):
        named = {key: token for key, token in settings.items() if key.endswith("_token")}
        named |= enumerate(settings.get("additional_special_tokens") or [])
        named = {key: t["content"] if isinstance(t, dict) else t for key, t in named.items()}
        if odd := [key for key, t in named.items() if isinstance(t, (list, dict))]:
            raise TypeError(f"{odd[0]} is no text")
    added, special = collect_added(path, vocab, listed, named.values())
    with expected_layout(path):
        tokenizer = make(path, added)
    tokenizer.special = special
    config = read_ids(path.parent)
    tokenizer.vocab_size = max(tokenizer.vocab_size, config.get("vocab_size", 0))
    for role in ROLES:
        name = named.get(f"{role}_token", "")
        usual = config.get(role) if roles.get(role) is None else roles[role]
        setattr(tokenizer, role, None if name is None else added.get(name, usual))
    return tokenizer


def collect_added(path: Path, vocab: dict[str, int], listed: list[dict],
                  named: Collection[str]) -> tuple[dict[str, int], set[int]]:
    """Collects the added tokens of all files: text -> id, and the ids of the special ones.

    Takes the `named` tokens that are in the vocabulary, those of added_tokens.json, those `listed`
    in `path`, and those of added_tokens_decoder in tokenizer_config.json. A later one replaces an
    earlier one of the same text. All are special but those of added_tokens.json, and those that a
    file says not to be.
    """
    file, special = path.with_name("added_tokens.json"), {}
    sources = {file: [{"content": text, "id": i, "special": False}
                      for text, i in read_json_if_there(file).items()]}
    sources[path] = listed
    file = path.with_name("tokenizer_config.json")
    with expected_layout(file):
        decoder = read_json_if_there(file).get("added_tokens_decoder") or {}
        sources[file] = [token | {"id": int(i)} for i, token in decoder.items()]
        added = {text: vocab[text] for text in named if text in vocab}
    for file, tokens in sources.items():
        with expected_layout(file):
            for token in tokens:
                for flag in ("lstrip", "rstrip", "single_word"):
                    if token.get(flag):
                        raise UserError(f"{file}: {flag} of {token['content']!r} is not supported")
                text, i = token["content"], token["id"]
                if not isinstance(text, str):
                    raise UserError(f"{file}: the content of an added token is {text!r}, no text")
                if text:
                    added[text] = check_id(file, text, i)
                    special[text] = token.get("special", True)
    return added, {i for text, i in added.items() if text in named or special[text]}


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
