"""Compares a layer with its definition in plain autograd, and with the same layer in peft.

Beside peft it trains both in float64, with the same weights, batches and optimizer.
"""
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from methods import adapters, inject

# our parameter -> peft's
LORA = {"A": "lora_A.default.weight", "B": "lora_B.default.weight"}
DORA = LORA | {"magnitude": "lora_magnitude_vector.default.weight"}
ADALORA = {"P": "lora_B.default", "lam": "lora_E.default", "Q": "lora_A.default"}
LOHA = {"A": "hada_w1_b.default", "B": "hada_w1_a.default",
        "C": "hada_w2_b.default", "D": "hada_w2_a.default"}
HIRA = {"A": "hira_A.default", "B": "hira_B.default"}


class Net(nn.Module):
    """Has two targets, and returns an object with a loss, to which peft's AdaLoRA adds its penalty.
    """

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.q, self.v = nn.Linear(12, 20), nn.Linear(20, 7)

    def forward(self, x, target):
        y = self.v(torch.tanh(self.q(x)))
        return SimpleNamespace(y=y, loss=F.mse_loss(y, target))


def gradients(layer, forward, x, g):
    """Returns the output of `forward`, the gradient of x, and that of each parameter."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = forward(x)
    y.backward(g)
    return [y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters(recurse=False))]


def assert_follows(layer, naive, x, g):
    """Asserts that the layer has the output and all gradients of its definition; returns these.

    naive(layer, x) is the definition, in plain autograd. The merged weight must give them too.
    """
    right = gradients(layer, lambda x: naive(layer, x), x, g)
    for forward in (layer, lambda x: F.linear(x, layer.merged_weight(), layer.base.bias)):
        for mine, expected in zip(gradients(layer, forward, x, g), right):
            assert torch.allclose(mine, expected, rtol=1e-9, atol=1e-12 * g.abs().max().item())
    return right


def trains_as_peft_does(config, names, method, steps=10, theirs_on_step=None, prepare=None,
                        **hyper):
    """Asserts that outputs, loss, gradients and weights stay equal; yields (step, ours).

    prepare(ours, theirs) is called after our parameters have been made equal to theirs.
    """
    import peft
    theirs = peft.get_peft_model(Net(), config).double().base_model      # adds the penalty
    ours = inject(Net().double(), method, ["q", "v"], **hyper)
    layers = adapters(ours)
    pairs = [(layer.get_parameter(mine), theirs.model.get_submodule(path)
              .get_parameter(name)) for path, layer in layers.items()
             for mine, name in names.items()]
    kind, layers = type(layers["q"]), list(layers.values())
    assert len(pairs) == sum(p.requires_grad for p in ours.parameters())
    with torch.no_grad():
        for mine, other in pairs:
            mine.copy_(other.view_as(mine))
        if prepare is not None:
            prepare(ours, theirs)
    optimizers = [torch.optim.AdamW(side, lr=0.01, weight_decay=0.1) for side in zip(*pairs)]
    for step in range(steps):
        x, target = torch.randn(9, 12).double(), torch.randn(9, 7).double()
        outputs = []
        for model, optimizer in zip((ours, theirs), optimizers):
            optimizer.zero_grad()
            torch.manual_seed(step)                    # dropout, if there is any, drops the same
            outputs.append(model(x, target))
        outputs[0].loss = outputs[0].loss + kind.extra_loss(layers)
        assert torch.allclose(outputs[0].y, outputs[1].y, rtol=1e-12, atol=1e-12)
        assert torch.allclose(outputs[0].loss, outputs[1].loss, rtol=1e-12, atol=0)
        for output in outputs:
            output.loss.backward()
        for mine, other in pairs:
            assert torch.allclose(mine.grad, other.grad.view_as(mine), rtol=1e-9, atol=1e-12)
        for optimizer in optimizers:
            optimizer.step()
        kind.on_step(layers, step, steps)
        if theirs_on_step is not None:
            theirs_on_step(theirs, step)
        for mine, other in pairs:
            assert torch.allclose(mine, other.view_as(mine), rtol=1e-9, atol=1e-11)
        yield step, ours
