"""Text <-> token ids, from the tokenizer files that come with a checkpoint.

Byte-pair encoding (BPE; Sennrich et al., 2016, arXiv:1508.07909) cuts text into words by a regular
expression, starts each word as its UTF-8 bytes, and joins the neighbouring pair that was learnt
first, again and again, until no learnt pair is left. tiktoken runs that loop; this file turns each
published layout into what tiktoken needs: a split pattern and the tokens in the order learnt.

    tokenizer.json               Hugging Face's layout: LLaMA-3, Qwen, SmolLM, GPT-2
    vocab.json + merges.txt      its older form; GPT-2 itself: encoder.json + vocab.bpe
    tokenizer.model, *.tiktoken  rank files, a line "base64 rank" a token: LLaMA-3; data/base
    tokenizer.model              a sentencepiece model, run by sentencepiece: LLaMA-1/2, Mistral

Read load_tokenizer and the classes first. The last two functions train a vocabulary.
"""
import base64
import json
import unicodedata
from collections import Counter, defaultdict
from contextlib import contextmanager
from functools import partial
from math import inf
from pathlib import Path
from typing import Callable, Iterable

import regex
import tiktoken

from support.errors import UserError
from support.files import atomic_write

# Split patterns. GPT-2: openai/gpt-2, src/encoder.py. LLaMA-3: meta-llama/llama-models,
# models/llama3/tokenizer.py (openai/tiktoken's cl100k_base splits the same). Qwen: transformers,
# models/qwen2/tokenization_qwen2.py: digits one by one.
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
# SmolLM cuts the digits out, then splits what lies between them like GPT-2, to which a digit is
# then the end of the text.
DIGITS_SPLIT = GPT2_SPLIT.replace(r" ?\p{N}+", r"\p{N}").replace(r"\S", r"[^\s\p{N}]")
# The names of the 256 ids after LLaMA-3's ranks (source as above; 3.1 renames some reserved ones).
LLAMA3_NAMES = ["begin_of_text", "end_of_text", *(f"reserved_special_token_{i}" for i in range(4)),
                "start_header_id", "end_header_id", "reserved_special_token_4", "eot_id",
                *(f"reserved_special_token_{i}" for i in range(5, 251))]
# vocab.json writes a byte as one visible character: itself, or else the next from U+0100 on.
_VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_HIDDEN = [byte for byte in range(256) if byte not in _VISIBLE]
_BYTE_OF = dict.fromkeys(_HIDDEN, "\uffff") | {256 + n: chr(b) for n, b in enumerate(_HIDDEN)}
BYTES = [bytes([byte]) for byte in range(256)]
ROLES = ("bos", "eos", "pad")


