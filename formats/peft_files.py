"""Reads the two files of PEFT's adapters: adapter_config.json, and the tensors.

PEFT skips tensors whose names it does not expect, in silence. Here such a tensor is an error, which
says why.
"""
import math
import re
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import regex
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from formats.bpe import MOST_REPEATS, count_repeats
from formats.checkpoint import find_folder, linear_names
from formats.decoders import Family
from formats.diffusers_files import LORA_FILE, read_config, read_layers
from formats.huggingface import FAMILIES, map_names, to_file
from formats.json_files import read_json
from formats.peft_heads import SEQ_CLS, head_names
from formats.tensors import DTYPES, Stored, few_names, stored_in
from support.errors import UserError, refuse_not_finite
from support.targets import ends_in

CONFIG, TENSORS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
READ = {"peft_type", "r", "rank_pattern", "lora_alpha", "alpha_pattern", "lora_dropout", "use_dora",
        "use_rslora", "bias", "init_lora_weights", "init_r", "target_modules", "exclude_modules",
        "layers_to_transform", "modules_to_save", "alpha", "hira_dropout", "init_weights"}
# Keys that need not be read: the tensors say the same, or the key only led to them.
HARMLESS = {"layers_pattern", "fan_in_fan_out", "task_type",
            "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version",
            "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
            "runtime_config", "qalora_group_size", "ensure_weight_tying", "ephemeral_gpu_offload",
            "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight",
            "total_step"}
# What may follow a tensor's kind in its name. PEFT loads adapters under the name `default`.
ENDINGS = {"LORA": {**dict.fromkeys(["lora_A", "lora_B"], [".weight", ".default.weight"]),
                    "lora_magnitude_vector": ["", ".weight", ".default.weight"]},
           "ADALORA": dict.fromkeys(["lora_A", "lora_B", "lora_E"], ["", ".default"]),
           "LOHA": dict.fromkeys(["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"],
                                 ["", ".default"]),
           "HIRA": dict.fromkeys(["hira_A", "hira_B"], ["", ".default"])}
KINDS = "|".join({kind: None for kinds in ENDINGS.values() for kind in kinds})
OPTIONAL = "lora_magnitude_vector"
# A config's rank, alpha and dropout, each with PEFT's default.
NUMBERS = {"LORA": (("r", 8), ("lora_alpha", 8), ("lora_dropout", 0)),
           "ADALORA": (("init_r", 12), ("lora_alpha", 8), ("lora_dropout", 0)),
           "LOHA": (("r", 8), ("alpha", 8), None), "HIRA": (("r", 32), None, ("hira_dropout", 0))}
# Programs that hold a model in another module put these into the names.
WRAPPERS = {"_orig_mod": "torch.compile", "module": "DistributedDataParallel",
            "_fsdp_wrapped_module": "FSDP", "_checkpoint_wrapped_module": "checkpointing"}


class Found(NamedTuple):
    """Holds the tensors that adapt one module, and the name of the module in their names."""
    name: str
    tensors: dict[str, Tensor]          # lora_A, lora_B, ... -> tensor


