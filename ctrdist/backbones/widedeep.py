"""Wide & Deep (Cheng et al., DLRS 2016)."""

from dataclasses import dataclass

from torch import Tensor

from ctrdist.backbones.base import Backbone, Inputs, Shape, all_fields
from ctrdist.backbones.layers import MLP


@dataclass(frozen=True)
class Config:
    """Wide & Deep.

    Args:
        hidden: hidden units of the deep part; the paper's are 1024, 512, 256.
        dropout: after each of its layers.
        batch_norm: before each of its activations.
    """

    hidden: tuple[int, ...] = (128, 64, 64)
    dropout: float = 0.2
    batch_norm: bool = False


class WideDeep(Backbone):
    """Wide & Deep: logit = w_wide x + w_deep MLP(x) + b (eq. 3 of the paper).

    The wide part holds single features. The paper's hand-picked crosses of two are no field here; a cross that is worth
    it can be a column of the log.
    """

    first_order = True

    def __init__(self, shape: Shape, config: Config) -> None:
        super().__init__()
        width = (shape.fields + shape.history_fields) * shape.dim
        self.mlp = MLP(width, config.hidden, dropout=config.dropout, batch_norm=config.batch_norm)
        self.make_head(self.mlp.width)

    def represent(self, inputs: Inputs) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        return self.mlp(all_fields(inputs).flatten(1)), inputs.first_order.sum(1), {}


Network = WideDeep
