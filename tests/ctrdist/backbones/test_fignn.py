import math

import pytest
import torch
from torch import Tensor

from ctrdist.backbones.base import Shape
from ctrdist.backbones.fignn import Config, FiGNN

N, HEADS, UNITS = 4, 2, 3


def model_of(steps: int) -> FiGNN:
    torch.manual_seed(0)
    model = FiGNN(Shape(3, 1, 2), Config(heads=HEADS, units=UNITS, steps=steps)).double().eval()
    with torch.no_grad():
        model.b.uniform_(-1, 1)
    return model


def softmax(values: list[float]) -> list[float]:
    total = sum(math.exp(value) for value in values)
    return [math.exp(value) / total for value in values]


def first_states(fields: list[list[float]], model: FiGNN) -> list[Tensor]:
    """h_i = relu(heads joined), a head is softmax(Q K^T / sqrt(d)) V."""
    e = [torch.tensor(field, dtype=torch.float64) for field in fields]
    query, key, value = (getattr(model.attention, name).weight for name in ("query", "key", "value"))
    states = []
    for i in range(N):
        heads = []
        for h in range(HEADS):
            own = slice(h * UNITS, (h + 1) * UNITS)
            scores = [((query[own] @ e[i]) @ (key[own] @ e[j])).item() / math.sqrt(UNITS) for j in range(N)]
            heads.append(sum(a * (value[own] @ e[j]) for j, a in enumerate(softmax(scores))))
        states.append(torch.cat(heads).clamp(min=0))
    return states


def edge_weights(h: list[Tensor], model: FiGNN) -> list[list[float]]:
    """A[i][j], of the edge from i to j: attention of i to all others."""
    w = torch.cat(list(model.edge.weight))
    adjacency = [[0.0] * N for _ in range(N)]
    for i in range(N):
        others = [j for j in range(N) if j != i]
        scores = [(w @ torch.cat([h[i], h[j]])).item() for j in others]
        for j, weight in zip(others, softmax([s if s > 0 else 0.01 * s for s in scores]), strict=True):
            adjacency[i][j] = weight
    return adjacency


def step(h: list[Tensor], first: list[Tensor], adjacency: list[list[float]], model: FiGNN) -> list[Tensor]:
    """An interaction, node by node: a_i from all edges into it, a GRU, the first state added."""
    size = HEADS * UNITS
    w_c, w_r, w_u = model.gru.project.weight.split(size)
    b_c, b_r, b_u = model.gru.project.bias.split(size)
    u_c, u_r, u_u = model.gru.recur.weight.split(size)
    out = []
    for i in range(N):
        a = model.b.clone()
        for j in range(N):
            if j != i:
                for column in range(size):
                    sent = h[j] @ model.w_out[j]
                    a[column] = a[column] + adjacency[j][i] * (sent @ model.w_in[i][:, column])
        update = torch.sigmoid(w_u @ a + u_u @ h[i] + b_u)
        reset = torch.sigmoid(w_r @ a + u_r @ h[i] + b_r)
        candidate = torch.tanh(w_c @ a + reset * (u_c @ h[i]) + b_c)
        out.append((1 - update) * h[i] + update * candidate + first[i])
    return out


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_states_node_by_node(steps: int, by_hand):
    model = model_of(steps)
    representation, direct, auxiliary = model.represent(by_hand.inputs)
    logits = model.head(representation)
    assert representation.shape == (len(by_hand.rows), N * HEADS * UNITS) and not direct.any() and auxiliary == {}
    for b in by_hand.rows:
        states = first = first_states(by_hand.fields(b), model)
        adjacency = edge_weights(first, model)
        for _ in range(steps):
            states = step(states, first, adjacency, model)
        torch.testing.assert_close(representation[b], torch.cat(states), rtol=1e-10, atol=1e-13)
        scores = [(model.y.weight[0] @ state + model.y.bias[0]).item() for state in states]
        weights = [(model.a.weight[0] @ state + model.a.bias[0]).item() for state in states]
        expected = sum(a * y for a, y in zip(weights, scores, strict=True))
        assert logits[b].item() == pytest.approx(expected, rel=1e-9)


def test_what_leaves_a_node_is_shared_out_among_the_others(by_hand):
    model = model_of(1)
    edges = model.edges(torch.stack([torch.stack(first_states(by_hand.fields(b), model)) for b in by_hand.rows]))
    torch.testing.assert_close(edges.sum(2), torch.ones(len(by_hand.rows), N, dtype=torch.float64))
    assert not edges.diagonal(dim1=1, dim2=2).any() and (edges.sum(1) - 1).abs().max() > 0.01
