"""Turns PEFT's adapters into our adapter layers, and our layers into PEFT's files.

A folder holds adapter_config.json and adapter_model.safetensors. The tensors are named by the
module that they adapt in the Hugging Face model:
    base_model.model.<module>.lora_A.weight                 (r, in)
    base_model.model.<module>.lora_B.weight                 (out, r)
    base_model.model.<module>.lora_magnitude_vector         (out,)      DoRA
    base_model.model.<module>.lora_E                        (r, 1)      AdaLoRA, all without .weight
An update is lora_alpha / r * B A, with use_rslora lora_alpha / sqrt(r) * B A. peft_files.py reads
the two files.

export_peft() always writes a LoRA (with magnitudes for DoRA):
    LoRA, LoRA+, DoRA   as they are
    AdaLoRA             the directions that were kept, lam in A: a rank of its own for each module
    LoRA-Dash           after the dash exactly a LoRA of rank r + s: [B, U diag(c)/scale] [A; Vt]
    Dual LoRA           no LoRA of low rank: the best one of a given rank, by the singular values
GPT-2's c_attn is one module that computes q, k and v. These are three layers here. Written, the
module gets their A's below each other and a block-diagonal B: rank 3 r. Read, each of the three
gets A and its own part of B. The update is the same, but each layer trains its own A from then on.
"""
import json
import math
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from formats.checkpoint import linear_names
from formats.encoders import head_by_head, part_by_part
from formats.huggingface import FAMILIES
from formats.peft_files import find_adapters, read_peft_config, read_tensors
from formats.peft_heads import fit_head, parts_of, put_back, saved_modules
from formats.tensors import few_names
from methods import adapters, inject, targets_for
from model import Transformer
from support.errors import UserError, refuse_not_finite
from support.files import atomic_write

# The methods that as_lora() knows.
MAPPED = {"lora", "lora+", "dora", "adalora", "dash", "dual"}


class Update(NamedTuple):
    """Holds one module's update, scale * B A, and DoRA's magnitude."""
    A: Tensor                           # (r, in)
    B: Tensor                           # (out, r)
    scale: float
    magnitude: Tensor | None = None     # (out,)


# ---- out
def export_peft(model: nn.Module, folder: str | Path, rank: int | None = None,
                base: str | None = None) -> dict[str, float]:
    """Writes the model's adapters -> the share of each Dual LoRA update that is lost.

    This share is ||dW - B A|| / ||dW|| (Frobenius), by the path of the layer. Other methods lose
    nothing, and the dict is empty.
    rank: the rank of the LoRA that stands for Dual LoRA, which needs one. A narrower layer gets
    its full rank. base: the pretrained model's name, for adapter_config.json.
    Raises UserError if there are no adapters, the method or a layer has no form in PEFT, or the
    rank does not suit the method.
    """
    layers, config = adapters(model), model.__dict__.get("injected", {})
    method = config.get("method")
    if not layers:
        raise UserError(f"{folder}: no adapters to write" + " (full trains the weights "
                        "themselves: write the whole model)" * (method == "full"))
    if method not in MAPPED:
        raise UserError(f"{folder}: {method} is not mapped to an adapter of PEFT: as_lora() in "
                        "formats/peft.py would have to know it")
    if (rank is not None) != (method == "dual"):
        raise UserError("Dual LoRA's update has no low rank: give --rank, of the LoRA that is to "
                        "stand for it" if rank is None else
                        f"a rank is for Dual LoRA; {method} is written as it is")
    largest = max(min(layer.W0.shape) for layer in layers.values())
    if rank is not None and not 1 <= rank <= largest:
        raise UserError(f"rank {rank}: must be from 1 to {largest}")
    errors, modules, tensors, known = {}, {}, {}, linear_names(model)
    for theirs, ours in known.items():
        found = [(i, layers[path]) for i, path in enumerate(ours) if path in layers]
        if found:
            parts = {}
            for i, layer in found:
                parts[i] = as_lora(layer, method, rank)
                if method == "dual":
                    dW = layer.delta_weight()
                    lost = dW - parts[i].scale * parts[i].B @ parts[i].A
                    errors[ours[i]] = (lost.norm() / dW.norm().clamp(min=1e-30)).item()
            update = fused(parts, [model.get_submodule(path) for path in ours])
            modules[theirs] = update._replace(**{
                part: head_by_head(theirs, rows, model.config) for part, rows in
                (("B", update.B), ("magnitude", update.magnitude)) if rows is not None})
    strange = set(layers) - {path for ours in known.values() for path in ours}
    if strange:
        raise UserError(f"{folder}: no module of PEFT's for {few_names(strange)}")
    whole, values = saved_modules(model, folder)
    tensors |= {f"base_model.model.{name}": value for name, value in values.items()}
    for module, update in modules.items():
        name = f"base_model.model.{module}"
        tensors[f"{name}.lora_A.weight"] = update.A.contiguous()
        tensors[f"{name}.lora_B.weight"] = update.B.contiguous()
        if update.magnitude is not None:
            tensors[f"{name}.lora_magnitude_vector"] = update.magnitude
    folder = Path(folder)
    for name, tensor in tensors.items():
        refuse_not_finite(tensor, f"{folder}: {name}")
    with atomic_write(folder / "adapter_model.safetensors") as path:
        save_file(tensors, path, {"format": "pt"})
    with atomic_write(folder / "adapter_config.json") as path:
        raw = peft_config(model, modules, known, whole, base)
        path.write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    return errors


