"""Small inputs, and what all networks are made of written out in plain Python numbers."""

import pytest
import torch
from torch import nn

from ctrdist.backbones.base import Inputs, Shape

B, T, F, FH, D = 4, 3, 3, 1, 2


class ByHand:
    """`B` rows of three fields and up to three behaviours of one field, each two wide; the last row has none."""

    shape = Shape(F, FH, D)
    rows = range(B)

    def __init__(self) -> None:
        draws = torch.Generator().manual_seed(1)
        fields = torch.randn(B, F, D, dtype=torch.float64, generator=draws)
        history = torch.randn(B, T, FH, D, dtype=torch.float64, generator=draws)
        first_order = torch.randn(B, F + FH, dtype=torch.float64, generator=draws)
        self.mask = [[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]]
        self.inputs = Inputs(fields, history, torch.tensor(self.mask).bool(), (1,), first_order)

    def fields(self, b: int) -> list[list[float]]:
        """The fields of row b, then the mean of its behaviours."""
        seen = [self.inputs.history[b, t, 0].tolist() for t in range(T) if self.mask[b][t]]
        pooled = [sum(column) / len(seen) for column in zip(*seen, strict=True)] if seen else [0.0] * D
        return [*self.inputs.fields[b].tolist(), pooled]

    def joined(self, b: int) -> list[float]:
        return [number for field in self.fields(b) for number in field]

    def linear(self, b: int) -> float:
        """The sum of row b's weights of the first order."""
        return sum(self.inputs.first_order[b].tolist())

    def pairs(self, b: int) -> list[float]:
        """v_i * v_j over all pairs of two fields of row b, number by number."""
        fields, out = self.fields(b), [0.0] * D
        for i in range(len(fields)):
            for j in range(i + 1, len(fields)):
                out = [total + p * q for total, p, q in zip(out, fields[i], fields[j], strict=True)]
        return out

    def deep(self, network: nn.Module, x: list[float]) -> list[float]:
        """`network`'s linear layers, each followed by max(0, .), unit by unit."""
        for layer in network.modules():
            if isinstance(layer, nn.Linear):
                units = zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)
                x = [max(0.0, sum(w * v for w, v in zip(row, x, strict=True)) + bias) for row, bias in units]
        return x

    def output(self, layer: nn.Linear, x: list[float]) -> float:
        return sum(w * v for w, v in zip(layer.weight[0].tolist(), x, strict=True)) + layer.bias.item()


@pytest.fixture
def by_hand() -> ByHand:
    return ByHand()
