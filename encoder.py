"""Defines a transformer that reads a text in both directions: BERT, RoBERTa and DeBERTa.

Shapes: B texts, T tokens, C = d_model, H heads of D = C / H. Weights are (out, in). q, k, v, o, up
and down are separate nn.Linear layers with the names that model.py has, so the same targets mean
the same.

BERT (Devlin et al. 2018, arXiv 1810.04805): each token looks at all others. A vector for its
position, and one for its sentence, first or second, are added to each word's. RoBERTa (Liu et al.
2019, 1907.11692) is the same network, trained longer and on more text. Its positions start at
pad + 1. DeBERTa (He et al. 2020, 2006.03654; v2 and v3: 2021, 2111.09543) adds no positions. Its
attention sees how far two tokens are apart. Token i looks at token j, at the distance d = i - j:

    score(i, j) = (q_i . k_j  +  q_i . K_d  +  k_j . Q_d) / sqrt(3 D)       3 counts the terms
                   content       content       position
                   to content    to position   to content

q_i and k_j are the query and the key of a token, "." their inner product. K_d and Q_d are the key
and the query of a distance: a row of a table, which table_rows() finds. v1 makes them from the row
by layers of their own. v2 and v3 use k and q of the same block, so an adapter there acts on tokens
and on distances. (The paper writes j - i in the third term. The code of the checkpoints has i - j.)

Worked case: D = 1, two tokens, q = k = (1, 2). The distances -1, 0, 1 have K = (5, 6, 7) and
Q = (0, 1, 2). Token 1 looks at token 0, so d = 1: (2 * 1 + 2 * 7 + 1 * 2) / sqrt 3 = 10.39.
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
    pad: int = 1                        # fills up a batch; RoBERTa's positions start after it
    bos: int | None = None              # kept for config.json, as eos is
    eos: list[int] = field(default_factory=list)
    n_types: int = 0                    # rows of the table of sentence types, 0: no table
    has_positions: bool = True          # adds a position's vector to its word's
    dropout: float = 0.1                # share of numbers set to 0 in training, after layers
    attention_dropout: float = 0.1      # the same, of the softmax's output
    head_dropout: float = 0.1           # the same, in the head for labels
    distance_terms: tuple[str, ...] = ()        # DeBERTa: of c2p (q_i . K_d) and p2c (k_j . Q_d)
    reach: int = 512                    # DeBERTa: the table ends at this distance
    buckets: int = 0                    # v2, v3: rows on either side, 0: a row for each distance
    own_distance_layers: bool = False   # True: pos_k, pos_q make K_d, Q_d. False: k, q do
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

    Distance d has row d + span, held within 0 to 2 span - 1. In v2 and v3 far distances share a
    bucket b, whose row is b + span. With mid = buckets / 2 and span = buckets:
        b(d) = d                                                                    up to mid
        b(d) = sign(d) (mid + ceil((mid - 1) ln(|d| / mid) / ln((reach - 1) / mid)))    beyond
    With mid 4 and reach 16: b(4) = 4, b(5) = b(6) = 5, b(7) to b(9) = 6, b(10) to b(15) = 7.
    """
    d, span = torch.arange(1 - T, T), config.reach
    if config.buckets:
        span, mid = config.buckets, config.buckets // 2
        far = torch.log(d.abs().clamp(min=mid) / mid)
        far = far / torch.log(torch.tensor((config.reach - 1) / mid))   # exactly 1 at reach - 1
        far = torch.ceil(far * (mid - 1)).long() + mid
        d = torch.where(d.abs() <= mid, d, d.sign() * far)
    return (d + span).clamp(0, 2 * span - 1)


def skewed(x: Tensor) -> Tensor:
    """Reads (B, H, T, 2 T - 1) as (B, H, T, T) without a copy: out[i, j] = x[i, T - 1 - i + j].

    Each row starts one column further left than the one above. So the step from row to row is
    2 T - 2, not 2 T - 1. A row of x must be contiguous; B and H may stand in any order in memory.
    """
    B, H, T, width = x.shape
    return x.as_strided((B, H, T, T), (*x.stride()[:2], width - 1, 1), x.storage_offset() + T - 1)


