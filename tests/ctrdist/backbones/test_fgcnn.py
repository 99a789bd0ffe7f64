import math
from itertools import combinations

import pytest
import torch
from torch import Tensor, nn

from ctrdist.backbones.base import Inputs, Shape
from ctrdist.backbones.fgcnn import FGCNN, Config, Generation
from ctrdist.errors import UserError

B, T, F, FH, D = 2, 2, 4, 1, 3
N = F + FH
Image = list[list[list[float]]]


def model_of(**options: object) -> FGCNN:
    torch.manual_seed(0)
    config = Config(channels=(2, 3), kernel=3, pooling=2, new=2, hidden=(5, 4), **options)
    return FGCNN(Shape(F, FH, D), config).double().eval()


def inputs_of() -> Inputs:
    draws = torch.Generator().manual_seed(1)
    fields = torch.randn(B, F, D, dtype=torch.float64, generator=draws)
    history = torch.randn(B, T, FH, D, dtype=torch.float64, generator=draws)
    return Inputs(fields, history, torch.tensor([[1, 1], [0, 0]]).bool(), (1,))


def vectors(inputs: Inputs, b: int) -> list[list[float]]:
    """The fields, then the mean of the behaviours."""
    seen = [inputs.history[b, t, 0] for t in range(T) if inputs.mask[b, t]]
    mean = sum(seen) / len(seen) if seen else torch.zeros(D)
    return [*inputs.fields[b].tolist(), mean.tolist()]


def convolution(image: Image, layer: Generation) -> Image:
    """C[i][p][q] = tanh(sum over channels m and heights j of E[m][p + j - 1][q] W[i][m][j]), zeros outside."""
    w, bias = layer.convolution.weight[..., 0].tolist(), layer.convolution.bias.tolist()
    fields, width = len(image[0]), len(image[0][0])
    out = []
    for i in range(len(w)):
        rows = []
        for p in range(fields):
            row = []
            for q in range(width):
                total = bias[i]
                for m in range(len(image)):
                    for j in range(3):
                        if 0 <= p + j - 1 < fields:
                            total += image[m][p + j - 1][q] * w[i][m][j]
                row.append(math.tanh(total))
            rows.append(row)
        out.append(rows)
    return out


def pooled(image: Image) -> Image:
    """The maximum of each two neighbours; the last of an odd number stays alone."""
    return [
        [[max(column) for column in zip(*rows[p : p + 2], strict=True)] for p in range(0, len(rows), 2)]
        for rows in image
    ]


def recombined(image: Image, layer: Generation, width: int) -> list[list[float]]:
    w, bias = layer.recombination.weight.tolist(), layer.recombination.bias.tolist()
    flat = [value for rows in image for row in rows for value in row]
    assert len(w[0]) == len(flat) and len(w) == 2 * len(image[0]) * width
    new = [math.tanh(sum(a * x for a, x in zip(row, flat, strict=True)) + b) for row, b in zip(w, bias, strict=True)]
    return [new[start : start + width] for start in range(0, len(new), width)]


def deep(mlp: nn.Module, x: Tensor) -> Tensor:
    for layer in mlp.modules():
        if isinstance(layer, nn.Linear):
            x = (layer.weight @ x + layer.bias).clamp(min=0)
    return x


@pytest.mark.parametrize("separate", [False, True])
def test_representation_number_by_number(separate: bool):
    model, inputs = model_of(separate=separate), inputs_of()
    representation, direct, auxiliary = model.represent(inputs)
    assert not direct.any() and auxiliary == {}
    for b in range(B):
        e = vectors(inputs, b)
        features = [vector[1:] if separate else vector for vector in e]
        image, width = [[vector[:1] if separate else vector for vector in e]], len(features[0])
        counts = []
        for layer in model.layers:
            image = pooled(convolution(image, layer))
            new = recombined(image, layer, width)
            features, counts = features + new, [*counts, len(new)]
        assert counts == [6, 4]
        inner = [sum(x * y for x, y in zip(i, j, strict=True)) for i, j in combinations(features, 2)]
        x = [value for vector in features for value in vector] + inner
        expected = deep(model.mlp, torch.tensor(x, dtype=torch.float64))
        torch.testing.assert_close(representation[b], expected, rtol=1e-9, atol=1e-12)


def test_one_column_is_not_split():
    with pytest.raises(UserError, match=r"fgcnn\.separate: a width of 1 leaves no column"):
        FGCNN(Shape(F, FH, 1), Config(separate=True))


def test_more_poolings_than_fields_leave_one():
    model = FGCNN(Shape(1, 0, D), Config(channels=(2, 2, 2))).eval()
    inputs = Inputs(torch.randn(B, 1, D), torch.zeros(B, 0, 0, D), torch.zeros(B, 0).bool(), ())
    assert [layer.height for layer in model.layers] == [1, 1, 1]
    assert model.represent(inputs)[0].isfinite().all()
