import math

import pytest
import torch
from torch import nn

from ctrdist.optim import learning_rate, split_decay


def course(schedule: str, warmup: float, steps: int) -> list[float]:
    return [learning_rate(schedule, warmup, step, steps) for step in range(steps)]


def test_constant_is_one():
    assert course("constant", 0.0, 7) == [1.0] * 7


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warm_up_rises_in_equal_parts_to_one(schedule: str):
    assert course(schedule, 0.25, 16)[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert max(course(schedule, 0.25, 16)) == pytest.approx(1.0)


def test_linear_falls_in_equal_parts_to_one_step_above_zero():
    factors = course("linear", 0.0, 10)
    falls = [before - after for before, after in zip(factors, factors[1:], strict=False)]
    assert falls == pytest.approx([falls[0]] * 9) and falls[0] > 0
    assert factors[-1] == pytest.approx(0.1) and factors[0] > 0.9
    warm = course("linear", 0.2, 10)
    assert warm[1] == pytest.approx(1.0) and warm[-1] == pytest.approx(0.1)
    assert course("linear", 0.0, 1000)[-1] == pytest.approx(0.001)


def test_cosine_is_half_a_wave_after_the_warm_up():
    expected = [0.5 * (1 + math.cos(math.pi * (step + 1) / 8)) for step in range(8)]
    assert course("cosine", 0.0, 8) == pytest.approx(expected, abs=1e-6)
    assert course("cosine", 0.5, 16)[8:] == pytest.approx(expected, abs=1e-6)
    assert expected[-1] == 0


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0.0, 0.01, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_every_factor_lies_between_zero_and_one(schedule: str, warmup: float, steps: int):
    assert all(0 <= factor <= 1 for factor in course(schedule, warmup, steps))


def test_split_decay_spares_biases_and_normalisation():
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Conv1d(2, 2, 3))
    decayed, spared = split_decay(list(module.parameters()), 0.1, 0.5)
    assert {id(p) for p in decayed["params"]} == {id(module[0].weight), id(module[2].weight)}
    assert {id(p) for p in spared["params"]} == {
        id(p) for p in (module[0].bias, module[1].weight, module[1].bias, module[2].bias)
    }
    assert (decayed["lr"], decayed["weight_decay"], spared["lr"], spared["weight_decay"]) == (0.1, 0.5, 0.1, 0.0)
    # As an optimizer takes them: without a gradient's pull only the matrices shrink.
    before = {id(p): p.detach().clone() for p in module.parameters()}
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    torch.optim.AdamW(split_decay(list(module.parameters()), 0.1, 0.5)).step()
    for parameter in module.parameters():
        shrunk = before[id(parameter)] * (0.95 if parameter.ndim >= 2 else 1.0)
        torch.testing.assert_close(parameter.detach(), shrunk)


def test_no_empty_groups():
    assert split_decay([], 0.1, 0.5) == []
    assert [g["weight_decay"] for g in split_decay(list(nn.LayerNorm(2).parameters()), 0.1, 0.5)] == [0.0]
    assert [g["weight_decay"] for g in split_decay(list(nn.Linear(2, 2, bias=False).parameters()), 0.1, 0.5)] == [0.5]
