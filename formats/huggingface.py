"""What a Hugging Face checkpoint looks like: names, config.json, files.

A checkpoint is a folder: config.json tells the shape, *.safetensors (or pytorch_model.bin) hold
named tensors. checkpoint.py reads and writes whole ones, peft.py adapters.
    1. tables    per family: a tensor's name there -> here, a config.json key -> a Config field
    2. config    config.json <-> Config; whatever would be computed otherwise here is refused
    3. files     names, shapes and dtypes, before any tensor is read
"""
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from formats.reading import read_json, read_json_if_there
from model import Config
from support.errors import UserError, refuse_not_finite

# ---- 1. tables. {} is the layer's number; each name has a .weight, and a .bias where it is used

LLAMA = {
    "model.embed_tokens": ["embed"],
    "model.layers.{}.input_layernorm": ["layers.{}.attn_norm"],
    "model.layers.{}.self_attn.q_proj": ["layers.{}.attn.q"],
    "model.layers.{}.self_attn.k_proj": ["layers.{}.attn.k"],
    "model.layers.{}.self_attn.v_proj": ["layers.{}.attn.v"],
    "model.layers.{}.self_attn.o_proj": ["layers.{}.attn.o"],
    "model.layers.{}.self_attn.q_norm": ["layers.{}.attn.q_norm"],          # Qwen3
    "model.layers.{}.self_attn.k_norm": ["layers.{}.attn.k_norm"],          # Qwen3
    "model.layers.{}.post_attention_layernorm": ["layers.{}.mlp_norm"],
    "model.layers.{}.mlp.gate_proj": ["layers.{}.mlp.gate"],
    "model.layers.{}.mlp.up_proj": ["layers.{}.mlp.up"],
    "model.layers.{}.mlp.down_proj": ["layers.{}.mlp.down"],
    "model.norm": ["norm"],
    "lm_head": ["head"],
}
GPT2 = {
    "transformer.wte": ["embed"],
    "transformer.wpe": ["positions"],
    "transformer.h.{}.ln_1": ["layers.{}.attn_norm"],
    "transformer.h.{}.attn.c_attn": ["layers.{}.attn.q", "layers.{}.attn.k", "layers.{}.attn.v"],
    "transformer.h.{}.attn.c_proj": ["layers.{}.attn.o"],
    "transformer.h.{}.ln_2": ["layers.{}.mlp_norm"],
    "transformer.h.{}.mlp.c_fc": ["layers.{}.mlp.up"],
    "transformer.h.{}.mlp.c_proj": ["layers.{}.mlp.down"],
    "transformer.ln_f": ["norm"],
    "lm_head": ["head"],
}
# The tensors that need work:
# - c_attn is one layer that computes q, k and v: its outputs are split among our three Linears.
# - OpenAI's GPT-2 kept its weights (in, out), and transformers' Conv1D still does: transposed.
CONV1D = ("c_attn", "c_proj", "c_fc")
# - Old files carry causal masks and rotary frequencies, which the model computes: left out.
BUFFERS = ("transformer.h.{}.attn.bias", "transformer.h.{}.attn.masked_bias",
           "model.layers.{}.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")

LLAMA_KEYS = {                                  # Config field: key in config.json
    "vocab_size": "vocab_size", "d_model": "hidden_size", "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads", "n_kv_heads": "num_key_value_heads", "head_dim": "head_dim",
    "d_ff": "intermediate_size", "max_positions": "max_position_embeddings",
    "norm_eps": "rms_norm_eps", "qkv_bias": "attention_bias", "mlp_bias": "mlp_bias",
}
GPT2_KEYS = LLAMA_KEYS | {
    "d_model": "n_embd", "n_layers": "n_layer", "n_heads": "n_head", "n_kv_heads": "n_head",
    "d_ff": "n_inner", "max_positions": "n_positions", "norm_eps": "layer_norm_epsilon",
}
# Options that change the result, and the values that mean what model.py computes.
APPLIED = {"hidden_act": ["silu"], "activation_function": ["gelu_new", "gelu_pytorch_tanh"],
           "scale_attn_weights": [True], "scale_attn_by_inverse_layer_idx": [False],
           "add_cross_attention": [False], "partial_rotary_factor": [1],
           "quantization_config": []}


