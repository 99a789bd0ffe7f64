import math

import pytest
import torch
from torch import Tensor, nn

from ctrdist.backbones.autoint import AutoInt, Config
from ctrdist.backbones.base import Shape

HEADS, UNITS = 2, 3


def model_of(**options: object) -> AutoInt:
    torch.manual_seed(0)
    config = Config(layers=2, heads=HEADS, units=UNITS, hidden=(5, 4), **options)
    return AutoInt(Shape(3, 1, 2), config).double().eval()


def interacting(e: list[Tensor], layer: nn.Module) -> list[Tensor]:
    """Equations 5 to 8, head by head and pair by pair."""
    query, key, value = (getattr(layer.attention, name).weight for name in ("query", "key", "value"))
    out = []
    for m in range(len(e)):
        joined = []
        for h in range(HEADS):
            own = slice(h * UNITS, (h + 1) * UNITS)
            psi = [math.exp(((query[own] @ e[m]) @ (key[own] @ e[k])).item()) for k in range(len(e))]
            alpha = [value / sum(psi) for value in psi]
            joined.append(sum(alpha[k] * (value[own] @ e[k]) for k in range(len(e))))
        out.append((torch.cat(joined) + layer.residual.weight @ e[m]).clamp(min=0))
    return out


@pytest.mark.parametrize("deep", [False, True])
def test_representation_head_by_head_and_pair_by_pair(deep: bool, by_hand):
    model = model_of(deep=deep)
    representation, direct, auxiliary = model.represent(by_hand.inputs)
    assert len(model.layers) == 2 and not direct.any() and auxiliary == {}
    for b in by_hand.rows:
        e = [torch.tensor(field, dtype=torch.float64) for field in by_hand.fields(b)]
        for layer in model.layers:
            e = interacting(e, layer)
        beside = by_hand.deep(model.mlp, by_hand.joined(b)) if deep else []
        expected = torch.cat([*e, torch.tensor(beside, dtype=torch.float64)])
        torch.testing.assert_close(representation[b], expected, rtol=1e-10, atol=1e-13)


def test_moved_fields_are_the_attended_fields_moved(by_hand):
    model, inputs, order = model_of(), by_hand.inputs, [2, 0, 1]
    plain = model.represent(inputs)[0].unflatten(1, (4, -1))
    inputs.fields = inputs.fields[:, order]
    moved = model.represent(inputs)[0].unflatten(1, (4, -1))
    torch.testing.assert_close(moved, plain[:, [*order, 3]], rtol=1e-12, atol=1e-14)
    assert not torch.allclose(moved, plain)
