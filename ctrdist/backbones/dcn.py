"""Deep & Cross Network (Wang et al., ADKDD 2017)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ctrdist.backbones.base import Backbone, Inputs, Shape, all_fields
from ctrdist.backbones.layers import MLP


@dataclass(frozen=True)
class Config:
    """Deep & Cross Network.

    Args:
        cross_layers: number of cross layers; the paper's best is 6.
        hidden: hidden units of the deep network; the paper's are 1024, 1024.
        dropout: after each of its layers.
        batch_norm: before each of its activations; the paper has it.
    """

    cross_layers: int = 2
    hidden: tuple[int, ...] = (128, 64, 64)
    dropout: float = 0.2
    batch_norm: bool = False


class VectorCross(nn.Module):
    """A cross layer, x <- x0 (x^T w) + b + x (eq. 3 of the paper): x0, x [B, width] -> [B, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.w = nn.Linear(width, 1, bias=False)
        self.b = nn.Parameter(torch.zeros(width))

    def forward(self, x0: Tensor, x: Tensor) -> Tensor:
        return x0 * self.w(x) + self.b + x


class DCN(Backbone):
    """DCN: representation = (cross network, deep network), side by side on the joined fields (eq. 5 of the paper)."""

    def __init__(self, shape: Shape, config: Config) -> None:
        super().__init__()
        width = (shape.fields + shape.history_fields) * shape.dim
        self.cross = nn.ModuleList(VectorCross(width) for _ in range(config.cross_layers))
        self.mlp = MLP(width, config.hidden, dropout=config.dropout, batch_norm=config.batch_norm)
        self.make_head(width + self.mlp.width)

    def represent(self, inputs: Inputs) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        x0 = x = all_fields(inputs).flatten(1)
        for layer in self.cross:
            x = layer(x0, x)
        return torch.cat([x, self.mlp(x0)], 1), x0.new_zeros(x0.shape[0]), {}


Network = DCN
