"""Defines a bidirectional transformer, one class for four families: BERT, RoBERTa, DeBERTa v1, v3.

BERT (Devlin et al. 2018, arXiv 1810.04805) reads a whole text at once, so each token looks at all
others. Position and sentence are added to the words. RoBERTa (Liu et al. 2019, 1907.11692) counts
positions from another number. DeBERTa (He et al. 2020, 2006.03654; v3: 2021, 2111.09543) adds no
positions. Its attention sees how far two tokens are apart, by three terms:

    score(i, j) = (q_i . k_j  +  q_i . K_r  +  k_j . Q_r) / sqrt(3 D),    r = row(i - j)
                   content       content       position
                   to content    to position   to content

K_r and Q_r are the keys and queries of one row of a table, learnt for the distance i - j. v1 makes
them by layers of their own. v2 and v3 use k and q of the same block, so an adapter on one of these
acts twice.

Worked case: D = 1, two tokens, q = k = (1, 2), rows for the distances -1, 0, 1 with K = (5, 6, 7)
and Q = (0, 1, 0). Token 1 looks at token 0, so i - j = 1: (2 * 1 + 2 * 7 + 1 * 0) / sqrt 3 = 9.24.

Shapes: B texts, T tokens, C = d_model, H heads of D. Weights are (out, in). q, k, v, o, up and down
are separate nn.Linear layers with the names that model.py has, so the same targets mean the same.
"""
import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model import Embedding
from support.errors import UserError


@dataclass
class EncoderConfig:
    """Holds everything that decides the shape of an encoder.

    formats/encoders.py fills it from a config.json and the tensors beside it.
    """
    vocab_size: int
    d_model: int                        # C
    n_layers: int
    n_heads: int                        # H; D = C / H
    d_ff: int                           # width inside the MLP
    max_positions: int                  # longest text, in tokens
    model_type: str = "roberta"         # the family: bert, roberta, deberta or deberta-v2 (v3 too)
    norm_eps: float = 1e-5
    pad: int = 1                        # the token that fills up a batch
    bos: int | None = None
    eos: list[int] = field(default_factory=list)
    n_types: int = 0                    # rows of the table of sentence types, 0: no table
    has_positions: bool = True          # adds a position's vector to its word's
    dropout: float = 0.1                # share of numbers set to 0 in training, after each layer
    attention_dropout: float = 0.1      # the same, of the attention's shares
    head_dropout: float = 0.1           # the same, in the head for labels
    distance_terms: tuple[str, ...] = ()        # DeBERTa: of c2p (q_i . K_r) and p2c (k_j . Q_r)
    reach: int = 512                    # DeBERTa: distances from here on share a row
    buckets: int = 0                    # v2, v3: rows on either side, 0: a row for each distance
    own_distance_layers: bool = False   # pos_q and pos_k make Q_r and K_r, not q and k
    norm_distances: bool = False        # v2, v3: LayerNorm on the table's rows
    has_mlm: bool = False               # has the head for masked tokens
    has_pooler: bool = False            # has the dense layer of the head for labels
    n_labels: int | None = None         # has the head for labels
    labels: list[str] = field(default_factory=list)     # their names, if there are any

    @property
    def is_deberta(self) -> bool:
        return self.model_type.startswith("deberta")


def table_rows(config: EncoderConfig, T: int) -> Tensor:
    """Finds the table's row of each distance i - j, from -(T - 1) to T - 1: (2 T - 1,) int64.

    A distance r has row r + span, so row 0 is the farthest on one side. In v2 and v3 span is
    `buckets`, and distances beyond mid = buckets / 2 share rows, the more the farther:
    sign(r) (mid + ceil(ln(|r| / mid) / ln((reach - 1) / mid) (mid - 1))). With mid 4 and reach 16
    distance 4 is 4, 5 to 6 are 5, 7 to 9 are 6, 10 to 15 are 7.
    """
    r, span = torch.arange(1 - T, T), config.reach
    if config.buckets:
        span, mid = config.buckets, config.buckets // 2
        far = torch.log(r.abs().clamp(min=mid) / mid)
        far = far / torch.log(torch.tensor((config.reach - 1) / mid))   # exactly 1 at reach - 1
        far = torch.ceil(far * (mid - 1)).long() + mid
        r = torch.where(r.abs() <= mid, r, r.sign() * far)
    return (r + span).clamp(0, 2 * span - 1)


def skewed(x: Tensor) -> Tensor:
    """Reads (B, H, T, 2 T - 1) as (B, H, T, T) without a copy: out[i, j] = x[i, T - 1 - i + j].

    One row down is one column to the left, so a stride of 2 T - 2 between rows does it.
    """
    B, H, T, width = x.shape
    return x.as_strided((B, H, T, T), (*x.stride()[:2], width - 1, 1), x.storage_offset() + T - 1)


