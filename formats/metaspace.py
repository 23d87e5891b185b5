"""Byte-pair encoding (BPE) on characters, with "▁" for a space: LLaMA's pieces in tokenizer.json.

Kudo & Richardson, 2018, arXiv:1808.06226. Spaces become "▁", and one more may stand in front. Each
character starts as a token. One that the vocabulary lacks starts as its UTF-8 bytes, <0xNN>. Then
the neighbouring pair that is listed first is joined, again and again. With u+g, h+ug, then ▁+hug:
    hug hugs   ▁ h u g ▁ h u g s -> ▁hug ▁hug s
The steps are those of huggingface/tokenizers: models/bpe, pre_tokenizers/metaspace.rs.
"""
import json
import re
from functools import partial
from heapq import heapify, heappop, heappush
from itertools import groupby
from pathlib import Path

from formats.bpe_files import list_steps, read_merges, refuse_settings
from formats.json_files import expected_layout, read_json_if_there
from formats.pairs import find_class
from formats.special_tokens import Tokenizer, build_tokenizer, check_ids
from support.errors import UserError

SPACE = "▁"
BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
CACHED_WORDS, CACHED_LENGTH = 2**16, 40


class MetaspaceTokenizer(Tokenizer):
    """Runs BPE on the characters of the text between the added tokens.

    vocab: token -> id. pairs: the merges, in the order learnt.
    prefix: when "▁" is put in front of the text.
        never
        first     at the start of the whole text, unless a space stands there
        always    after an added token too
        each      as always, and also before a space
    strip: what decoding takes off: "" nothing, "one" a space at the start, "all" every space of the
    first token. With "all", tokens <0xNN> stay as they are spelt.
    split: cut the text before each space. unk: the id of a character that has no bytes either;
    None drops it. fuse_unk: several such characters in a row are one id.
    Raises UserError if an id is wrong, or a merge names a token that the vocabulary lacks.
    """

    def __init__(self, path: Path, added: dict[str, int], vocab: dict[str, int],
                 pairs: list[tuple[str, ...]], prefix: str, strip: str, split: bool = False,
                 unk: int | None = None, fuse_unk: bool = True, byte_fallback: bool = True):
        check_ids(path, vocab)
        super().__init__(path, added, max(vocab.values()) + 1)
        self._vocab, self._prefix, self._strip, self._split = vocab, prefix, strip, split
        self._unk, self._fuse_unk, self._byte_fallback = unk, fuse_unk, byte_fallback
        self._token_of = {i: token for token, i in (vocab | added).items()}
        self._text_of = {}           # so that decode_plain() gets added tokens too
        self._merges, self._joints = {}, set()
        for place, pair in enumerate(pairs):
            if len(pair) != 2 or not all(t in vocab for t in (*pair, "".join(pair))):
                raise UserError(f"{path}: merge {place + 1}, {' '.join(pair)!r}: a part or the "
                                "union is not in the vocabulary")
            left, right = pair
            self._merges[vocab[left], vocab[right]] = place, vocab[left + right]
            self._joints.add((left[-1:], right[:1]))
        self._known: dict[str, list[int]] = {}               # word -> ids

    def encode_plain(self, text: str, at_start: bool) -> list[int]:
        text = text.replace(" ", SPACE)
        wanted = self._prefix == "always" or self._prefix == "first" and at_start
        if self._prefix == "each" or wanted and not text.startswith(SPACE):
            text = SPACE + text
        ids = []
        for word in self._cut(text):
            if word in self._known:
                ids += self._known[word]
                continue
            found = self._merge(self._start(word))
            if len(word) <= CACHED_LENGTH and len(self._known) < CACHED_WORDS:
                self._known[word] = found
            ids += found
        return ids

    def _cut(self, text: str) -> list[str]:
        """Cuts the text between two characters that no merge joins.

        Such a cut changes no id. A merge across it would join a token that ends with the left
        character to one that begins with the right one. The pieces repeat, so their ids are cached.
        There is no cut beside a character that is spelt in bytes: _joints has no bytes.
        """
        words, start = [], 0
        for at, joint in enumerate(zip(text, text[1:]), 1):
            apart = joint not in self._joints and joint[0] in self._vocab and joint[1] in self._vocab
            if apart or self._split and joint[1] == SPACE:
                words.append(text[start:at])
                start = at
        return [*words, text[start:]]

    def _start(self, word: str) -> list[int]:
        """Gives each character its id, or else the ids of its bytes, or else unk.

        As in the library, an unk that waits for others stands behind bytes that follow it.
        """
        ids, waiting = [], False                  # waiting: an unk that others may join
        for char in word:
            if char in self._vocab:
                ids += [self._unk] * waiting + [self._vocab[char]]
                waiting = False
                continue
            spelt = [self._vocab.get(f"<0x{byte:02X}>") for byte in char.encode()]
            if self._byte_fallback and None not in spelt:
                ids += spelt
            elif self._unk is not None:
                ids += [self._unk] * (waiting and not self._fuse_unk)
                waiting = True
        return ids + [self._unk] * waiting

    def _merge(self, ids: list[int]) -> list[int]:
        """Joins the pairs of a word: the pair listed first, and of equal pairs the left one.

        A heap holds the pairs that can be joined, and each place knows the next. So n characters
        take O(n log n).
        """
        end = len(ids)
        before, after = list(range(-1, end - 1)), list(range(1, end + 1))

        def pair_at(at: int) -> tuple[int, int, int] | None:
            """Finds the merge of the token at `at` with the next -> its place, `at`, the union."""
            found = self._merges.get((ids[at], ids[after[at]])) if after[at] < end else None
            return found and (found[0], at, found[1])

        heap = [pair for at in range(end) if (pair := pair_at(at))]
        heapify(heap)
        while heap:
            pair = heappop(heap)
            place, at, union = pair
            if pair_at(at) != pair:             # one of the two is joined already
                continue
            gone = after[at]
            ids[at], ids[gone], after[at] = union, None, after[gone]
            if after[at] < end:
                before[after[at]] = at
            for changed in (before[at], at):
                if changed >= 0 and (pair := pair_at(changed)):
                    heappush(heap, pair)
        return [i for i in ids if i is not None]

    def decode_plain(self, ids: list[int]) -> str:
        tokens = [self._token_of[i] for i in ids if i in self._token_of]
        if self._strip == "all":
            tokens[:1] = [token.replace(SPACE, "") for token in tokens[:1]]
            return "".join(tokens).replace(SPACE, " ")
        texts = []
        for spelt, run in groupby(tokens, lambda token: bool(BYTE.fullmatch(token))):
            texts.append(read_spelt(list(run)) if spelt else "".join(run).replace(SPACE, " "))
        return "".join(texts).removeprefix(" " if self._strip == "one" else "")


