"""Reads a sentencepiece model. Mostly sentencepiece itself runs it.

    tokenizer.model    LLaMA-1, LLaMA-2, Mistral
    spm.model          DeBERTa-v2 and v3
"""
from functools import partial
from pathlib import Path
from typing import Iterator

from formats.json_files import read_bytes, read_json_if_there
from formats.metaspace import find_llama_prefix, load_pieces
from formats.pairs import FAMILIES, check_class
from formats.special_tokens import Tokenizer, build_tokenizer
from support.errors import UserError


class SentencePieceTokenizer(Tokenizer):
    """Runs sentencepiece's own `processor` on the text between the added tokens.

    lower: lower-case the text first.
    """

    def __init__(self, path: Path, added: dict[str, int], processor, lower: bool = False):
        super().__init__(path, added, processor.vocab_size())
        self.processor, self.lower = processor, lower

    def encode_plain(self, text: str, at_start: bool) -> list[int]:
        return self.processor.encode(text.lower() if self.lower else text)

    def decode_plain(self, ids: list[int]) -> str:
        return self.processor.decode([i for i in ids if i < self.processor.vocab_size()])


def load_sentencepiece(path: Path, listed: list[dict]) -> Tokenizer:
    """Loads a tokenizer.model. Control pieces such as <s> become added tokens too.

    If tokenizer_config.json names LlamaTokenizer, the pieces are joined as that class joins them,
    in the order of their ids. Any other model is run by sentencepiece.
    listed: the added tokens of a tokenizer.json beside it.
    """
    model, vocab, controls = read_model(path)
    if prefix := find_llama_prefix(path.parent):
        controls += [{"content": piece, "id": vocab[piece], "special": False}
                     for piece in user_defined(model.serialized_model_proto())]
        pairs = [(piece[:at], piece[at:]) for piece in vocab for at in range(1, len(piece))
                 if piece[:at] in vocab and piece[at:] in vocab]
        return load_pieces(path, vocab, pairs, controls + listed, prefix)
    roles = {"bos": model.bos_id(), "eos": model.eos_id(), "pad": model.pad_id()}
    return build_tokenizer(partial(SentencePieceTokenizer, processor=model), path, vocab,
                           controls + listed, {role: i for role, i in roles.items() if i >= 0})


def load_spm(path: Path, listed: list[dict]) -> Tokenizer:
    """Loads the spm.model of DeBERTa-v2 or v3, whose [MASK] is the first id after the model's.

    listed: the added tokens of a tokenizer.json beside it. Raises UserError if the folder names
    another class, or tokenizer_config.json says split_by_punct. No published checkpoint does.
    """
    check_class(path, "DebertaV2Tokenizer")
    model, vocab, controls = read_model(path)
    settings = read_json_if_there(path.with_name("tokenizer_config.json"))
    if settings.get("split_by_punct"):
        raise UserError(f"{path.with_name('tokenizer_config.json')}: split_by_punct is not "
                        "supported")
    make = partial(SentencePieceTokenizer, processor=model,
                   lower=bool(settings.get("do_lower_case")))
    return build_tokenizer(make, path, {"[MASK]": model.vocab_size()} | vocab, controls + listed,
                           {}, FAMILIES["DebertaV2Tokenizer"])


def read_model(path: Path) -> tuple:
    """Reads a sentencepiece model -> the model, its vocabulary, and its control pieces.

    vocabulary: piece -> id. control pieces: as added tokens, such as <s> and <unk>. Raises
    UserError if the file is not a sentencepiece model or the package is missing.
    """
    try:
        import sentencepiece
    except ImportError as error:
        raise UserError(f"{path}: needs sentencepiece: pip install sentencepiece") from error
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=read_bytes(path))
        vocab = {model.id_to_piece(i): i for i in range(model.vocab_size())}
    except (RuntimeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: no sentencepiece model"
                        f"{' and no rank file' * (path.name == 'tokenizer.model')}") from error
    return model, vocab, [{"content": piece, "id": i} for piece, i in vocab.items()
                          if model.is_control(i) or model.is_unknown(i)]


def user_defined(model: bytes) -> list[str]:
    """Lists the user-defined pieces of a model, which sentencepiece's own interface does not tell.

    A model is a protobuf (sentencepiece_model.proto): field 1 holds a piece; of a piece field 1 is
    the text and field 3 its type, 4 for user-defined.
    """
    pieces = [dict(read_fields(value)) for number, value in read_fields(model) if number == 1]
    return [piece[1].decode() for piece in pieces if piece.get(3) == 4]


def read_fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yields the fields of a protobuf message: number, and an integer or bytes.

    A key is 8 * number + kind: 0 an integer, 1 and 5 eight and four bytes, 2 a length and bytes.
    """
    at = 0

    def integer() -> int:                       # 7 bits a byte, the lowest first
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
            if byte < 128:
                return value

    while at < len(data):
        number, kind = divmod(integer(), 8)
        if kind == 0:
            yield number, integer()
            continue
        size = {1: 8, 5: 4}.get(kind) or integer()
        yield number, data[at:at + size]
        at += size