def load_tokenizer(folder: str | Path) -> "Tokenizer | None":
    """The tokenizer of a checkpoint folder; None where it holds no tokenizer files.

    Looks for a byte-level tokenizer.json, then tokenizer.model, vocabulary + merges, *.tiktoken.
    Raises UserError, naming the file, for anything that would not give the reference's ids.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    main, model = folder / "tokenizer.json", folder / "tokenizer.model"
    spec = _read_json(main, required=main.exists())
    if spec:
        with _layout_of(main):
            kind = spec["model"].get("type", "BPE")
            steps = [step["type"] for step in _steps(spec.get("pre_tokenizer"), "pretokenizers")]
        if kind == "BPE" and "ByteLevel" in steps:
            return _load_tokenizer_json(main, spec)
        if not model.exists():
            raise UserError(f"{main}: {kind!r} with pre-tokenizer {steps} is not byte-level BPE: "
                            "the checkpoint's tokenizer.model must be beside it")
    if model.exists():
        if not spec and _read(model).isascii():            # a sentencepiece model is binary
            return _load_ranks(model)
        return _load_sentencepiece(model, spec.get("added_tokens") or [])
    for vocab, merges in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
        if (folder / vocab).exists() or (folder / merges).exists():
            return _load_vocab_merges(folder / vocab, folder / merges)
    rank_files = sorted(folder.glob("*.tiktoken"))
    if len(rank_files) > 1:
        raise UserError(f"{folder}: more than one *.tiktoken file")
    return _load_ranks(rank_files[0]) if rank_files else None


class Tokenizer:
    """What both kinds share: added tokens (mostly special ones) are cut out of the text first.

    path: the vocabulary's file, for messages. added: text -> id. size: every other id is below it.
    vocab_size: every id is below it. bos, eos, pad: ids, or None. A subclass's encode_plain(text)
    and decode_plain(ids) do what lies between the added tokens.
    """
    bos = eos = pad = None

    def __init__(self, path: Path, added: dict[str, int], size: int):
        self.path, self.added = path, added
        self.vocab_size = max([size - 1, *added.values()]) + 1
        self._text_of = {i: text for text, i in added.items()}
        longest_first = sorted(added, key=len, reverse=True)
        self._any_added = regex.compile(f"({'|'.join(map(regex.escape, longest_first)) or '(?!)'})")

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without bos and eos; special tokens written in it count as such.

        A lone surrogate, which UTF-8 cannot hold, counts as U+FFFD.
        """
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        ids = []
        for n, part in enumerate(self._any_added.split(text)):
            if n % 2:                            # what the pattern found is at the odd places
                ids.append(self.added[part])
            elif part:
                ids += self.encode_plain(part)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, special tokens included; U+FFFD stands for bytes that are not UTF-8.

        Raises UserError for an id outside the vocabulary; one that no token uses gives no text.
        """
        texts, run = [], []                      # run: plain ids not decoded yet
        for i in map(int, ids):
            if not 0 <= i < self.vocab_size:
                raise UserError(f"{self.path}: token id {i} is outside its {self.vocab_size} ids")
            if i in self._text_of:
                texts += [self.decode_plain(run), self._text_of[i]]
                run = []
            else:
                run.append(i)
        return "".join(texts) + self.decode_plain(run)


class BPETokenizer(Tokenizer):
    """Byte-level BPE by tiktoken.

    tokens: bytes -> id in the order learnt, every single byte among them, with id None where the
    vocabulary lacks it. vocab: all of vocab.json, for decoding tokens that BPE never makes.
    """

    def __init__(self, path: Path, added: dict[str, int], split: str,
                 tokens: dict[bytes, int | None], vocab: dict[str, int], nfc: bool = False,
                 prefix_space: bool = False):
        self._nfc, self._prefix_space = nfc, prefix_space
        self._bytes_of = {i: data for data, i in tokens.items() if i is not None}
        for token, i in vocab.items():
            self._bytes_of[i] = _to_bytes(token) or token.encode()
        super().__init__(path, added, max(self._bytes_of) + 1)
        try:
            self._split = regex.compile(split)
            self._encoding = tiktoken.Encoding(
                path.name, pat_str=split, special_tokens={},
                mergeable_ranks={token: rank for rank, token in enumerate(tokens)})
        except (ValueError, regex.error) as error:
            raise UserError(f"{path}: split pattern {split!r} does not compile: "
                            f"{' '.join(str(error).split())}") from error
        if self._split.match(""):
            raise UserError(f"{path}: split pattern {split!r} matches the empty text")
        self._id_of_rank = list(tokens.values())
        self._missing = b"".join(byte for byte in BYTES if tokens[byte] is None)

    def encode_plain(self, text: str) -> list[int]:
        text = unicodedata.normalize("NFC", text) if self._nfc else text
        if self._prefix_space and not text.startswith(" "):
            text = " " + text
        data = text.encode()
        if len(data.translate(None, self._missing)) == len(data):
            try:
                ranks = self._encoding.encode(text, disallowed_special=())
                return [self._id_of_rank[rank] for rank in ranks]
            except ValueError:           # its regular expressions give up on 10^6 spaces in a row
                pass
        # Word by word instead; tokenizers drops the bytes that the vocabulary lacks from each word.
        # (The regex module knows letters of Unicode 17 and on, which tiktoken takes for symbols.)
        words = (match.group().encode() for match in self._split.finditer(text))
        words = (word.translate(None, self._missing) for word in words)
        return [self._id_of_rank[rank] for word in words if word
                for rank in self._encoding._encode_single_piece(word)]

    def decode_plain(self, ids: list[int]) -> str:
        return b"".join(self._bytes_of.get(i, b"") for i in ids).decode("utf-8", errors="replace")


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model, run by sentencepiece itself (`processor`)."""

    def __init__(self, path: Path, added: dict[str, int], processor):
        super().__init__(path, added, processor.vocab_size())
        self.processor = processor

    def encode_plain(self, text: str) -> list[int]:
        return self.processor.encode(text)

    def decode_plain(self, ids: list[int]) -> str:
        return self.processor.decode([i for i in ids if i < self.processor.vocab_size()])


