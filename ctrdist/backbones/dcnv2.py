"""Deep & Cross Network V2 (Wang et al., WWW 2021), full-matrix cross layers."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ctrdist.backbones.base import Backbone, Inputs, Shape, all_fields
from ctrdist.backbones.layers import MLP


@dataclass(frozen=True)
class Config:
    """Deep & Cross Network V2.

    Args:
        cross_layers: number of cross layers.
        structure: `stacked` puts the deep network on the cross network, `parallel` beside it.
        hidden: hidden units of the deep network.
        dropout: after each of its layers.
        batch_norm: before each of its activations.
    """

    cross_layers: int = 2
    structure: Literal["stacked", "parallel"] = "parallel"
    hidden: tuple[int, ...] = (128, 64, 64)
    dropout: float = 0.2
    batch_norm: bool = False


class DCNv2(Backbone):
    """DCN-V2: cross layers x <- x0 * (W x + b) + x (eq. 1 of the paper) and a deep network on the same input."""

    def __init__(self, shape: Shape, config: Config) -> None:
        super().__init__()
        width = (shape.fields + shape.history_fields) * shape.dim
        self.stacked = config.structure == "stacked"
        self.cross = nn.ModuleList(nn.Linear(width, width) for _ in range(config.cross_layers))
        self.mlp = MLP(width, config.hidden, dropout=config.dropout, batch_norm=config.batch_norm)
        self.make_head(self.mlp.width if self.stacked else width + self.mlp.width)

    def represent(self, inputs: Inputs) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        x0 = all_fields(inputs).flatten(1)
        x = x0
        for layer in self.cross:
            x = x0 * layer(x) + x
        deep = self.mlp(x if self.stacked else x0)
        return deep if self.stacked else torch.cat([x, deep], 1), x0.new_zeros(len(x0)), {}


Network = DCNv2
