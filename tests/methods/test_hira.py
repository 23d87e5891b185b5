import parity
import pytest
import torch
from parity import assert_follows, gradients
from torch import nn

from hira import HiRALinear
from lora import LoRALinear


def test_a_hand_worked_2x2_layer_gives_these_numbers():
    layer = HiRALinear(nn.Linear(2, 2), rank=1, alpha=99)       # alpha is not used
    with torch.no_grad():
        layer.base.weight.copy_(torch.tensor([[1., 2.], [3., 4.]]))
        layer.base.bias.copy_(torch.tensor([10., 20.]))
        layer.A.copy_(torch.tensor([[1., 2.]]))
        layer.B.copy_(torch.tensor([[1.], [-1.]]))              # B A = [[1, 2], [-1, -2]]
    assert layer.delta_weight().tolist() == [[1, 4], [-3, -8]]
    y, dx, dA, dB = gradients(layer, layer, torch.tensor([1., 1.]), torch.tensor([1., 2.]))
    assert y.tolist() == [2 + 6 + 10, 0 - 4 + 20]               # W' = [[2, 6], [0, -4]]
    assert dx.tolist() == [2, -2]                               # g W'
    # dW = g' x = [[1, 1], [2, 2]]; times W0: [[1, 2], [6, 8]]
    assert dB.tolist() == [[5], [22]]                           # [[1, 2], [6, 8]] A'
    assert dA.tolist() == [[-5, -6]]                            # B' [[1, 2], [6, 8]]


def test_output_and_all_gradients_equal_the_naive_definition_in_float64():
    layer = HiRALinear(nn.Linear(11, 17, dtype=torch.float64), 3, 6)
    nn.init.normal_(layer.B)
    x, g = torch.randn(2, 7, 11).double(), torch.randn(2, 7, 17).double()
    assert_follows(layer, lambda layer, x: x @ (layer.base.weight * (1 + layer.B @ layer.A)).t()
                   + layer.base.bias, x, g)


def test_a_weight_of_zero_stays_zero_and_the_rank_is_high():
    base = nn.Linear(40, 40, dtype=torch.float64)
    with torch.no_grad():
        base.weight[3, 5] = 0
    layer = HiRALinear(base, 2, 4)
    nn.init.normal_(layer.B)
    assert layer.merged_weight()[3, 5] == 0
    assert torch.linalg.matrix_rank(layer.delta_weight()) == 40


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_it_trains_as_peft_does_in_float64(dropout):
    peft = pytest.importorskip("peft")
    config = peft.HiraConfig(r=3, hira_dropout=dropout, target_modules=["q", "v"],
                             init_weights=False)
    for _ in parity.trains_as_peft_does(config, parity.HIRA, "hira", rank=3, dropout=dropout):
        pass


def test_it_starts_as_lora_does():
    torch.manual_seed(3)
    layer = HiRALinear(nn.Linear(25, 6), 4, 8)
    torch.manual_seed(3)
    lora = LoRALinear(nn.Linear(25, 6), 4, 8)
    assert torch.equal(layer.A, lora.A) and not layer.B.any()
