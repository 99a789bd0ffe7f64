"""Fi-GNN (Li et al., CIKM 2019): fields as the nodes of a graph, which send messages to each other."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ctrdist.backbones.base import Backbone, Inputs, Shape, all_fields
from ctrdist.backbones.layers import GRU, SelfAttention


@dataclass(frozen=True)
class Config:
    """Fi-GNN.

    Args:
        heads: of the self-attention that makes the nodes' first states.
        units: width of a head; a node's state is heads * units wide.
        steps: interactions of the nodes.
    """

    heads: int = 2
    units: int = 16
    steps: int = 3


class FiGNN(Backbone):
    """Fi-GNN: representation = the last states h_i of the nodes, joined; logit = sum of a_i y_i.

    The first states are relu(self-attention between the fields). Every step has the same graph and the same
    weights. y_i and a_i, the paper's MLP_1 and MLP_2, are linear in h_i.
    """

    lr = 3e-3
    table_lr = 1e-2

    def __init__(self, shape: Shape, config: Config) -> None:
        super().__init__()
        self.nodes, self.steps = shape.fields + shape.history_fields, config.steps
        self.state = config.heads * config.units
        self.attention = SelfAttention(shape.dim, config.heads, config.units, scaled=True)
        self.edge = nn.Linear(self.state, 2, bias=False)
        bound = self.state**-0.5
        self.w_out, self.w_in = (
            nn.Parameter(torch.empty(self.nodes, self.state, self.state).uniform_(-bound, bound)) for _ in range(2)
        )
        self.b = nn.Parameter(torch.zeros(self.state))
        self.gru = GRU(self.state, self.state)
        self.y, self.a = (nn.Linear(self.state, 1) for _ in range(2))
        self.width = self.nodes * self.state

    def represent(self, inputs: Inputs) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        states = first = torch.relu(self.attention(all_fields(inputs)))
        edges = self.edges(first)
        for _ in range(self.steps):
            states = self.gru.step(self.gru.project(self.messages(edges, states)), states) + first
        return states.flatten(1), states.new_zeros(states.shape[0]), {}

    def head(self, representation: Tensor) -> Tensor:
        states = representation.unflatten(1, (self.nodes, self.state))
        return (self.a(states) * self.y(states)).sum((1, 2))

    def edges(self, first: Tensor) -> Tensor:
        """A [B, n, n], A_ij the weight of the edge from i to j: softmax over j of leaky_relu(W [h_i, h_j]), h the first
        states, and 0 at j = i, which the softmax leaves out."""
        source, target = self.edge(first).unbind(2)
        scores = nn.functional.leaky_relu(source.unsqueeze(2) + target.unsqueeze(1))
        loop = torch.eye(self.nodes, dtype=torch.bool, device=first.device)
        weights = torch.softmax(scores.masked_fill(loop, torch.finfo(scores.dtype).min), 2)
        return weights.masked_fill(loop, 0.0)

    def messages(self, edges: Tensor, states: Tensor) -> Tensor:
        """a_i = W_in^i sum over j of A_ji W_out^j h_j + b: [B, n, n], [B, n, state] -> [B, n, state]."""
        sent = (states.transpose(0, 1) @ self.w_out).transpose(0, 1)
        received = edges.transpose(1, 2) @ sent
        return (received.transpose(0, 1) @ self.w_in).transpose(0, 1) + self.b


Network = FiGNN
