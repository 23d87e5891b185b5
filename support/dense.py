"""Defines the base of the methods whose update has no thin factors to multiply by."""
import torch

from lora import AdapterLinear
from support.products import full_precision, low_precision, rebuilt


class DenseLinear(AdapterLinear):
    """Builds the update in every forward, and again in backward, in blocks of its rows.

    delta_weight(rows) returns rows of the update (n, in), and all of them without `rows`. Training
    never holds all of it. Beside LoRA it costs one large product more: backward computes dL/dW'.
    """

    def forward(self, x):
        # Two products where the sum W0 + dW would round a small dW away, and where dropout acts on
        # the input of dW alone.
        if low_precision(x) or (self.training and self.dropout.p > 0):
            return super().forward(x)
        return rebuilt(x, self.updated_rows, self.blocks(), self.base.bias)

    def update(self, x):
        return rebuilt(x, self.delta_weight, self.blocks())

    def product(self, x):
        if low_precision(x):
            return super().product(x)
        return rebuilt(x, self.updated_rows, self.blocks())

    def squared_norm(self):
        with full_precision(self.W0):
            return torch.cat([torch.linalg.vector_norm(self.updated_rows(rows), dim=1)
                              for rows in self.blocks()]) ** 2

    def updated_rows(self, rows: slice):
        """Returns rows of W0 + delta_weight(): (n, in)."""
        return self.rows(rows) + self.delta_weight(rows)

    def blocks(self) -> list[slice]:
        """Cuts the rows into blocks of 1024: large for products, small for memory."""
        return [slice(i, i + 1024) for i in range(0, len(self.W0), 1024)]
