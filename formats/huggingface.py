"""Knows the form of a Hugging Face checkpoint: its names, its config.json, its files.

A checkpoint is a folder. Its config.json tells the shape of the model. Its *.safetensors (or
pytorch_model.bin) hold named tensors. checkpoint.py reads and writes whole checkpoints, peft.py
adapters.
    1. tables    of each family: tensor names there -> here, keys of config.json -> Config fields
    2. config    config.json <-> Config, and what model.py cannot compute
    3. files     the names, shapes and dtypes of tensors, before any tensor is read
"""
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from formats.json_files import read_json, read_json_if_there
from model import Config
from support.errors import UserError, refuse_not_finite

# ---- 1. tables. {} is the layer's number. Each name has a .weight, and a .bias if that is used.

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
# Three kinds of tensors need work:
# - c_attn is one layer that computes q, k and v. Its outputs are split among our three Linears.
# - OpenAI's GPT-2 kept its weights (in, out), and transformers' Conv1D still does. We transpose.
CONV1D = ("c_attn", "c_proj", "c_fc")
# - Old files hold causal masks and rotary frequencies. The model computes these: we skip them.
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
# Options that change the result -> the values with which model.py computes the same.
APPLIED = {"hidden_act": ["silu"], "activation_function": ["gelu_new", "gelu_pytorch_tanh"],
           "scale_attn_weights": [True], "scale_attn_by_inverse_layer_idx": [False],
           "add_cross_attention": [False], "partial_rotary_factor": [1],
           "quantization_config": []}


@dataclass
class Family:
    """Lists what differs between the files of two model types."""
    architecture: str                   # transformers' class
    prefix: str                         # files of a model saved without its head lack it
    names: dict[str, list[str]]         # a tensor's name there -> its names here
    keys: dict[str, str]                # Config field -> key of config.json
    defaults: dict                      # key -> the value that transformers assumes without it
    fixed: dict                         # key -> the value that transformers' code always takes


def llama_like(architecture: str, defaults: dict, fixed: dict) -> Family:
    """Makes a family with LLaMA's names, keys and common defaults."""
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
# The files that tell how to write with a model; all files to fetch beside the tensors.
TEXTS = ["generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
         "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "encoder.json",
         "vocab.bpe", "tokenizer.model", "*.tiktoken"]
SMALL = ["config.json", "adapter_config.json", "*.index.json", *TEXTS]


def map_names(config: Config, ours: set[str]) -> dict[str, list[str]]:
    """Maps each full name in a checkpoint to the names of ours that its tensor fills.

    ours: the names of the model's parameters.
    """
    return {f"{theirs.format(layer)}.{kind}": [f"{name.format(layer)}.{kind}" for name in names]
            for theirs, names in FAMILIES[config.model_type].names.items()
            for layer in range(config.n_layers) for kind in ("weight", "bias")
            if f"{names[0].format(layer)}.{kind}" in ours}


def is_conv1d(full: str) -> bool:
    """Tells whether the file keeps this weight (in, out)."""
    return full.rpartition(".")[0].endswith(CONV1D)


# ---- 2. config

def read_model_config(folder: Path) -> tuple[Config, torch.dtype | None]:
    """Reads config.json and generation_config.json -> Config, and the dtype or None.

    Raises UserError, which names the file, if model.py cannot compute this model.
    """
    path, extra = folder / "config.json", folder / "generation_config.json"
    raw, generation = read_json(path), read_json_if_there(extra)
    try:
        config = parse_config(raw)
        name = raw.get("dtype") or raw.get("torch_dtype")       # the latter before transformers 5
        if name not in [None, *DTYPES]:
            raise UserError(f"dtype {name!r} is not one of {', '.join(DTYPES)}")
        path = extra                    # its eos counts: LLaMA-3 instruct ends its turns with one
        config.eos = token_ids(generation, "eos_token_id") or config.eos
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return config, DTYPES.get(name)


