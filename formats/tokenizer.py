"""Finds and loads the tokenizer that comes with a checkpoint: text <-> token ids.

    layout                       published with                          read by
    tokenizer.json, bytes        LLaMA-3, Qwen, SmolLM, GPT-2, RoBERTa   bpe_files.py
    tokenizer.json, "▁"          LLaMA-1, LLaMA-2, Mistral, TinyLlama    metaspace.py
    tokenizer.json, WordPiece    BERT, MiniLM                            wordpiece.py
    vocab.json + merges.txt      RoBERTa, DeBERTa, older checkpoints     bpe_files.py
    encoder.json + vocab.bpe     OpenAI's GPT-2                          bpe_files.py
    *.tiktoken                   data/base                               bpe_files.py
    tokenizer.model (text)       Meta's LLaMA-3                          bpe_files.py
    tokenizer.model (binary)     LLaMA-1, LLaMA-2, Mistral               sentencepiece_file.py
    spm.model                    DeBERTa-v2, DeBERTa-v3                  sentencepiece_file.py
    vocab.txt                    BERT                                    wordpiece.py
    words.txt                    data/pictures                           pictures.py

bpe.py has the algorithm on bytes, metaspace.py the one on characters. special_tokens.py has the
tokens outside them. pairs.py says how an encoder joins two sentences.
"""
from pathlib import Path

from formats.bpe_files import (list_steps, load_ranks, load_tokenizer_json, load_vocab_merges,
                               read_table)
from formats.json_files import expected_layout, read_bytes
from formats.metaspace import load_metaspace
from formats.pairs import FAMILIES, find_family
from formats.pictures import Words, load_words
from formats.sentencepiece_file import load_sentencepiece, load_spm
from formats.special_tokens import Tokenizer
from formats.wordpiece import load_vocab_txt, load_wordpiece_json
from support.errors import UserError


def load_tokenizer(folder: str | Path) -> Tokenizer | Words | None:
    """Loads the tokenizer of a checkpoint folder, or returns None if it has no tokenizer files.

    Takes the first of these that is there: a tokenizer.json of BPE or WordPiece, spm.model,
    tokenizer.model, vocabulary and merges, vocab.txt, words.txt, *.tiktoken. Raises UserError,
    which names the file, if the ids would not be those of the reference.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    main, model, spm = (folder / name for name in ("tokenizer.json", "tokenizer.model",
                                                   "spm.model"))
    spec = read_table(main) if main.exists() else {}
    if spec:
        with expected_layout(main):
            kind = spec["model"].get("type") or (                       # older files do not say it
                "WordPiece" if "max_input_chars_per_word" in spec["model"] else "BPE")
            steps = list_steps(spec.get("pre_tokenizer"), "pretokenizers")
            steps = [step["type"] for step in steps]
        if kind == "WordPiece":
            return load_wordpiece_json(main, spec)
        if kind == "BPE" and "ByteLevel" in steps:
            return load_tokenizer_json(main, spec)
        try:
            return load_metaspace(main, spec)
        except UserError as error:
            if not model.exists() and not spm.exists():
                wanted = spm if find_family(folder) == FAMILIES["DebertaV2Tokenizer"] else model
                raise UserError(f"{error} ({wanted.name} beside it would do)") from error
    if spm.exists():
        return load_spm(spm, spec.get("added_tokens") or [])
    if model.exists():
        if not spec and read_bytes(model).isascii():       # a sentencepiece model is binary
            return load_ranks(model)
        return load_sentencepiece(model, spec.get("added_tokens") or [])
    for vocab, merges in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
        if (folder / vocab).exists() or (folder / merges).exists():
            return load_vocab_merges(folder / vocab, folder / merges)
    if (folder / "vocab.txt").exists():
        return load_vocab_txt(folder / "vocab.txt")
    if (folder / "words.txt").exists():
        return load_words(folder / "words.txt")
    rank_files = sorted(folder.glob("*.tiktoken"))
    if len(rank_files) > 1:
        raise UserError(f"{folder}: more than one *.tiktoken file")
    return load_ranks(rank_files[0]) if rank_files else None
