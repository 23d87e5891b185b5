"""Knows the files of the encoders, BERT, RoBERTa and DeBERTa: tensor names, config.json.

    1. tables    tensor names there -> here, keys of config.json -> fields of EncoderConfig
    2. config    config.json <-> EncoderConfig, and what encoder.py cannot compute
    3. tensors   those of a folder, under the names of the tables
A file holds the encoder alone, or with a head: for masked tokens, or for the labels of texts. The
tensors say which, since a config.json often says something else.
"""
import re
from pathlib import Path

import torch
from torch import Tensor

from encoder import EncoderConfig
from formats.decoders import Family, one_or_all, refuse_options, token_ids
from formats.json_files import read_value
from formats.tensors import Stored, all_stored
from support.errors import UserError

# ---- 1. tables. {} is the layer's number. A name that ends in .weight or .bias is a tensor's; any
# other has a .weight, and a .bias if that is used. The names are those after the family's prefix.
BODY = {
    "embeddings.word_embeddings": ["embed"],
    "embeddings.position_embeddings": ["positions"],
    "embeddings.token_type_embeddings": ["types"],
    "embeddings.LayerNorm": ["embed_norm"],
    "encoder.layer.{}.attention.output.dense": ["layers.{}.attn.o"],
    "encoder.layer.{}.attention.output.LayerNorm": ["layers.{}.attn_norm"],
    "encoder.layer.{}.intermediate.dense": ["layers.{}.mlp.up"],
    "encoder.layer.{}.output.dense": ["layers.{}.mlp.down"],
    "encoder.layer.{}.output.LayerNorm": ["layers.{}.mlp_norm"],
}
BERT = BODY | {
    "encoder.layer.{}.attention.self.query": ["layers.{}.attn.q"],
    "encoder.layer.{}.attention.self.key": ["layers.{}.attn.k"],
    "encoder.layer.{}.attention.self.value": ["layers.{}.attn.v"],
}
DEBERTA_V2 = BODY | {
    "encoder.rel_embeddings": ["distances"],
    "encoder.LayerNorm": ["distance_norm"],
    "encoder.layer.{}.attention.self.query_proj": ["layers.{}.attn.q"],
    "encoder.layer.{}.attention.self.key_proj": ["layers.{}.attn.k"],
    "encoder.layer.{}.attention.self.value_proj": ["layers.{}.attn.v"],
    "encoder.layer.{}.attention.self.pos_query_proj": ["layers.{}.attn.pos_q"],
    "encoder.layer.{}.attention.self.pos_key_proj": ["layers.{}.attn.pos_k"],
}
DEBERTA_V1 = BODY | {
    "encoder.rel_embeddings": ["distances"],
    "encoder.layer.{}.attention.self.in_proj.weight": [
        "layers.{}.attn.q.weight", "layers.{}.attn.k.weight", "layers.{}.attn.v.weight"],
    "encoder.layer.{}.attention.self.q_bias": ["layers.{}.attn.q.bias"],
    "encoder.layer.{}.attention.self.v_bias": ["layers.{}.attn.v.bias"],
    "encoder.layer.{}.attention.self.pos_q_proj": ["layers.{}.attn.pos_q"],
    "encoder.layer.{}.attention.self.pos_proj": ["layers.{}.attn.pos_k"],
}
# The heads' names stand without the prefix, but for BERT's pooler.
DEBERTA_HEADS = {
    "lm_predictions.lm_head.dense": ["mlm_head.dense"],
    "lm_predictions.lm_head.LayerNorm": ["mlm_head.norm"],
    "lm_predictions.lm_head.bias": ["mlm_head.bias"],
    "pooler.dense": ["head.dense"],
    "classifier": ["head.out"],
}
HEADS = {
    "bert": {"cls.predictions.transform.dense": ["mlm_head.dense"],
             "cls.predictions.transform.LayerNorm": ["mlm_head.norm"],
             "cls.predictions.bias": ["mlm_head.bias"],
             "bert.pooler.dense": ["head.dense"],
             "classifier": ["head.out"]},
    "roberta": {"lm_head.dense": ["mlm_head.dense"],
                "lm_head.layer_norm": ["mlm_head.norm"],
                "lm_head.bias": ["mlm_head.bias"],
                "classifier.dense": ["head.dense"],
                "classifier.out_proj": ["head.out"]},
    "deberta": DEBERTA_HEADS,
    "deberta-v2": DEBERTA_HEADS,
}
OUTSIDE = ("cls.", "lm_head.", "lm_predictions.", "mask_predictions.", "classifier.")
# Tensors of other dialects: the pattern of a name -> the name in the tables.
RENAMED = {
    r"(LayerNorm|layer_norm)\.gamma$": r"\1.weight",    # files of TensorFlow's BERT
    r"(LayerNorm|layer_norm)\.beta$": r"\1.bias",
    r"^(lm_head|cls\.predictions)\.decoder\.bias$": r"\1.bias",     # one tensor, at two names
    # transformers' DebertaForMaskedLM with `legacy`: the same head under BERT's names.
    r"^cls\.predictions\.(?:transform\.)?(?=\w+(\.\w+)?$)": "lm_predictions.lm_head.",
}
# Tensors that no head here uses: position numbers, heads of other pretraining tasks, and a pooler
# that RoBERTa's head has no use for.
UNUSED = (r".*embeddings\.position_ids|cls\.seq_relationship\..*|mask_predictions\..*"
          r"|roberta\.pooler\..*")

