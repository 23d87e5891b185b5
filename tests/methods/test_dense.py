"""support/dense.py: a small update is not rounded away, and nothing is built in low precision."""
import pytest
import torch
from torch import nn

from hira import HiRALinear
from lora import AdapterLinear, LoRALinear
from support.dense import DenseLinear

SMALL = 1e-3                # W0 is 1 or -1, so bf16 rounds W0 + SMALL to W0


class Constant(DenseLinear):
    def delta_weight(self, rows=slice(None)):
        self.in_autocast = torch.is_autocast_enabled("cpu")
        return torch.full_like(self.W0[rows], SMALL, dtype=torch.float32)


def alternating(dtype):
    """Makes a layer whose rows sum to 0: of a constant input only the update is left."""
    base = nn.Linear(8, 3, bias=False, dtype=dtype)
    with torch.no_grad():
        base.weight.copy_(torch.tensor([1., -1.]).repeat(3, 4))
    return Constant(base, 1, 1.0)


@pytest.mark.parametrize("call", ["forward", "product"])
@pytest.mark.parametrize("dtype, autocast", [(torch.bfloat16, False), (torch.float32, True),
                                             (torch.float32, False)])
def test_a_small_update_counts_in_any_precision(call, dtype, autocast):
    layer = alternating(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = getattr(layer, call)(torch.ones(2, 8, dtype=dtype))
    assert torch.allclose(y.float(), torch.full((2, 3), 8 * SMALL), rtol=0.01)
    assert not layer.in_autocast


def test_an_update_is_built_without_autocast():
    seen = []

    class Watched(AdapterLinear):
        def delta_weight(self):
            seen.append(torch.is_autocast_enabled("cpu"))
            return torch.zeros_like(self.W0)

    with torch.autocast("cpu", torch.bfloat16):
        Watched(nn.Linear(4, 3), 1, 1.0)(torch.randn(2, 4))
    assert seen == [False]


@pytest.mark.parametrize("layer", [LoRALinear, HiRALinear])
def test_lengths_of_rows_are_the_same_under_autocast(layer):
    layer = layer(nn.Linear(40, 6), 3, 6.0)
    nn.init.normal_(layer.B)
    plain = layer.squared_norm()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.squared_norm(), plain)
