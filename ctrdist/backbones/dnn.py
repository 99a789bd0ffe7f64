"""A deep network on the joined fields (as in Covington et al., RecSys 2016), what the others add interactions to."""

from dataclasses import dataclass

from torch import Tensor

from ctrdist.backbones.base import Backbone, Inputs, Shape, all_fields
from ctrdist.backbones.layers import MLP


@dataclass(frozen=True)
class Config:
    """Deep neural network.

    Args:
        hidden: hidden units.
        dropout: after each of its layers.
        batch_norm: before each of its activations.
    """

    hidden: tuple[int, ...] = (128, 64, 64)
    dropout: float = 0.2
    batch_norm: bool = False


class DNN(Backbone):
    """DNN: representation = MLP(fields, mean of the behaviours)."""

    def __init__(self, shape: Shape, config: Config) -> None:
        super().__init__()
        width = (shape.fields + shape.history_fields) * shape.dim
        self.mlp = MLP(width, config.hidden, dropout=config.dropout, batch_norm=config.batch_norm)
        self.make_head(self.mlp.width)

    def represent(self, inputs: Inputs) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        x = all_fields(inputs).flatten(1)
        return self.mlp(x), x.new_zeros(x.shape[0]), {}


Network = DNN
