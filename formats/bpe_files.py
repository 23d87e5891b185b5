"""Reads and writes the files of byte-level BPE: a split pattern and the tokens in the order learnt.

    load_tokenizer_json    tokenizer.json: vocabulary, merges, split pattern and added tokens
    load_vocab_merges      vocab.json and merges.txt, which name no split pattern
    load_ranks             a rank file: a line "base64 rank" for each token, in the order learnt
    save_ranks             writes one
    save_roberta_json      writes the same tokens as RoBERTa's tokenizer.json
"""
import base64
import json
from functools import partial
from pathlib import Path

from formats.bpe import (BYTES, DIGITS_SPLIT, GPT2_SPLIT, LLAMA3_SPLIT, PUBLISHED, QWEN_SPLIT,
                         BPETokenizer, merge_to_two, order_tokens, spell)
from formats.json_files import expected_layout, read_bytes, read_json, read_json_if_there
from formats.pairs import FAMILIES, find_class, find_family
from formats.special_tokens import ROLES, Tokenizer, build_tokenizer, read_ids
from support.errors import UserError
from support.files import atomic_write

# The names of the 256 ids after LLaMA-3's ranks (meta-llama/llama-models,
# models/llama3/tokenizer.py; 3.1 renames some reserved ones).
LLAMA3_NAMES = ["begin_of_text", "end_of_text", *(f"reserved_special_token_{i}" for i in range(4)),
                "start_header_id", "end_header_id", "reserved_special_token_4", "eot_id",
                *(f"reserved_special_token_{i}" for i in range(5, 251))]


def read_table(path: Path) -> dict:
    """Reads the JSON object in a file. Raises UserError if nothing is in it."""
    table = read_json(path)
    if not table:
        raise UserError(f"{path}: a JSON object with nothing in it")
    return table


def list_steps(part: dict | None, key: str) -> list[dict]:
    """Lists the steps of a part of tokenizer.json: a Sequence holds several, anything else one."""
    if not part:
        return []
    return part[key] if part["type"] == "Sequence" else [part]


def read_merges(model: dict) -> list[tuple[str, ...]]:
    """Reads the merges of tokenizer.json's model: each is "left right" or a list of both."""
    return [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]


def refuse_settings(path: Path, model: dict, *more: str) -> None:
    """Raises UserError if the model of a tokenizer.json has a setting that is not known here."""
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", *more):
        if model.get(name):
            raise UserError(f"{path}: {name} {model[name]!r} is not supported")


def load_tokenizer_json(path: Path, spec: dict) -> Tokenizer:
    """Loads a byte-level tokenizer.json, whose contents are `spec`.

    Raises UserError if a setting would change the ids in a way that is not known here.
    """
    with expected_layout(path):
        model, added = spec["model"], spec.get("added_tokens") or []
        refuse_settings(path, model)
        normalizers = [step["type"] for step in list_steps(spec.get("normalizer"), "normalizers")]
        if normalizers not in ([], ["NFC"]):
            raise UserError(f"{path}: normalizer {normalizers} is not supported")
        split, prefix_space = find_split(path, spec["pre_tokenizer"])
        tokens = order_tokens(path, model["vocab"], path, read_merges(model),
                              model.get("ignore_merges"),
                              [token["content"] for token in added])
        if find_class(path.parent) in FAMILIES:     # these classes disregard the file's own
            prefix_space = read_prefix_space(path.parent)
        if model.get("unk_token") and None in tokens.values():
            raise UserError(f"{path}: unk_token is not supported where the vocabulary lacks bytes")
    make = partial(BPETokenizer, split=split, tokens=tokens, vocab=model["vocab"],
                   nfc=bool(normalizers), prefix_space=prefix_space)
    return build_tokenizer(make, path, model["vocab"], added, {})


def find_split(path: Path, pre_tokenizer: dict) -> tuple[str, bool]:
    """Finds the one pattern that splits as a pre-tokenizer does -> pattern, add_prefix_space.

    Raises UserError if there is none: the pre-tokenizer must end in ByteLevel, after nothing, the
    splitting of digits, or one regular expression.
    """
    *first, last = list_steps(pre_tokenizer, "pretokenizers")
    prefix_space, use_regex = last.get("add_prefix_space", True), last.get("use_regex", True)
    if last["type"] == "ByteLevel" and not first and use_regex:
        return GPT2_SPLIT, prefix_space
    if last["type"] == "ByteLevel" and len(first) == 1 and not prefix_space:
        step = first[0]
        if step["type"] == "Digits" and step.get("individual_digits") and use_regex:
            return DIGITS_SPLIT, False
        if step["type"] == "Split" and "Regex" in step["pattern"] and not use_regex:
            pattern = step["pattern"]["Regex"]
            kept = step["behavior"], step["invert"]
            if kept == ("Removed", True) or kept == ("Isolated", False) and pattern in PUBLISHED:
                return pattern, False
            if kept == ("Isolated", False):
                return rf"(?:{pattern})|(?:(?!{pattern})[\s\S])+", False  # the gaps are words too
    raise UserError(f"{path}: pre-tokenizer {json.dumps(pre_tokenizer)[:300]} is not supported")


