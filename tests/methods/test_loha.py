import parity
import pytest
import torch
from parity import assert_follows, gradients
from torch import nn

from loha import LoHaLinear
from support.errors import UserError


def loha(n_in, n_out, rank=5, alpha=4.0, **kwargs):
    """Makes a layer as in the middle of training: C is not zero."""
    layer = LoHaLinear(nn.Linear(n_in, n_out, dtype=torch.float64), rank, alpha, **kwargs)
    nn.init.normal_(layer.C)
    return layer


def test_a_hand_worked_2x2_layer_gives_these_numbers():
    layer = LoHaLinear(nn.Linear(2, 2), rank=2, alpha=2)        # scale = 2 / sqrt(1 * 1)
    with torch.no_grad():
        layer.base.weight.copy_(torch.tensor([[1., 0.], [0., 1.]]))
        layer.base.bias.copy_(torch.tensor([10., 20.]))
        layer.A.copy_(torch.tensor([[1., -1.]]))
        layer.B.copy_(torch.tensor([[2.], [-1.]]))              # B A = [[2, -2], [-1, 1]]
        layer.C.copy_(torch.tensor([[1., 1.]]))
        layer.D.copy_(torch.tensor([[1.], [3.]]))               # D C = [[1, 1], [3, 3]]
    assert layer.delta_weight().tolist() == [[4, -4], [-6, 6]]
    y, dx, dA, dB, dC, dD = gradients(layer, layer, torch.tensor([1., 2.]), torch.tensor([1., 1.]))
    assert y.tolist() == [5 - 8 + 10, -6 + 14 + 20]             # W' = [[5, -4], [-6, 7]]
    assert dx.tolist() == [-1, 3]                               # g W'
    # dW = g' x = [[1, 2], [1, 2]]. Through B A: 2 dW (.) D C = [[2, 4], [6, 12]]
    assert dB.tolist() == [[-2], [-6]]                          # [[2, 4], [6, 12]] A'
    assert dA.tolist() == [[-2, -4]]                            # B' [[2, 4], [6, 12]]
    # Through D C: 2 dW (.) B A = [[4, -8], [-2, 4]]
    assert dD.tolist() == [[-4], [2]]
    assert dC.tolist() == [[-2, 4]]


def test_output_and_all_gradients_equal_the_naive_definition_in_float64():
    layer = loha(11, 17)
    x, g = torch.randn(2, 7, 11).double(), torch.randn(2, 7, 17).double()

    def naive(layer, x):
        W = layer.base.weight + 4 / 6 ** .5 * (layer.B @ layer.A) * (layer.D @ layer.C)
        return x @ W.t() + layer.base.bias

    assert layer.A.shape == (2, 11) and layer.C.shape == (3, 11)
    assert_follows(layer, naive, x, g)


def test_the_rank_of_the_update_is_the_product_of_the_two_ranks():
    layer = loha(64, 64, rank=8)
    assert torch.linalg.matrix_rank(layer.delta_weight()) == 4 * 4


def test_a_rank_too_low_to_share_is_refused():
    with pytest.raises(UserError, match="at least 2"):
        LoHaLinear(nn.Linear(3, 3), 1, 2.0)


def test_it_starts_as_peft_s_and_trains_as_peft_does_in_float64():
    peft = pytest.importorskip("peft")

    def starts_alike(ours, theirs):
        torch.manual_seed(0)
        mine = LoHaLinear(nn.Linear(200, 300), 8, 16)
        other = peft.get_peft_model(nn.Sequential(nn.Linear(200, 300)), peft.LoHaConfig(
            r=4, alpha=16, target_modules=["0"])).base_model.model[0]
        for name, key in parity.LOHA.items():
            a, b = mine.get_parameter(name), other.get_parameter(key)
            assert a.shape == b.shape and a.std().item() == pytest.approx(b.std().item(), rel=0.1)

    config = peft.LoHaConfig(r=2, alpha=5, target_modules=["q", "v"], init_weights=False)
    for _ in parity.trains_as_peft_does(config, parity.LOHA, "loha", rank=4, alpha=5,
                                        prepare=starts_alike):
        pass
