"""Deep & Cross Network V2 (Wang et al., WWW 2021)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ctrdist.backbones.base import Backbone, Inputs, Shape, all_fields
from ctrdist.backbones.dcn import VectorCross
from ctrdist.backbones.layers import MLP


@dataclass(frozen=True)
class Config:
    """Deep & Cross Network V2.

    Args:
        cross: `matrix` weighs each cross by a full matrix, `mixture` by several experts of low rank, `vector` by DCN's
            vector.
        cross_layers: number of cross layers.
        rank: of an expert of the mixture; the paper's is about a quarter of fields x width.
        experts: of the mixture; 1 is the plain low-rank network.
        gate: of the experts' sum: `softmax` shares out, `sigmoid` lets in each on its own.
        structure: `stacked` puts the deep network on the cross network, `parallel` beside it.
        hidden: hidden units of the deep network.
        dropout: after each of its layers.
        batch_norm: before each of its activations.
    """

    cross: Literal["vector", "matrix", "mixture"] = "matrix"
    cross_layers: int = 2
    rank: int = 32
    experts: int = 4
    gate: Literal["softmax", "sigmoid"] = "softmax"
    structure: Literal["stacked", "parallel"] = "parallel"
    hidden: tuple[int, ...] = (128, 64, 64)
    dropout: float = 0.2
    batch_norm: bool = False


class MatrixCross(nn.Linear):
    """A cross layer, x <- x0 * (W x + b) + x (eq. 1 of the paper): x0, x [B, width] -> [B, width]."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width)

    def forward(self, x0: Tensor, x: Tensor) -> Tensor:
        return x0 * super().forward(x) + x


class MixtureCross(nn.Module):
    """A mixture of low-rank cross layers, x <- sum of G_i(x) E_i(x) + x (eq. 3 of the paper), each nonlinear in its
    r dimensions, E_i(x) = x0 * (U_i tanh(C_i tanh(V_i^T x)) + b) (eq. 4): x0, x [B, width] -> [B, width].
    """

    def __init__(self, width: int, experts: int, rank: int, gate: Literal["softmax", "sigmoid"]) -> None:
        super().__init__()
        self.shape, self.softmax = (experts, rank), gate == "softmax"
        self.gate = nn.Linear(width, experts)
        self.v = nn.Linear(width, experts * rank, bias=False)
        self.c = nn.Parameter(torch.empty(experts, rank, rank).uniform_(-(rank**-0.5), rank**-0.5))
        self.u = nn.Linear(experts * rank, width, bias=False)
        self.b = nn.Parameter(torch.zeros(width))

    def forward(self, x0: Tensor, x: Tensor) -> Tensor:
        gates = self.gate(x)
        gates = gates.softmax(1) if self.softmax else gates.sigmoid()
        low = torch.tanh(self.v(x)).unflatten(1, self.shape)
        low = torch.tanh(torch.einsum("krs,bks->bkr", self.c, low))
        # U and b are linear: gating what goes in is gating what comes out, and one product serves all experts.
        mixed = self.u((gates.unsqueeze(2) * low).flatten(1)) + gates.sum(1, keepdim=True) * self.b
        return x0 * mixed + x


class DCNv2(Backbone):
    """DCN-V2: cross layers, and a deep network beside them or on them."""

    def __init__(self, shape: Shape, config: Config) -> None:
        super().__init__()
        width = (shape.fields + shape.history_fields) * shape.dim
        make = {
            "vector": lambda: VectorCross(width),
            "matrix": lambda: MatrixCross(width),
            "mixture": lambda: MixtureCross(width, config.experts, config.rank, config.gate),
        }[config.cross]
        self.stacked = config.structure == "stacked"
        self.cross = nn.ModuleList(make() for _ in range(config.cross_layers))
        self.mlp = MLP(width, config.hidden, dropout=config.dropout, batch_norm=config.batch_norm)
        self.make_head(self.mlp.width if self.stacked else width + self.mlp.width)

    def represent(self, inputs: Inputs) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        x0 = x = all_fields(inputs).flatten(1)
        for layer in self.cross:
            x = layer(x0, x)
        deep = self.mlp(x if self.stacked else x0)
        return deep if self.stacked else torch.cat([x, deep], 1), x0.new_zeros(x0.shape[0]), {}


Network = DCNv2
