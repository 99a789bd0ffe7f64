"""DeepFM (Guo et al., IJCAI 2017): a factorization machine and a deep network on the same embeddings."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ctrdist.backbones.base import Backbone, Inputs, Shape, all_fields
from ctrdist.backbones.fm import pairwise
from ctrdist.backbones.layers import MLP


@dataclass(frozen=True)
class Config:
    """DeepFM.

    Args:
        hidden: hidden units of the deep network; the paper's are 400, 400, 400.
        dropout: after each of its layers; the paper's is 0.5.
        batch_norm: before each of its activations.
    """

    hidden: tuple[int, ...] = (128, 64, 64)
    dropout: float = 0.2
    batch_norm: bool = False


class DeepFM(Backbone):
    """DeepFM: logit = y_FM + y_DNN (eq. 1 of the paper), y_FM = sum of w_i + sum of <v_i, v_j>, i < j (eq. 2).

    The representation is the FM's pairs [d] before they are added up, then the deep network's output. The head adds up
    the first and weighs only the second.
    """

    first_order = True

    def __init__(self, shape: Shape, config: Config) -> None:
        super().__init__()
        self.dim = shape.dim
        width = (shape.fields + shape.history_fields) * shape.dim
        self.mlp = MLP(width, config.hidden, dropout=config.dropout, batch_norm=config.batch_norm)
        self.width = self.dim + self.mlp.width
        self.output = nn.Linear(self.mlp.width, 1)

    def represent(self, inputs: Inputs) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        fields = all_fields(inputs)
        representation = torch.cat([pairwise(fields), self.mlp(fields.flatten(1))], 1)
        return representation, inputs.first_order.sum(1), {}

    def head(self, representation: Tensor) -> Tensor:
        pairs, deep = representation[:, : self.dim], representation[:, self.dim :]
        return pairs.sum(1) + self.output(deep).squeeze(1)


Network = DeepFM