# The layouts.

def _load_tokenizer_json(path: Path, spec: dict) -> Tokenizer:
    """A byte-level tokenizer.json; settings that would change the ids in other ways are refused."""
    with _layout_of(path):
        model, added = spec["model"], spec.get("added_tokens") or []
        for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(name):
                raise UserError(f"{path}: {name} {model[name]!r} is not supported")
        normalizers = [step["type"] for step in _steps(spec.get("normalizer"), "normalizers")]
        if normalizers not in ([], ["NFC"]):
            raise UserError(f"{path}: normalizer {normalizers} is not supported")
        split, prefix_space = _split_of(path, spec["pre_tokenizer"])
        pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
        tokens = _in_merge_order(path, model["vocab"], path, pairs, model.get("ignore_merges"),
                                 [token["content"] for token in added])
        if model.get("unk_token") and None in tokens.values():
            raise UserError(f"{path}: unk_token is not supported where the vocabulary lacks bytes")
    make = partial(BPETokenizer, split=split, tokens=tokens, vocab=model["vocab"],
                   nfc=bool(normalizers), prefix_space=prefix_space)
    return _finish(make, path, model["vocab"], added, {})


def _split_of(path: Path, pre_tokenizer: dict) -> tuple[str, bool]:
    """The one pattern that splits like a pre-tokenizer ending in ByteLevel; add_prefix_space."""
    *first, last = _steps(pre_tokenizer, "pretokenizers")
    prefix_space, use_regex = last.get("add_prefix_space", True), last.get("use_regex", True)
    if last["type"] == "ByteLevel" and not first and use_regex:
        return GPT2_SPLIT, prefix_space
    if last["type"] == "ByteLevel" and len(first) == 1 and not prefix_space:
        step = first[0]
        if step["type"] == "Digits" and step.get("individual_digits") and use_regex:
            return DIGITS_SPLIT, False
        if step["type"] == "Split" and "Regex" in step["pattern"] and not use_regex:
            pattern = step["pattern"]["Regex"]
            if (step["behavior"], step["invert"]) == ("Removed", True):
                return pattern, False
            if (step["behavior"], step["invert"]) == ("Isolated", False):
                return rf"(?:{pattern})|(?:(?!{pattern})[\s\S])+", False  # the gaps are words too
    raise UserError(f"{path}: pre-tokenizer {json.dumps(pre_tokenizer)[:300]} is not supported")


def _load_vocab_merges(vocab_path: Path, merges_path: Path) -> Tokenizer:
    """Files that name no split: Qwen's (and NFC) if the checkpoint is a Qwen, else GPT-2's."""
    folder, vocab, pairs = vocab_path.parent, _read_json(vocab_path, required=True), []
    for number, line in enumerate(_read(merges_path).decode("utf-8", "replace").split("\n"), 1):
        line = line.rstrip("\r")
        if line and not line.startswith("#version"):
            pairs.append(tuple(line.split(" ")))
            if len(pairs[-1]) != 2:
                raise UserError(f"{merges_path}: line {number}: not two tokens: {line[:80]!r}")
    settings = _read_json(folder / "tokenizer_config.json")
    kind = settings.get("tokenizer_class") or _ids_of(folder)["model_type"]
    qwen = str(kind).lower().startswith("qwen")
    make = partial(BPETokenizer, split=QWEN_SPLIT if qwen else GPT2_SPLIT, vocab=vocab, nfc=qwen,
                   tokens=_in_merge_order(vocab_path, vocab, merges_path, pairs),
                   prefix_space=bool(settings.get("add_prefix_space")))
    usual, roles = "<|endoftext|>", ("eos", "pad" if qwen else "bos")   # of transformers' classes
    added = [{"content": usual, "id": vocab[usual]}] if usual in vocab else []
    return _finish(make, vocab_path, vocab, added, {role: vocab.get(usual) for role in roles})