def read_spelt(tokens: list[str]) -> str:
    """Reads a run of tokens <0xNN> as UTF-8. If it is not, U+FFFD stands for each of its bytes."""
    try:
        return bytes(int(token[3:5], 16) for token in tokens).decode()
    except UnicodeDecodeError:
        return "\ufffd" * len(tokens)


def find_llama_prefix(folder: Path) -> str | None:
    """Finds the `prefix` of transformers' LlamaTokenizer, or None if that class is not named.

    The class disregards the normalizer, pre-tokenizer, decoder and unk of tokenizer.json. It goes
    by add_prefix_space and legacy in tokenizer_config.json (transformers 5,
    models/llama/tokenization_llama.py). CodeLlamaTokenizer does the same without legacy. A Mistral
    is read by another class, whatever is named.
    """
    settings, config = (read_json_if_there(folder / name)
                        for name in ("tokenizer_config.json", "config.json"))
    name = find_class(folder)
    if name not in ("LlamaTokenizer", "CodeLlamaTokenizer") or (
            config.get("model_type") == "mistral"):
        return None
    wanted = settings.get("add_prefix_space")
    if wanted is not None and not wanted:
        return "never"
    return "always" if settings.get("legacy") and name == "LlamaTokenizer" else "first"


def load_pieces(path: Path, vocab: dict[str, int], pairs: list[tuple[str, ...]],
                listed: list[dict], prefix: str) -> Tokenizer:
    """Builds transformers' LlamaTokenizer from its vocabulary and merges.

    listed: added tokens. <unk>, <s> and </s> are added tokens too.
    """
    make = partial(MetaspaceTokenizer, vocab=vocab, pairs=pairs, prefix=prefix,
                   strip="" if prefix == "never" else "one")
    usual = [{"content": t, "id": vocab[t]} for t in ("<unk>", "<s>", "</s>") if t in vocab]
    return build_tokenizer(make, path, vocab, usual + listed,
                           {"bos": vocab.get("<s>"), "eos": vocab.get("</s>")})