KEYS = {                                        # EncoderConfig field: key in config.json
    "vocab_size": "vocab_size", "d_model": "hidden_size", "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads", "d_ff": "intermediate_size",
    "max_positions": "max_position_embeddings", "norm_eps": "layer_norm_eps",
    "dropout": "hidden_dropout_prob", "attention_dropout": "attention_probs_dropout_prob",
    "head_dropout": "classifier_dropout",
}
DEBERTA_KEYS = KEYS | {"head_dropout": "cls_dropout"}
# Options that change the result -> the values with which encoder.py computes the same.
APPLIED = {"hidden_act": ["gelu"], "is_decoder": [False], "add_cross_attention": [False],
           "position_embedding_type": ["absolute"], "quantization_config": []}
DEBERTA_APPLIED = APPLIED | {"relative_attention": [True], "talking_head": [False],
                             "pooler_hidden_act": ["gelu"], "pooler_dropout": [0]}


def encoder_like(stem: str, kind: str, names: dict, keys: dict, defaults: dict) -> Family:
    """Makes a family. Its defaults are the values of the public checkpoints.

    transformers assumes others for RoBERTa and DeBERTa, and so misreads an old config.json.
    """
    prefix = f"{kind.partition('-')[0]}."
    common = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
              "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": None}
    # The dense layer of DeBERTa's head is called pooler, as the part of BERT's encoder is.
    outside = OUTSIDE + ("pooler.",) * (prefix == "deberta.")
    return Family(stem, prefix, outside, {prefix + theirs: ours for theirs, ours in names.items()}
                  | HEADS[kind], keys, common | defaults, {})


DEBERTA_DEFAULTS = {"layer_norm_eps": 1e-7, "type_vocab_size": 0, "pad_token_id": 0,
                    "position_biased_input": False, "pos_att_type": ["c2p", "p2c"],
                    "max_relative_positions": -1}
FAMILIES = {                            # by config.json's model_type
    "bert": encoder_like("Bert", "bert", BERT, KEYS, {
        "layer_norm_eps": 1e-12, "type_vocab_size": 2, "pad_token_id": 0}),
    "roberta": encoder_like("Roberta", "roberta", BERT, KEYS, {
        "layer_norm_eps": 1e-5, "type_vocab_size": 1, "pad_token_id": 1, "bos_token_id": 0,
        "eos_token_id": 2, "max_position_embeddings": 514}),
    "deberta": encoder_like("Deberta", "deberta", DEBERTA_V1, DEBERTA_KEYS, DEBERTA_DEFAULTS),
    "deberta-v2": encoder_like("DebertaV2", "deberta-v2", DEBERTA_V2, DEBERTA_KEYS, {
        **DEBERTA_DEFAULTS, "position_buckets": 256, "share_att_key": True,
        "norm_rel_ebd": "layer_norm"}),
}


# ---- 2. config

