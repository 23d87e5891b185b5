"""Knows the files of the decoders, GPT-2 and LLaMA's kin: tensor names, config.json.

    1. tables    tensor names there -> here, keys of config.json -> fields of Config
    2. config    config.json <-> Config, and what model.py cannot compute
    3. tensors   those of a folder, under the names of the tables
rope.py reads the part of config.json on rotary positions.
"""
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from formats.json_files import read_value
from formats.rope import OLD, parse_rope
from formats.tensors import Stored, all_stored
from model import Config
from support.errors import UserError

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
    "score": ["score"],                                                     # labels of texts
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
    "score": ["score"],
}
HEADS = ("lm_head.", "score.")
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
APPLIED = {"hidden_act": ["silu", "swish"],     # two names of one function
           "activation_function": ["gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh",
                                   "gelu_fast", "gelu_accurate"],       # five names of one
           "scale_attn_weights": [True], "scale_attn_by_inverse_layer_idx": [False],
           "add_cross_attention": [False], "partial_rotary_factor": [1],
           "quantization_config": []}


@dataclass
class Family:
    """Lists what differs between the files of two model types."""
    architecture: str                   # transformers' class
    prefix: str                         # files of a model saved without its head lack it
    outside: tuple[str, ...]            # how names begin that never have it
    names: dict[str, list[str]]         # a tensor's name there -> its names here
    keys: dict[str, str]                # Config field -> key of config.json
    defaults: dict                      # key -> the value that transformers assumes without it
    fixed: dict                         # key -> the value that transformers' code always takes

    def full_name(self, name: str) -> str:
        """Puts the prefix before a tensor's name if it lacks it."""
        return name if name.startswith((self.prefix, *self.outside)) else self.prefix + name


def llama_like(architecture: str, defaults: dict, fixed: dict) -> Family:
    """Makes a family with LLaMA's names, keys and common defaults."""
    common = {"head_dim": None, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
              "attention_bias": False, "mlp_bias": False, "bos_token_id": None,
              "eos_token_id": None, "pad_token_id": None}
    return Family(architecture, "model.", HEADS, LLAMA, LLAMA_KEYS, common | defaults, fixed)