@dataclass
class Family:
    architecture: str                   # transformers' class
    prefix: str                         # left out where a model was saved without its head
    names: dict[str, list[str]]         # tensors
    keys: dict[str, str]                # of config.json
    defaults: dict                      # what transformers assumes for a key that is absent
    fixed: dict                         # what its code decides, whatever the file says


def llama_like(architecture: str, defaults: dict, fixed: dict) -> Family:
    common = {"head_dim": None, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
              "attention_bias": False, "mlp_bias": False, "bos_token_id": None,
              "eos_token_id": None, "pad_token_id": None}
    return Family(architecture, "model.", LLAMA, LLAMA_KEYS, common | defaults, fixed)


FAMILIES = {                            # by config.json's model_type
    "gpt2": Family("GPT2LMHeadModel", "transformer.", GPT2, GPT2_KEYS, {
        "n_positions": 1024, "n_inner": None, "layer_norm_epsilon": 1e-5, "pad_token_id": None,
        "bos_token_id": 50256, "eos_token_id": 50256, "tie_word_embeddings": True},
        {"head_dim": None, "attention_bias": True, "mlp_bias": True}),
    "llama": llama_like("LlamaForCausalLM", {
        "num_key_value_heads": None, "max_position_embeddings": 2048,
        "bos_token_id": 1, "eos_token_id": 2}, {}),
    "mistral": llama_like("MistralForCausalLM", {
        "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096,
        "bos_token_id": 1, "eos_token_id": 2}, {"attention_bias": False, "mlp_bias": False}),
    "qwen2": llama_like("Qwen2ForCausalLM", {
        "num_key_value_heads": 32, "max_position_embeddings": 32768},
        {"attention_bias": True, "mlp_bias": False}),               # on q, k, v, not on o
    "qwen3": llama_like("Qwen3ForCausalLM", {
        "num_key_value_heads": 32, "max_position_embeddings": 32768, "head_dim": 128},
        {"mlp_bias": False}),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
          "float64": torch.float64}
SAFE_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
               "F64": torch.float64}
# What tells how to write with a model; and what to fetch from the hub beside the tensors.
TEXTS = ["generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
         "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "encoder.json",
         "vocab.bpe", "tokenizer.model", "*.tiktoken"]
SMALL = ["config.json", "*.index.json", *TEXTS]


def places(config: Config, ours: set[str]) -> dict[str, list[str]]:
    """The tables written out: full name in a checkpoint -> the names of ours that it fills."""
    return {f"{theirs.format(layer)}.{kind}": [f"{name.format(layer)}.{kind}" for name in names]
            for theirs, names in FAMILIES[config.model_type].names.items()
            for layer in range(config.n_layers) for kind in ("weight", "bias")
            if f"{names[0].format(layer)}.{kind}" in ours}


def is_conv1d(full: str) -> bool:
    return full.rpartition(".")[0].endswith(CONV1D)


# ---- 2. config

def read_config(folder: Path) -> tuple[Config, torch.dtype | None]:
    """-> the folder's Config, and the dtype where its config.json names one."""
    path, extra = folder / "config.json", folder / "generation_config.json"
    raw, generation = read_json(path), read_json_if_there(extra)
    try:
        config = parse_config(raw)
        name = raw.get("dtype") or raw.get("torch_dtype")           # since transformers 5; before
        if name not in [None, *DTYPES]:
            raise UserError(f"dtype {name!r} is not one of {', '.join(DTYPES)}")
        path = extra                    # its eos counts: LLaMA-3 instruct ends its turns with one
        config.eos = token_ids(generation, "eos_token_id") or config.eos
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return config, DTYPES.get(name)