@torch.no_grad()
def as_lora(layer, method: str, rank: int | None) -> Update:
    """Writes the layer's update as a LoRA. `rank` is for Dual LoRA."""
    if method == "adalora":
        kept = layer.lam.nonzero()[:, 0]
        kept = kept if len(kept) else kept.new_zeros(1)             # PEFT has no rank 0
        return Update(layer.lam[kept, None] * layer.Q[kept], layer.P[:, kept], layer.scale)
    if method == "dual":
        U, S, Vt = torch.linalg.svd(layer.delta_weight(), full_matrices=False)
        root = S[:rank].sqrt()
        return Update(root[:, None] * Vt[:rank], U[:, :rank] * root, 1.0)
    A, B = layer.A.detach(), layer.B.detach()
    if method == "dash":
        A = torch.cat((A, layer.Vt))
        B = torch.cat((B, layer.U * layer.coords / layer.scale), 1)
    return Update(A, B, layer.scale, layer.magnitude.detach() if method == "dora" else None)


@torch.no_grad()
def fused(parts: dict[int, Update], layers: list) -> Update:
    """Joins the updates of a module that computes several layers.

    layers: all layers of the module. parts: place among them -> update, if it has one.
    """
    if len(layers) == 1:
        return parts[0]
    scale, first = next(iter(parts.values())).scale, next(iter(parts.values())).A
    weights = [getattr(layer, "base", layer).weight for layer in layers]
    B = first.new_zeros(sum(len(W) for W in weights), sum(len(part.A) for part in parts.values()))
    rows, columns = 0, 0
    for i, W in enumerate(weights):
        if i in parts:
            own = parts[i].B * (parts[i].scale / scale)
            B[rows:rows + len(W), columns:columns + own.shape[1]] = own
            columns += own.shape[1]
        rows += len(W)
    magnitude = None
    if any(part.magnitude is not None for part in parts.values()):
        magnitude = torch.cat([parts[i].magnitude if i in parts else W.to(B.dtype).norm(dim=1)
                               for i, W in enumerate(weights)])
    return Update(torch.cat([part.A for part in parts.values()]), B, scale, magnitude)


def peft_config(model, modules: dict[str, Update], known, whole: list[str],
                base: str | None) -> dict:
    """Makes the contents of adapter_config.json.

    A name of a target must not be that of a head's layer too, as `dense` is.
    """
    r, rank_pattern = pattern_of(ranks(modules))
    alpha, alpha_pattern = pattern_of(alphas(modules))
    names = FAMILIES[model.config.model_type].names
    known = {*known, *(name for name in names if "{}" not in name)}
    writes = isinstance(model, Transformer) and model.label_head is None
    task = "SEQ_CLS" if whole else "CAUSAL_LM" if writes else None
    return {"peft_type": "LORA", "task_type": task, "base_model_name_or_path": base,
            "modules_to_save": whole or None,
            "r": r, "lora_alpha": alpha,
            "rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern,
            "lora_dropout": model.injected["dropout"],
            "target_modules": sorted(targets_for(modules, known)),
            "use_dora": model.injected["method"] == "dora", "use_rslora": False, "bias": "none",
            "fan_in_fan_out": model.config.model_type == "gpt2",
            "inference_mode": True}