class Attention(nn.Module):
    """Lets each token gather from all tokens: o(softmax(scores) v)."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config, C = config, config.d_model
        key_bias = config.model_type != "deberta"       # v1's keys have none
        own = config.distance_terms if config.own_distance_layers else ()
        self.q, self.v, self.o = nn.Linear(C, C), nn.Linear(C, C), nn.Linear(C, C)
        self.k = nn.Linear(C, C, bias=key_bias)
        self.pos_q = nn.Linear(C, C) if "p2c" in own else None
        self.pos_k = nn.Linear(C, C, bias=key_bias) if "c2p" in own else None

    def split(self, x: Tensor) -> Tensor:
        """Cuts the last dimension into heads: (..., n, C) -> (..., H, n, D)."""
        return x.unflatten(-1, (self.config.n_heads, -1)).transpose(-2, -3)

    def forward(self, x: Tensor, mask: Tensor, distances: tuple[Tensor, Tensor] | None) -> Tensor:
        """Mixes the tokens of each text: x (B, T, C) -> (B, T, C).

        mask: (B, 1, 1, T), True for real tokens. distances: what Encoder.distance_rows() returns.
        """
        q, k, v = (self.split(layer(x)) for layer in (self.q, self.k, self.v))  # (B, H, T, D)
        p = self.config.attention_dropout if self.training else 0.0
        if distances is None:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
        else:
            scores = self.scores(q, k, *distances)                              # (B, H, T, T)
            # The lowest number, not -inf: a text of padding alone would become NaN.
            scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)
            y = F.dropout(scores.softmax(-1), p) @ v
        return self.o(y.transpose(1, 2).flatten(2))                             # (B, T, C)

    def scores(self, q: Tensor, k: Tensor, rows: Tensor, row_of: Tensor) -> Tensor:
        """Computes DeBERTa's scores: q, k (B, H, T, D) -> (B, H, T, T).

        rows: (n, C), of the table. row_of: (2 T - 1,), the row of each distance, from -(T - 1) up.
        The second term takes K from the distance T - 1 down. Column c of q K^T is then the distance
        T - 1 - c. So (i, j) stands in column T - 1 - i + j, which is what skewed() reads. The third
        term has j for its rows, and is transposed. So its columns go up, from -(T - 1).
        """
        terms = self.config.distance_terms
        scale = math.sqrt(q.shape[-1] * (1 + len(terms)))
        q = q / scale                                   # here, since the scores are more numbers
        scores = q @ k.transpose(-1, -2)
        if terms:
            rows = F.dropout(rows, self.config.dropout, self.training)
        if "c2p" in terms:
            K = self.split((self.pos_k or self.k)(rows)[row_of.flip(0)])        # (H, 2 T - 1, D)
            scores += skewed(torch.einsum("bhid,hcd->bhic", q, K))
        if "p2c" in terms:
            Q = self.split((self.pos_q or self.q)(rows)[row_of]) / scale
            scores += skewed(torch.einsum("bhjd,hcd->bhjc", k, Q)).transpose(-1, -2)
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
    """Adds attention, then the MLP, to x: x = norm(x + f(x)). (model.py: x = x + f(norm(x)).)"""

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
    """Predicts masked tokens: W norm(gelu(dense x)) + bias, (..., C) -> (..., vocab_size).

    W is the embedding. (DeBERTa's pretraining added positions before this head. transformers leaves
    them out, and so does this file.)
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.dense = nn.Linear(config.d_model, config.d_model)
        self.norm = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.bias = nn.Parameter(torch.empty(config.vocab_size))

    def forward(self, x: Tensor, W: Tensor) -> Tensor:
        return F.linear(self.norm(F.gelu(self.dense(x))), W, self.bias)