FAMILIES = {                            # by config.json's model_type
    "gpt2": Family("GPT2LMHeadModel", "transformer.", HEADS, GPT2, GPT2_KEYS, {
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


# ---- 2. config

def parse_config(raw: dict) -> Config:
    """Parses the contents of a config.json.

    Raises UserError if a value is missing or absurd, or an option is not computed here.
    """
    kind = raw["model_type"]
    refuse_options(raw, APPLIED)
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
        config.rope_theta, config.rope_scaling = parse_rope(raw, config.head_dim)
        cap_positions(raw, config)
    return config


def refuse_options(raw: dict, applied: dict[str, list]) -> None:
    """Raises UserError if an option that changes the result has none of the `applied` values."""
    for key, values in applied.items():
        if raw.get(key) is not None and raw[key] not in values:
            raise UserError(f"{key} {str(raw[key])[:200]!r} is not supported")


def token_ids(raw: dict, key: str) -> list[int]:
    """Returns raw[key], which is a token id, a list of them or null, as a list.

    Some files write null as -1. Raises UserError if it is anything else.
    """
    value = raw.get(key)
    values = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(v) is not int for v in values):
        raise UserError(f"{key} must be a token id or null, found {value!r}")
    return [v for v in values if v >= 0]


def one_or_all(ids: list[int]) -> int | list[int] | None:
    """Returns what config.json holds for these token ids: one, a list of them, or null."""
    return ids[0] if len(ids) == 1 else ids or None


def cap_positions(raw: dict, config: Config) -> None:
    """Caps max_positions at the length beyond which model.py would compute something else.

    model.py lets a token attend to all before it. A sliding window of W shows a token itself and
    W - 1 before it. So both are the same up to W tokens. LongRoPE is the same up to the length of
    the pretraining. config.beyond keeps what config.json says, for save_pretrained.
    Raises UserError if the window is absurd, or layers attend in a third way.
    """
    ends, window = [config.max_positions], False
    if config.model_type != "llama":
        raw = {"sliding_window": 4096} | raw
        window = slides(raw, config)
        ends += [raw["sliding_window"]] * window
    if config.rope_scaling and config.rope_scaling["rope_type"] == "longrope":
        ends.append(config.rope_scaling[OLD])
    if window or min(ends) < config.max_positions:
        config.max_positions = min(ends)
        config.beyond = {key: raw[key] for key in (
            "max_position_embeddings", "sliding_window", "use_sliding_window", "max_window_layers",
            "layer_types") if key in raw}


def slides(raw: dict, config: Config) -> bool:
    """Tells whether any layer attends through a window. Raises as cap_positions() does."""
    if config.model_type == "mistral":
        found = raw["sliding_window"] is not None
    elif raw.get("layer_types") is not None:    # since transformers 5: a word for each layer
        layers, words = raw["layer_types"], ("full_attention", "sliding_attention")
        if (not isinstance(layers, list) or len(layers) != config.n_layers
                or any(layer not in words for layer in layers)):
            raise UserError(f"layer_types must be {config.n_layers} times one of "
                            f"{', '.join(words)}, found {repr(layers)[:200]}")
        found = "sliding_attention" in layers
    else:                                       # the layers slide from max_window_layers on
        full = raw.get("max_window_layers", 28)
        found = (raw.get("use_sliding_window") not in (None, False)
                 and raw["sliding_window"] is not None
                 and not (type(full) is int and full >= config.n_layers))
    if found:
        read_value(raw, "sliding_window", "size")
    return found


def describe_cap(config: Config) -> str | None:
    """Says where positions end before the model would change; None if they do not."""
    kind = (config.rope_scaling or {}).get("rope_type")
    allowed = config.beyond.get("max_position_embeddings", config.max_positions)
    capped = config.max_positions < allowed
    if not capped and kind != "dynamic":
        return None
    window = config.beyond.get("sliding_window") == config.max_positions
    return (f"positions capped at {config.max_positions}, where "
            f"{'a sliding window' if window else f'rope of type {kind}'} sets in"
            + f" (config.json allows {allowed})" * capped)


def make_config_json(model, dtype: torch.dtype) -> dict:
    config = model.config
    family = FAMILIES[config.model_type]
    raw = {"architectures": [family.architecture], "model_type": config.model_type,
           "torch_dtype": str(dtype).removeprefix("torch."), "tie_word_embeddings": config.tied,
           "bos_token_id": config.bos, "pad_token_id": config.pad,
           "eos_token_id": one_or_all(config.eos)}
    raw |= {key: getattr(config, name) for name, key in family.keys.items()
            if key not in family.fixed}
    if model.score is not None:
        raw |= {"architectures": [re.sub("(LMHeadModel|ForCausalLM)$", "ForSequenceClassification",
                                         family.architecture)],
                "id2label": {str(i): f"LABEL_{i}" for i in range(model.score.out_features)}}
    if config.is_gpt2:
        return raw | {"activation_function": "gelu_new"}
    raw |= {"hidden_act": "silu", "rope_theta": config.rope_theta,
            "rope_scaling": config.rope_scaling}
    raw |= {"sliding_window": None} if config.model_type == "mistral" else {}
    return raw | config.beyond


# ---- 3. tensors

def by_full_name(folder: Path, config: Config) -> dict[str, Stored]:
    """Does huggingface.by_full_name() for a decoder.

    The head of a tied model fills the embedding if the file has no embedding. Sets config.tied to
    False if the two differ.
    """
    tensors, family = {}, FAMILIES[config.model_type]
    for tensor in all_stored(folder):
        full = family.full_name(tensor.name)
        if full in tensors:
            raise UserError(f"{tensor.path}: {tensor.name} is there twice")
        if re.sub(r"\.\d+\.", ".{}.", full, count=1) not in BUFFERS:
            tensors[full] = tensor
    if "score.weight" in tensors and "lm_head.weight" not in tensors:
        config.tied = True              # a classifier: it has no use for a head for tokens
    # A tied model's file may repeat the embedding as lm_head, or hold it under that name only. If
    # the two differ, the config is wrong. Then both are kept. transformers 5 does the same.
    embed = next(theirs for theirs, ours in family.names.items() if ours == ["embed"]) + ".weight"
    if config.tied and "lm_head.weight" in tensors:
        head = tensors.pop("lm_head.weight")
        if not torch.equal(head.read(), tensors.setdefault(embed, head).read()):
            config.tied, tensors["lm_head.weight"] = False, head
    return tensors
