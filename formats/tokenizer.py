"""Finds and loads the tokenizer that comes with a checkpoint: text <-> token ids.

    layout                       published with                          read by
    tokenizer.json               LLaMA-3, Qwen, SmolLM, GPT-2            bpe_files.py
    vocab.json + merges.txt      older checkpoints                       bpe_files.py
    encoder.json + vocab.bpe     OpenAI's GPT-2                          bpe_files.py
    *.tiktoken                   data/base                               bpe_files.py
    tokenizer.model (text)       Meta's LLaMA-3                          bpe_files.py
    tokenizer.model (binary)     LLaMA-1, LLaMA-2, Mistral               sentencepiece_file.py

bpe.py has the algorithm that most of them share. special_tokens.py has the tokens outside it.
"""
from pathlib import Path

from formats.bpe_files import (list_steps, load_ranks, load_tokenizer_json, load_vocab_merges,
                               read_table)
from formats.json_files import expected_layout, read_bytes
from formats.sentencepiece_file import load_sentencepiece
from formats.special_tokens import Tokenizer
from support.errors import UserError


def load_tokenizer(folder: str | Path) -> Tokenizer | None:
    """Loads the tokenizer of a checkpoint folder, or returns None if it has no tokenizer files.

    Takes the first of these that is there: a byte-level tokenizer.json, tokenizer.model,
    vocabulary and merges, *.tiktoken. Raises UserError, which names the file, if the ids would
    not be those of the reference.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    main, model = folder / "tokenizer.json", folder / "tokenizer.model"
    spec = read_table(main) if main.exists() else {}
    if spec:
        with expected_layout(main):
            kind = spec["model"].get("type", "BPE")
            steps = list_steps(spec.get("pre_tokenizer"), "pretokenizers")
            steps = [step["type"] for step in steps]
        if kind == "BPE" and "ByteLevel" in steps:
            return load_tokenizer_json(main, spec)
        if not model.exists():
            raise UserError(f"{main}: {kind!r} with pre-tokenizer {steps} is not byte-level BPE: "
                            "the checkpoint's tokenizer.model must be beside it")
    if model.exists():
        if not spec and read_bytes(model).isascii():       # a sentencepiece model is binary
            return load_ranks(model)
        return load_sentencepiece(model, spec.get("added_tokens") or [])
    for vocab, merges in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
        if (folder / vocab).exists() or (folder / merges).exists():
            return load_vocab_merges(folder / vocab, folder / merges)
    rank_files = sorted(folder.glob("*.tiktoken"))
    if len(rank_files) > 1:
        raise UserError(f"{folder}: more than one *.tiktoken file")
    return load_ranks(rank_files[0]) if rank_files else None
