"""Factorization Machine (Rendle, ICDM 2010)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ctrdist.backbones.base import Backbone, Inputs, Shape, all_fields


@dataclass(frozen=True)
class Config:
    """Factorization Machine: nothing to set; its factors are the fields' vectors."""


def pairwise(fields: Tensor) -> Tensor:
    """The sum of v_i * v_j over all pairs i < j, in linear time (lemma 3.1 of the paper): [B, N, d] -> [B, d]."""
    return (fields.sum(1).square() - fields.square().sum(1)) / 2


class FM(Backbone):
    """FM: logit = w_0 + sum of w_i + sum of <v_i, v_j> over pairs i < j of fields (eq. 1 of the paper).

    The representation is the pairs' sum before its d numbers are added up. A bag or a history is one field, its mean:
    no pairs within it.
    """

    first_order = True
    first_order_scale = 30.0
    table_lr = 1e-2

    def __init__(self, shape: Shape, config: Config) -> None:
        super().__init__()
        self.width = shape.dim
        self.bias = nn.Parameter(torch.zeros(1))

    def represent(self, inputs: Inputs) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        return pairwise(all_fields(inputs)), inputs.first_order.sum(1) + self.bias, {}

    def head(self, representation: Tensor) -> Tensor:
        return representation.sum(1)


Network = FM