def _in_merge_order(vocab_path: Path, vocab: dict[str, int], merges_path: Path,
                    pairs: list[tuple[str, ...]], ignore_merges: bool | None = False,
                    added: Iterable[str] = ()) -> dict[bytes, int | None]:
    """bytes -> id of every token that BPE makes, in an order for which tiktoken makes the same.

    tokenizers joins only the listed pairs, the first listed first; tiktoken joins any neighbours
    whose union is a token, the lowest rank first. Neighbours in a word have been through the very
    merges that BPE of their union alone goes through. So both do the same if each token stands at
    the place of the merge that ends the BPE of its own bytes, and is left out if none does. With
    ignore_merges (588 tokens of LLaMA-3 need it) a word that is a token is one id, merges or not:
    then those left out come last, as long as their BPE ends in more than two parts, so that
    tiktoken never meets them as two neighbours.
    """
    with _layout_of(vocab_path):
        if len(set(vocab.values())) < len(vocab) or not all(
                type(i) is int and i >= 0 for i in vocab.values()):
            raise UserError(f"{vocab_path}: ids must be whole numbers, each used once")
        ids = {data: i for token, i in vocab.items() if (data := _to_bytes(token))}
    order: dict[tuple[bytes, bytes], int] = {}
    for number, pair in enumerate(pairs):
        left, right = map(_to_bytes, pair)
        if left not in ids or right not in ids or left + right not in ids:
            raise UserError(f"{merges_path}: merge {number + 1}, {' '.join(pair)!r}: a part or the "
                            "union is not in the vocabulary")
        order[left, right] = number                          # of a repeated pair the last counts
    place, unmade = {}, []
    special = set(map(_to_bytes, added))
    for token in ids:
        parts = _last_two(token, order)
        if parts in order:
            place[token] = order[parts]
        elif ignore_merges and len(token) > 1 and token not in special:
            unmade.append(token)
            if len(parts) == 2 or not all(byte in ids for byte in BYTES):
                raise UserError(f"{vocab_path}: no merges make {token!r}: ignore_merges is not "
                                "supported then")
    return {t: ids.get(t) for t in [*BYTES, *sorted(place, key=place.__getitem__), *unmade]}