class Attention(nn.Module):
    """Lets each token gather from all tokens: o(softmax(scores) v)."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        c, C, self.config = config, config.d_model, config
        own = c.own_distance_layers
        self.q, self.v, self.o = nn.Linear(C, C), nn.Linear(C, C), nn.Linear(C, C)
        self.k = nn.Linear(C, C, bias=c.model_type != "deberta")
        self.pos_q = nn.Linear(C, C) if own and "p2c" in c.distance_terms else None
        self.pos_k = (nn.Linear(C, C, bias=c.model_type != "deberta")
                      if own and "c2p" in c.distance_terms else None)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.config.n_heads, -1)).transpose(-2, -3)     # (..., H, T, D)

    def forward(self, x: Tensor, mask: Tensor, distances: tuple[Tensor, Tensor] | None) -> Tensor:
        """Mixes the tokens of each text: x (B, T, C) -> (B, T, C).

        mask: (B, 1, 1, T), True for real tokens. distances: the rows of the table that are in
        reach (n, C), and which of them belongs to each distance (2 T - 1,); None without a table.
        """
        q, k, v = (self.heads(layer(x)) for layer in (self.q, self.k, self.v))  # (B, H, T, D)
        p = self.config.attention_dropout if self.training else 0.0
        if distances is None:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
        else:
            scores = self.scores(q, k, *distances)                              # (B, H, T, T)
            scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)
            y = F.dropout(scores.softmax(-1), p) @ v
        return self.o(y.transpose(1, 2).flatten(2))                             # (B, T, C)

    def scores(self, q: Tensor, k: Tensor, rows: Tensor, row_of: Tensor) -> Tensor:
        """Adds DeBERTa's terms: q, k (B, H, T, D) -> (B, H, T, T).

        K_r holds 2 T - 1 rows, from the distance T - 1 down. So q K_r' holds all q_i . K_r, and
        those of token i stand i columns further left than those of token 0. Its skewed view is the
        second term. Q_r goes from -(T - 1) up, and gives the third one transposed.
        """
        terms = self.config.distance_terms
        scale = math.sqrt(q.shape[-1] * (1 + len(terms)))
        q = q / scale                                   # smaller than the scores
        scores = q @ k.transpose(-1, -2)
        if terms:
            rows = F.dropout(rows, self.config.dropout, self.training)
        if "c2p" in terms:
            K_r = self.heads((self.pos_k or self.k)(rows)[row_of.flip(0)])      # (H, 2 T - 1, D)
            scores += skewed(torch.einsum("bhid,hrd->bhir", q, K_r))
        if "p2c" in terms:
            Q_r = self.heads((self.pos_q or self.q)(rows)[row_of]) / scale
            scores += skewed(torch.einsum("bhjd,hrd->bhjr", k, Q_r)).transpose(-1, -2)
        return scores


class MLP(nn.Module):
    """Transforms each token by itself: down(gelu(up x))."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.up = nn.Linear(config.d_model, config.d_ff)
        self.down = nn.Linear(config.d_ff, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """Adds attention, then the MLP, each followed by a norm on the sum: x = norm(x + f(x))."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.attn, self.mlp = Attention(config), MLP(config)
        self.attn_norm = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.mlp_norm = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.config = config

    def forward(self, x: Tensor, mask: Tensor, distances) -> Tensor:
        p = self.config.dropout
        x = self.attn_norm(x + F.dropout(self.attn(x, mask, distances), p, self.training))
        return self.mlp_norm(x + F.dropout(self.mlp(x), p, self.training))


class MaskedHead(nn.Module):
    """Predicts masked tokens: embed(norm(gelu(dense x))) + bias, (..., C) -> (..., vocab_size)."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.dense = nn.Linear(config.d_model, config.d_model)
        self.norm = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.bias = nn.Parameter(torch.empty(config.vocab_size))

    def forward(self, x: Tensor, embed: Tensor) -> Tensor:
        return F.linear(self.norm(F.gelu(self.dense(x))), embed, self.bias)


class LabelHead(nn.Module):
    """Judges a text by its first token: out(act(dense x)), (B, T, C) -> (B, n_labels).

    act is tanh, in DeBERTa gelu. RoBERTa drops numbers before dense too. A pretrained BERT brings
    its dense layer, the pooler.
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        self.dense = nn.Linear(config.d_model, config.d_model)
        self.out = None if config.n_labels is None else nn.Linear(config.d_model, config.n_labels)

    def forward(self, x: Tensor) -> Tensor:
        x, p = x[:, 0].to(self.dense.weight.dtype), self.config.head_dropout
        if self.config.model_type == "roberta":
            x = F.dropout(x, p, self.training)
        x = self.dense(x)
        x = F.gelu(x) if self.config.is_deberta else torch.tanh(x)
        return self.out(F.dropout(x, p, self.training))


class Encoder(nn.Module):
    """Reads texts, and judges them or fills their gaps.

    >>> states = model.hidden(tokens, mask)         # (B, T, C)
    >>> scores = model.mlm(tokens, mask)            # (B, T, vocab_size), if it has that head
    >>> labels = model.add_head(2)(tokens, mask)    # (B, 2)
    tokens: (B, T) int64. mask: (B, T), True (or 1) for real tokens, False for padding, which stands
    on the right; None if all are real. types: (B, T), 0 for tokens of the first sentence and 1 for
    the second; None means zeros.
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        c, self.config = config, config
        self.embed = Embedding(c.vocab_size, c.d_model)
        first = c.pad + 1 if c.model_type == "roberta" else 0       # the first token's position
        self.positions = Embedding(first + c.max_positions, c.d_model) if c.has_positions else None
        self.types = Embedding(c.n_types, c.d_model) if c.n_types else None
        self.embed_norm = nn.LayerNorm(c.d_model, eps=c.norm_eps)
        span = c.buckets or c.reach
        self.distances = Embedding(2 * span, c.d_model) if c.is_deberta else None
        self.distance_norm = (nn.LayerNorm(c.d_model, eps=c.norm_eps)
                              if c.norm_distances else None)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.n_layers))
        self.mlm_head = MaskedHead(c) if c.has_mlm else None
        self.head = LabelHead(c) if c.has_pooler or c.n_labels is not None else None
        self.checkpointing = False      # True: training keeps only the input of each block

    def init_weights(self, generator: torch.Generator | None = None) -> "Encoder":
        """Draws the weights as BERT does: N(0, 0.02^2), norms 1, biases 0."""
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02, generator=generator)
            else:
                nn.init.constant_(p, 0.0 if name.endswith("bias") else 1.0)
        return self

    def add_head(self, n_labels: int) -> "Encoder":
        """Gives the model a new head for labels, in the place of the head for masked tokens.

        Keeps a pretrained dense layer. What is new is drawn from N(0, 0.02^2), biases are 0. The
        head is float32 on a bf16 model too, since it trains.
        """
        config, device = self.config, self.embed.weight.device
        dtype = torch.promote_types(self.embed.weight.dtype, torch.float32)
        kept = self.head and self.head.dense
        config.n_labels, config.labels = n_labels, []
        config.has_mlm, config.has_pooler = False, True
        self.mlm_head, self.head = None, LabelHead(config).to(device, dtype).train(self.training)
        for layer in (self.head.dense, self.head.out):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.head.dense = kept.to(dtype) if kept else self.head.dense
        return self

    @property
    def label_head(self) -> str | None:
        """Names the module that is the head for labels, None without one."""
        return None if self.config.n_labels is None else "head"

    def hidden(self, tokens: Tensor, mask: Tensor | None, types: Tensor | None = None) -> Tensor:
        """Computes the last hidden states (B, T, C). Those of padding mean nothing."""
        c, (_, T) = self.config, tokens.shape
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
        x = self.embed(tokens)                                                  # (B, T, C)
        if self.positions is not None:
            positions = torch.arange(T, device=tokens.device)
            if c.model_type == "roberta":       # counts real tokens, from pad + 1; padding is pad
                positions = mask.cumsum(1) * mask + c.pad
            x = x + self.positions(positions)
        if self.types is not None:
            x = x + self.types(torch.zeros_like(tokens) if types is None else types)
        x = self.embed_norm(x)
        if c.is_deberta:
            x = x * mask[..., None]
        x = F.dropout(x, c.dropout, self.training)
        attend, distances = mask[:, None, None], self.near_distances(T)
        for layer in self.layers:
            if self.checkpointing and self.training:
                # The reentrant form would lose the gradient, since a frozen embedding has none.
                x = checkpoint(layer, x, attend, distances, use_reentrant=False)
            else:
                x = layer(x, attend, distances)
        return x

    def near_distances(self, T: int) -> tuple[Tensor, Tensor] | None:
        """Takes the rows of the table for texts of T tokens; Attention.forward() says which."""
        if self.distances is None:
            return None
        row_of = table_rows(self.config, T).to(self.distances.weight.device)
        low, high = row_of[0].item(), row_of[-1].item()         # rows grow with the distance
        rows = self.distances.weight if self.distance_norm is None else self.distance_norm(
            self.distances.weight)
        return rows[low:high + 1], row_of - low

    def mlm(self, tokens: Tensor, mask: Tensor | None, types: Tensor | None = None) -> Tensor:
        """Scores every token of the vocabulary at each place: (B, T, vocab_size).

        Raises UserError if the checkpoint has no head for masked tokens.
        """
        if self.mlm_head is None:
            raise UserError("the model has no head for masked tokens")
        return self.mlm_head(self.hidden(tokens, mask, types), self.embed.weight)

    def forward(self, tokens: Tensor, mask: Tensor | None, types: Tensor | None = None) -> Tensor:
        """Scores the labels of each text: (B, n_labels). Raises UserError without such a head."""
        if self.config.n_labels is None:
            raise UserError("the model has no head for labels: add_head(n_labels)")
        return self.head(self.hidden(tokens, mask, types))

    classify = forward      # the name that decoders have for it
