"""Reads PEFT's adapter files into our adapter layers, and writes our layers for PEFT.

A folder holds adapter_config.json and adapter_model.safetensors. The tensors are named by the
module that they adapt in the Hugging Face model:
    base_model.model.<module>.lora_A.weight                 (r, in)
    base_model.model.<module>.lora_B.weight                 (out, r)
    base_model.model.<module>.lora_magnitude_vector         (out,)      DoRA
    base_model.model.<module>.lora_E                        (r, 1)      AdaLoRA, all without .weight
An update is lora_alpha / r * B A, with use_rslora lora_alpha / sqrt(r) * B A.

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
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Iterable, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from formats.huggingface import FAMILIES, few_names, map_names, stored_in
from formats.json_files import read_json
from methods import adapters, inject
from support.errors import UserError, refuse_not_finite
from support.files import atomic_write

READ = {"peft_type", "lora_alpha", "alpha_pattern", "lora_dropout", "use_dora", "use_rslora",
        "bias", "init_lora_weights", "init_r"}
# Keys that need not be read: the tensors say the same, or the key only led to them.
HARMLESS = {"r", "rank_pattern", "target_modules", "exclude_modules", "layers_to_transform",
            "layers_pattern", "fan_in_fan_out", "task_type", "base_model_name_or_path", "revision",
            "inference_mode", "auto_mapping", "peft_version", "megatron_core", "loftq_config",
            "eva_config", "corda_config", "lora_ga_config", "runtime_config", "qalora_group_size",
            "ensure_weight_tying", "ephemeral_gpu_offload", "target_r", "tinit", "tfinal",
            "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"}


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
    if config.get("whole"):
        raise UserError(f"{folder}: the whole modules {few_names(config['whole'])} have no place "
                        "in PEFT's adapters here")
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
    errors, modules, tensors, known = {}, {}, {}, modules_of(model)
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
            modules[theirs] = fused(parts, [model.get_submodule(path) for path in ours])
    strange = set(layers) - {path for ours in known.values() for path in ours}
    if strange:
        raise UserError(f"{folder}: no module of PEFT's for {few_names(strange)}")
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
        path.write_text(json.dumps(peft_config(model, modules, known, base), indent=2) + "\n",
                        encoding="utf-8")
    return errors


def modules_of(model) -> dict[str, list[str]]:
    """Maps each of PEFT's modules to the paths of our layers that it computes."""
    linear = {name for name, module in model.named_modules()
              if isinstance(module, nn.Linear) or hasattr(module, "base")}
    full = map_names(model.config, {f"{name}.weight" for name in linear})
    return {theirs.removesuffix(".weight"): [name.removesuffix(".weight") for name in ours]
            for theirs, ours in full.items() if theirs != "lm_head.weight"}


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


def peft_config(model, modules: dict[str, Update], known, base: str | None) -> dict:
    """Makes the contents of adapter_config.json."""
    r, rank_pattern = pattern_of(ranks(modules))
    alpha, alpha_pattern = pattern_of(alphas(modules))
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
            "r": r, "lora_alpha": alpha,
            "rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern,
            "lora_dropout": model.injected["dropout"],
            "target_modules": sorted(targets_for(modules, known)),
            "use_dora": model.injected["method"] == "dora", "use_rslora": False, "bias": "none",
            "fan_in_fan_out": model.config.is_gpt2, "inference_mode": True}


# ---- in
def import_peft(model: nn.Module, folder: str | Path, **own) -> nn.Module:
    """Injects a pretrained model with the adapters that PEFT left in `folder`.

    They become LoRA layers, or DoRA layers if they have magnitudes. AdaLoRA's become LoRA layers
    too, with lam in A. own: the method's options, to train on with.
    Raises UserError if the config asks for something that is not read here, or if a tensor has no
    place, does not fit or overflows. The model is as it was then.
    """
    raw, path = read_peft_config(folder), Path(folder) / "adapter_config.json"
    method, modules = peft_method(raw), modules_of(model)
    updates = {}                                # path of a layer of ours -> Update
    for module, found in read_tensors(Path(folder), model, modules).items():
        ours = modules[module]
        sizes = [len(model.get_submodule(layer).weight) for layer in ours]
        A, B, magnitude = fitting(found, sum(sizes), model.get_submodule(ours[0]).in_features)
        if A is None or (magnitude is None) != (method != "dora"):
            raise UserError(f"{folder}: the tensors of {module} do not fit its config or the model")
        scale, split = scale_of(raw, path, module, len(A)), len(sizes) > 1 and bool(B.any())
        magnitudes = [None] * len(sizes) if magnitude is None else magnitude.split(sizes)
        for layer, part, lengths in zip(ours, B.split(sizes), magnitudes):
            update = Update(*(used(A, part) if split else (A, part)), scale, lengths)
            updates[layer] = cast(update, model.get_submodule(layer).weight, f"{folder}: {layer}")
    known = [layer for layers in modules.values() for layer in layers]
    dropout = number(raw, path, "lora_dropout", 0)
    try:
        inject(model, method, targets_for(updates, known), one_or_each(ranks(updates)),
               one_or_each(alphas(updates)), dropout, **own)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    with torch.no_grad():
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


