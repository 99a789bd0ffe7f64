"""Deep Interest Network (Zhou et al., KDD 2018): attention from the target item to each behaviour."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctrdist.backbones.base import Backbone, Inputs, Shape, target_item
from ctrdist.backbones.layers import MLP, Activation


@dataclass(frozen=True)
class Config:
    """Deep Interest Network.

    Args:
        attention: hidden units of the attention's activation unit.
        hidden: hidden units of the network on top.
        activation: its activation; `dice` is the paper's.
        dropout: after each of its layers.
        batch_norm: before each of its activations.
        softmax: normalise the attention over the behaviours; the paper does not, to keep an interest's intensity.
    """

    attention: tuple[int, ...] = (64, 32)
    hidden: tuple[int, ...] = (128, 64, 64)
    activation: Activation = "dice"
    dropout: float = 0.2
    batch_norm: bool = False
    softmax: bool = False


class DIN(Backbone):
    """DIN: representation = MLP(fields, sum of w(behaviour, target) * behaviour), eq. 3 of the paper."""

    def __init__(self, shape: Shape, config: Config) -> None:
        super().__init__()
        self.softmax = config.softmax
        self.interest = shape.history_fields * shape.dim
        hidden = MLP(4 * self.interest, config.attention)
        self.attention = nn.Sequential(*hidden.layers, nn.Linear(hidden.width, 1))
        self.mlp = MLP(
            shape.fields * shape.dim + self.interest,
            config.hidden,
            config.activation,
            config.dropout,
            config.batch_norm,
        )
        self.make_head(self.mlp.width)

    def represent(self, inputs: Inputs) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        fields = inputs.fields.flatten(1)
        x = torch.cat([fields, self.interests(inputs)], 1)
        return self.mlp(x), fields.new_zeros(fields.shape[0]), {}

    def interests(self, inputs: Inputs) -> Tensor:
        """The behaviours weighted by the target's attention, [B, F_h * d]; zeros without behaviours."""
        keys = inputs.history.flatten(2)
        weights = self.attend(target_item(inputs), keys).squeeze(2)
        if self.softmax:
            weights = torch.softmax(weights.masked_fill(~inputs.mask, -1e4), 1)
        weights = weights * inputs.mask
        return weights @ keys[0] if keys.shape[0] == 1 else weights.unsqueeze(1).matmul(keys).squeeze(1)

    def attend(self, query: Tensor, keys: Tensor) -> Tensor:
        """The activation unit on (query, key, query - key, query * key), [B, T, 1], for query [B, n], keys [B, T, n],
        or [1, T, n] for all rows.

        Its first layer is linear in them, so that what is the query's alone is computed once a row, and the difference
        needs no product of its own: half the work of that layer. With the same keys for all rows it is linear in the
        query, by a matrix of those keys.
        """
        first, *rest = self.attention
        of_query, of_key, of_difference, of_product = first.weight.unflatten(1, (4, self.interest)).unbind(1)
        if keys.shape[0] == 1:
            by_key = of_product.t().unsqueeze(1) * keys[0].t().unsqueeze(2)
            by_key = by_key + (of_query + of_difference).t().unsqueeze(1)
            row = F.linear(keys[0], of_key - of_difference, first.bias)
            x = torch.addmm(row.flatten(), query, by_key.flatten(1)).unflatten(1, row.shape)
        else:
            row = F.linear(query, of_query + of_difference, first.bias)
            pairs = torch.cat([keys, query.unsqueeze(1) * keys], 2)
            x = F.linear(pairs, torch.cat([of_key - of_difference, of_product], 1)).add_(row.unsqueeze(1))
        for layer in rest:
            x = layer(x)
        return x


Network = DIN