def load_metaspace(path: Path, spec: dict) -> Tokenizer:
    """Loads a tokenizer.json of BPE that writes "▁" for a space, whose contents are `spec`.

    Raises UserError if a setting would change the ids or the text in a way that is not known here.
    """
    with expected_layout(path):
        model, added = spec["model"], spec.get("added_tokens") or []
        if model.get("type", "BPE") != "BPE":
            raise UserError(f"{path}: {model['type']!r} is not BPE")
        refuse_settings(path, model, "ignore_merges")
        vocab, pairs = model["vocab"], read_merges(model)
        if prefix := find_llama_prefix(path.parent):
            return load_pieces(path, vocab, pairs, added, prefix)
        prefix, split = find_spaces(path, spec)
        if model.get("unk_token") is not None and model["unk_token"] not in vocab:
            raise UserError(f"{path}: unk_token {model['unk_token']!r} is not in the vocabulary")
        for token in added:
            moves = prefix == "each" or spec.get("normalizer") and " " in token["content"]
            if token.get("normalized") and moves:
                raise UserError(f"{path}: normalized of {token['content']!r} is not supported")
        make = partial(MetaspaceTokenizer, vocab=vocab, pairs=pairs, prefix=prefix,
                       strip=find_strip(path, spec), split=split,
                       unk=vocab.get(model.get("unk_token")),
                       fuse_unk=bool(model.get("fuse_unk")),
                       byte_fallback=bool(model.get("byte_fallback")))
    return build_tokenizer(make, path, vocab, added, {})


def find_spaces(path: Path, spec: dict) -> tuple[str, bool]:
    """Finds how a tokenizer.json treats spaces -> prefix and split of MetaspaceTokenizer.

    Raises UserError unless each step is one of those below, and one of them writes "▁".
    """
    normalizers = list_steps(spec.get("normalizer"), "normalizers")
    steps = normalizers + list_steps(spec.get("pre_tokenizer"), "pretokenizers")
    prefix, split, kinds, known = "never", False, [], True
    for step in steps:
        kinds.append(step["type"])
        if step == {"type": "Prepend", "prepend": SPACE}:
            prefix = "each"
        elif step["type"] == "Metaspace" and step["replacement"] == SPACE:
            scheme = step.get("prepend_scheme", "always")
            scheme = scheme if step.get("add_prefix_space", True) else "never"
            if scheme not in ("always", "first", "never"):
                raise UserError(f"{path}: prepend_scheme {scheme!r} is not supported")
            prefix = scheme if prefix == "never" else prefix
            split = split or step.get("split", True)
        elif step["type"] == "Split" and step["pattern"] == {"String": " "} and "Replace" in kinds:
            pass                                     # Gemma: no space is left to split at
        elif step != {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}:
            known = False
    twice = len(set(kinds)) < len(kinds)
    if not known or twice or not {"Replace", "Metaspace"} & {*kinds}:
        part = {name: spec.get(name) for name in ("normalizer", "pre_tokenizer")}
        raise UserError(f"{path}: {json.dumps(part)[:300]} is not supported")
    return prefix, split


def find_strip(path: Path, spec: dict) -> str:
    """Finds what a tokenizer.json's decoder takes off the text -> strip of MetaspaceTokenizer."""
    steps = list_steps(spec.get("decoder"), "decoders")
    usual = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
             {"type": "ByteFallback"}, {"type": "Fuse"}]
    if steps[:3] == usual and len(steps) <= 4:
        if steps[3:] == [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]:
            return "one"
        if len(steps) == 3:
            return ""
    if len(steps) == 1 and steps[0]["type"] == "Metaspace" and steps[0]["replacement"] == SPACE:
        scheme = steps[0].get("prepend_scheme", "always")
        if scheme != "never" and steps[0].get("add_prefix_space", True):
            return "all"
    raise UserError(f"{path}: decoder {json.dumps(spec.get('decoder'))[:300]} is not supported")
