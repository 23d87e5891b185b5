"""Defines a decoder-only transformer, one class for two families.

GPT-2 (Radford et al. 2019): learned positions, LayerNorm, GELU (tanh form), biases everywhere.
LLaMA (Touvron et al. 2023, arXiv 2302.13971): rotary positions, RMSNorm, SwiGLU, grouped-query
attention (Ainslie et al. 2023, 2305.13245). Mistral, Qwen2 and Qwen3 share its layout.

Shapes: B sequences, T new tokens, S = T plus cached tokens, C = d_model, H heads of D = head_dim.
Weights are (out, in). q, k, v and o are separate nn.Linear layers in both families. So a target
name such as `q` means the same thing in every checkpoint. An adapter may wrap any of these
layers, so each is called as a module (never as F.linear on its weight).
"""
import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from formats.rope import scale_speeds


@dataclass
class Config:
    """Holds everything that decides the shape of a model.

    formats/huggingface.py fills it from a config.json.
    """
    vocab_size: int
    d_model: int                        # C, width of the residual stream
    n_layers: int
    n_heads: int                        # H, query heads
    n_kv_heads: int                     # key/value heads; each serves H / n_kv_heads query heads
    head_dim: int                       # D; H * D may differ from C (Qwen3)
    d_ff: int                           # width inside the MLP
    max_positions: int                  # longest text, in tokens, that is computed as it was meant
    model_type: str = "llama"           # the family: gpt2, llama, mistral, qwen2 or qwen3
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None    # how longer texts slow the rotations, see formats/rope.py
    beyond: dict = field(default_factory=dict)      # config.json's keys on longer texts, kept
    qkv_bias: bool = False              # Qwen2
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False               # Qwen3: RMSNorm on each head's q and k
    tied: bool = True                   # the output head is the embedding itself
    bos: int | None = None
    eos: list[int] = field(default_factory=list)    # generation stops at any of these
    pad: int | None = None

    @property
    def is_gpt2(self) -> bool:
        return self.model_type == "gpt2"


class Cache:
    """Keeps the keys and values of the tokens read so far, so that each is computed once.

    kv is (n_layers, 2, B, n_kv_heads, length, D), allocated once. Its first `used` positions are
    filled. rope holds the rotations of all `length` positions.
    """

    def __init__(self, config: Config, batch: int, length: int, like: Tensor):
        c = config
        self.kv = like.new_empty(c.n_layers, 2, batch, c.n_kv_heads, length, c.head_dim)
        self.rope = None if c.is_gpt2 else rotations(
            c, torch.arange(length, device=like.device), like.dtype)
        self.used = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores one layer's new k, v (B, n_kv_heads, T, D), and returns all of its k, v so far."""
        end = self.used + k.shape[2]
        keys, values = self.kv[layer].unbind()
        keys[:, :, self.used:end], values[:, :, self.used:end] = k, v
        return keys[:, :, :end], values[:, :, :end]

    def repeat(self, times: int | Tensor) -> None:
        """Repeats each sequence of the batch `times` times, side by side.

        times: one number for all, or a tensor (B,) with a number for each.
        """
        self.kv = self.kv.repeat_interleave(times, dim=2)

    def reorder(self, rows: Tensor, start: int) -> None:
        """Copies into each row i, from position `start` on, what row rows[i] holds there.

        Both rows must hold the same before `start`, as beams of one prompt do.
        """
        moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero()[:, 0]
        new = self.kv[:, :, :, :, start:self.used]
        new[:, :, moved] = new[:, :, rows[moved]]


def rope_frequencies(config: Config, device: torch.device) -> Tensor:
    """Computes how fast each pair of a head's coordinates turns: (D / 2,), in radians per token.

    RoPE (Su et al. 2021, arXiv 2104.09864): pair i turns by theta^(-2i/D) per token.
    LLaMA-3.1 and others slow some of the pairs, to read longer texts (formats/rope.py).
    """
    exponents = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    return scale_speeds(1 / config.rope_theta ** exponents, config.rope_theta, config.rope_scaling)


