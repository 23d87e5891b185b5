"""Measures DeBERTa's forward, backward and memory beside transformers, on the same weights."""
from argparse import Namespace

import torch
from torch import nn

from encoder import Encoder, EncoderConfig
from experiments.contenders import ratio
from experiments.profiling import (addresses, kept_for_backward, median_and_spread, megabytes,
                                   print_table, race)
from experiments.references import INSTALLED, in_transformers
from support.run import PRECISIONS

SHAPES = ((8, 128), (2, 512))           # texts and their tokens
SIZE = dict(d_model=768, n_heads=12, d_ff=3072)         # DeBERTaV3-base's; 2 of its 12 layers


def encoder_part(args: Namespace) -> list[dict]:
    """Times forward and backward of all weights, in training mode with the base's dropout."""
    torch.manual_seed(0)
    config = EncoderConfig(
        vocab_size=1000, n_layers=2, max_positions=512, model_type="deberta-v2", norm_eps=1e-7,
        pad=0, has_positions=False, distance_terms=("c2p", "p2c"), reach=512, buckets=256,
        norm_distances=True, has_pooler=True, n_labels=2, **SIZE)
    model = Encoder(config).init_weights().to(args.device, PRECISIONS["bf16" if args.bf16
                                                                      else "fp32"]).train()
    models: dict[str, nn.Module] = {"ours": model}
    if INSTALLED:
        theirs = in_transformers(model, "AutoModelForSequenceClassification")
        models["transformers"] = theirs.to(args.device).train()
    rows = []
    for texts, length in SHAPES:
        tokens = torch.randint(1, 1000, (texts, length), device=args.device)
        mask = torch.ones_like(tokens)
        times = race({name: passes(model, tokens, mask) for name, model in models.items()}, 9,
                     args.device)
        found = {}
        for name, model in models.items():
            seconds, spread = median_and_spread([row[1] for row in times[name]])
            found[name] = {"contender": name, "texts": texts, "length": length,
                           "seconds": seconds, "spread": spread,
                           "kept_bytes": kept_by_attention(model, texts, length)}
        print_table(f"DeBERTa-v3, 2 layers 768 wide, {texts} texts of {length} tokens: forward + "
                    "backward", [{
                        "": name, "ms": f"{1e3 * row['seconds']:.0f}",
                        "+-": f"{1e3 * row['spread']:.0f}",
                        "kept by a layer's attention, MB": megabytes(row["kept_bytes"])}
                        | {f"/ {other}": f"{ratio(found, name, other):.2f}" for other in found
                           if other != "ours"} for name, row in found.items()])
        rows += found.values()
    return rows


def passes(model: nn.Module, tokens, mask) -> list:
    """Makes two calls: forward, and backward from it."""
    result = {}

    def forward():
        model.zero_grad()
        out = model(tokens, mask)
        result["loss"] = getattr(out, "logits", out).float().square().sum()
    return [forward, lambda: result["loss"].backward()]


def kept_by_attention(model: nn.Module, texts: int, length: int) -> int:
    """Counts the bytes that the first layer's attention holds between forward and backward.

    Its output layer, the weights, the input and the table of distances do not count.
    """
    weight = next(model.parameters())
    x = torch.randn(texts, length, SIZE["d_model"], device=weight.device, dtype=weight.dtype,
                    requires_grad=True)
    mask = torch.ones(texts, length, device=weight.device)
    if isinstance(model, Encoder):
        attention, table = model.layers[0].attn, model.distance_rows(length)
        table = table[0].detach(), table[1]
        owned = addresses(attention, x, *table)
        return kept_for_backward(lambda: attention(x, mask.bool()[:, None, None], table), owned)
    encoder = model.deberta.encoder
    attention, table = encoder.layer[0].attention.self, encoder.get_rel_embedding().detach()
    square, distances = encoder.get_attention_mask(mask), encoder.get_rel_pos(x)
    return kept_for_backward(
        lambda: attention(x, square, relative_pos=distances, rel_embeddings=table)[0],
        addresses(attention, x, table, square, distances))
