"""The contract of a backbone: what it gets and what it gives back."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class Inputs:
    """Embedded features of B rows.

    Args:
        fields: [B, F, d]; user, context and item fields in the order of the schema, then the text field if any.
        history: [B, T, F_h, d]; the item side of each behaviour, oldest first. Where all rows are one user's, as in a
            request to score, [1, T, F_h, d]: what depends on the history alone is then computed once.
        mask: bool [B, T], or [1, T]; false at padding.
        target: for each of the F_h history fields, the index of the target item's field that it corresponds to.
        first_order: [B, F + F_h], for a backbone that asks for them: each field's own weight (times its value, if it is
            a number; a bag's mean), then the mean over the behaviours of each history field's.
    """

    fields: Tensor
    history: Tensor
    mask: Tensor
    target: tuple[int, ...]
    first_order: Tensor | None = None


@dataclass(frozen=True)
class Shape:
    """What a backbone knows when it is built.

    Args:
        fields: F, number of fields.
        history_fields: F_h, number of fields of a behaviour.
        dim: d, their common width.
    """

    fields: int
    history_fields: int
    dim: int


class Backbone(nn.Module):
    """A published network between embeddings and logit: logit = head(representation) + direct.

    A subclass sets `width` (H), takes `(shape: Shape, config: Config)` and implements `represent`. One file each; its
    `Config` holds the hyper-parameters, with the paper's values as defaults. A subclass whose paper has a linear part
    over single features sets `first_order`, and gets their weights as `Inputs.first_order`: stored numbers times
    `first_order_scale`, by which they are learnt so much faster than embeddings. `lr` and `table_lr` are the learning
    rates that suit it, its own and that of its tables (`docs/backbones.md`).

    The number of rows comes from a tensor's `shape`: `len` would make it a constant of the exported graph.
    """

    width: int
    first_order = False
    first_order_scale = 1.0
    lr = 1e-3
    table_lr = 3e-3

    def represent(self, inputs: Inputs) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(representation [B, H], direct [B], auxiliary losses by name, each a global mean; empty for most)."""
        raise TypeError(f"{type(self).__name__} has no represent")

    def head(self, representation: Tensor) -> Tensor:
        """Logits [B] from representations [B, H]."""
        return self.output(representation).squeeze(-1)

    def make_head(self, width: int) -> None:
        """Set the representation's width and a linear head on it."""
        self.width = width
        self.output = nn.Linear(width, 1)


def target_item(inputs: Inputs) -> Tensor:
    """The target item's own fields, joined, [B, F_h * d]: what a behaviour is compared with."""
    fields = inputs.fields  # a list as an index would wait for the device
    return torch.cat([fields[:, :0].flatten(1), *(fields[:, number] for number in inputs.target)], 1)


def all_fields(inputs: Inputs) -> Tensor:
    """The fields, then the pooled history as more fields, [B, F + F_h, d]: for networks without sequences."""
    return torch.cat([inputs.fields, pooled_history(inputs).expand(inputs.fields.shape[0], -1, -1)], 1)


def pooled_history(inputs: Inputs) -> Tensor:
    """The mean of the behaviours as F_h more fields [B, F_h, d], zeros without any: for networks without sequences.

    Of one history for all rows, [1, F_h, d].
    """
    mask = inputs.mask[:, :, None, None].to(inputs.history.dtype)
    return (inputs.history * mask).sum(1) / mask.sum(1).clamp(min=1)
