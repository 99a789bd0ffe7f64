import pytest
import torch
from torch import Tensor, nn

from ctrdist.backbones.base import Inputs, Shape
from ctrdist.backbones.dcnv2 import Config, DCNv2

B, T, F, FH, D = 3, 2, 2, 1, 2


def inputs_of() -> Inputs:
    draws = torch.Generator().manual_seed(1)
    fields = torch.randn(B, F, D, dtype=torch.float64, generator=draws)
    history = torch.randn(B, T, FH, D, dtype=torch.float64, generator=draws)
    return Inputs(fields, history, torch.tensor([[1, 1], [1, 0], [0, 0]]).bool(), (1,))


def flat_row(inputs: Inputs, b: int) -> list[float]:
    """Fields, then the mean of the behaviours."""
    values = inputs.fields[b].flatten().tolist()
    seen = [inputs.history[b, t].flatten().tolist() for t in range(T) if inputs.mask[b, t]]
    return values + [sum(column) / len(seen) for column in zip(*seen, strict=True)] if seen else values + [0.0] * FH * D


def cross(x0: list[float], layers: list[nn.Linear]) -> list[float]:
    """Equation 1, index by index: x_i <- x0_i (sum_j W_ij x_j + b_i) + x_i."""
    x = x0
    for layer in layers:
        w, b = layer.weight.tolist(), layer.bias.tolist()
        x = [x0[i] * (sum(w[i][j] * x[j] for j in range(len(x))) + b[i]) + x[i] for i in range(len(x))]
    return x


def deep(x: list[float], model: DCNv2) -> Tensor:
    out = torch.tensor(x, dtype=torch.float64)
    for layer in model.mlp.modules():
        if isinstance(layer, nn.Linear):
            out = (layer.weight @ out + layer.bias).clamp(min=0)
    return out


@pytest.mark.parametrize("cross_layers", [1, 3])
@pytest.mark.parametrize("structure", ["stacked", "parallel"])
def test_representation_index_by_index(structure: str, cross_layers: int):
    torch.manual_seed(0)
    config = Config(cross_layers=cross_layers, structure=structure, hidden=(5, 4))
    model = DCNv2(Shape(F, FH, D), config).double().eval()
    inputs = inputs_of()
    representation, direct, auxiliary = model.represent(inputs)
    assert len(model.cross) == cross_layers and not direct.any() and auxiliary == {}
    for b in range(B):
        x0 = flat_row(inputs, b)
        crossed = cross(x0, list(model.cross))
        if structure == "stacked":
            expected = deep(crossed, model)
        else:
            expected = torch.cat([torch.tensor(crossed, dtype=torch.float64), deep(x0, model)])
        torch.testing.assert_close(representation[b], expected, rtol=1e-10, atol=1e-13)
        logit = sum(w * h for w, h in zip(model.output.weight[0].tolist(), expected.tolist(), strict=True))
        assert model.head(representation)[b].item() == pytest.approx(logit + model.output.bias.item(), rel=1e-9)
