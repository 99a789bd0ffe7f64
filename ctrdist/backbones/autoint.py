"""AutoInt (Song et al., CIKM 2019): self-attention between fields."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ctrdist.backbones.base import Backbone, Inputs, Shape, all_fields
from ctrdist.backbones.layers import MLP, SelfAttention


@dataclass(frozen=True)
class Config:
    """AutoInt.

    Args:
        layers: number of interacting layers.
        heads: subspaces of a layer, each with an attention of its own.
        units: d', the width of a head; the paper's is 32, CELA's 16.
        deep: with a deep network beside them: AutoInt+.
        hidden: hidden units of the deep network.
        dropout: after each of its layers.
        batch_norm: before each of its activations.
    """

    layers: int = 3
    heads: int = 2
    units: int = 16
    deep: bool = False
    hidden: tuple[int, ...] = (128, 64, 64)
    dropout: float = 0.2
    batch_norm: bool = False


class Interacting(nn.Module):
    """An interacting layer, e_m <- relu(attention(e)_m + W_res e_m) (eq. 8): [B, F, width] -> [B, F, heads * units]."""

    def __init__(self, width: int, heads: int, units: int) -> None:
        super().__init__()
        self.attention = SelfAttention(width, heads, units)
        self.residual = nn.Linear(width, heads * units, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.attention(x) + self.residual(x))


class AutoInt(Backbone):
    """AutoInt: representation = the fields after the interacting layers, joined (eq. 9), then the deep network's."""

    lr = 3e-3
    table_lr = 1e-2

    def __init__(self, shape: Shape, config: Config) -> None:
        super().__init__()
        fields, out = shape.fields + shape.history_fields, config.heads * config.units
        widths = [shape.dim] + [out] * config.layers
        self.layers = nn.ModuleList(Interacting(width, config.heads, config.units) for width in widths[:-1])
        self.mlp = None
        if config.deep:
            self.mlp = MLP(fields * shape.dim, config.hidden, dropout=config.dropout, batch_norm=config.batch_norm)
        self.make_head(fields * widths[-1] + (self.mlp.width if self.mlp else 0))

    def represent(self, inputs: Inputs) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        fields = x = all_fields(inputs)
        for layer in self.layers:
            x = layer(x)
        x = x.flatten(1)
        if self.mlp is not None:
            x = torch.cat([x, self.mlp(fields.flatten(1))], 1)
        return x, x.new_zeros(x.shape[0]), {}


Network = AutoInt
