"""Reads and writes whole Hugging Face checkpoints, without transformers.

>>> model, tokenizer = load_pretrained("data/base")                         # a folder
>>> model, tokenizer = load_pretrained("HuggingFaceTB/SmolLM2-135M", dtype=torch.bfloat16)
>>> save_pretrained(model, "copy")               # transformers.AutoModelForCausalLM reads it

huggingface.py knows the form of the files. First the names and shapes of all tensors are checked.
Then each tensor is read straight into its place.
"""
import functools
import json
import math
import re
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from diffusion import PictureConfig, PictureModel
from encoder import Encoder, EncoderConfig
from formats.decoders import describe_cap, one_or_all
from formats.huggingface import (SMALL, TEXTS, by_full_name, from_file, is_conv1d, make_config_json,
                                 map_names, parse_config, read_model_config, to_file)
from formats.json_files import read_json
from formats.pictures import Words
from formats.sdxl import INDEX, SDXL, load_sdxl, save_sdxl
from formats.tensors import DTYPES, Stored, few_names
from formats.tokenizer import load_tokenizer
from model import Config, Transformer
from support.errors import UserError, refuse_not_finite
from support.files import atomic_write, open_regular
from support.processes import is_main

IN_TENSORS = ("n_labels", "has_pooler", "has_mlm")     # what no config.json needs to say
MAX_LENGTH = 256        # tokens of an example, unless a command says otherwise
AnyModel = Transformer | Encoder | PictureModel | SDXL
MODELS = {Config: Transformer, EncoderConfig: Encoder, PictureConfig: PictureModel}


@torch.no_grad()
def load_pretrained(path_or_repo: str | Path, dtype: torch.dtype | None = None,
                    device: str | torch.device = "cpu"):
    """Loads a folder, or a repository of the Hugging Face hub ("owner/name") -> (model, tokenizer).

    dtype: None keeps the checkpoint's own. The tokenizer is None if the folder has none.
    model.config.eos lists the ends that config.json, generation_config.json and the tokenizer name.
    A tokenizer that names none gets the first of them as its eos, which training ends a text with.
    model.also_named maps the checkpoint's names of linear layers to ours: inject() takes both as
    targets.
    A folder with model_index.json is read by formats/sdxl.py.
    Where model.py computes shorter texts than transformers, a line on standard error says so.
    Raises UserError if a tensor is missing, left over or misshapen, or if model.py would compute
    the model in another way than transformers.
    """
    if dtype not in [None, *DTYPES.values()]:
        raise UserError(f"dtype {dtype!r} is not one of torch's {', '.join(DTYPES)}")
    folder = find_folder(path_or_repo)
    refuse_adapters(folder)
    if (folder / INDEX).exists():
        return load_sdxl(folder, dtype, device)
    config, named = read_model_config(folder)
    tokenizer = load_tokenizer(folder)
    if tokenizer is not None and isinstance(config, Config):
        if tokenizer.eos is None:
            tokenizer.eos = next(iter(config.eos), None)
        elif tokenizer.eos not in config.eos and tokenizer.eos < config.vocab_size:
            if config.eos:
                say_once(f"{path_or_repo}: the tokenizer ends a text with {tokenizer.eos}, the "
                         f"model's config with {one_or_all(config.eos)}: any of them ends one here")
            config.eos.append(tokenizer.eos)
    if isinstance(config, PictureConfig) != isinstance(tokenizer, Words) and tokenizer is not None:
        raise UserError(f"{folder}: words.txt belongs to a model that draws pictures, and no other "
                        "tokenizer does")
    if isinstance(tokenizer, Words):
        tokenizer.check_number(config.n_words, folder)
    tensors = by_full_name(folder, config)
    model = empty_model(config, folder, tensors)
    plan = match_tensors(model, tensors, folder)
    dtype = dtype or named or next(iter(tensors.values())).dtype
    # Copying a tensor takes its size twice for a moment. The largest comes first, while the model
    # is still small. So the peak of memory stays near the model's own size.
    for full in sorted(tensors, key=lambda full: math.prod(tensors[full].shape), reverse=True):
        whole = tensors.pop(full).read()
        whole = from_file(full, whole, config)
        lengths = [model.get_parameter(ours).shape[0] for ours in plan[full]]
        for ours, part in zip(plan[full], whole.split(lengths)):
            owner, _, leaf = ours.rpartition(".")
            own = torch.empty(part.shape, dtype=dtype, device=device).copy_(part)
            if own.dtype != part.dtype:
                refuse_not_finite(own, f"{folder}: {ours}, as {dtype},")
            setattr(model.get_submodule(owner), leaf, nn.Parameter(own))
        del whole, part                         # unmaps the file
    names = linear_names(model)
    model.also_named = names | {"all-linear": [ours for paths in names.values() for ours in paths]}
    if isinstance(config, Config) and (cap := describe_cap(config)):
        say_once(f"{path_or_repo}: {cap}")
    return model, tokenizer


