from itertools import combinations

import pytest
import torch
from torch import Tensor, nn

from ctrdist.backbones.base import Inputs, Shape
from ctrdist.backbones.fibinet import BilinearInteraction, Config, FiBiNET

B, T, F, FH, D = 3, 2, 5, 1, 2
N = F + FH


def model_of(**options: object) -> FiBiNET:
    torch.manual_seed(0)
    return FiBiNET(Shape(F, FH, D), Config(hidden=(5, 4), **options)).double().eval()


def inputs_of() -> Inputs:
    draws = torch.Generator().manual_seed(1)
    fields = torch.randn(B, F, D, dtype=torch.float64, generator=draws)
    history = torch.randn(B, T, FH, D, dtype=torch.float64, generator=draws)
    first_order = torch.randn(B, N, dtype=torch.float64, generator=draws)
    return Inputs(fields, history, torch.tensor([[1, 1], [1, 0], [0, 0]]).bool(), (1,), first_order)


def vectors(inputs: Inputs, b: int) -> list[list[float]]:
    """The fields, then the mean of the behaviours."""
    seen = [inputs.history[b, t, 0] for t in range(T) if inputs.mask[b, t]]
    mean = sum(seen) / len(seen) if seen else torch.zeros(D)
    return [*inputs.fields[b].tolist(), mean.tolist()]


def weighted(e: list[list[float]], model: FiBiNET) -> list[list[float]]:
    """Squeeze, excitation and re-weighting, number by number."""
    w1, w2 = model.senet.w1.weight.tolist(), model.senet.w2.weight.tolist()
    assert len(w1) == N // 3
    z = [sum(vector) / D for vector in e]
    hidden = [max(0.0, sum(row[i] * z[i] for i in range(N))) for row in w1]
    a = [max(0.0, sum(row[u] * hidden[u] for u in range(len(hidden)))) for row in w2]
    return [[a[i] * value for value in e[i]] for i in range(N)]


def products(e: list[list[float]], layer: BilinearInteraction, kind: str) -> list[float]:
    """p_ij = v_i W * v_j, pair by pair."""
    out = []
    for number, (i, j) in enumerate(combinations(range(N), 2)):
        w = layer.weight[{"all": 0, "each": i, "interaction": number}[kind]].tolist()
        out += [sum(e[i][row] * w[row][column] for row in range(D)) * e[j][column] for column in range(D)]
    return out


def deep(mlp: nn.Module, x: Tensor) -> Tensor:
    for layer in mlp.modules():
        if isinstance(layer, nn.Linear):
            x = (layer.weight @ x + layer.bias).clamp(min=0)
    return x


@pytest.mark.parametrize(("kind", "matrices"), [("all", 1), ("each", N - 1), ("interaction", N * (N - 1) // 2)])
def test_representation_pair_by_pair(kind: str, matrices: int):
    model, inputs = model_of(bilinear=kind), inputs_of()
    representation, direct, auxiliary = model.represent(inputs)
    assert model.p.weight.shape == model.q.weight.shape == (matrices, D, D) and auxiliary == {}
    active = 0
    for b in range(B):
        e = vectors(inputs, b)
        v = weighted(e, model)
        active += sum(any(vector) for vector in v)
        p, q = products(e, model.p, kind), products(v, model.q, kind)
        expected = deep(model.mlp, torch.tensor(p + q, dtype=torch.float64))
        torch.testing.assert_close(representation[b], expected, rtol=1e-10, atol=1e-13)
        assert direct[b].item() == pytest.approx(sum(inputs.first_order[b].tolist()), rel=1e-12)
    assert 0 < active < B * N


def test_fields_weigh_by_their_importance():
    model, inputs = model_of(), inputs_of()
    with torch.no_grad():
        model.senet.w1.weight.fill_(1.0)
        model.senet.w2.weight.copy_(torch.arange(N, dtype=torch.float64)[:, None].expand(N, N // 3))
    fields = inputs.fields.abs()
    fields = torch.cat([fields, fields[:, :1]], 1)
    importance = fields.mean(2).sum(1)[:, None] * (N // 3) * torch.arange(N)
    torch.testing.assert_close(model.senet(fields), fields * importance[:, :, None], rtol=1e-12, atol=0)