@dataclass
class PeftConfig:
    """Holds the contents of an adapter_config.json. Each method names the file in its errors."""
    path: Path
    raw: dict
    seconds: float = 8.0                # how long regular expressions may still take

    @property
    def kind(self) -> str:
        """Returns LORA, LOHA or HIRA; AdaLoRA's adapters are read as LoRA's."""
        return "LORA" if self.is_adalora else self.raw["peft_type"]

    @property
    def method(self) -> str:
        return "dora" if self.raw.get("use_dora") else self.kind.lower()

    @property
    def is_adalora(self) -> bool:
        return self.raw["peft_type"] == "ADALORA"

    @property
    def dropout(self) -> float:
        name = NUMBERS[self.raw["peft_type"]][2]
        return self.number(*name) if name else 0.0

    def number(self, name: str, default: float, key: str | None = None) -> float:
        """Returns the number under a name, or under a key of the object there, or else default.

        Raises UserError if it is not from 0 on.
        """
        raw = self.raw if key is None else self.raw[name]
        value = raw.get(name if key is None else key, default)
        if type(value) not in (int, float) or not 0 <= value < 1e9:
            raise UserError(f"{self.path}: {name} must be a number from 0 on, found {shown(value)}")
        return value

    def number_of(self, module: str, name: str, default: float, pattern: str) -> float:
        """Returns the number of the first key of `pattern` that names the module, else `name`'s."""
        patterns = self.raw.get(pattern) or {}
        if not isinstance(patterns, dict):
            raise UserError(f"{self.path}: {pattern} must be an object, found {shown(patterns)}")
        for key in patterns:
            if self.matches(rf"(.*\.)?({key})", module, pattern):
                return self.number(pattern, default, key)
        return self.number(name, default)

    def matches(self, pattern: str, text: str, option: str) -> bool:
        """Says whether a regular expression matches all of a text, as in PEFT, which uses `re`.

        Raises UserError if the expression is wrong, or takes more than 2 seconds for this text, or
        all expressions more than 8.
        """
        try:
            began = time.monotonic()
            found = compiled(pattern).fullmatch(text, timeout=max(0.001, min(2, self.seconds)))
            self.seconds -= time.monotonic() - began
            return found is not None
        except (re.error, regex.error, TimeoutError, RecursionError, OverflowError,
                ValueError) as error:
            reason = "takes too long" if isinstance(error, TimeoutError) else error
            raise UserError(f"{self.path}: {option}: regular expression {pattern!r:.80}: {reason}"
                            ) from None

    def names(self, option: str, module: str) -> bool:
        """Says whether target_modules or exclude_modules names the module: a list, or a pattern."""
        value = self.raw.get(option)
        if isinstance(value, str):
            return self.matches(value, module, option)
        return ends_in(module, self.words(option))

    def words(self, option: str) -> list[str]:
        """Returns a list of names, empty for null."""
        value = self.raw.get(option) or []
        if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
            raise UserError(f"{self.path}: {option} must be a list of names, found {shown(value)}")
        return value

    def check_module(self, module: str, r: int) -> None:
        """Raises UserError if PEFT would make no adapter for the module, or one of other rank."""
        where = f"{self.path}: PEFT would ignore the tensors of {module}, which is"
        targets, layers = self.raw.get("target_modules"), self.raw.get("layers_to_transform")
        if self.names("exclude_modules", module):
            raise UserError(f"{where} among the exclude_modules")
        if any(f".{name}." in f".{module}." for name in self.words("modules_to_save")):
            raise UserError(f"{where} among the modules_to_save")
        if targets is None:
            raise UserError(f"{self.path}: target_modules must name the adapted modules")
        if not (isinstance(targets, str) and targets.lower() == "all-linear") and (
                not self.names("target_modules", module)):
            raise UserError(f"{where} not among the target_modules")
        layers = layers if isinstance(layers, list) else [layers]
        number = re.search(r"\.(\d+)\.", f".{module}")
        if module not in targets and layers not in ([], [None]) and not (
                number and int(number[1]) in layers):
            raise UserError(f"{where} not among the layers_to_transform")
        if self.is_adalora:                     # its rank_pattern tells what was pruned
            rank = r if self.raw.get("rank_pattern") else self.number("init_r", 12)
        elif self.kind == "HIRA":               # which ignores its rank_pattern in PEFT 0.21
            rank = self.number("r", 32)
        else:
            rank = self.number_of(module, *NUMBERS[self.kind][0], "rank_pattern")
        if r != rank:
            raise UserError(f"{self.path}: PEFT would refuse the tensors of {module}: their rank is"
                            f" {r}, the config's {rank}")

    def scale(self, module: str, r: int) -> float:
        """Finds the factor by which PEFT multiplies the update."""
        if self.is_adalora:                     # which knows no patterns
            r, alpha = self.number("init_r", 12), self.number("lora_alpha", 8)
            return (alpha or r) / (r + 1e-5)
        if NUMBERS[self.kind][1] is None:
            return 1.0
        alpha = self.number_of(module, *NUMBERS[self.kind][1], "alpha_pattern")
        return alpha / (math.sqrt(r) if self.raw.get("use_rslora") else r)


class InferredConfig(PeftConfig):
    """Stands for the config of a file that has none: the tensors tell all, and each scale is 1."""

    def check_module(self, module: str, r: int) -> None:
        """Accepts every module: no config excludes it."""

    def scale(self, module: str, r: int) -> float:
        return 1.0


@cache
def compiled(pattern: str) -> regex.Pattern:
    """Compiles a regular expression that `re` knows.

    `regex` has a timeout, which `re` lacks. It unrolls counted repeats when it compiles, so these
    are limited.
    """
    re.compile(pattern)
    if count_repeats(pattern) > MOST_REPEATS:
        raise OverflowError("repeats too often")
    return regex.compile(pattern)