def parse_config(raw: dict) -> Config:
    """The contents of a config.json -> Config. UserError: what is missing, absurd, not applied."""
    kind = raw.get("model_type")
    if kind not in list(FAMILIES):
        raise UserError(f"model_type must be one of {', '.join(FAMILIES)}, found {kind!r}")
    for key, values in APPLIED.items():
        if raw.get(key) is not None and raw[key] not in values:
            raise UserError(f"{key} {str(raw[key])[:200]!r} is not supported")
    family = FAMILIES[kind]
    raw, keys = family.defaults | raw | family.fixed, family.keys
    width, heads = check(raw, keys["d_model"], "size"), check(raw, keys["n_heads"], "size")
    if raw["head_dim"] is None and width % heads:
        raise UserError(f"{heads} heads do not divide a width of {width}")
    fallbacks = {"head_dim": width // heads, "num_key_value_heads": heads, "n_inner": 4 * width}
    raw |= {key: value for key, value in fallbacks.items() if raw.get(key) is None}
    sizes = {name: check(raw, keys[name], "size") for name in (
        "vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff",
        "max_positions")}
    qkv_bias = check(raw, "attention_bias", "flag")
    config = Config(
        **sizes, model_type=kind, norm_eps=check(raw, keys["norm_eps"], "number"),
        qkv_bias=qkv_bias, o_bias=qkv_bias and kind != "qwen2", qk_norm=kind == "qwen3",
        mlp_bias=check(raw, "mlp_bias", "flag"), tied=check(raw, "tie_word_embeddings", "flag"),
        bos=(token_ids(raw, "bos_token_id") or [None])[0], eos=token_ids(raw, "eos_token_id"),
        pad=(token_ids(raw, "pad_token_id") or [None])[0])
    if heads % config.n_kv_heads or config.head_dim % 2 and kind != "gpt2":
        raise UserError(f"{heads} query heads must be a multiple of {config.n_kv_heads} key/value "
                        f"heads, and head_dim {config.head_dim} even")
    if kind != "gpt2":
        config.rope_theta, config.rope_scaling = parse_rope(raw)
        refuse_window(raw, config)
    return config


def check(raw: dict, key: str, kind: str):
    """raw[key], if it is of that kind."""
    value = raw.get(key)
    right, what = {
        "size": (type(value) is int and 1 <= value <= 2 ** 24, "a whole number from 1 to 2^24"),
        "number": (type(value) in (int, float) and 0 < value < 1e30, "a positive number"),
        "flag": (type(value) is bool, "true or false")}[kind]
    if not right:
        raise UserError(f"{key} must be {what}, found {value!r}")
    return value


def token_ids(raw: dict, key: str) -> list[int]:
    """A token id, a list of them or null -> a list. Some files write null as -1."""
    value = raw.get(key)
    values = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(v) is not int for v in values):
        raise UserError(f"{key} must be a token id or null, found {value!r}")
    return [v for v in values if v >= 0]


def parse_rope(raw: dict) -> tuple[float, dict | None]:
    """-> theta, and LLaMA-3.1's scaling where there is one.

    Before transformers 5: rope_theta beside rope_scaling (null, or a dict with "rope_type", once
    "type"). Since: a dict rope_parameters, which holds rope_theta too.
    """
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise UserError(f"rope_scaling must be null or an object, found {rope!r}")
    kinds = {"factor": "number", "low_freq_factor": "number", "high_freq_factor": "number",
             "original_max_position_embeddings": "size"}
    kind = rope.get("rope_type", rope.get("type", "default"))
    known = {*kinds, "rope_theta", "rope_type", "type"}
    if rope.get("partial_rotary_factor") == 1:          # all of each head is rotated: as here
        known.add("partial_rotary_factor")
    odd = set(rope) - known
    if kind not in ("default", "llama3") or odd:
        raise UserError(f"rope of type {kind!r}{' with ' * bool(odd)}{some(odd)} is not supported, "
                        f"only default and llama3")
    theta = check({"rope_theta": raw.get("rope_theta", 10000.0)} | rope, "rope_theta", "number")
    if kind == "default":
        return float(theta), None
    rope = {"original_max_position_embeddings": raw["max_position_embeddings"]} | rope
    scaling = {key: check(rope, key, kind) for key, kind in kinds.items()}
    if scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise UserError("low_freq_factor must be below high_freq_factor")
    return float(theta), scaling


