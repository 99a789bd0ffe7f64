"""FiBiNET (Huang et al., RecSys 2019): the importance of each field, and bilinear products of pairs."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ctrdist.backbones.base import Backbone, Inputs, Shape, all_fields
from ctrdist.backbones.layers import MLP

Bilinear = Literal["all", "each", "interaction"]


@dataclass(frozen=True)
class Config:
    """FiBiNET.

    Args:
        reduction: how many times fewer units than fields the squeeze-excitation network has.
        bilinear: a matrix for `all` pairs, for `each` left field, or for each `interaction` of two fields.
        hidden: hidden units of the network on top.
        dropout: after each of its layers.
        batch_norm: before each of its activations.
    """

    reduction: int = 3
    bilinear: Bilinear = "interaction"
    hidden: tuple[int, ...] = (128, 64, 64)
    dropout: float = 0.2
    batch_norm: bool = False


class SENET(nn.Module):
    """The fields weighted by a_i, a = relu(W2 relu(W1 z)), z_i the mean of field i: [B, F, d] -> [B, F, d]."""

    def __init__(self, fields: int, reduction: int) -> None:
        super().__init__()
        units = max(1, fields // reduction)
        self.w1 = nn.Linear(fields, units, bias=False)
        self.w2 = nn.Linear(units, fields, bias=False)

    def forward(self, fields: Tensor) -> Tensor:
        weights = torch.relu(self.w2(torch.relu(self.w1(fields.mean(2)))))
        return fields * weights.unsqueeze(2)


class BilinearInteraction(nn.Module):
    """p_ij = (v_i W) * v_j of each pair i < j, W that of all, of i, or of the pair.

    [B, F, d] -> [B, F (F - 1) / 2, d], pairs in the order 01, 02, ..., 12, ...
    """

    def __init__(self, fields: int, dim: int, kind: Bilinear) -> None:
        super().__init__()
        self.register_buffer("pairs", torch.triu_indices(fields, fields, 1), persistent=False)
        self.kind, self.count = kind, self.pairs.shape[1]
        matrices = {"all": 1, "each": fields - 1, "interaction": self.count}[kind]
        self.weight = nn.Parameter(torch.empty(matrices, dim, dim).uniform_(-(dim**-0.5), dim**-0.5))

    def forward(self, fields: Tensor) -> Tensor:
        left, right = self.pairs
        vectors = fields.transpose(0, 1)
        if self.kind == "interaction":
            products = vectors.index_select(0, left) @ self.weight
        else:
            products = (vectors[:-1] @ self.weight).index_select(0, left)
        return (products * vectors.index_select(0, right)).transpose(0, 1)


class FiBiNET(Backbone):
    """FiBiNET: representation = MLP(p, q), bilinear products p of the fields and q of the fields weighted by SENET."""

    first_order = True

    def __init__(self, shape: Shape, config: Config) -> None:
        super().__init__()
        fields = shape.fields + shape.history_fields
        self.senet = SENET(fields, config.reduction)
        self.p, self.q = (BilinearInteraction(fields, shape.dim, config.bilinear) for _ in range(2))
        self.mlp = MLP(
            2 * self.p.count * shape.dim, config.hidden, dropout=config.dropout, batch_norm=config.batch_norm
        )
        self.make_head(self.mlp.width)

    def represent(self, inputs: Inputs) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        fields = all_fields(inputs)
        x = torch.cat([self.p(fields), self.q(self.senet(fields))], 1)
        return self.mlp(x.flatten(1)), inputs.first_order.sum(1), {}


Network = FiBiNET