@functools.cache
def say_once(line: str) -> None:
    """Prints a line on standard error, the first time only."""
    if is_main():
        print(line, file=sys.stderr)


def linear_names(model) -> dict[str, list[str]]:
    """Maps the checkpoint's name of each linear layer but a head's to the paths of our layers."""
    linear = {name for name, module in model.named_modules()
              if isinstance(module, nn.Linear) or hasattr(module, "base")}
    if isinstance(model, SDXL):
        return {name.removeprefix("unet."): [name] for name in linear
                if not name.endswith(".base")}
    full = map_names(model.config, {f"{name}.weight" for name in linear
                                    if name.startswith("layers.")})
    return {theirs.removesuffix(".weight"): [name.removesuffix(".weight") for name in ours]
            for theirs, ours in full.items()}


def refuse_adapters(folder: Path) -> None:
    """Raises UserError if PEFT's adapters are in the folder: transformers would apply them."""
    if not (folder / "adapter_config.json").exists():
        return
    if (folder / "config.json").exists():
        raise UserError(f"{folder}: adapter_config.json beside the model: transformers would apply "
                        "these adapters; move them to a folder of their own, for --from-peft")
    raise UserError(f"{folder}: holds PEFT's adapters, not a model: give it as --from-peft, and "
                    "the model that they adapt as --model")


def find_folder(path_or_repo: str | Path, small: list[str] = SMALL,
                weights: tuple[str, str] = ("model*.safetensors", "pytorch_model*.bin")) -> Path:
    """Finds the folder, or fetches the repository into huggingface_hub's cache.

    small: the patterns of the files to fetch beside the weights. weights: the pattern of these, and
    another for a repository that has none. Raises UserError if there is neither folder nor
    repository.
    """
    folder, repo = Path(path_or_repo), str(path_or_repo)
    if folder.is_dir():
        return folder
    if folder.exists() or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo):
        gpt2 = re.fullmatch(r"gpt2(-\w+)?", repo)
        hint = f"; the hub has openai-community/{repo}" if gpt2 else ""
        raise UserError(f"{repo}: neither a folder nor a repository of the hub (owner/name){hint}")
    from huggingface_hub import snapshot_download
    try:
        fetched = Path(snapshot_download(repo, allow_patterns=[*small, weights[0]]))
        if not any(fetched.glob(weights[0])):
            snapshot_download(repo, allow_patterns=[*small, weights[1]])
        return fetched
    except Exception as error:                  # the network's, the hub's or the disk's
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{repo}: no such folder, and not fetched from the hub: {reason}") from None


def empty_model(config, folder: Path, tensors: dict[str, Stored]) -> AnyModel:
    """Builds the model without memory for its weights, on torch's "meta" device.

    Raises UserError if the config asks for another number of layers or for impossible sizes.
    """
    layers = {layer for full in tensors for layer in re.findall(r"^\D+\.(\d+)\.", full)}
    if len(layers) != config.n_layers:          # checked first: building 10^7 layers takes hours
        raise UserError(f"{folder}: config.json says {config.n_layers} layers, the tensors are of "
                        f"{len(layers)}")
    try:
        with torch.device("meta"):
            model = MODELS[type(config)](config)
            if "score.weight" in tensors:
                model.add_head(tensors["score.weight"].shape[0])
            return model
    except RuntimeError as error:               # two sizes whose product overflows
        raise UserError(f"{folder / 'config.json'}: impossible sizes: {error}") from None


