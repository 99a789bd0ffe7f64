import math

import pytest
import torch
from torch import Tensor, nn

from ctrdist.backbones.base import Inputs, Shape
from ctrdist.backbones.din import DIN, Config

B, T, F, FH, D = 4, 3, 5, 2, 3


def model_of(**options: object) -> DIN:
    torch.manual_seed(0)
    return DIN(Shape(F, FH, D), Config(attention=(7, 4), hidden=(6, 5), **options)).double().eval()


def inputs_of() -> Inputs:
    draws = torch.Generator().manual_seed(1)
    fields = torch.randn(B, F, D, dtype=torch.float64, generator=draws)
    history = torch.randn(B, T, FH, D, dtype=torch.float64, generator=draws)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]]).bool()
    return Inputs(fields, history, mask, (4, 1))


def relu_network(linears: list[nn.Linear], x: Tensor) -> Tensor:
    for layer in linears:
        x = (layer.weight @ x + layer.bias).clamp(min=0)
    return x


@pytest.mark.parametrize("softmax", [False, True])
def test_interests_are_equation_3_row_by_row(softmax: bool):
    model, inputs = model_of(softmax=softmax), inputs_of()
    *linears, last = [layer for layer in model.attention.modules() if isinstance(layer, nn.Linear)]
    found = model.interests(inputs)
    assert found.shape == (B, FH * D)
    for b in range(B):
        query = torch.cat([inputs.fields[b, 4], inputs.fields[b, 1]])
        keys, scores = [], []
        for t in range(T):
            if inputs.mask[b, t]:
                key = torch.cat([inputs.history[b, t, 0], inputs.history[b, t, 1]])
                hidden = relu_network(linears, torch.cat([query, key, query - key, query * key]))
                scores.append((last.weight[0] @ hidden + last.bias[0]).item())
                keys.append(key)
        if softmax:
            total = sum(math.exp(score) for score in scores)
            scores = [math.exp(score) / total for score in scores]
        expected = sum((w * k for w, k in zip(scores, keys, strict=True)), torch.zeros(FH * D, dtype=torch.float64))
        torch.testing.assert_close(found[b], expected, rtol=1e-10, atol=1e-13)


def test_the_network_on_top_sees_fields_then_interests():
    model, inputs = model_of(activation="relu", dropout=0.0), inputs_of()
    linears = [layer for layer in model.mlp.modules() if isinstance(layer, nn.Linear)]
    representation, direct, auxiliary = model.represent(inputs)
    interests = model.interests(inputs)
    for b in range(B):
        x = torch.cat([*inputs.fields[b], interests[b]])
        torch.testing.assert_close(representation[b], relu_network(linears, x), rtol=1e-10, atol=1e-13)
    assert not direct.any() and auxiliary == {}


def test_attention_tells_targets_apart():
    model, inputs = model_of(), inputs_of()
    before = model.interests(inputs)
    inputs.fields[:, 0] += 1
    assert torch.equal(model.interests(inputs), before)
    inputs.fields[:, 4] += 1
    assert ((model.interests(inputs) != before).any(1) == inputs.mask.any(1)).all()