def parse_config(raw: dict) -> Config:
    """Parses the contents of a config.json.

    Raises UserError if a value is missing or absurd, or an option is not computed here.
    """
    kind = raw.get("model_type")
    if kind not in list(FAMILIES):
        raise UserError(f"model_type must be one of {', '.join(FAMILIES)}, found {kind!r}")
    for key, values in APPLIED.items():
        if raw.get(key) is not None and raw[key] not in values:
            raise UserError(f"{key} {str(raw[key])[:200]!r} is not supported")
    family = FAMILIES[kind]
    raw, keys = family.defaults | raw | family.fixed, family.keys
    width, heads = (read_value(raw, keys[name], "size") for name in ("d_model", "n_heads"))
    if raw["head_dim"] is None and width % heads:
        raise UserError(f"{heads} heads do not divide a width of {width}")
    fallbacks = {"head_dim": width // heads, "num_key_value_heads": heads, "n_inner": 4 * width}
    raw |= {key: value for key, value in fallbacks.items() if raw.get(key) is None}
    sizes = {name: read_value(raw, keys[name], "size") for name in (
        "vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff",
        "max_positions")}
    qkv_bias = read_value(raw, "attention_bias", "flag")
    config = Config(
        **sizes, model_type=kind, norm_eps=read_value(raw, keys["norm_eps"], "number"),
        qkv_bias=qkv_bias, o_bias=qkv_bias and kind != "qwen2", qk_norm=kind == "qwen3",
        mlp_bias=read_value(raw, "mlp_bias", "flag"),
        tied=read_value(raw, "tie_word_embeddings", "flag"),
        bos=(token_ids(raw, "bos_token_id") or [None])[0], eos=token_ids(raw, "eos_token_id"),
        pad=(token_ids(raw, "pad_token_id") or [None])[0])
    if heads % config.n_kv_heads or config.head_dim % 2 and kind != "gpt2":
        raise UserError(f"{heads} query heads must be a multiple of {config.n_kv_heads} key/value "
                        f"heads, and head_dim {config.head_dim} even")
    if kind != "gpt2":
        config.rope_theta, config.rope_scaling = parse_rope(raw)
        refuse_window(raw, config)
    return config


def read_value(raw: dict, key: str, kind: str):
    """Returns raw[key]. Raises UserError if it is not of that kind: size, number or flag."""
    value = raw.get(key)
    right, expected = {
        "size": (type(value) is int and 1 <= value <= 2 ** 24, "a whole number from 1 to 2^24"),
        "number": (type(value) in (int, float) and 0 < value < 1e30, "a positive number"),
        "flag": (type(value) is bool, "true or false")}[kind]
    if not right:
        raise UserError(f"{key} must be {expected}, found {value!r}")
    return value


def token_ids(raw: dict, key: str) -> list[int]:
    """Returns raw[key], which is a token id, a list of them or null, as a list.

    Some files write null as -1. Raises UserError if it is anything else.
    """
    value = raw.get(key)
    values = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(v) is not int for v in values):
        raise UserError(f"{key} must be a token id or null, found {value!r}")
    return [v for v in values if v >= 0]


def parse_rope(raw: dict) -> tuple[float, dict | None]:
    """Reads the rotary positions -> theta, and LLaMA-3.1's scaling or None.

    Before transformers 5 rope_theta stood beside rope_scaling: null, or a dict with "rope_type"
    (in older files "type"). Since then a dict rope_parameters holds rope_theta too.
    Raises UserError if the positions are scaled in another way.
    """
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise UserError(f"rope_scaling must be null or an object, found {rope!r}")
    kinds = {"factor": "number", "low_freq_factor": "number", "high_freq_factor": "number",
             "original_max_position_embeddings": "size"}
    kind = rope.get("rope_type", rope.get("type", "default"))
    known = {*kinds, "rope_theta", "rope_type", "type"}
    if rope.get("partial_rotary_factor") == 1:          # all of each head is rotated, as here
        known.add("partial_rotary_factor")
    odd = set(rope) - known
    if kind not in ("default", "llama3") or odd:
        raise UserError(f"rope of type {kind!r}{' with ' * bool(odd)}{few_names(odd)} is not "
                        f"supported, only default and llama3")
    rope = {"rope_theta": raw.get("rope_theta", 10000.0)} | rope
    theta = read_value(rope, "rope_theta", "number")
    if kind == "default":
        return float(theta), None
    rope = {"original_max_position_embeddings": raw["max_position_embeddings"]} | rope
    scaling = {key: read_value(rope, key, kind) for key, kind in kinds.items()}
    if scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise UserError("low_freq_factor must be below high_freq_factor")
    return float(theta), scaling


