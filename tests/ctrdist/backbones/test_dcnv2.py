import math

import pytest
import torch
from torch import Tensor

from ctrdist.backbones import dcn
from ctrdist.backbones.dcnv2 import Config, DCNv2, MatrixCross, MixtureCross

Matrix = list[list[float]]


def model_of(by_hand, **options: object) -> DCNv2:
    torch.manual_seed(0)
    model = DCNv2(by_hand.shape, Config(hidden=(5, 4), **options)).double().eval()
    for parameter in model.cross.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter)
    return model


def times(matrix: Matrix, x: list[float]) -> list[float]:
    return [sum(w * v for w, v in zip(row, x, strict=True)) for row in matrix]


def full(layer: MatrixCross, x0: list[float], x: list[float]) -> list[float]:
    """Equation 1: x_i <- x0_i (sum_j W_ij x_j + b_i) + x_i."""
    w, b = layer.weight.tolist(), layer.bias.tolist()
    return [x0[i] * (sum(w[i][j] * x[j] for j in range(len(x))) + b[i]) + x[i] for i in range(len(x))]


def mixture(layer: MixtureCross, x0: list[float], x: list[float], gate: str, rank: int) -> list[float]:
    """Equations 3 and 4, an expert at a time: x + sum_i G_i(x) x0 * (U_i tanh(C_i tanh(V_i^T x)) + b)."""

    def part(weight: Tensor, expert: int) -> Tensor:
        return weight[expert * rank : (expert + 1) * rank]

    scores = times(layer.gate.weight.tolist(), x)
    scores = [score + bias for score, bias in zip(scores, layer.gate.bias.tolist(), strict=True)]
    if gate == "softmax":
        gates = [math.exp(score) / sum(math.exp(other) for other in scores) for score in scores]
    else:
        gates = [1 / (1 + math.exp(-score)) for score in scores]
    out, bias = list(x), layer.b.tolist()
    for expert, weight in enumerate(gates):
        v, u = part(layer.v.weight, expert).tolist(), part(layer.u.weight.T, expert).T.tolist()
        low = [math.tanh(value) for value in times(v, x)]
        low = [math.tanh(value) for value in times(layer.c[expert].tolist(), low)]
        assert len(low) == rank
        high = times(u, low)
        out = [out[i] + weight * x0[i] * (high[i] + bias[i]) for i in range(len(x))]
    return out


@pytest.mark.parametrize("cross_layers", [1, 3])
@pytest.mark.parametrize("structure", ["stacked", "parallel"])
@pytest.mark.parametrize("cross", ["matrix", "mixture softmax", "mixture sigmoid"])
def test_representation_index_by_index(by_hand, cross: str, structure: str, cross_layers: int):
    kind, _, gate = cross.partition(" ")
    options = {"gate": gate, "experts": 3, "rank": 2} if gate else {}
    model = model_of(by_hand, cross=kind, structure=structure, cross_layers=cross_layers, **options)
    representation, direct, auxiliary = model.represent(by_hand.inputs)
    assert len(model.cross) == cross_layers and not direct.any() and auxiliary == {}
    for b in by_hand.rows:
        x0 = x = by_hand.joined(b)
        for layer in model.cross:
            x = mixture(layer, x0, x, gate, 2) if gate else full(layer, x0, x)
        expected = by_hand.deep(model.mlp, x) if structure == "stacked" else x + by_hand.deep(model.mlp, x0)
        assert representation[b].tolist() == pytest.approx(expected, rel=1e-10, abs=1e-13)
        logit = by_hand.output(model.output, expected)
        assert model.head(representation)[b].item() == pytest.approx(logit, rel=1e-9)


def test_with_vectors_side_by_side_it_is_dcn(by_hand):
    model, first = model_of(by_hand, cross="vector"), dcn.DCN(by_hand.shape, dcn.Config(hidden=(5, 4))).double().eval()
    first.load_state_dict(model.state_dict())
    expected = first.represent(by_hand.inputs)[0]
    assert torch.equal(model.represent(by_hand.inputs)[0], expected)


def test_one_expert_has_no_choice(by_hand):
    model = model_of(by_hand, cross="mixture", experts=1, rank=3)
    before = model.represent(by_hand.inputs)[0]
    for layer in model.cross:
        torch.nn.init.normal_(layer.gate.weight)
    assert torch.equal(model.represent(by_hand.inputs)[0], before)