def refuse_window(raw: dict, config: Config) -> None:
    """Attention within a sliding window is not applied: no text may be longer than the window."""
    if config.model_type == "llama":
        return
    if config.model_type != "mistral":          # Qwen: the layers from max_window_layers on slide
        full, layers = raw.get("max_window_layers", 28), raw.get("layer_types")
        slides = raw.get("use_sliding_window") not in (None, False)
        slides = slides and not (type(full) is int and full >= config.n_layers)
        if layers is not None:                  # since transformers 5: a word for each layer
            slides = layers != ["full_attention"] * config.n_layers
        if not slides:
            return
    raw = {"sliding_window": 4096} | raw
    if raw["sliding_window"] is not None and (
            check(raw, "sliding_window", "size") < config.max_positions):
        raise UserError(f"a sliding_window of {raw['sliding_window']} is not supported; lower "
                        f"max_position_embeddings to it, to use the model up to that length")


def describe(config: Config, dtype: torch.dtype) -> dict:
    """The contents of config.json, in the older dialect: transformers 5 reads it as well."""
    family = FAMILIES[config.model_type]
    raw = {"architectures": [family.architecture], "model_type": config.model_type,
           "torch_dtype": str(dtype).removeprefix("torch."), "tie_word_embeddings": config.tied,
           "bos_token_id": config.bos, "pad_token_id": config.pad,
           "eos_token_id": config.eos[0] if len(config.eos) == 1 else config.eos or None}
    raw |= {key: getattr(config, name) for name, key in family.keys.items()
            if key not in family.fixed}
    if config.is_gpt2:
        return raw | {"activation_function": "gelu_new"}
    scaling = config.rope_scaling and {"rope_type": "llama3", **config.rope_scaling}
    raw |= {"hidden_act": "silu", "rope_theta": config.rope_theta, "rope_scaling": scaling}
    return raw | ({"sliding_window": None} if config.model_type == "mistral" else {})


# ---- 3. files

@dataclass
class Stored:
    """A tensor in a file, not yet read.

    Files are mapped into memory, where each page once touched counts as ours until the file is
    unmapped. So read() maps the file anew, and what it returns lets go of it.
    """
    path: Path
    name: str
    shape: tuple
    dtype: torch.dtype | None           # None: not plain floating-point numbers
    kept: Tensor | None = None          # for a file that cannot be mapped

    def read(self) -> Tensor:
        """Raises UserError, which names the tensor, if it holds NaN or infinity."""
        tensor = self.values()
        refuse_not_finite(tensor, f"{self.path}: {self.name}")
        return tensor

    def values(self) -> Tensor:
        if self.kept is not None:
            return self.kept
        if self.path.suffix != ".safetensors":
            return load_bin(self.path)[self.name]
        with safe_open(self.path, "pt") as file:
            return file.get_tensor(self.name)


def load_bin(path: Path, mmap: bool = True) -> dict[str, Tensor]:
    """weights_only, because a pickle can run any code."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def stored_in(path: Path) -> list[Stored]:
    """What the file holds, without reading the tensors."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                views = [(name, file.get_slice(name)) for name in file.keys()]
                return [Stored(path, name, tuple(v.get_shape()), SAFE_DTYPES.get(v.get_dtype()))
                        for name, v in views]
        try:
            tensors, mapped = load_bin(path), True
        except RuntimeError as error:           # the format before torch 1.6
            if "mmap can only be used" not in str(error):
                raise
            tensors, mapped = load_bin(path, mmap=False), False
        return [Stored(path, str(name), tuple(t.shape),
                       t.dtype if t.layout is torch.strided and not t.is_meta else None,
                       kept=None if mapped else t) for name, t in tensors.items()]
    except Exception as error:                  # a broken file can break its reader in any way
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path}: cannot read its tensors: {reason}") from None


def all_stored(folder: Path) -> list[Stored]:
    """The folder's tensors, safetensors first; an index lists the shards of a large model."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            return stored_in(folder / name)
        index = folder / f"{name}.index.json"
        if index.exists():
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not shards:
                raise UserError(f"{index}: weight_map must name the file of each tensor")
            for shard in shards.values():       # the name alone: the hub's files are links
                if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".."):
                    raise UserError(f"{index}: {shard!r} is not the name of a file beside it")
            found = [t for shard in sorted(set(shards.values())) for t in stored_in(folder / shard)]
            lost = set(shards) - {tensor.name for tensor in found}
            if lost:
                raise UserError(f"{index}: no shard holds {some(lost)}")
            return found
    raise UserError(f"{folder}: holds neither model.safetensors nor pytorch_model.bin")


def some(names) -> str:
    names = sorted(" ".join(str(name).split()) for name in names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