# ---- in
def import_peft(model: nn.Module, folder: str | Path, **own) -> nn.Module:
    """Injects a pretrained model with the adapters that PEFT left in `folder`, or on the hub.

    They become LoRA layers, or DoRA layers if they have magnitudes. AdaLoRA's become LoRA layers
    too, with lam in A. own: the method's options, to train on with.
    Raises UserError if the config asks for something that is not read here, or if a tensor has no
    place, does not fit or overflows. The model is as it was then.
    """
    folder = find_adapters(folder)
    config, modules = read_peft_config(folder), linear_names(model)
    found_in_file, head = read_tensors(folder, config, model)
    updates = {}                                # path of a layer of ours -> Update
    for module, (name, found) in found_in_file.items():
        ours = modules[module]
        sizes = [len(model.get_submodule(layer).weight) for layer in ours]
        A, B, magnitude = fitting(found, sum(sizes), model.get_submodule(ours[0]).in_features)
        if A is None:
            raise UserError(f"{folder}: the tensors of {module} do not fit the model")
        if (magnitude is None) != (config.method != "dora"):
            raise UserError(f"{config.path}: use_dora does not fit the tensors of {module}, which "
                            f"have {'no' if magnitude is None else 'a'} lora_magnitude_vector")
        config.check_module(name, len(A))
        B, magnitude = (None if rows is None else part_by_part(module, rows, model.config)
                        for rows in (B, magnitude))
        scale, split = config.scale(name, len(A)), len(sizes) > 1 and bool(B.any())
        magnitudes = [None] * len(sizes) if magnitude is None else magnitude.split(sizes)
        for layer, part, lengths in zip(ours, B.split(sizes), magnitudes):
            update = Update(*(used(A, part) if split else (A, part)), scale, lengths)
            updates[layer] = cast(update, model.get_submodule(layer).weight, f"{folder}: {layer}")
    known = [layer for layers in modules.values() for layer in layers]
    dropout, before = config.number("lora_dropout", 0), parts_of(model)
    try:
        whole = fit_head(model, head)
        inject(model, config.method, targets_for(updates, known), one_or_each(ranks(updates)),
               one_or_each(alphas(updates)), dropout, whole, **own)
    except UserError as error:
        put_back(model, before)
        raise UserError(f"{config.path}: {error}") from None
    with torch.no_grad():
        for name, value in head.items():
            model.get_parameter(name).copy_(value)
        for name, layer in adapters(model).items():
            for parameter, value in updates[name]._asdict().items():
                if isinstance(value, Tensor):
                    getattr(layer, parameter).copy_(value)
    return model


def fitting(found: dict[str, Tensor], n_out: int, n_in: int) -> tuple:
    """Returns A (r, in), B (out, r) and the magnitude (out,) or None.

    All three are None if a shape does not fit.
    """
    r, magnitude = len(found["lora_A"]), found.get("lora_magnitude_vector")
    right = {"lora_A": (r, n_in), "lora_B": (n_out, r), "lora_E": (r, 1),
             "lora_magnitude_vector": (n_out,)}
    if any(tensor.shape != right[name] for name, tensor in found.items()) or (
            r == 0 and "lora_E" not in found):
        return None, None, None
    A, B = found["lora_A"] * found.get("lora_E", 1), found["lora_B"]
    if r == 0:                                  # AdaLoRA kept nothing here
        A, B = A.new_zeros(1, n_in), B.new_zeros(n_out, 1)
    return A, B, magnitude


def cast(update: Update, W0: Tensor, where: str) -> Update:
    """Casts an update to the dtype of an adapter: float32, or float64 on a float64 W0.

    Raises UserError, which begins with `where`, if a value overflows.
    """
    dtype = torch.float64 if W0.dtype == torch.float64 else torch.float32
    parts = {name: value.to(dtype) if isinstance(value, Tensor) else value
             for name, value in update._asdict().items()}
    for name, value in parts.items():
        if isinstance(value, Tensor):
            refuse_not_finite(value, f"{where}.{name}")
    return Update(**parts)


def used(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Drops the rows of A that only other parts of a fused layer use. At least one stays."""
    columns = B.any(0)
    columns[0] |= not columns.any()
    return A[columns], B[:, columns]


def ranks(updates: dict[str, Update]) -> dict[str, int]:
    """Returns each rank."""
    return {name: len(update.A) for name, update in updates.items()}


def alphas(updates: dict[str, Update]) -> dict[str, float]:
    """Returns each alpha = scale * rank."""
    return {name: whole(update.scale * len(update.A)) for name, update in updates.items()}


def pattern_of(values: dict) -> tuple:
    """Returns the commonest value, and the names that have another, as PEFT writes them."""
    common = Counter(values.values()).most_common(1)[0][0]
    return common, {name: value for name, value in values.items() if value != common}


def one_or_each(values: dict):
    """Returns the one value that all have, or all of them, as inject() takes them."""
    return next(iter(values.values())) if len(set(values.values())) == 1 else values


def whole(number: float) -> float | int:
    """Turns 8.0 into 8, as PEFT writes an alpha. A product that missed 8 by a hair gives 8 too."""
    near = round(number)
    return near if math.isclose(number, near, rel_tol=1e-9) else number