class LabelHead(nn.Module):
    """Judges a text by its first token: out(act(dense x)), (B, T, C) -> (B, n_labels).

    act is tanh, in DeBERTa gelu. RoBERTa has dropout before dense too. A pretrained BERT brings its
    dense layer, the pooler.
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
    the second; None means zeros. RoBERTa knows no other.
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
        """Draws the weights as transformers does: N(0, 0.02^2), norms 1, biases 0."""
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02, generator=generator)
            else:
                nn.init.constant_(p, 0.0 if name.endswith("bias") else 1.0)
        return self

    def add_head(self, n_labels: int) -> "Encoder":
        """Gives the model a new head for labels, in the place of the head for masked tokens.

        Keeps a pretrained dense layer. New weights are drawn from N(0, 0.02^2), new biases are 0.
        The head is float32 on a bf16 model too, since it trains.
        """
        config, W = self.config, self.embed.weight
        kept = self.head and self.head.dense
        config.n_labels, config.labels = n_labels, []
        config.has_mlm, config.has_pooler = False, True
        self.mlm_head, self.head = None, LabelHead(config).train(self.training)
        for layer in (self.head.dense, self.head.out):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        if kept is not None:
            self.head.dense = kept
        self.head.to(W.device, torch.promote_types(W.dtype, torch.float32))
        return self

    @property
    def label_head(self) -> str | None:
        """Names the module that is the head for labels, None without one."""
        return None if self.config.n_labels is None else "head"

    def hidden(self, tokens: Tensor, mask: Tensor | None = None,
               types: Tensor | None = None) -> Tensor:
        """Computes the last hidden states (B, T, C). Those of padding mean nothing."""
        c, (_, T) = self.config, tokens.shape
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
        x = self.embed(tokens)                                                  # (B, T, C)
        if self.positions is not None:
            positions = torch.arange(T, device=tokens.device)
            if c.model_type == "roberta":       # counts real tokens; padding has the position pad
                positions = mask.cumsum(1) * mask + c.pad
            x = x + self.positions(positions)
        if self.types is not None:
            x = x + self.types(torch.zeros_like(tokens) if types is None else types)
        x = F.dropout(self.embed_norm(x), c.dropout, self.training)
        attend, distances = mask[:, None, None], self.distance_rows(T)
        for layer in self.layers:
            if self.checkpointing and self.training:
                # The reentrant form would lose the gradient, since a frozen embedding has none.
                x = checkpoint(layer, x, attend, distances, use_reentrant=False)
            else:
                x = layer(x, attend, distances)
        return x

    def distance_rows(self, T: int) -> tuple[Tensor, Tensor] | None:
        """Takes the table's rows that texts of T tokens need, and the row of each distance.

        Returns (n, C) and (2 T - 1,), from -(T - 1) up. None if the family has no table.
        """
        if self.distances is None:
            return None
        row_of = table_rows(self.config, T)             # on the CPU: a GPU need not be waited for
        low, high = int(row_of[0]), int(row_of[-1])     # the smallest and the largest
        rows = self.distances.weight[low:high + 1]
        if self.distance_norm is not None:
            rows = self.distance_norm(rows)
        return rows, (row_of - low).to(rows.device)

    def mlm(self, tokens: Tensor, mask: Tensor | None = None,
            types: Tensor | None = None) -> Tensor:
        """Scores every token of the vocabulary at each place: (B, T, vocab_size).

        Raises UserError if the checkpoint has no head for masked tokens.
        """
        if self.mlm_head is None:
            raise UserError("the model has no head for masked tokens")
        return self.mlm_head(self.hidden(tokens, mask, types), self.embed.weight)

    def forward(self, tokens: Tensor, mask: Tensor | None = None,
                types: Tensor | None = None) -> Tensor:
        """Scores the labels of each text: (B, n_labels). Raises UserError without such a head."""
        if self.config.n_labels is None:
            raise UserError("the model has no head for labels: add_head(n_labels)")
        return self.head(self.hidden(tokens, mask, types))

    classify = forward      # the name that decoders have for it
