"""Deep Interest Evolution Network (Zhou et al., AAAI 2019): interests behind the behaviours, and how they evolve."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctrdist.backbones.base import Backbone, Inputs, Shape, target_item
from ctrdist.backbones.layers import GRU, MLP, Activation
from ctrdist.group import Group
from ctrdist.losses import global_mean


@dataclass(frozen=True)
class Config:
    """Deep Interest Evolution Network.

    Args:
        evolution: where the target's attention enters the evolution of interests: it scales the update gate (`augru`,
            the paper's choice), takes its place (`agru`), or scales the input (`aigru`).
        auxiliary_weight: alpha, of the auxiliary loss; 0 leaves it out.
        hidden: hidden units of the network on top.
        activation: its activation.
        dropout: after each of its layers.
        batch_norm: before each of its activations.
    """

    evolution: Literal["augru", "agru", "aigru"] = "augru"
    auxiliary_weight: float = 1.0
    hidden: tuple[int, ...] = (128, 64, 64)
    activation: Activation = "dice"
    dropout: float = 0.2
    batch_norm: bool = False


class DIEN(Backbone):
    """DIEN: representation = MLP(fields, last evolved interest).

    A GRU extracts an interest h_t, as wide as a behaviour, from the behaviours until t; a second one, with attention
    a_t from the target, evolves them. In training, a loss teaches h_t to tell the next behaviour from another row's.
    """

    def __init__(self, shape: Shape, config: Config) -> None:
        super().__init__()
        self.group = Group()
        self.kind, self.auxiliary_weight = config.evolution, config.auxiliary_weight
        self.interest = shape.history_fields * shape.dim
        if self.interest:
            self.extractor = GRU(self.interest, self.interest)
            self.attention = nn.Linear(self.interest, self.interest, bias=False)
            self.evolution = GRU(self.interest, self.interest, update_gate=self.kind != "agru")
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
        direct = fields.new_zeros(fields.shape[0])
        if not self.interest:
            return self.mlp(fields), direct, {}
        behaviours, mask = inputs.history.flatten(2), inputs.mask
        if not mask.shape[1]:  # one step of padding, so that all weights take part
            behaviours, mask = F.pad(behaviours, (0, 0, 0, 1)), F.pad(mask, (0, 1))
        interests = self.interests(behaviours, mask)
        target = target_item(inputs)
        representation = self.mlp(torch.cat([fields, self.evolved(interests, target, mask)], 1))
        if not self.training or not self.auxiliary_weight:
            return representation, direct, {}
        auxiliary = self.auxiliary_weight * self.auxiliary_loss(interests, behaviours, mask)
        return representation, direct, {"auxiliary": auxiliary}

    def interests(self, behaviours: Tensor, mask: Tensor) -> Tensor:
        """h_t after each behaviour: [B, T, n] -> [B, T, n]. A state stays as it is over padding."""
        projected, strength = self.extractor.project(behaviours).unbind(1), mask.unsqueeze(2).unbind(1)
        state, states = torch.zeros_like(behaviours[:, 0]), []
        for t in range(mask.shape[1]):
            state = self.extractor.step(projected[t], state, strength[t])
            states.append(state)
        return torch.stack(states, 1)

    def evolved(self, interests: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """The last h'_t [B, n] (eq. 9 to 12), with a_t = softmax over the behaviours of h_t W e_target (eq. 8)."""
        scores = (interests @ self.attention(target).unsqueeze(2)).squeeze(2)
        attention = torch.softmax(scores.masked_fill(~mask, torch.finfo(scores.dtype).min), 1)
        strength = (attention * mask).unsqueeze(2)
        if self.kind == "aigru":
            interests, strength = interests * strength, mask.unsqueeze(2)
        projected, strength = self.evolution.project(interests).unbind(1), strength.unbind(1)
        state = torch.zeros_like(target)
        for t in range(mask.shape[1]):
            state = self.evolution.step(projected[t], state, strength[t])
        return state

    def auxiliary_loss(self, interests: Tensor, behaviours: Tensor, mask: Tensor) -> Tensor:
        """-mean of log sigmoid(<h_t, e_t+1>) + log(1 - sigmoid(<h_t, ê_t+1>)) (eq. 6), over all workers' pairs of a row
        and a step that has a next behaviour e; ê is another one. Where they are the same item, the pair is left out."""
        states, positive, negative = interests[:, :-1], behaviours[:, 1:], self.negatives(behaviours, mask)[:, 1:]
        pairs = mask[:, 1:] & (positive != negative).any(2)
        wide = torch.promote_types(states.dtype, torch.float32)
        right, wrong = ((states * other).sum(2).to(wide) for other in (positive, negative))
        losses = F.softplus(-right) + F.softplus(wrong)
        return global_mean((losses * pairs).sum(), pairs.sum(), self.group)

    def negatives(self, behaviours: Tensor, mask: Tensor) -> Tensor:
        """For each row and step a behaviour of another row of the global batch, [B, T, n].

        Row k of the m rows with behaviours lends its (k modulo length)-th one, and step t of a row borrows from the row
        m / 2 + t places further on (never from itself, unless m is 1). So negatives are distributed as behaviours are,
        without chance, and the same for any number of workers, at the cost of gathering one behaviour a row.
        """
        rows, steps = mask.shape
        lengths, first = mask.sum(1), sum(self.group.sizes(mask)[: self.group.rank])
        row = torch.arange(rows, device=mask.device)
        lent = behaviours[row, (first + row) % lengths.clamp(min=1)]
        gathered = self.group.all_gather(torch.cat([lent, (lengths > 0).unsqueeze(1).to(lent.dtype)], 1))
        lent, lends = gathered[:, :-1], gathered[:, -1] > 0
        lenders, count = torch.argsort(~lends, stable=True), lends.sum()
        place = (lends.cumsum(0) - 1)[first : first + rows]
        further = 1 + (count // 2 + torch.arange(steps, device=mask.device)) % (count - 1).clamp(min=1)
        return lent[lenders[(place.unsqueeze(1) + further) % count.clamp(min=1)]]


Network = DIEN
