"""xDeepFM (Lian et al., KDD 2018): explicit interactions of bounded order, field by field, beside a deep network."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ctrdist.backbones.base import Backbone, Inputs, Shape, all_fields
from ctrdist.backbones.layers import MLP
from ctrdist.errors import UserError


@dataclass(frozen=True)
class Config:
    """xDeepFM.

    Args:
        cin: feature maps of each layer of the compressed interaction network; the paper's are 100 or 200 a layer, whose
            cost is their square times the number of fields.
        hidden: hidden units of the deep network; the paper's are 400 a layer.
        dropout: after each of its layers.
        batch_norm: before each of its activations.
    """

    cin: tuple[int, ...] = (25, 25, 25)
    hidden: tuple[int, ...] = (128, 64, 64)
    dropout: float = 0.2
    batch_norm: bool = False

    def __post_init__(self) -> None:
        if not self.cin:
            raise UserError("ctr.networks.xdeepfm.cin: no layers; without them the network is widedeep")


class CIN(nn.Module):
    """The compressed interaction network: fields X^0 [B, m, d] -> [B, sum of its layers' feature maps].

    X^k_h = sum over i, j of W^kh_ij (X^(k-1)_i * X^0_j) (eq. 6 of the paper), without an activation, as the paper found
    best. Each map is summed over its d numbers (eq. 7), and all layers' sums are joined.
    """

    def __init__(self, fields: int, sizes: tuple[int, ...]) -> None:
        super().__init__()
        before = (fields, *sizes)
        self.layers = nn.ModuleList(nn.Linear(before[k] * fields, size, bias=False) for k, size in enumerate(sizes))
        self.width = sum(sizes)

    def forward(self, fields: Tensor) -> Tensor:
        x0 = x = fields.transpose(1, 2)
        pooled = []
        for layer in self.layers[:-1]:
            x = layer((x.unsqueeze(3) * x0.unsqueeze(2)).flatten(2))
            pooled.append(x.sum(1))
        # No layer follows that needs the last maps themselves: summed over d first, they cost a d-th.
        pooled.append(self.layers[-1]((x.transpose(1, 2) @ x0).flatten(1)))
        return torch.cat(pooled, 1)


class XDeepFM(Backbone):
    """xDeepFM: logit = w_linear a + w_dnn MLP(x) + w_cin p + b (eq. 9 of the paper), p = CIN(x).

    The representation is p, then the deep network's output.
    """

    first_order = True

    def __init__(self, shape: Shape, config: Config) -> None:
        super().__init__()
        fields = shape.fields + shape.history_fields
        self.cin = CIN(fields, config.cin)
        self.mlp = MLP(fields * shape.dim, config.hidden, dropout=config.dropout, batch_norm=config.batch_norm)
        self.make_head(self.cin.width + self.mlp.width)

    def represent(self, inputs: Inputs) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        fields = all_fields(inputs)
        representation = torch.cat([self.cin(fields), self.mlp(fields.flatten(1))], 1)
        return representation, inputs.first_order.sum(1), {}


Network = XDeepFM
