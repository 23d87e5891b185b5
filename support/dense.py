"""Defines the base of the methods whose update has an entry of its own for each weight."""
import torch

from lora import AdapterLinear
from support.products import full_precision, low_precision, rebuilt


class DenseLinear(AdapterLinear):
    """Learns an update that no thin product replaces: Dual LoRA's, LoHa's, HiRA's.

    delta_weight(rows) returns rows of the update (n, in), and all of them without `rows`. Forward
    and backward build it block by block, so that it is never there as a whole.
    """

    def forward(self, x):
        # Two products in bf16, where W0 + dW would round a small dW away.
        if low_precision(x) or self.training and self.dropout.p > 0:
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