def targets_for(paths: Iterable[str], known: Iterable[str]) -> set[str]:
    """Shortens `paths` to their last parts, unless these name other known paths too."""
    paths = set(paths)
    leaves = {path.rpartition(".")[2] for path in paths}
    return leaves if {p for p in known if p.rpartition(".")[2] in leaves} == paths else paths


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


def read_peft_config(folder: str | Path) -> dict:
    """Reads adapter_config.json. Raises UserError, which names the key, if one is not read here."""
    path = Path(folder) / "adapter_config.json"
    raw = read_json(path)
    if raw.get("peft_type") not in ("LORA", "ADALORA"):
        raise UserError(f"{path}: peft_type {raw.get('peft_type')!r} is not read, only LORA and "
                        f"ADALORA")
    for name, value in raw.items():
        if name not in READ | HARMLESS and value not in (None, False, [], {}):
            raise UserError(f"{path}: {name} {str(value)[:60]!r} is not supported")
    if raw.get("bias", "none") != "none":
        raise UserError(f"{path}: bias {str(raw['bias'])[:60]!r}: no method here trains a bias")
    if raw.get("init_lora_weights") not in (None, True, False, "gaussian", "orthogonal", "eva"):
        raise UserError(f"{path}: init_lora_weights {str(raw['init_lora_weights'])[:60]!r} changes "
                        f"the base model; PEFT can convert it to a plain LoRA")
    return raw


def peft_method(raw: dict) -> str:
    return "dora" if raw.get("use_dora") else "lora"


def number(raw: dict, path: Path, name: str, default: float | None = None) -> float:
    """Returns raw[name]. Raises UserError if it is not a number from 0 on."""
    value = raw.get(name, default)
    if type(value) not in (int, float) or not 0 <= value < 1e9:
        raise UserError(f"{path}: {name} must be a number from 0 on, found {str(value)[:60]!r}")
    return value


def scale_of(raw: dict, path: Path, module: str, r: int) -> float:
    """Finds the factor by which PEFT multiplies B A."""
    alpha, patterns = number(raw, path, "lora_alpha", 8), raw.get("alpha_pattern") or {}
    if raw["peft_type"] == "ADALORA":           # which knows no patterns
        r = number(raw, path, "init_r", 12)
        return (alpha or r) / (r + 1e-5)
    if not isinstance(patterns, dict) or not all(re.fullmatch(r"[\w.]+", key) for key in patterns):
        raise UserError(f"{path}: alpha_pattern must name modules; of regular expressions only the "
                        f"dot is read")
    for key in patterns:
        if re.fullmatch(rf"(.*\.)?{key}", module):          # as PEFT: a dot is any character
            alpha = number(patterns, path, key)
            break
    return alpha / (math.sqrt(r) if raw.get("use_rslora") else r)


def read_tensors(folder: Path, model, modules) -> dict[str, dict[str, Tensor]]:
    """Reads all tensors: module -> lora_A, lora_B, ... -> tensor.

    Raises UserError if a name is unknown or not read here.
    """
    names = ("adapter_model.safetensors", "adapter_model.bin")
    file = next((folder / name for name in names if (folder / name).exists()), None)
    if file is None:
        raise UserError(f"{folder}: holds neither {' nor '.join(names)}")
    found: dict = defaultdict(dict)
    prefix = FAMILIES[model.config.model_type].prefix
    for stored in stored_in(file):
        parts = re.fullmatch(r"base_model\.model\.(.+)\.(lora_[ABE]|lora_magnitude_vector)"
                             r"(\.weight)?", stored.name)
        module = parts and prefix * (not parts[1].startswith(prefix)) + parts[1]
        if module not in modules or stored.dtype is None:
            raise UserError(f"{file}: {stored.name[:200]}: only the linear layers of attention and "
                            f"MLP can have adapters here, of plain numbers")
        found[module][parts[2]] = stored.read()
    for module, tensors in found.items():
        missing = {"lora_A", "lora_B"} - set(tensors)
        if missing or any(t.dim() != 2 for name, t in tensors.items() if "magn" not in name):
            raise UserError(f"{file}: {module} has no {few_names(missing) or 'matrices'}")
    if not found:
        raise UserError(f"{file}: holds no adapters")
    return found
