"""Knows the form of a Hugging Face checkpoint, whichever family's it is.

A checkpoint is a folder. Its config.json tells the shape of the model. Its *.safetensors (or
pytorch_model.bin) hold named tensors. decoders.py and encoders.py have the names of each family,
tensors.py reads the files. checkpoint.py reads and writes whole checkpoints, peft.py adapters.
"""
from pathlib import Path

import torch
from torch import Tensor

from diffusion import PictureConfig
from encoder import EncoderConfig
from formats import decoders, encoders, pictures
from formats.json_files import read_json, read_json_if_there
from formats.tensors import DTYPES, Stored
from model import Config
from support.errors import UserError

FAMILIES = decoders.FAMILIES | encoders.FAMILIES | pictures.FAMILIES    # by model_type
AnyConfig = Config | EncoderConfig | PictureConfig
# The files that tell how to write with a model; all files to fetch beside the tensors.
TEXTS = ["generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
         "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "encoder.json",
         "vocab.bpe", "tokenizer.model", "*.tiktoken", "vocab.txt", "spm.model", "words.txt"]
SMALL = ["config.json", "model_index.json", "adapter_config.json", "*.index.json", *TEXTS]


def form_of(kind: str):
    """Returns the file that knows a model_type: decoders.py, encoders.py or pictures.py."""
    return next(form for form in (decoders, encoders, pictures) if kind in form.FAMILIES)


def read_model_config(folder: Path) -> tuple[AnyConfig, torch.dtype | None]:
    """Reads config.json and generation_config.json -> the config, and the dtype or None.

    Raises UserError, which names the file, if this model cannot be computed here.
    """
    path, extra = folder / "config.json", folder / "generation_config.json"
    raw, generation = read_json(path), read_json_if_there(extra)
    try:
        config = parse_config(raw)
        name = raw.get("dtype") or raw.get("torch_dtype")       # the latter before transformers 5
        if name not in [None, "auto", *DTYPES]:
            raise UserError(f"dtype {name!r} is not one of auto, {', '.join(DTYPES)}")
        path = extra                    # its eos counts: LLaMA-3 instruct ends its turns with one
        more = decoders.token_ids(generation, "eos_token_id")
        if more:
            config.eos = list(dict.fromkeys(config.eos + more))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return config, DTYPES.get(name)


def parse_config(raw: dict) -> AnyConfig:
    """Parses the contents of a config.json.

    Raises UserError if a value is missing or absurd, or an option is not computed here.
    """
    kind = raw.get("model_type")
    if kind not in list(FAMILIES):
        raise UserError(f"model_type must be one of {', '.join(FAMILIES)}, found {kind!r}")
    return form_of(kind).parse_config(raw)


def make_config_json(model, dtype: torch.dtype) -> dict:
    """Makes the contents of a config.json, in the older dialect, which transformers 5 reads too."""
    return form_of(model.config.model_type).make_config_json(model, dtype)


def by_full_name(folder: Path, config: AnyConfig) -> dict[str, Stored]:
    """Lists the tensors that fill the model: their names in the tables -> the tensors.

    Says in the config what only the tensors tell: which heads there are. Raises UserError if a
    tensor is there twice.
    """
    return form_of(config.model_type).by_full_name(folder, config)


def map_names(config: AnyConfig, ours: set[str]) -> dict[str, list[str]]:
    """Maps each full name in a checkpoint to the names of ours that its tensor fills.

    ours: the names of the model's parameters. A name of the tables that ends in .weight or .bias is
    a tensor's, any other a module's.
    """
    found = {}
    for theirs, names in FAMILIES[config.model_type].names.items():
        for kind in [""] if names[0].endswith((".weight", ".bias")) else [".weight", ".bias"]:
            for layer in range(config.n_layers):
                if f"{names[0].format(layer)}{kind}" in ours:
                    found[f"{theirs.format(layer)}{kind}"] = [f"{name.format(layer)}{kind}"
                                                              for name in names]
    return found


def is_conv1d(full: str) -> bool:
    """Tells whether the file keeps this weight (in, out)."""
    return full.rpartition(".")[0].endswith(decoders.CONV1D)


def from_file(full: str, tensor: Tensor, config: AnyConfig) -> Tensor:
    """Turns a tensor of a file into ours below each other, such as W_q, W_k, W_v: (out, in)."""
    tensor = tensor.t() if is_conv1d(full) else tensor
    return encoders.part_by_part(full, tensor, config)


def to_file(full: str, tensor: Tensor, config: AnyConfig) -> Tensor:
    """Undoes from_file()."""
    tensor = encoders.head_by_head(full, tensor, config)
    return tensor.t() if is_conv1d(full) else tensor
