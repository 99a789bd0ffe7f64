"""Product-based Neural Network (Qu et al., ICDM 2016)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ctrdist.backbones.base import Backbone, Inputs, Shape, all_fields
from ctrdist.backbones.layers import MLP


@dataclass(frozen=True)
class Config:
    """Product-based Neural Network.

    Args:
        product: of the fields: `inner` is the paper's IPNN, `outer` its OPNN, `both` its PNN*.
        hidden: hidden units of the network on top, whose first layer weighs fields and products.
        dropout: after each of its layers.
        batch_norm: before each of its activations.
    """

    product: Literal["inner", "outer", "both"] = "inner"
    hidden: tuple[int, ...] = (128, 64, 64)
    dropout: float = 0.2
    batch_norm: bool = False


class Gram(nn.Module):
    """Inner products of n vectors, each pair's once and each one's with itself: [B, n, k] -> [B, n (n + 1) / 2]."""

    def __init__(self, n: int) -> None:
        super().__init__()
        first, second = torch.triu_indices(n, n)
        self.register_buffer("pairs", first * n + second, persistent=False)
        self.width = len(self.pairs)

    def forward(self, vectors: Tensor) -> Tensor:
        return (vectors @ vectors.transpose(1, 2)).flatten(1).index_select(1, self.pairs)


class PNN(Backbone):
    """PNN: representation = MLP(z, p), z the fields, p their products; so l_1 = relu(W_z z + W_p p + b_1) (eq. 3).

    Inner: p_ij = <f_i, f_j>, with the full matrix of weights, where the paper also gives a factorised one. Outer:
    p = s s^T with s = sum of f_i, the paper's superposition of all f_i f_j^T. Both are symmetric: a half of p is taken.
    """

    def __init__(self, shape: Shape, config: Config) -> None:
        super().__init__()
        fields = shape.fields + shape.history_fields
        self.inner = Gram(fields) if config.product != "outer" else None
        self.outer = Gram(shape.dim) if config.product != "inner" else None
        width = fields * shape.dim + sum(product.width for product in (self.inner, self.outer) if product)
        self.mlp = MLP(width, config.hidden, dropout=config.dropout, batch_norm=config.batch_norm)
        self.make_head(self.mlp.width)

    def represent(self, inputs: Inputs) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        fields = all_fields(inputs)
        signals = [fields.flatten(1)]
        if self.inner is not None:
            signals.append(self.inner(fields))
        if self.outer is not None:
            signals.append(self.outer(fields.sum(1).unsqueeze(2)))
        x = torch.cat(signals, 1)
        return self.mlp(x), x.new_zeros(x.shape[0]), {}


Network = PNN
