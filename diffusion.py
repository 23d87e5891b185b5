"""Defines a small text-to-image transformer, which draws a picture for a caption.

It learns a rectified flow (flow matching: Liu et al. 2022, arXiv 2209.03003; t as in Esser et al.
2024, 2403.03206). Let x be a picture with values in [-1, 1], and e noise from N(0, 1) of its shape.
Between them lies a straight line:
    z_t = (1 - t) x + t e,      t in [0, 1],    so its velocity dz/dt is e - x at every t
The model sees z_t, t and the caption, and learns this velocity:
    loss = mean (v(z_t, t, caption) - (e - x))^2
Many x and e can give the same z_t, so the best v is the mean of their e - x. At t = 1 that makes
z - v the average picture of the caption. The nearer t is to 0, the more of one picture is settled.

sample() starts at noise, t = 1, and walks back to t = 0 in n equal steps (Euler):
    z <- z - v(z, t, caption) / n,          t = 1, 1 - 1/n, ..., 1/n
Classifier-free guidance (Ho and Salimans 2022, 2207.12598; their w is g - 1): a tenth of the
captions of pretraining are empty, so one model knows both velocities. sample() takes
    v = v(empty) + g (v(caption) - v(empty))
With g above 1 pictures keep closer to the caption, and vary less.

The model is a diffusion transformer (DiT: Peebles and Xie 2022, 2212.09748). It reads the caption's
words and the picture's patches as one sequence, as model.py reads tokens, but without a causal
mask. Time sets the scale, shift and gate of each block (adaLN; one network for all blocks: Chen et
al. 2023, 2310.00426).
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass
class PictureConfig:
    """Holds everything that decides the shape of a picture model."""
    n_words: int                        # size of the vocabulary; number 0 is "no word"
    caption: int = 8                    # L, words of a caption, filled up with "no word"
    side: int = 32                      # S, rows and columns of a picture
    patch: int = 4                      # P, rows and columns of a patch; n = S / P in a row
    d_model: int = 128                  # C, width of the residual stream
    n_layers: int = 6
    n_heads: int = 4                    # H
    d_ff: int = 352                     # width inside the MLP
    smooth: int = 12                    # K, numbers of each pixel before the last convolution
    model_type: str = "pictures"

    @property
    def max_positions(self) -> int:     # the other models' name for the longest text
        return self.caption


class Attention(nn.Module):
    """Lets each token gather from all tokens: o(softmax(q k' / sqrt D) v), D = C / H.

    q and k are RMS-normed in each head (QK-norm: Dehghani et al. 2023, 2302.05442).
    """

    def __init__(self, config: PictureConfig):
        super().__init__()
        C, self.heads = config.d_model, config.n_heads
        self.q, self.k, self.v, self.o = (nn.Linear(C, C, bias=False) for _ in range(4))
        self.q_norm, self.k_norm = (nn.RMSNorm(C // config.n_heads, eps=1e-6) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (self.heads, -1))              # (B, T, H, D)
                   for part in (self.q, self.k, self.v))
        q, k, v = (part.transpose(1, 2)                                 # (B, H, T, D)
                   for part in (self.q_norm(q), self.k_norm(k), v))
        y = F.scaled_dot_product_attention(q, k, v)                     # (B, H, T, D)
        return self.o(y.transpose(1, 2).flatten(2))                     # (B, T, C)


class MLP(nn.Module):
    """Transforms each token by itself: down(silu(gate x) * up x), SwiGLU (Shazeer 2020)."""

    def __init__(self, config: PictureConfig):
        super().__init__()
        self.gate, self.up = (nn.Linear(config.d_model, config.d_ff, bias=False) for _ in range(2))
        self.down = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Normalises each token to mean 0 and variance 1, then returns (1 + scale) x + shift.

    x: (B, T, C). shift, scale: (B, 1, C).
    """
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift


class Block(nn.Module):
    """Adds attention, then the MLP, to the residual stream: input modulated, output gated."""

    def __init__(self, config: PictureConfig):
        super().__init__()
        self.attn, self.mlp = Attention(config), MLP(config)
        self.table = nn.Embedding(6, config.d_model)        # this block's, added to the shared six

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Returns the stream (B, T, C); x is like it. time: (B, 6, C), the same for all blocks."""
        six = (time + self.table.weight)[:, :, None].unbind(1)          # each (B, 1, C)
        shift, scale, gate, shift2, scale2, gate2 = six
        x = x + gate * self.attn(modulated(x, shift, scale))
        return x + gate2 * self.mlp(modulated(x, shift2, scale2))


def waves(t: Tensor, width: int) -> Tensor:
    """Returns cos and sin of t at width / 2 speeds, from 1 to 1000 radians per unit of t.

    t: (B,) -> (B, width). Positions of a transformer are told so, too (Vaswani et al. 2017).
    """
    speeds = torch.logspace(0, 3, width // 2, device=t.device)
    angles = t[:, None] * speeds
    return torch.cat((angles.cos(), angles.sin()), -1)


class PictureModel(nn.Module):
    """Predicts the velocity of a noisy picture: model(z, t, words) -> like z.

    z: (B, 3, S, S). t: (B,) in [0, 1]. words: (B, L) int64; "no word" is read like any other.
    """

    def __init__(self, config: PictureConfig):
        super().__init__()
        c, self.config = config, config
        C, n = c.d_model, c.side // c.patch
        self.embed = nn.Embedding(c.n_words, C)
        self.places = nn.Embedding(c.caption + n * n, C)        # one for each word and each patch
        self.patches = nn.Linear(3 * c.patch ** 2, C)
        self.time_in, self.time_out = nn.Linear(C, C), nn.Linear(C, 6 * C)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.n_layers))
        self.last = nn.Linear(C, c.smooth * c.patch ** 2)
        self.smooth = nn.Conv2d(c.smooth, 3, 3, padding=1)      # hides the seams between patches
        self.checkpointing = False      # True: training keeps only the input of each block

    def init_weights(self, generator: torch.Generator | None = None) -> "PictureModel":
        """Draws matrices from N(0, 1 / inputs) and embeddings from N(0, 0.3^2); returns the model.

        Norms start at 1. Shifts, scales, gates, biases and the output start at 0.
        """
        for name, p in self.named_parameters():
            if "norm" in name:
                nn.init.ones_(p)
            elif p.dim() < 2 or "table" in name or name.startswith(("time_out", "smooth")):
                nn.init.zeros_(p)
            else:
                std = 0.3 if name in ("embed.weight", "places.weight") else p.shape[1] ** -0.5
                nn.init.normal_(p, std=std, generator=generator)
        return self

    def forward(self, z: Tensor, t: Tensor, words: Tensor) -> Tensor:
        c, dtype = self.config, self.embed.weight.dtype
        patches = F.pixel_unshuffle(z.to(dtype), c.patch)                   # (B, 3 P P, n, n)
        patches = self.patches(patches.flatten(2).transpose(1, 2))          # (B, n n, C)
        x = torch.cat((self.embed(words), patches), 1) + self.places.weight     # (B, L + n n, C)
        time = F.silu(self.time_in(waves(t, c.d_model).to(dtype)))          # (B, C)
        time = self.time_out(time).unflatten(-1, (6, -1))                   # (B, 6, C)
        for layer in self.layers:
            if self.checkpointing and self.training:
                x = checkpoint(layer, x, time, use_reentrant=False)
            else:
                x = layer(x, time)
        x = self.last(F.layer_norm(x[:, c.caption:], x.shape[-1:]))         # (B, n n, K P P)
        x = x.transpose(1, 2).unflatten(2, (c.side // c.patch, -1))         # (B, K P P, n, n)
        return self.smooth(F.pixel_shuffle(x, c.patch)).to(z.dtype)         # (B, 3, S, S)


def flow_loss(model: PictureModel, pictures: Tensor, words: Tensor, t: Tensor,
              noise: Tensor) -> Tensor:
    """Returns the mean of (v - (e - x))^2 over each picture: (B,).

    pictures, noise: x and e, (B, 3, S, S). words: (B, L). t: (B,); it is the caller's to draw, as
    the sigmoid of N(0, 1), which puts most near 1/2 (Esser et al., section 3.1).
    """
    z = torch.lerp(pictures, noise, t[:, None, None, None])
    return (model(z, t, words) - (noise - pictures)).square().mean((1, 2, 3))


@torch.no_grad()
def sample(model: PictureModel, words: Tensor, noise: Tensor, steps: int = 16,
           guidance: float = 2.5) -> Tensor:
    """Draws captions: words (B, L), noise (B, 3, S, S) -> pictures (B, 3, S, S) in [-1, 1].

    guidance: g above; 1 takes v(caption) alone. Each step runs the model on 2 B pictures.
    """
    z, both = noise, torch.cat((words, torch.zeros_like(words)))
    for i in range(steps):
        t = torch.full((len(both),), 1 - i / steps, device=z.device)
        told, empty = model(torch.cat((z, z)), t, both).chunk(2)
        z = z - (empty + guidance * (told - empty)) / steps
    return z.clamp(-1, 1)
