"""Turns PEFT's adapters into our adapter layers, and our layers into PEFT's files.

A folder holds adapter_config.json and adapter_model.safetensors. The tensors are named by the
module that they adapt in the Hugging Face model, after base_model.model.<module>:
    .lora_A.weight (r, in)   .lora_B.weight (out, r)        LoRA
    .lora_magnitude_vector (out,)                           DoRA, beside LoRA's
    .lora_A   .lora_B   .lora_E (r, 1)                      AdaLoRA
    .hada_w1_b (r, in)   .hada_w1_a (out, r)                LoHa: A and B, then C and D
    .hada_w2_b (r, in)   .hada_w2_a (out, r)
    .hira_A (r, in)   .hira_B (out, r)                      HiRA
An update is lora_alpha / r * B A, with use_rslora lora_alpha / sqrt(r) * B A. LoHa's factor is
alpha / r, HiRA's is 1. peft_files.py reads the two files. SDXL has another, in diffusers_files.py.

export_peft() writes LoHa and HiRA as such, and all else as a LoRA, with DoRA's magnitudes:
    LoRA, LoRA+         as they are; started as PiSSA a LoRA of rank 2 r: [B, -B0] [A; A0]
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
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from dora import MagnitudeLinear
from formats.checkpoint import linear_names
from formats.diffusers_files import LORA_FILE, to_tensors
from formats.encoders import head_by_head, part_by_part
from formats.huggingface import FAMILIES
from formats.peft_files import PeftConfig, find_adapters, read_peft_config, read_tensors
from formats.peft_heads import fit_head, parts_of, put_back, saved_modules
from formats.sdxl import SDXL
from formats.tensors import few_names
from lora import LoRALinear
from methods import adapters, inject
from model import Transformer
from support.errors import UserError, refuse_not_finite
from support.files import atomic_write
from support.products import best_factors
from support.targets import targets_for

# The methods that as_update() knows -> how PEFT calls the kind of adapter.
MAPPED = {**dict.fromkeys(("lora", "lora+", "dora", "adalora", "dash", "dual"), "LORA"),
          "loha": "LOHA", "hira": "HIRA"}
# Our parameter -> PEFT's tensor.
NAMES = {"LORA": {"A": "lora_A", "B": "lora_B", "magnitude": "lora_magnitude_vector"},
         "LOHA": {"A": "hada_w1_b", "B": "hada_w1_a", "C": "hada_w2_b", "D": "hada_w2_a"},
         "HIRA": {"A": "hira_A", "B": "hira_B"}}


class Update(NamedTuple):
    """Holds one module's update: scale * B A, or what its method makes of these matrices."""
    A: Tensor                           # (r, in)
    B: Tensor                           # (out, r)
    scale: float = 1.0
    magnitude: Tensor | None = None     # (out,)        DoRA
    C: Tensor | None = None             # (r, in)       LoHa
    D: Tensor | None = None             # (out, r)      LoHa


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
    folder = Path(folder)
    layers, config = adapters(model), model.__dict__.get("injected", {})
    method = config.get("method")
    if not layers:
        raise UserError(f"{folder}: no adapters to write" + " (full trains the weights "
                        "themselves: write the whole model)" * (method == "full"))
    if method not in MAPPED:
        raise UserError(f"{folder}: {method} is not mapped to an adapter of PEFT: as_update() in "
                        "formats/peft.py would have to know it")
    kind, has_magnitude = MAPPED[method], isinstance(next(iter(layers.values())), MagnitudeLinear)
    if isinstance(model, SDXL) and (kind != "LORA" or config.get("whole")):
        raise UserError(f"{folder}: diffusers reads a UNet's LoRA and DoRA alone: --to writes the "
                        "merged model")
    if has_magnitude and (method == "dual" or kind != "LORA"):
        raise UserError(f"{folder}: PEFT has DoRA over LoRA alone, not over {method}: --to writes "
                        "the merged model")
    if kind == "LOHA" and model.config.model_type == "gpt2":
        raise UserError(f"{folder}: PEFT has no LoHa for GPT-2's layers, which are of type Conv1D")
    if (rank is not None) != (method == "dual"):
        raise UserError("Dual LoRA's update has no low rank: --to writes the merged model, --rank "
                        "R the LoRA that is to stand for it" if rank is None else
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
                parts[i] = as_update(layer, method, rank)
                if method == "dual":
                    dW = layer.delta_weight()
                    lost = dW - parts[i].scale * parts[i].B @ parts[i].A
                    errors[ours[i]] = (lost.norm() / dW.norm().clamp(min=1e-30)).item()
            update = fused(parts, [model.get_submodule(path) for path in ours])
            modules[theirs] = update._replace(**{
                part: head_by_head(theirs, getattr(update, part), model.config)
                for part in ("B", "magnitude", "D") if getattr(update, part) is not None})
    strange = set(layers) - {path for ours in known.values() for path in ours}
    if strange:
        raise UserError(f"{folder}: no module of PEFT's for {few_names(strange)}")
    if isinstance(model, SDXL):
        write_tensors(to_tensors(modules), folder / LORA_FILE)
        return errors
    if kind == "HIRA":                  # PEFT's reads no rank_pattern (0.21)
        r = max(len(update.A) for update in modules.values())
        modules = {name: Update(*of_rank(update.A, update.B, r))
                   for name, update in modules.items()}
    whole, values = saved_modules(model, folder)
    tensors |= {f"base_model.model.{name}": value for name, value in values.items()}
    for module, update in modules.items():
        for part, name in NAMES[kind].items():
            if (tensor := getattr(update, part)) is not None:
                name += ".weight" * (name in ("lora_A", "lora_B"))
                tensors[f"base_model.model.{module}.{name}"] = tensor
    write_tensors(tensors, folder / "adapter_model.safetensors")
    with atomic_write(folder / "adapter_config.json") as path:
        raw = peft_config(model, modules, known, whole, base)
        path.write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    return errors


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Writes a file of safetensors. Raises UserError if a tensor holds NaN or infinity."""
    for name, tensor in tensors.items():
        refuse_not_finite(tensor, f"{path.parent}: {name}")
    with atomic_write(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary,
                  {"format": "pt"})


@torch.no_grad()
def as_update(layer, method: str, rank: int | None) -> Update:
    """Writes the layer's update in PEFT's form. `rank` is for Dual LoRA."""
    magnitude = layer.magnitude.detach() if isinstance(layer, MagnitudeLinear) else None
    if method == "adalora":
        kept = layer.lam.nonzero()[:, 0]
        kept = kept if len(kept) else kept.new_zeros(1)             # PEFT has no rank 0
        return Update(layer.lam[kept, None] * layer.Q[kept], layer.P[:, kept], layer.scale,
                      magnitude)
    if method == "dual":
        return Update(*best_factors(layer.delta_weight(), rank))
    A, B = layer.A.detach(), layer.B.detach()
    if method == "hira":
        return Update(A, B)
    if method == "loha":                                            # PEFT has one rank for both
        return Update(*of_rank(A, B, len(layer.C)), layer.scale, C=layer.C.detach(),
                      D=layer.D.detach())
    if layer.A0 is not None:
        A, B = torch.cat((A, layer.A0)), torch.cat((B, -layer.B0), 1)
    if method == "dash":
        A = torch.cat((A, layer.Vt))
        B = torch.cat((B, layer.U * layer.coords / layer.scale), 1)
    return Update(A, B, layer.scale, magnitude)


def of_rank(A: Tensor, B: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Fills A (., in) and B (out, .) up with zeros to rank r, which leaves B A as it is."""
    return F.pad(A, (0, 0, 0, r - len(A))), F.pad(B, (0, r - len(A)))


@torch.no_grad()
def fused(parts: dict[int, Update], layers: list) -> Update:
    """Joins the updates of a module that computes several layers.

    layers: all layers of the module. parts: place among them -> update, if it has one.
    """
    if len(layers) == 1:
        return parts[0]
    first = next(iter(parts.values()))
    sizes = [len(getattr(layer, "base", layer).weight) for layer in layers]
    magnitude = None
    if first.magnitude is not None:
        weights = [getattr(layer, "base", layer).weight.to(first.B.dtype) for layer in layers]
        magnitude = torch.cat([parts[i].magnitude if i in parts else W.norm(dim=1)
                               for i, W in enumerate(weights)])
    own = {i: part.B * (part.scale / first.scale) for i, part in parts.items()}
    update = Update(torch.cat([part.A for part in parts.values()]), block_diagonal(own, sizes),
                    first.scale, magnitude)
    if first.C is None:
        return update
    return update._replace(C=torch.cat([part.C for part in parts.values()]),
                           D=block_diagonal({i: part.D for i, part in parts.items()}, sizes))


def block_diagonal(parts: dict[int, Tensor], sizes: list[int]) -> Tensor:
    """Puts (out, r) matrices on a diagonal. parts: place -> matrix, if there; sizes: each out."""
    widths = [parts[i].shape[1] if i in parts else 0 for i in range(len(sizes))]
    whole = next(iter(parts.values())).new_zeros(sum(sizes), sum(widths))
    for i, part in parts.items():
        row, column = sum(sizes[:i]), sum(widths[:i])
        whole[row:row + sizes[i], column:column + widths[i]] = part
    return whole


def peft_config(model, modules: dict[str, Update], known, whole: list[str],
                base: str | None) -> dict:
    """Makes the contents of adapter_config.json.

    A name of a target must not be that of a head's layer too, as `dense` is.
    """
    r, rank_pattern = pattern_of({name: len(update.A) for name, update in modules.items()})
    alpha, alpha_pattern = pattern_of(alphas(modules))
    names = FAMILIES[model.config.model_type].names
    known = {*known, *(name for name in names if "{}" not in name)}
    writes = isinstance(model, Transformer) and model.label_head is None
    task = "SEQ_CLS" if whole else "CAUSAL_LM" if writes else None
    method = model.injected["method"]
    raw = {"peft_type": MAPPED[method], "task_type": task, "base_model_name_or_path": base,
           "modules_to_save": whole or None, "r": r, "rank_pattern": rank_pattern,
           "target_modules": sorted(targets_for(modules, known)), "inference_mode": True}
    if MAPPED[method] == "LOHA":
        return raw | {"alpha": alpha, "alpha_pattern": alpha_pattern}
    raw |= {"fan_in_fan_out": model.config.model_type == "gpt2"}
    if MAPPED[method] == "HIRA":
        return raw | {"hira_dropout": model.injected["dropout"]}
    has_magnitude = any(update.magnitude is not None for update in modules.values())
    return raw | {"lora_alpha": alpha, "alpha_pattern": alpha_pattern,
                  "lora_dropout": model.injected["dropout"], "use_dora": has_magnitude,
                  "use_rslora": False, "bias": "none"}


# ---- in
def import_peft(model: nn.Module, folder: str | Path, **own) -> nn.Module:
    """Injects a pretrained model with the adapters that PEFT left in `folder`, or on the hub.

    They become LoRA layers, DoRA layers if they have magnitudes, LoHa or HiRA layers. AdaLoRA's
    become LoRA layers too, with lam in A. own: the method's options, to train on with.
    Raises UserError if the config asks for something that is not read here, or if a tensor has no
    place, does not fit or overflows, or if an option would change the update. The model is as it
    was then.
    """
    folder = find_adapters(folder)
    config, modules = read_peft_config(folder), linear_names(model)
    if isinstance(model, SDXL) != (config.path.name == LORA_FILE):
        raise UserError(f"{config.path}: SDXL's adapters are read from {LORA_FILE}, those of other "
                        "models from PEFT's files")
    for name in own.keys() & LoRALinear.options.keys():
        raise UserError(f"{config.path}: brings its own {name}")
    found_in_file, head = read_tensors(folder, config, model)
    updates = {}                                # path of a layer of ours -> Update
    for module, (name, found) in found_in_file.items():
        ours = modules[module]
        sizes = [len(model.get_submodule(layer).weight) for layer in ours]
        update = fitting(found, config, sum(sizes), model.get_submodule(ours[0]).in_features)
        if update is None:
            raise UserError(f"{folder}: the tensors of {module} do not fit the model")
        if (update.magnitude is None) != (config.method != "dora"):
            raise UserError(f"{config.path}: use_dora does not fit the tensors of {module}, which "
                            f"have {'no' if update.magnitude is None else 'a'} "
                            "lora_magnitude_vector")
        config.check_module(name, len(update.A))
        update = update._replace(scale=config.scale(name, len(update.A)), **{
            part: part_by_part(module, getattr(update, part), model.config)
            for part in ("B", "magnitude", "D") if getattr(update, part) is not None})
        for i, layer in enumerate(ours):
            part = update if len(sizes) == 1 else part_of(update, i, sizes)
            updates[layer] = cast(part, model.get_submodule(layer).weight, f"{folder}: {layer}")
    known = [layer for layers in modules.values() for layer in layers]
    before = parts_of(model)
    try:
        whole = fit_head(model, head)
        inject(model, config.method, targets_for(updates, known), one_or_each(ranks(updates)),
               one_or_each(alphas(updates)), config.dropout, whole, **own)
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


def fitting(found: dict[str, Tensor], config: PeftConfig, n_out: int, n_in: int) -> Update | None:
    """Returns the update that the tensors of a module make, or None if a shape does not fit."""
    if config.is_adalora:
        E, kept = found.pop("lora_E"), len(found["lora_A"]) > 0
        if E.shape != (len(found["lora_A"]), 1):
            return None
        found["lora_A"] = found["lora_A"] * E
        if not kept and found["lora_A"].shape == (0, n_in) and found["lora_B"].shape == (n_out, 0):
            found = {"lora_A": E.new_zeros(1, n_in), "lora_B": E.new_zeros(n_out, 1)}
    parts = {part: found[name] for part, name in NAMES[config.kind].items() if name in found}
    r = len(parts["A"])
    right = {"A": (r, n_in), "B": (n_out, r), "C": (r, n_in), "D": (n_out, r),
             "magnitude": (n_out,)}
    fits = r > 0 and all(tensor.shape == right[part] for part, tensor in parts.items())
    return Update(**parts) if fits else None


def part_of(update: Update, i: int, sizes: list[int]) -> Update:
    """Returns the i-th layer's part of a fused module's update. sizes: each layer's out."""
    A, B, scale, magnitude, C, D = (
        value.split(sizes)[i] if part in ("B", "magnitude", "D") and value is not None else value
        for part, value in update._asdict().items())
    if C is None and bool(update.B.any()):
        A, B = used(A, B)
    return Update(A, B, scale, magnitude, C, D)


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
    """Returns each rank as inject() takes it: LoHa's is of both products together."""
    return {name: len(update.A) * (1 if update.C is None else 2)
            for name, update in updates.items()}


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
