"""Reads how a config.json stretches rotary positions to longer texts, and does so.

Plain RoPE turns pair i of a head's D coordinates by theta^(-2i/D) per token (model.py). A model
for longer texts than those it was pretrained on turns some pairs more slowly. rope_type says how:
    linear    every speed / factor (Chen et al. 2023, arXiv 2306.15595)
    llama3    slow pairs / factor, fast ones as before (apply_scaling in meta-llama/llama-models)
    yarn      as llama3 with other bounds, and q and k are multiplied by attention_factor (Peng et
              al. 2023, 2309.00071)
    dynamic   plain up to max_position_embeddings, slower in longer texts
    longrope  pair i / short_factor[i], and q and k as in yarn (Ding et al. 2024, 2402.13753);
              texts beyond original_max_position_embeddings take long_factor instead
The last two depend on the text's length. Here positions end where they would begin to change.
The formulas and defaults are those of transformers 5 (modeling_rope_utils.py).
"""
import math

import torch
from torch import Tensor

from formats.json_files import read_value
from support.errors import UserError

OLD = "original_max_position_embeddings"        # longest text of the pretraining, in tokens
TYPES = {                                       # rope_type: its options
    "default": [], "linear": ["factor"], "dynamic": ["factor"],
    "llama3": ["factor", OLD, "low_freq_factor", "high_freq_factor"],
    "yarn": ["factor", OLD, "attention_factor", "beta_fast", "beta_slow", "truncate"],
    "longrope": ["factor", OLD, "attention_factor", "short_factor", "long_factor"],
}
# An option that belongs to another rope_type is ignored, and so is "finetuned".
KNOWN = {"rope_theta", "mscale", "mscale_all_dim", "finetuned", *sum(TYPES.values(), [])}


def parse_rope(raw: dict, head_dim: int) -> tuple[float, dict | None]:
    """Reads the rotary positions -> theta, and None or rope_type with all of its options.

    Before transformers 5 rope_theta stood beside rope_scaling: null, or a dict with "rope_type"
    (in older files "type"). Since then a dict rope_parameters holds rope_theta too.
    Raises UserError if the type is another, or an option is missing, unknown or absurd.
    """
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise UserError(f"rope_scaling must be null or an object, found {str(rope)[:200]}")
    rope = {"rope_theta": raw.get("rope_theta", 10000.0)} | rope
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    if rope.get("partial_rotary_factor") == 1:          # all of each head is rotated, as here
        del rope["partial_rotary_factor"]
    odd = ", ".join(sorted(set(rope) - KNOWN))
    if kind not in list(TYPES) or odd:
        raise UserError(f"rope of type {str(kind)[:200]!r}{' with ' * bool(odd)}{odd[:200]} is not "
                        f"supported, only {', '.join(TYPES)}")
    theta = read_value(rope, "rope_theta", "scale")
    if kind == "default":
        return float(theta), None
    rope = {OLD: raw["max_position_embeddings"]} | rope
    if OLD in raw:
        rope[OLD] = raw[OLD]
    if kind in ("yarn", "longrope"):
        fill_in(rope, kind, theta, raw["max_position_embeddings"])
    scaling = {"rope_type": kind}
    for key in TYPES[kind]:
        if key in ("short_factor", "long_factor"):      # a number for each pair
            each = rope.get(key)
            if not isinstance(each, list) or len(each) != head_dim // 2:
                raise UserError(f"{key} must be a list of {head_dim // 2} numbers")
            scaling[key] = [read_value({key: one}, key, "scale") for one in each]
        else:
            what = {OLD: "size", "truncate": "flag"}.get(key, "scale")
            scaling[key] = read_value(rope, key, what)
    if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise UserError("low_freq_factor must be below high_freq_factor")
    return float(theta), scaling


def fill_in(rope: dict, kind: str, theta: float, positions: int) -> None:
    """Fills in the options of yarn or longrope that the file leaves out.

    attention_factor is 0.1 ln(factor) + 1 for YaRN (section 3.4 of its paper), and
    sqrt(1 + ln(factor) / ln(original_max_position_embeddings)) for LongRoPE.
    Raises UserError if the logarithms have no value.
    """
    old = read_value(rope, OLD, "size")
    if theta <= 1 or old == 1:
        raise UserError(f"rope of type {kind} needs rope_theta and {OLD} above 1")
    if rope.get("factor") is None:
        rope["factor"] = positions / old
    for key, usual in {"beta_fast": 32, "beta_slow": 1}.items():
        rope[key] = rope.get(key) or usual
    rope.setdefault("truncate", True)
    if rope.get("attention_factor") is None:
        log = max(math.log(read_value(rope, "factor", "scale")), 0)
        one, other = rope.get("mscale"), rope.get("mscale_all_dim")
        if kind == "longrope":
            rope["attention_factor"] = math.sqrt(1 + log / math.log(old))
        elif one and other:                             # DeepSeek's
            one, other = (read_value(rope, key, "scale") for key in ("mscale", "mscale_all_dim"))
            rope["attention_factor"] = (0.1 * one * log + 1) / (0.1 * other * log + 1)
        else:
            rope["attention_factor"] = 0.1 * log + 1


def scale_speeds(speed: Tensor, theta: float, scaling: dict | None) -> Tensor:
    """Slows the speeds (D / 2,) of plain RoPE, in radians per token, as `scaling` says.

    llama3 and yarn keep the share k of each speed: speed * (k + (1 - k) / factor).
    """
    s = scaling or {"rope_type": "default"}
    if s["rope_type"] in ("default", "dynamic"):
        return speed
    if s["rope_type"] == "linear":
        return speed / s["factor"]
    if s["rope_type"] == "longrope":
        return speed / torch.tensor(s["short_factor"], device=speed.device)
    keep = share_by_turns(speed, s) if s["rope_type"] == "llama3" else share_by_place(
        2 * len(speed), theta, s).to(speed.device)
    return speed * (keep + (1 - keep) / s["factor"])


def share_by_turns(speed: Tensor, s: dict) -> Tensor:
    """Computes LLaMA-3.1's share: 0 for a pair that turns low_freq_factor times in the old context.

    It is 1 from high_freq_factor turns on, and grows linearly with the turns between.
    """
    low, high = s["low_freq_factor"], s["high_freq_factor"]
    turns = s[OLD] * speed / (2 * math.pi)
    return ((turns - low) / (high - low)).clamp(0, 1)


def share_by_place(D: int, theta: float, s: dict) -> Tensor:
    """Computes YaRN's share: 1 for a pair that turns beta_fast times in the old context.

    It is 0 from beta_slow turns down, and falls linearly with the pair's number i between. Pair i
    turns b times if i = D ln(old context / 2 pi b) / (2 ln theta); `truncate` rounds both ends.
    """
    first, last = (D * math.log(s[OLD] / (2 * math.pi * b)) / (2 * math.log(theta))
                   for b in (s["beta_fast"], s["beta_slow"]))
    if s["truncate"]:
        first, last = float(math.floor(first)), float(math.ceil(last))
    first, last = max(first, 0.0), min(last, D - 1.0)
    i = torch.arange(D // 2).float()
    return 1 - ((i - first) / ((last - first) or 0.001)).clamp(0, 1)