def parse_config(raw: dict) -> EncoderConfig:
    """Does huggingface.parse_config() for an encoder."""
    kind, family = raw["model_type"], FAMILIES[raw["model_type"]]
    deberta = kind.startswith("deberta")
    refuse_options(raw, DEBERTA_APPLIED if deberta else APPLIED)
    raw, keys = family.defaults | raw, family.keys
    sizes = {name: read_value(raw, keys[name], "size") for name in (
        "vocab_size", "d_model", "n_layers", "n_heads", "d_ff", "max_positions")}
    width, heads = sizes["d_model"], sizes["n_heads"]
    if width % heads:
        raise UserError(f"{heads} heads do not divide a width of {width}")
    for key, value in {"embedding_size": width, "pooler_hidden_size": width,
                       "attention_head_size": width // heads}.items():
        if raw.get(key) not in (None, value):
            raise UserError(f"{key} {str(raw[key])[:200]} is not supported, only {value}")
    if raw.get("conv_kernel_size") and raw["conv_kernel_size"] != -1:
        raise UserError(f"conv_kernel_size {str(raw['conv_kernel_size'])[:200]}: a convolution is "
                        "not supported")
    pad = (token_ids(raw, "pad_token_id") or [family.defaults["pad_token_id"]])[0]
    if kind == "roberta":
        sizes["max_positions"] -= pad + 1           # the rows before the first token's
        if sizes["max_positions"] < 1:
            raise UserError(f"{keys['max_positions']}: leaves no position after that of padding")
    shares = {name: read_value(raw, keys[name], "share")
              for name in ("dropout", "attention_dropout")}
    if raw.get(keys["head_dropout"]) is not None:
        shares["head_dropout"] = read_value(raw, keys["head_dropout"], "share")
    return EncoderConfig(
        **sizes, model_type=kind, norm_eps=read_value(raw, keys["norm_eps"], "number"), pad=pad,
        bos=(token_ids(raw, "bos_token_id") or [None])[0], eos=token_ids(raw, "eos_token_id"),
        n_types=read_value(raw, "type_vocab_size", "count"),
        has_positions=not deberta or read_value(raw, "position_biased_input", "flag"),
        **{"head_dropout": shares["dropout"]} | shares, labels=label_names(raw),
        **(read_distances(raw, sizes["max_positions"]) if deberta else {}))


def read_distances(raw: dict, max_positions: int) -> dict:
    """Reads what DeBERTa's config.json says of its table of distances -> fields.

    pos_att_type is a list, or words with "|" between them. v1 knows no buckets, no shared layers
    and no norm of the table, whatever is said.
    """
    terms = raw["pos_att_type"] or []
    terms = terms.lower().split("|") if isinstance(terms, str) else terms
    if not isinstance(terms, list) or not all(
            isinstance(term, str) and term.strip() in ("c2p", "p2c") for term in terms):
        raise UserError(f"pos_att_type must be of c2p and p2c, found "
                        f"{repr(raw['pos_att_type'])[:200]}")
    terms = tuple(sorted(term.strip() for term in terms))
    if len(set(terms)) < len(terms):
        raise UserError(f"pos_att_type names a term twice: {', '.join(terms)[:200]}")
    reach = raw["max_relative_positions"]
    reach = max_positions if type(reach) is int and reach < 1 else read_value(
        raw, "max_relative_positions", "size")
    found = {"distance_terms": terms, "reach": reach, "own_distance_layers": True}
    if raw["model_type"] == "deberta":
        return found
    buckets, norm = raw["position_buckets"], raw["norm_rel_ebd"]
    buckets = 0 if type(buckets) is int and buckets < 1 else read_value(
        raw, "position_buckets", "size")
    if buckets and not 2 <= buckets < 2 * (reach - 1):
        raise UserError(f"position_buckets {buckets}: must be from 2, and half of it below the "
                        f"{reach} positions in reach")
    if norm not in ("none", "layer_norm"):
        raise UserError(f"norm_rel_ebd must be none or layer_norm, found {repr(norm)[:200]}")
    return found | {"buckets": buckets, "norm_distances": norm == "layer_norm",
                    "own_distance_layers": not read_value(raw, "share_att_key", "flag")}


def label_names(raw: dict) -> list[str]:
    """Reads the labels' names of id2label, in the order of their ids; empty if there are none.

    LABEL_0 and so on are no names, but what transformers writes for want of them.
    """
    table = raw.get("id2label")
    table = {} if table is None else table
    try:
        names = [table[i] for i in sorted(table, key=int)]
        if all(isinstance(name, str) for name in names):
            return [] if all(re.fullmatch(r"LABEL_\d+", name) for name in names) else names
    except (AttributeError, TypeError, ValueError, LookupError):
        pass
    raise UserError(f"id2label must map numbers to names, found {repr(table)[:200]}")


def make_config_json(model, dtype: torch.dtype) -> dict:
    c, family = model.config, FAMILIES[model.config.model_type]
    head = ("ForSequenceClassification" if c.n_labels is not None else
            "ForMaskedLM" if c.has_mlm else "Model")
    raw = {"architectures": [family.architecture + head], "model_type": c.model_type,
           "torch_dtype": str(dtype).removeprefix("torch."), "hidden_act": "gelu",
           "type_vocab_size": c.n_types, "pad_token_id": c.pad, "bos_token_id": c.bos,
           "eos_token_id": one_or_all(c.eos), "tie_word_embeddings": True}
    raw |= {key: getattr(c, name) for name, key in family.keys.items()}
    if c.n_labels is not None:
        names = c.labels or [f"LABEL_{i}" for i in range(c.n_labels)]
        raw |= {"id2label": {str(i): name for i, name in enumerate(names)},
                "label2id": {name: i for i, name in enumerate(names)}}
    if c.model_type == "roberta":
        raw["max_position_embeddings"] += c.pad + 1
    if c.is_deberta:
        raw |= {"relative_attention": True, "position_biased_input": c.has_positions,
                "pos_att_type": list(c.distance_terms), "max_relative_positions": c.reach,
                "legacy": False}            # the head for masked tokens by its first names
    if c.model_type == "deberta-v2":
        raw |= {"position_buckets": c.buckets or -1, "share_att_key": not c.own_distance_layers,
                "norm_rel_ebd": "layer_norm" if c.norm_distances else "none"}
    return raw


# ---- 3. tensors

def by_full_name(folder: Path, config: EncoderConfig) -> dict[str, Stored]:
    """Does huggingface.by_full_name() for an encoder. Says in the config which heads there are.

    A head for masked tokens counts only if there is none for labels. Raises UserError, too, if
    masked tokens are not scored by the embedding.
    """
    kind, family = config.model_type, FAMILIES[config.model_type]
    found, tied = {}, []
    for tensor in all_stored(folder):
        name = tensor.name
        for pattern, new in RENAMED.items():
            if config.is_deberta or not new.startswith("lm_predictions"):
                name = re.sub(pattern, new, name)
        full = family.full_name(name)
        if re.fullmatch(UNUSED, full) or (
                not config.has_positions and "embeddings.position_embeddings" in full):
            continue
        if full.endswith("decoder.weight"):
            tied.append(tensor)
        elif full in found and not (full.endswith(("lm_head.bias", "cls.predictions.bias"))
                                    and torch.equal(tensor.read(), found[full].read())):
            raise UserError(f"{tensor.path}: {tensor.name} is there twice")
        else:
            found[full] = tensor
    parts = {ours[0]: theirs for theirs, ours in HEADS[kind].items()}
    out = found.get(f"{parts['head.out']}.weight")
    config.n_labels = out.shape[0] if out is not None and out.shape else None
    config.labels = config.labels if len(config.labels) == config.n_labels else []
    config.has_pooler = f"{parts['head.dense']}.weight" in found
    config.has_mlm = config.n_labels is None and f"{parts['mlm_head.dense']}.weight" in found
    if not config.has_mlm:
        for part in ("mlm_head.dense", "mlm_head.norm", "mlm_head.bias"):
            for ending in ("", ".weight", ".bias"):
                found.pop(parts[part] + ending, None)
    embed = found.get(f"{family.prefix}embeddings.word_embeddings.weight")
    for tensor in tied if config.has_mlm else []:
        if embed is not None and not torch.equal(tensor.read(), embed.read()):
            raise UserError(f"{tensor.path}: {tensor.name} is not the embedding, as "
                            "tie_word_embeddings would have it: not supported")
    return found


def head_by_head(full: str, rows: Tensor, config) -> Tensor:
    """Orders rows q, k, v (3 C, ...) as DeBERTa v1's in_proj has them: q, k, v of each head.

    Rows of any other tensor stay as they are.
    """
    if not full.endswith(("in_proj", "in_proj.weight")):
        return rows
    return rows.unflatten(0, (3, config.n_heads, -1)).transpose(0, 1).flatten(0, 2)


def part_by_part(full: str, rows: Tensor, config) -> Tensor:
    """Undoes head_by_head()."""
    if not full.endswith(("in_proj", "in_proj.weight")):
        return rows
    return rows.unflatten(0, (config.n_heads, 3, -1)).transpose(0, 1).flatten(0, 2)