def find_adapters(folder_or_repo: str | Path) -> Path:
    """Finds the folder of the adapters, or fetches owner/name from the hub, as find_folder()."""
    try:
        return find_folder(folder_or_repo, [CONFIG, LORA_FILE], TENSORS)
    except UserError as error:
        raise UserError(f"no {CONFIG}: {error}") from None


def read_peft_config(folder: Path) -> PeftConfig:
    """Reads adapter_config.json, or what the header of diffusers' file says in its place.

    Raises UserError, which names the key, if one is not read here.
    """
    path = folder / CONFIG
    if not path.exists() and (folder / LORA_FILE).exists():
        path = folder / LORA_FILE
        raw = read_config(path)
        if raw is None:
            has_magnitude = any(len(layer) > 2 for layer in read_layers(path).values())
            return InferredConfig(path, {"peft_type": "LORA", "use_dora": has_magnitude})
    else:
        raw = read_json(path)
    if raw.get("peft_type") not in list(ENDINGS):
        raise UserError(f"{path}: peft_type {shown(raw.get('peft_type'))} is not read, only "
                        + ", ".join(ENDINGS))
    for name, value in raw.items():
        if name not in READ | HARMLESS and value not in (None, False, [], {}):
            raise UserError(f"{path}: {name} {shown(value)} is not supported")
    if raw.get("bias", "none") != "none":
        raise UserError(f"{path}: bias {shown(raw['bias'])}: no method here trains a bias")
    if raw.get("init_lora_weights") not in (None, True, False, "gaussian", "orthogonal", "eva"):
        raise UserError(f"{path}: init_lora_weights {shown(raw['init_lora_weights'])} may change "
                        "the base model; PEFT can convert it to a plain LoRA")
    return PeftConfig(path, raw)


def shown(value) -> str:
    """Writes a value of a JSON file for an error; a container may be nested too deeply for that."""
    return f"a {type(value).__name__}" if isinstance(value, (dict, list)) else f"{value!r:.60}"


def read_tensors(folder: Path, config: PeftConfig,
                 model: nn.Module) -> tuple[dict[str, Found], dict[str, Tensor]]:
    """Reads all tensors -> those of each module of linear_names(), and those of a head for labels.

    The head's tensors have our names. A copy of a weight of the model itself is skipped, if it is
    equal: PEFT saves the embedding so. Raises UserError if PEFT would ignore a tensor or load it
    over the model's, if two adapt one module, or if one has no place here.
    """
    if config.path.name == LORA_FILE:
        return read_lora(config, model), {}
    file = next((folder / name for name in TENSORS if (folder / name).exists()), None)
    if file is None:
        raise UserError(f"{folder}: holds neither {' nor '.join(TENSORS)}")
    known, family = linear_names(model), FAMILIES[model.config.model_type]
    of_head, head = head_names(family), {}
    found: dict[str, Found] = {}
    names: dict[tuple, str] = {}
    copies = []
    for stored in stored_in(file):
        parts = re.fullmatch(rf"base_model\.model\.(.+)\.({KINDS})((?:\.[^.]+){{0,2}})",
                             stored.name)
        if parts is None and not re.search(r"lora_|hada_|hira_", stored.name):
            name = plain_name(stored.name, family)
            if name in of_head:
                if of_head[name] in head:
                    raise UserError(f"{file}: {stored.name} and another are one tensor's names")
                head[of_head[name]] = numbers(stored)
            else:
                refuse_changed(stored, name, model)
            copies += [name.rpartition(".")[0], name.rpartition(".")[0].rpartition(".")[0]]
            continue
        refuse_ignored(stored, config)
        module = parts and family.full_name(parts[1])
        if module not in known:
            raise UserError(f"{file}: {stored.name:.200}: only the linear layers of attention and "
                            f"MLP can have adapters here")
        if (module, parts[2]) in names:
            raise UserError(f"{file}: {names[module, parts[2]]} and {stored.name} are one tensor's "
                            "names")
        names[module, parts[2]] = stored.name
        found.setdefault(module, Found(parts[1], {})).tensors[parts[2]] = numbers(stored)
    check_complete(file, config, found)
    lost = {name for name in config.words("modules_to_save")
            if not any(ends_in(copy, [name]) for copy in copies)}
    if config.raw.get("task_type") == "SEQ_CLS" and not lost >= SEQ_CLS:
        lost -= SEQ_CLS                   # PEFT names both, and a model has one
    if lost:
        raise UserError(f"{file}: has no tensors of {config.path.name}'s modules_to_save "
                        f"{few_names(lost)}")
    return found, head