def refuse_window(raw: dict, config: Config) -> None:
    """Raises UserError if a text may be longer than the model's sliding window.

    model.py lets a token attend to all before it. Up to the window's length this is the same.
    """
    if config.model_type == "llama":
        return
    if config.model_type != "mistral":          # Qwen's layers slide from max_window_layers on
        full, layers = raw.get("max_window_layers", 28), raw.get("layer_types")
        slides = raw.get("use_sliding_window") not in (None, False)
        slides = slides and not (type(full) is int and full >= config.n_layers)
        if layers is not None:                  # since transformers 5: a word for each layer
            slides = layers != ["full_attention"] * config.n_layers
        if not slides:
            return
    raw = {"sliding_window": 4096} | raw
    if raw["sliding_window"] is not None and (
            read_value(raw, "sliding_window", "size") < config.max_positions):
        raise UserError(f"a sliding_window of {raw['sliding_window']} is not supported; lower "
                        f"max_position_embeddings to it, to use the model up to that length")


def make_config_json(config: Config, dtype: torch.dtype) -> dict:
    """Makes the contents of config.json, in the older dialect, which transformers 5 reads too."""
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
    """Stands for a tensor in a file that is not yet read.

    A file is mapped into memory. Each page that was touched counts as ours until the file is
    unmapped. So read() maps the file anew, and the file is unmapped once the tensor is dropped.
    """
    path: Path
    name: str
    shape: tuple
    dtype: torch.dtype | None           # None if it is not plain floating-point numbers
    kept: Tensor | None = None          # the tensor itself, if its file cannot be mapped

    def read(self) -> Tensor:
        """Reads the tensor. Raises UserError, which names it, if it holds NaN or infinity."""
        tensor = self.values()
        refuse_not_finite(tensor, f"{self.path}: {self.name}")
        return tensor

    def values(self) -> Tensor:
        """Reads the tensor, whatever it holds."""
        if self.kept is not None:
            return self.kept
        if self.path.suffix != ".safetensors":
            return load_bin(self.path)[self.name]
        with safe_open(self.path, "pt") as file:
            return file.get_tensor(self.name)


def load_bin(path: Path, mmap: bool = True) -> dict[str, Tensor]:
    """Reads a pickled checkpoint, weights_only because a pickle can run any code."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def stored_in(path: Path) -> list[Stored]:
    """Lists the tensors of a file without reading them. Raises UserError if it is broken."""
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
    """Lists the tensors of a folder, of safetensors if it has them.

    A large model is cut into shards, which an index lists. Raises UserError if a file is missing
    or broken, or the index names a file outside the folder.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            return stored_in(folder / name)
        index = folder / f"{name}.index.json"
        if index.exists():
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not shards:
                raise UserError(f"{index}: weight_map must name the file of each tensor")
            for shard in shards.values():       # by name, since the hub's files are links
                if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".."):
                    raise UserError(f"{index}: {shard!r} is not the name of a file beside it")
            found = [t for shard in sorted(set(shards.values())) for t in stored_in(folder / shard)]
            lost = set(shards) - {tensor.name for tensor in found}
            if lost:
                raise UserError(f"{index}: no shard holds {few_names(lost)}")
            return found
    raise UserError(f"{folder}: holds neither model.safetensors nor pytorch_model.bin")


def few_names(names) -> str:
    """Joins the first three names, and counts the others."""
    names = sorted(" ".join(str(name).split()) for name in names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
