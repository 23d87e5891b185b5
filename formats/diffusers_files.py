"""Knows the file of a UNet's adapters that diffusers writes: pytorch_lora_weights.safetensors.

Its tensors are named in one of two dialects, by the layer that they adapt:
    unet.<layer>.lora_A.weight (r, in)      unet.<layer>.lora_B.weight (out, r)
    unet.<layer>.lora.down.weight           unet.<layer>.lora.up.weight             the older one
    unet.<layer>.lora_magnitude_vector (out,)                                       DoRA
The header may hold PEFT's config. Without it each layer's rank is its tensors' and the update B A.
We write no header, and the scale goes into B: other programs read no header, nor does diffusers'
unet.load_lora_adapter(FILE) unless it is told use_safetensors=True (0.42).
"""
import json
import re
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from formats.tensors import Stored, stored_in
from support.errors import UserError

LORA_FILE = "pytorch_lora_weights.safetensors"
CONFIG_KEY = "lora_adapter_metadata"
PARTS = {"lora_A.weight": "lora_A", "lora.down.weight": "lora_A",
         "lora_B.weight": "lora_B", "lora.up.weight": "lora_B",
         "lora_magnitude_vector": "lora_magnitude_vector",
         "lora_magnitude_vector.weight": "lora_magnitude_vector"}


def read_config(file: Path) -> dict | None:
    """Returns PEFT's config from the file's header, or None if there is none."""
    stored_in(file)                             # refuses what is no such file
    with safe_open(file, "pt") as opened:
        raw = (opened.metadata() or {}).get(CONFIG_KEY)
    if raw is None:
        return None
    try:
        config = json.loads(raw)
        return {name.removeprefix("unet."): value for name, value in config.items()
                if name.startswith("unet.")}
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: {CONFIG_KEY} in its header is no JSON object: {error}") from None


def read_layers(file: Path) -> dict[str, dict[str, Stored]]:
    """Lists the adapters: layer of the UNet -> lora_A, lora_B, lora_magnitude_vector -> tensor.

    Raises UserError if a tensor has another name, or two have one's.
    """
    found: dict[str, dict[str, Stored]] = {}
    for stored in stored_in(file):
        name = re.fullmatch(rf"unet\.(.+?)\.({'|'.join(map(re.escape, PARTS))})", stored.name)
        if name is None:
            raise UserError(f"{file}: {stored.name:.200}: only a UNet's adapters are read, as "
                            "unet.<layer>.lora_A.weight or unet.<layer>.lora.down.weight")
        layer, part = found.setdefault(name[1], {}), PARTS[name[2]]
        if part in layer:
            raise UserError(f"{file}: {layer[part].name} and {stored.name} are one tensor's names")
        layer[part] = stored
    return found


def to_tensors(updates: dict) -> dict[str, Tensor]:
    """Names the tensors of the updates, layer -> peft.Update, as the newer dialect does."""
    tensors = {}
    for layer, update in updates.items():
        tensors |= {f"unet.{layer}.lora_A.weight": update.A,
                    f"unet.{layer}.lora_B.weight": update.scale * update.B}
        if update.magnitude is not None:
            tensors[f"unet.{layer}.lora_magnitude_vector"] = update.magnitude
    return tensors