def read_lora(config: PeftConfig, model: nn.Module) -> dict[str, Found]:
    """Reads the tensors of diffusers' file, for the modules of linear_names().

    Raises UserError if the model has no such module, or a tensor is missing.
    """
    file, known = config.path, linear_names(model)
    found = {}
    for module, tensors in read_layers(file).items():
        if module not in known:
            raise UserError(f"{file}: the model has no linear layer {module:.200}")
        found[module] = Found(module, {part: numbers(stored) for part, stored in tensors.items()})
    check_complete(file, config, found)
    return found


def check_complete(file: Path, config: PeftConfig, found: dict[str, Found]) -> None:
    """Raises UserError if there is no adapter, or one lacks a matrix."""
    for module, (_, tensors) in found.items():
        missing = ENDINGS[config.raw["peft_type"]].keys() - {OPTIONAL} - set(tensors)
        if missing or any(t.dim() != 2 for name, t in tensors.items() if "magn" not in name):
            raise UserError(f"{file}: {module} has no {few_names(missing) or 'matrices'}")
    if not found:
        raise UserError(f"{file}: holds no adapters")


def plain_name(name: str, family: Family) -> str:
    """Turns the name of a whole tensor in a file of PEFT into the one that a checkpoint has."""
    name = re.sub(r"\.(base_layer|original_module|modules_to_save(\.default)?)(?=\.)", "",
                  name.removeprefix("base_model.model."))
    return family.full_name(name)


def refuse_ignored(stored: Stored, config: PeftConfig) -> None:
    """Raises UserError if the name is one that PEFT's loading ignores."""
    where = f"{stored.path}: PEFT would ignore {stored.name:.200}"
    for part in stored.name.split("."):
        if part in WRAPPERS:
            raise UserError(f"{where}, a name from within {WRAPPERS[part]}: take `{part}.` out of "
                            "the names")
    if not stored.name.startswith("base_model.model."):
        raise UserError(f"{where}, which does not begin with base_model.model.")
    kind, ending = re.fullmatch(r".*?((?:lora|hada|hira)_\w*)(.*)", stored.name, re.DOTALL).groups()
    kinds = ENDINGS[config.raw["peft_type"]]
    if kind not in kinds:
        raise UserError(f"{stored.path}: {stored.name:.200}: {kind} is not read in an adapter of "
                        f"peft_type {config.raw['peft_type']}")
    if ending not in kinds[kind]:
        raise UserError(f"{where}: its name must end in {kind}{kinds[kind][0]}, or in "
                        f"{kind}{kinds[kind][-1]}")


def numbers(stored: Stored) -> Tensor:
    """Reads a tensor as float32, or float64 if it is that. Whole numbers count, as in PEFT.

    Raises UserError, which names it, if it is not of real numbers, or holds NaN or infinity.
    """
    try:
        tensor = stored.values()
        if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_complex():
            raise UserError(f"{stored.path}: {stored.name} is not of plain numbers")
        tensor = tensor if tensor.dtype == torch.float64 else tensor.float()
    except (RuntimeError, SafetensorError, AttributeError, TypeError) as error:     # odd dtypes
        raise UserError(f"{stored.path}: {stored.name} is not of plain numbers: "
                        f"{str(error)[:200]}") from None
    refuse_not_finite(tensor, f"{stored.path}: {stored.name}")
    return tensor


def refuse_changed(stored: Stored, name: str, model) -> None:
    """Raises UserError unless a tensor equals the model's weight of that name, in a precision."""
    where, weights = f"{stored.path}: {stored.name:.200}", dict(model.named_parameters())
    plan = map_names(model.config, set(weights))
    if name == "lm_head.weight" and getattr(model.config, "tied", False):
        plan[name] = ["embed.weight"]
    if name not in plan:
        raise UserError(f"{where}: neither an adapter nor a weight of the model")
    ours = torch.cat([weights[own].detach().cpu() for own in plan[name]])
    ours = to_file(name, ours, model.config)
    copy = stored.values() if stored.dtype in DTYPES.values() else None
    if copy is None or copy.shape != ours.shape or not (
            torch.equal(copy, ours.to(copy.dtype)) or torch.equal(copy.to(ours.dtype), ours)):
        raise UserError(f"{where}: not the model's own weight, but a trained or another one, which "
                        "PEFT would put in its place: only adapters and heads for labels are read")