def rotations(config: Config, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Computes the cos and sin for rotate(), each of positions' shape + (D,).

    YaRN and LongRoPE make both longer by attention_factor, and with them q and k.
    """
    angles = positions[..., None].float() * rope_frequencies(config, positions.device)
    length = (config.rope_scaling or {}).get("attention_factor", 1)
    cos, sin = (length * angles.cos()).to(dtype), (length * angles.sin()).to(dtype)
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair a = x[i], b = x[i + D/2] into a cos - b sin, b cos + a sin.

    x is (B, H, T, D). cos and sin hold the same values in both halves, but sin is negative in the
    first. Hugging Face's files pair the coordinates in this way.
    """
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


class Attention(nn.Module):
    """Lets each token gather from the tokens up to itself: o(softmax(q k' / sqrt D) v)."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        c, self.config, self.layer = config, config, layer
        self.q = nn.Linear(c.d_model, c.n_heads * c.head_dim, bias=c.qkv_bias)
        self.k = nn.Linear(c.d_model, c.n_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.v = nn.Linear(c.d_model, c.n_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.o = nn.Linear(c.n_heads * c.head_dim, c.d_model, bias=c.o_bias)
        if c.qk_norm:
            self.q_norm = nn.RMSNorm(c.head_dim, eps=c.norm_eps)
            self.k_norm = nn.RMSNorm(c.head_dim, eps=c.norm_eps)

    def forward(self, x: Tensor, rope, mask: Tensor | None, cache: Cache | None) -> Tensor:
        """Mixes the tokens of each sequence: x (B, T, C) -> (B, T, C).

        rope: cos and sin for rotate(), None for GPT-2. mask: (B, 1, T, S), True where a query may
        look. None lets each look at all tokens up to itself.
        """
        c, (B, T, _) = self.config, x.shape
        q = self.q(x).view(B, T, c.n_heads, c.head_dim)
        k = self.k(x).view(B, T, c.n_kv_heads, c.head_dim)
        v = self.v(x).view(B, T, c.n_kv_heads, c.head_dim).transpose(1, 2)
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = q.transpose(1, 2), k.transpose(1, 2)                      # (B, H, T, D)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)                        # (B, n_kv_heads, S, D)
        if T == 1:      # for one token, heads that share k and v can stand as tokens of one head
            q = q.view(B, c.n_kv_heads, -1, c.head_dim)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None and T > 1,
            enable_gqa=q.shape[1] != k.shape[1])                         # (B, H, T, D)
        if T == 1:
            y = y.view(B, c.n_heads, 1, c.head_dim)
        return self.o(y.transpose(1, 2).flatten(2))                       # (B, T, C)


class MLP(nn.Module):
    """Transforms each token by itself.

    GPT-2: down(gelu(up x)). LLaMA: down(silu(gate x) * up x), SwiGLU (Shazeer 2020, 2002.05202).
    """

    def __init__(self, config: Config):
        super().__init__()
        if not config.is_gpt2:
            self.gate = nn.Linear(config.d_model, config.d_ff, bias=config.mlp_bias)
        self.up = nn.Linear(config.d_model, config.d_ff, bias=config.mlp_bias)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=config.mlp_bias)
        self.is_gpt2 = config.is_gpt2

    def forward(self, x: Tensor) -> Tensor:
        if self.is_gpt2:
            return self.down(F.gelu(self.up(x), approximate="tanh"))
        return self.down(F.silu(self.gate(x)) * self.up(x))


def make_norm(config: Config) -> nn.Module:
    """Makes the family's norm: LayerNorm for GPT-2, RMSNorm for the others."""
    kind = nn.LayerNorm if config.is_gpt2 else nn.RMSNorm
    return kind(config.d_model, eps=config.norm_eps)


class Block(nn.Module):
    """Adds attention, then the MLP, to the residual stream, each after a norm."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.attn_norm, self.attn = make_norm(config), Attention(config, layer)
        self.mlp_norm, self.mlp = make_norm(config), MLP(config)

    def forward(self, x: Tensor, rope, mask: Tensor | None, cache: Cache | None) -> Tensor:
        x = x + self.attn(self.attn_norm(x), rope, mask, cache)
        return x + self.mlp(self.mlp_norm(x))


class Embedding(nn.Embedding):
    """Starts without drawing numbers on torch's meta device.

    Drawing there would import torch's compiler, which takes a second.
    """

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class Transformer(nn.Module):
    """Predicts the next token of each position: model(tokens) -> logits.

    >>> logits = model(torch.tensor([[1, 5, 7]]))     # (1, 3, vocab_size)
    """

    def __init__(self, config: Config):
        super().__init__()
        c, self.config = config, config
        self.embed = Embedding(c.vocab_size, c.d_model)
        self.positions = Embedding(c.max_positions, c.d_model) if c.is_gpt2 else None
        self.layers = nn.ModuleList(Block(c, i) for i in range(c.n_layers))
        self.norm = make_norm(c)
        self.head = None if c.tied else nn.Linear(c.d_model, c.vocab_size, bias=False)
        self.score = None               # the head for labels, see add_head()
        self.checkpointing = False      # True: training keeps only the input of each block

    def init_weights(self, generator: torch.Generator | None = None) -> "Transformer":
        """Draws the weights as GPT-2 does, for training from scratch.

        They are N(0, 0.02^2). Weights that write into the residual stream have a std smaller by
        sqrt(2 n_layers), so that the stream does not grow with depth. Norms start at 1, biases
        at 0.
        """
        for name, p in self.named_parameters():
            if p.dim() == 2:
                into_stream = name.endswith(("attn.o.weight", "mlp.down.weight"))
                std = 0.02 / math.sqrt(2 * self.config.n_layers) if into_stream else 0.02
                nn.init.normal_(p, std=std, generator=generator)
            else:
                nn.init.constant_(p, 0.0 if name.endswith("bias") else 1.0)
        return self

    def attention_mask(self, mask: Tensor, T: int) -> Tensor:
        """Tells which keys each of the T last tokens may look at: (B, 1, T, S) bool.

        mask: (B, S) bool, True for real tokens.
        """
        S = mask.shape[1]
        if T == 1:                              # nothing lies ahead of the last token
            return torch.cat((mask[:, :-1], torch.ones_like(mask[:, -1:])), dim=1)[:, None, None]
        query = torch.arange(S - T, S, device=mask.device)[:, None]
        key = torch.arange(S, device=mask.device)[None, :]
        allowed = (key <= query) & mask[:, None, None, :]
        # Padding could look at nothing, and softmax over nothing has no value. It sees itself.
        return allowed | (key == query)

    def hidden(self, tokens: Tensor, mask: Tensor | None = None,
               cache: Cache | None = None) -> Tensor:
        """Computes the last hidden state, after the final norm: (B, T, C).

        tokens: (B, T) int64. mask: (B, S), True (or 1) for real tokens, False for padding. S counts
        the cached tokens too. Positions count real tokens only, so a left-padded prompt is read
        like one that stands alone. cache: the tokens follow those already in it.
        """
        c, (_, T) = self.config, tokens.shape
        past = cache.used if cache is not None else 0
        if mask is None:
            positions = torch.arange(past, past + T, device=tokens.device)   # (T,)
            attend = None
            if past and T > 1:                  # is_causal assumes that nothing is cached
                everything = tokens.new_ones(1, past + T, dtype=torch.bool)
                attend = self.attention_mask(everything, T)
        else:
            mask = mask.bool()
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -T:]        # (B, T)
            attend = self.attention_mask(mask, T)
        x = self.embed(tokens)                                           # (B, T, C)
        rope = None
        if c.is_gpt2:
            x = x + self.positions(positions)
        else:
            positions = positions if mask is None else positions[:, None]        # (B, 1, T), (T,)
            rope = (rotations(c, positions, x.dtype) if cache is None else
                    tuple(table[positions] for table in cache.rope))             # (..., T, D)
        for layer in self.layers:
            if self.checkpointing and self.training:
                # The reentrant form would lose the gradient, since a frozen embedding has none.
                x = checkpoint(layer, x, rope, attend, cache, use_reentrant=False)
            else:
                x = layer(x, rope, attend, cache)
        if cache is not None:
            cache.used += T
        return self.norm(x)

    def make_cache(self, batch: int, length: int) -> Cache:
        """Makes an empty cache for `batch` sequences of up to `length` tokens."""
        return Cache(self.config, batch, length, like=self.embed.weight)

    def logits(self, x: Tensor) -> Tensor:
        """Turns hidden states into scores of the next token: (..., C) -> (..., vocab_size)."""
        return F.linear(x, self.embed.weight) if self.head is None else self.head(x)

    def add_head(self, n_labels: int) -> "Transformer":
        """Gives the model a head for labels, drawn from N(0, 0.02^2).

        It is float32 on a bf16 model too, since it trains.
        """
        W = self.embed.weight
        self.score = nn.Linear(self.config.d_model, n_labels, bias=False, device=W.device,
                               dtype=torch.promote_types(W.dtype, torch.float32))
        nn.init.normal_(self.score.weight, std=0.02)
        return self

    @property
    def label_head(self) -> str | None:
        """Names the module that is the head for labels, None without one."""
        return None if self.score is None else "score"

    def classify(self, tokens: Tensor, mask: Tensor, types: Tensor | None = None) -> Tensor:
        """Scores the labels of each text by its last real token: (B, n_labels).

        transformers' ...ForSequenceClassification does the same. A decoder has no use for types.
        """
        last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)       # (B,)
        x = self.hidden(tokens, mask)[torch.arange(len(last), device=mask.device), last]
        return self.score(x.to(self.score.weight.dtype))

    def forward(self, tokens: Tensor, mask: Tensor | None = None,
                cache: Cache | None = None) -> Tensor:
        """Computes the logits (B, T, vocab_size). The arguments are those of hidden()."""
        return self.logits(self.hidden(tokens, mask, cache))