def _last_two(token: bytes, order: dict[tuple[bytes, bytes], int]) -> tuple[bytes, ...]:
    """BPE of `token` until two parts are left, or more where no listed pair is left before."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        places = [order.get(pair, inf) for pair in zip(parts, parts[1:])]
        at = places.index(min(places))
        if (parts[at], parts[at + 1]) not in order:
            break
        parts[at:at + 2] = [parts[at] + parts[at + 1]]
    return tuple(parts)


def _load_ranks(path: Path) -> Tokenizer:
    """A rank file, where a token's rank is its id too.

    tokenizer.model is LLaMA-3's: its split and its special names. Any other has Qwen's split if the
    model_type in config.json starts with qwen, else GPT-2's; its special tokens are the ids in
    config.json from the number of ranks on, by the names <|bos|>, <|eos|> and <|pad|>.
    """
    tokens: dict[bytes, int] = {}
    for number, line in enumerate(_read(path).rstrip().split(b"\n"), 1):
        try:
            encoded, rank = line.split()
            token, rank = base64.b64decode(encoded, validate=True), int(rank)
        except ValueError as error:
            raise UserError(f"{path}: line {number}: {line[:40]!r}: not base64 and a rank"
                            ) from error
        if not token or token in tokens or rank != len(tokens):
            raise UserError(f"{path}: line {number}: {line[:40]!r}: not a new token of rank "
                            f"{len(tokens)}")
        tokens[token] = rank
    if missing := [byte for byte in BYTES if byte not in tokens]:
        raise UserError(f"{path}: no token for {len(missing)} of the 256 bytes: {missing[0]!r} ...")
    config, names = _ids_of(path.parent), {}
    if path.name == "tokenizer.model":
        names = {len(tokens) + n: f"<|{name}|>" for n, name in enumerate(LLAMA3_NAMES)}
        names = {i: name for i, name in names.items() if i < config.get("vocab_size", i + 1)}
    roles = dict(zip(("bos", "eos"), names))
    roles |= {role: config[role] for role in ROLES if role in config}
    for role, i in roles.items():
        if i >= len(tokens):
            names.setdefault(i, f"<|{role}|>")
    split = QWEN_SPLIT if config["model_type"].startswith("qwen") else GPT2_SPLIT
    split = LLAMA3_SPLIT if path.name == "tokenizer.model" else split
    added = [{"content": name, "id": i} for i, name in names.items()]
    make = partial(BPETokenizer, split=split, tokens=tokens, vocab={})
    return _finish(make, path, {}, added, roles)


def _load_sentencepiece(path: Path, added: list[dict]) -> Tokenizer:
    """added: from a tokenizer.json beside it. Control pieces such as <s> are added tokens too."""
    try:
        import sentencepiece
    except ImportError as error:
        raise UserError(f"{path}: needs sentencepiece: pip install sentencepiece") from error
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=_read(path))
        vocab = {model.id_to_piece(i): i for i in range(model.vocab_size())}
    except (RuntimeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: neither a sentencepiece model nor a rank file") from error
    controls = [{"content": piece, "id": i} for piece, i in vocab.items()
                if model.is_control(i) or model.is_unknown(i)]
    roles = {"bos": model.bos_id(), "eos": model.eos_id(), "pad": model.pad_id()}
    return _finish(partial(SentencePieceTokenizer, processor=model), path, vocab, controls + added,
                   {role: i for role, i in roles.items() if i >= 0})


# Added tokens, and which of them are bos, eos and pad.

def _finish(make: Callable, path: Path, vocab: dict[str, int], listed: list[dict],
            roles: dict[str, int | None]) -> Tokenizer:
    """make(path, added) with bos, eos and pad, each as the first of these says that is there:
    special_tokens_map.json (where tokenizer_config.json has no added_tokens_decoder), *_token in
    tokenizer_config.json (null means none), `roles`, config.json, generation_config.json. The first
    two are transformers' rule.
    """
    settings = _read_json(path.with_name("tokenizer_config.json"))
    if "added_tokens_decoder" not in settings:
        settings = settings | _read_json(path.with_name("special_tokens_map.json"))
    with _layout_of(path.with_name("tokenizer_config.json or special_tokens_map.json")):
        named = {key: token for key, token in settings.items() if key.endswith("_token")}
        named |= enumerate(settings.get("additional_special_tokens") or [])
        named = {key: t["content"] if isinstance(t, dict) else t for key, t in named.items()}
    added = _added_tokens(path, vocab, listed, named.values())
    with _layout_of(path):
        tokenizer = make(path, added)
    config = _ids_of(path.parent)
    tokenizer.vocab_size = max(tokenizer.vocab_size, config.get("vocab_size", 0))
    for role in ROLES:
        name = named.get(f"{role}_token", "")
        usual = config.get(role) if roles.get(role) is None else roles[role]
        setattr(tokenizer, role, None if name is None else added.get(name, usual))
    return tokenizer


def _added_tokens(path: Path, vocab: dict[str, int], listed: list[dict],
                  named: Iterable[str]) -> dict[str, int]:
    """text -> id of the named tokens that are in the vocabulary, of added_tokens.json, of those
    `listed` in `path`, and of added_tokens_decoder in tokenizer_config.json."""
    file = path.with_name("added_tokens.json")
    sources = {file: [{"content": text, "id": i} for text, i in _read_json(file).items()]}
    sources[path] = listed
    file = path.with_name("tokenizer_config.json")
    with _layout_of(file):
        decoder = _read_json(file).get("added_tokens_decoder") or {}
        sources[file] = [token | {"id": i} for i, token in decoder.items()]
        added = {text: vocab[text] for text in named if text in vocab}
    for file, tokens in sources.items():
        with _layout_of(file):
            for token in tokens:
                for flag in ("lstrip", "rstrip", "single_word"):
                    if token.get(flag):
                        raise UserError(f"{file}: {flag} of {token['content']!r} is not supported")
                if token["content"]:
                    added[token["content"]] = int(token["id"])
    return added


def _ids_of(folder: Path) -> dict:
    """config.json's vocab_size and model_type; as bos, eos and pad the first id that it gives for
    each, or else generation_config.json. A negative id means none."""
    config = _read_json(folder / "config.json")
    with _layout_of(folder / "config.json"):
        found = {"model_type": str(config.get("model_type"))}
        found |= {"vocab_size": int(config["vocab_size"])} if config.get("vocab_size") else {}
    for source in (_read_json(folder / "generation_config.json"), config):
        for role in ROLES:
            value = source.get(f"{role}_token_id")
            value = value[0] if isinstance(value, list) and value else value
            if type(value) is int and value >= 0:
                found[role] = value
    return found


# Reading: every fault becomes one line that names the file.

@contextmanager
def _layout_of(path: Path):
    try:
        yield
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        message = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{path}: unexpected layout: {message}") from error


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror}") from error
    if not data.strip():
        raise UserError(f"{path}: the file is empty")
    return data


def _read_json(path: Path, required: bool = False) -> dict:
    """The JSON object in a file; {} where there is no file and none is required."""
    if not required and not path.exists():
        return {}
    data = _read(path)
    with _layout_of(path):
        value = json.loads(data)
        if not isinstance(value, dict) or not value and required:
            raise UserError(f"{path}: not a JSON object with anything in it")
        return value


def _steps(part: dict | None, key: str) -> list[dict]:
    """A part of tokenizer.json as a list: a Sequence holds several, anything else is one."""
    if not part:
        return []
    return part[key] if part["type"] == "Sequence" else [part]


def _to_bytes(token: str) -> bytes | None:
    """The bytes that vocab.json writes as `token`; None if it is not written that way."""
    try:
        return token.translate(_BYTE_OF).encode("latin-1")
    except UnicodeEncodeError:
        return None


# Training a vocabulary for data/base.

def train_bpe(text: str, vocab_size: int) -> dict[bytes, int]:
    """Learns BPE on `text` with the GPT-2 split: token -> rank, the 256 bytes first.

    Gives the ranks of tiktoken._educational.bpe_train (of pairs equally frequent the first in the
    text), but keeps each distinct word once and visits only the words that hold the pair to merge.
    Raises UserError for a vocab_size below 256 or a text with too few pairs.
    """
    if vocab_size < 256:
        raise UserError(f"vocab_size {vocab_size}: at least 256, a token for each byte")
    frequency = Counter(regex.findall(GPT2_SPLIT, text))
    words = [[bytes([byte]) for byte in word.encode()] for word in frequency]
    copies, count, holders = list(frequency.values()), Counter(), defaultdict(set)

    def tally(w: int, sign: int) -> None:
        for pair in zip(words[w], words[w][1:]):
            count[pair] += sign * copies[w]
            holders[pair].add(w) if sign > 0 else holders[pair].discard(w)

    def first_place(pair: tuple[bytes, bytes]) -> tuple[int, int]:
        w = min(holders[pair])
        return w, list(zip(words[w], words[w][1:])).index(pair)

    for w in range(len(words)):
        tally(w, +1)
    ranks = {byte: rank for rank, byte in enumerate(BYTES)}
    while len(ranks) < vocab_size:
        most = max(count.values(), default=0)
        if most == 0:
            raise UserError(f"the text gives {len(ranks)} tokens, fewer than {vocab_size}")
        pair = min((p for p, n in count.items() if n == most), key=first_place)
        ranks[pair[0] + pair[1]] = len(ranks)
        for w in list(holders[pair]):
            tally(w, -1)
            for at in range(len(words[w])):                  # the list gets shorter on the way
                if tuple(words[w][at:at + 2]) == pair:
                    words[w][at:at + 2] = [pair[0] + pair[1]]
            tally(w, +1)
    return ranks


def save_ranks(ranks: dict[bytes, int], path: str | Path) -> None:
    """Writes a rank file: a line "base64 rank" for each token, in rank order."""
    lines = (f"{base64.b64encode(token).decode()} {rank}\n"
             for token, rank in sorted(ranks.items(), key=lambda item: item[1]))
    with atomic_write(path) as temporary:
        temporary.write_text("".join(lines), encoding="ascii")
