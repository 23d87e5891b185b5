"""Joins a sentence, or a pair of them, to the ids that an encoder reads.

    BERT, DeBERTa    [CLS] A [SEP]         [CLS] A [SEP] B [SEP]      types 0 0 0 1 1
    RoBERTa          <s> A </s>            <s> A </s> </s> B </s>     types 0 everywhere

The type says which sentence a token is in. Devlin et al., 2019, arXiv:1810.04805, figure 2; Liu et
al., 2019, arXiv:1907.11692 (facebookresearch/fairseq, models/roberta/hub_interface.py).
(transformers 5 puts a second [SEP] between the sentences of DeBERTa v1; version 4 did not.)
"""
from dataclasses import dataclass
from pathlib import Path

from formats.json_files import read_json_if_there
from support.errors import UserError


@dataclass(frozen=True)
class Family:
    """Says which special tokens a family of encoders has, and how it joins two sentences.

    names: role -> text of the special token. between: how many seps are between the sentences.
    second: the type of the second sentence. mask_lstrip: the mask takes the white space before it.
    """
    names: dict[str, str]
    between: int = 1
    second: int = 1
    mask_lstrip: bool = False


BERT = {"cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "unk": "[UNK]", "mask": "[MASK]"}
DEBERTA = BERT | {"bos": "[CLS]", "eos": "[SEP]"}
ROBERTA = {"cls": "<s>", "sep": "</s>", "pad": "<pad>", "unk": "<unk>", "mask": "<mask>",
           "bos": "<s>", "eos": "</s>"}
FAMILIES = {        # transformers' class of tokenizer -> its family
    "BertTokenizer": Family(BERT),
    "RobertaTokenizer": Family(ROBERTA, between=2, second=0, mask_lstrip=True),
    "DebertaTokenizer": Family(DEBERTA, mask_lstrip=True),
    "DebertaV2Tokenizer": Family(DEBERTA),
}
CLASSES = {"bert": "BertTokenizer", "roberta": "RobertaTokenizer", "deberta": "DebertaTokenizer",
           "deberta-v2": "DebertaV2Tokenizer"}                      # model_type -> class


def find_class(folder: Path) -> str:
    """Finds the class that transformers would read a tokenizer with, or "" if none is known.

    tokenizer_class in tokenizer_config.json or config.json counts before model_type.
    """
    settings, config = (read_json_if_there(folder / name)
                        for name in ("tokenizer_config.json", "config.json"))
    name = settings.get("tokenizer_class") or config.get("tokenizer_class")
    return str(name or CLASSES.get(str(config.get("model_type")), "")).removesuffix("Fast")


def find_family(folder: Path) -> Family | None:
    """Finds the family of a checkpoint folder, or None if it is no encoder that is known here.

    A class such as PreTrainedTokenizerFast, which says nothing, leaves it to model_type.
    """
    model_type = str(read_json_if_there(folder / "config.json").get("model_type"))
    return FAMILIES.get(find_class(folder)) or FAMILIES.get(CLASSES.get(model_type, ""))


def check_class(path: Path, *known: str) -> None:
    """Raises UserError if a folder's class of tokenizer may read the file `path` in another way."""
    name = find_class(path.parent)
    if name not in ("", "PreTrainedTokenizer", "TokenizersBackend", *known):
        raise UserError(f"{path}: {name[:80]!r} is not supported with this file")


def shorten(first: int, second: int, room: int) -> tuple[int, int]:
    """Finds how many tokens of two sentences stay, so that they fit in `room` together.

    The longer one is cut first. The shorter one stays whole if half the room holds it. Else each
    gets half, and the longer one the odd token. Equal lengths give it to the second. That is
    longest_first of huggingface/tokenizers, utils/truncation.rs.
    """
    if first + second <= room:
        return first, second
    short = min(first, second, room // 2)
    return (room - short, short) if first > second else (short, room - short)


def join(tokenizer, first: list[int], second: list[int] | None,
         max_length: int) -> tuple[list[int], list[int]]:
    """Joins the ids of one sentence or two -> ids and types, each of at most `max_length`.

    An empty second sentence is one too. Raises UserError if the special tokens alone are more than
    max_length, or the tokenizer is not one of an encoder that is known here.
    """
    family, cls, sep = tokenizer.family, tokenizer.cls, tokenizer.sep
    if family is None or cls is None or sep is None:
        raise UserError(f"{tokenizer.path}: this tokenizer joins no sentences: only those of BERT, "
                        "RoBERTa and DeBERTa do, with cls and sep")
    between = [sep] * (1 if second is None else family.between)
    room = max_length - 1 - len(between) - (second is not None)
    if room < 0:
        raise UserError(f"{tokenizer.path}: {max_length} tokens at most: the special tokens alone "
                        f"are {max_length - room}")
    kept, more = shorten(len(first), len(second or []), room)
    ids, tail = [cls, *first[:kept], sep], between[1:]
    if second is not None:
        tail += [*second[:more], sep]
    return ids + tail, [0] * len(ids) + [family.second] * len(tail)