def match_tensors(model, tensors: dict[str, Stored],
                  folder: Path) -> dict[str, list[str]]:
    """Matches the tensors to the model's parameters, as map_names() does.

    Raises UserError if a tensor or a parameter is left over, or a shape or dtype does not fit.
    """
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    plan = map_names(model.config, set(shapes))
    if set(plan) != set(tensors):
        raise UserError(f"{folder}: the tensors do not fit config.json: "
                        f"missing {few_names(set(plan) - set(tensors)) or 'none'}; "
                        f"unexpected {few_names(set(tensors) - set(plan)) or 'none'}")
    for full, tensor in tensors.items():
        shape = (sum(shapes[ours][0] for ours in plan[full]), *shapes[plan[full][0]][1:])
        shape = shape[::-1] if is_conv1d(full) else shape
        if tensor.shape != shape:
            raise UserError(f"{tensor.path}: {tensor.name} has the shape {tensor.shape}, "
                            f"config.json asks for {shape}")
        if tensor.dtype not in DTYPES.values():
            raise UserError(f"{tensor.path}: {tensor.name} is not of {', '.join(DTYPES)}")
    return plan


def save_pretrained(model: AnyModel, path: str | Path) -> None:
    """Writes config.json and model.safetensors, which load_pretrained and transformers read.

    If the positions were capped, config.json keeps the original window and
    max_position_embeddings, with which transformers computes longer texts.
    Raises UserError if the model has adapters, or if config.json cannot express its Config.
    """
    if isinstance(model, SDXL):
        return save_sdxl(model, Path(path))
    config, path, state = model.config, Path(path), model.state_dict()
    plan = map_names(config, set(state))
    odd = set(state) - {name for names in plan.values() for name in names}
    if odd:
        raise UserError(f"{path}: the model has adapters, merge(model) before saving it; or it is "
                        f"no {config.model_type}: {few_names(odd)}")
    for name, tensor in state.items():
        refuse_not_finite(tensor, f"{path}: {name}")
    raw = make_config_json(model, model.embed.weight.dtype)
    read_back = asdict(parse_config(raw))
    lost = [name for name, value in asdict(config).items()
            if name not in IN_TENSORS and read_back[name] != value]
    if lost:
        raise UserError(f"{path}: a {config.model_type} config.json cannot say this "
                        f"{few_names(lost)}")
    tensors = {}
    for full, names in plan.items():
        parts = [state[name] for name in names]
        whole = torch.cat(parts) if len(parts) > 1 else parts[0]
        tensors[full] = to_file(full, whole, config).contiguous()
    with atomic_write(path / "model.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    with atomic_write(path / "config.json") as temporary:
        temporary.write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def texts_of(source: str | Path) -> list[Path]:
    """Lists the files that merging does not change: the tokenizer's and the generation settings.

    Raises UserError if one is a link that leads out of the folder. (The hub's cache links to its
    own blobs.)
    """
    folder = find_folder(source).resolve()
    home = folder.parent.parent if folder.parent.name == "snapshots" else folder
    files = sorted({found for pattern in TEXTS for found in folder.glob(pattern)})
    for file in files:
        if home not in file.resolve().parents:
            raise UserError(f"{file}: a link that leads out of the folder")
        open_regular(file).close()
    return files


def copy_texts(files: list[Path], folder: Path, config) -> None:
    """Copies the files that texts_of() lists; generation_config.json gets all ends of the config.

    transformers stops at the ends in generation_config.json, or in config.json if it is not there.
    """
    for file in files:
        with atomic_write(folder / file.name) as temporary:
            if file.name == "generation_config.json":
                raw = read_json(file) | {"eos_token_id": one_or_all(config.eos)}
                temporary.write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
            else:
                shutil.copyfile(file, temporary)


def open_model(path: str, device: str, max_length: int | None, dtype: torch.dtype):
    """Loads a model in that dtype -> model, tokenizer, max_length.

    max_length is MAX_LENGTH if it is None, and at most the model's positions. Raises UserError if
    there is no such model, or if it has no tokenizer.
    """
    model, tokenizer = load_pretrained(path, dtype, device)
    if tokenizer is None:
        raise UserError(f"{path}: the folder holds no tokenizer")
    return model, tokenizer, min(max_length or MAX_LENGTH, model.config.max_positions)
