"""Reads a sentencepiece model: LLaMA-1, LLaMA-2, Mistral. Mostly sentencepiece itself runs it."""
from functools import partial
from pathlib import Path

from formats.json_files import read_bytes
from formats.metaspace import find_llama_prefix, load_pieces
from formats.special_tokens import Tokenizer, build_tokenizer
from support.errors import UserError


class SentencePieceTokenizer(Tokenizer):
    """Runs sentencepiece's own `processor` on the text between the added tokens."""

    def __init__(self, path: Path, added: dict[str, int], processor):
        super().__init__(path, added, processor.vocab_size())
        self.processor = processor

    def encode_plain(self, text: str, at_start: bool) -> list[int]:
        return self.processor.encode(text)

    def decode_plain(self, ids: list[int]) -> str:
        return self.processor.decode([i for i in ids if i < self.processor.vocab_size()])


def load_sentencepiece(path: Path, listed: list[dict]) -> Tokenizer:
    """Loads a tokenizer.model. Control pieces such as <s> become added tokens too.

    If tokenizer_config.json names LlamaTokenizer, the pieces are joined as that class joins them,
    in the order of their ids. Any other model is run by sentencepiece.
    listed: the added tokens of a tokenizer.json beside it. Raises UserError if the file is not a
    sentencepiece model or the package is missing.
    """
    try:
        import sentencepiece
    except ImportError as error:
        raise UserError(f"{path}: needs sentencepiece: pip install sentencepiece") from error
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=read_bytes(path))
        vocab = {model.id_to_piece(i): i for i in range(model.vocab_size())}
    except (RuntimeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: neither a sentencepiece model nor a rank file") from error
    controls = [{"content": piece, "id": i} for piece, i in vocab.items()
                if model.is_control(i) or model.is_unknown(i)]
    if prefix := find_llama_prefix(path.parent):
        pairs = [(piece[:at], piece[at:]) for piece in vocab for at in range(1, len(piece))
                 if piece[:at] in vocab and piece[at:] in vocab]
        return load_pieces(path, vocab, pairs, controls + listed, prefix)
    roles = {"bos": model.bos_id(), "eos": model.eos_id(), "pad": model.pad_id()}
    return build_tokenizer(partial(SentencePieceTokenizer, processor=model), path, vocab,
                           controls + listed, {role: i for role, i in roles.items() if i >= 0})