def load_vocab_merges(vocab_path: Path, merges_path: Path) -> Tokenizer:
    """Loads a vocabulary and its merges.

    These files name no split pattern. A Qwen checkpoint has Qwen's and normalizes (NFC), any other
    has GPT-2's, also RoBERTa and DeBERTa v1. A vocabulary of single characters and special tokens,
    such as that of proteins, needs no merges.
    """
    folder, vocab, pairs = vocab_path.parent, read_table(vocab_path), []
    text = b""
    if merges_path.exists() or any(len(token) > 1 and token[0] not in "<[" for token in vocab):
        text = read_bytes(merges_path)
    for number, line in enumerate(text.decode("utf-8", "replace").split("\n"), 1):
        line = line.rstrip("\r")
        if line and not line.startswith("#version"):
            pairs.append(tuple(line.split(" ")))
            if len(pairs[-1]) != 2:
                raise UserError(f"{merges_path}: line {number}: not two tokens: {line[:80]!r}")
    settings = read_json_if_there(folder / "tokenizer_config.json")
    kind = settings.get("tokenizer_class") or read_ids(folder)["model_type"]
    qwen = str(kind).lower().startswith("qwen")
    make = partial(BPETokenizer, split=QWEN_SPLIT if qwen else GPT2_SPLIT, vocab=vocab, nfc=qwen,
                   tokens=order_tokens(vocab_path, vocab, merges_path, pairs),
                   prefix_space=read_prefix_space(folder))
    usual, roles = "<|endoftext|>", ("eos", "pad" if qwen else "bos")   # of transformers' classes
    if usual not in vocab or find_family(folder):       # an encoder has other special tokens
        return build_tokenizer(make, vocab_path, vocab, [], {})
    return build_tokenizer(make, vocab_path, vocab, [{"content": usual, "id": vocab[usual]}],
                           {role: vocab[usual] for role in roles})


def read_prefix_space(folder: Path) -> bool:
    """Reads whether tokenizer_config.json wants a space before the text."""
    return bool(read_json_if_there(folder / "tokenizer_config.json").get("add_prefix_space"))


def read_ranks(path: Path) -> dict[bytes, int]:
    """Reads a rank file: token -> rank, in rank order. Raises UserError if it is none."""
    tokens: dict[bytes, int] = {}
    for number, line in enumerate(read_bytes(path).rstrip().split(b"\n"), 1):
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
    return tokens


def load_ranks(path: Path) -> Tokenizer:
    """Loads a rank file. The rank of a token is its id too.

    A tokenizer.model is LLaMA-3's: it has LLaMA-3's split pattern and special names. Any other
    file has Qwen's pattern if the model_type in config.json starts with qwen, else GPT-2's. Its
    special tokens are the ids in config.json that are no ranks: <|bos|>, <|eos|> and <|pad|>.
    """
    tokens = read_ranks(path)
    config, names = read_ids(path.parent), {}
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
    return build_tokenizer(make, path, {}, added, roles)


def save_ranks(ranks: dict[bytes, int], path: str | Path) -> None:
    """Writes a rank file: a line "base64 rank" for each token, in rank order."""
    lines = (f"{base64.b64encode(token).decode()} {rank}\n"
             for token, rank in sorted(ranks.items(), key=lambda item: item[1]))
    with atomic_write(path) as temporary:
        temporary.write_text("".join(lines), encoding="ascii")


def list_merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Finds the two parts that BPE joins to each token, in rank order."""
    order: dict[tuple[bytes, ...], int] = {}
    for token in sorted(ranks, key=ranks.get):
        if len(token) > 1:
            order[merge_to_two(token, order)] = len(order)
    return list(order)


def save_roberta_json(ranks: dict[bytes, int], path: str | Path) -> None:
    """Writes a tokenizer.json with RoBERTa's special tokens around the ranks.

    The ids are <s> 0, <pad> 1, </s> 2, <unk> 3, rank + 4, and <mask> last. A text begins with a
    space. So a word has the same token at the start of a text as inside.
    """
    special = dict(zip(("<s>", "<pad>", "</s>", "<unk>", "<mask>"), (0, 1, 2, 3, len(ranks) + 4)))
    vocab = special | {spell(token): rank + 4 for token, rank in ranks.items()}
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                  "use_regex": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    spec = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": name, **flags, "special": True}
                         for name, i in special.items()],
        "normalizer": None, "pre_tokenizer": byte_level,
        "post_processor": {"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 0],
                           "trim_offsets": True, "add_prefix_space": True},
        "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None,
                  "continuing_subword_prefix": "", "end_of_word_suffix": "",
                  "fuse_unk": False, "byte_fallback": False,
                  "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])),
                  "merges": [" ".join(map(spell, pair)) for pair in list_merges(ranks)]}}
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
