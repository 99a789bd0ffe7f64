import math

import pytest
import torch
from torch import Tensor, nn

from ctrdist.backbones.base import Inputs, Shape
from ctrdist.backbones.dien import DIEN, Config
from ctrdist.backbones.layers import GRU
from ctrdist.metrics import auc

B, T, F, FH, D = 5, 4, 5, 2, 2
N = FH * D
LENGTHS = [4, 1, 0, 3, 2]


def model_of(**options: object) -> DIEN:
    torch.manual_seed(0)
    config = Config(**({"hidden": (6, 5), "activation": "relu", "dropout": 0.0} | options))
    return DIEN(Shape(F, FH, D), config).double()


def inputs_of(lengths: list[int] = LENGTHS) -> Inputs:
    rows, draws = len(lengths), torch.Generator().manual_seed(1)
    fields = torch.randn(rows, F, D, dtype=torch.float64, generator=draws)
    history = torch.randn(rows, T, FH, D, dtype=torch.float64, generator=draws)
    return Inputs(fields, history, torch.arange(T) < torch.tensor(lengths)[:, None], (4, 1))


def behaviour(inputs: Inputs, b: int, t: int) -> Tensor:
    return torch.cat([inputs.history[b, t, 0], inputs.history[b, t, 1]])


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def gates(unit: GRU, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Update gate (1 if there is none) and candidate, equations 2 to 4."""
    w, b, u = (list(p.split(N)) for p in (unit.project.weight, unit.project.bias, unit.recur.weight))
    reset = sigmoid(w[1] @ x + u[1] @ h + b[1])
    candidate = torch.tanh(w[0] @ x + reset * (u[0] @ h) + b[0])
    return sigmoid(w[2] @ x + u[2] @ h + b[2]) if len(w) == 3 else torch.ones(N), candidate


def interests(model: DIEN, inputs: Inputs, b: int) -> list[Tensor]:
    """h_t after each of a row's behaviours (eq. 2 to 5)."""
    h, states = torch.zeros(N, dtype=torch.float64), []
    for t in range(int(inputs.mask[b].sum())):
        update, candidate = gates(model.extractor, behaviour(inputs, b, t), h)
        h = (1 - update) * h + update * candidate
        states.append(h)
    return states


def evolved(model: DIEN, inputs: Inputs, b: int, kind: str) -> Tensor:
    """h'_T (eq. 8 to 12)."""
    target = torch.cat([inputs.fields[b, 4], inputs.fields[b, 1]])
    states = interests(model, inputs, b)
    exponents = [math.exp((state @ model.attention.weight @ target).item()) for state in states]
    h = torch.zeros(N, dtype=torch.float64)
    for state, exponent in zip(states, exponents, strict=True):
        a = exponent / sum(exponents)
        update, candidate = gates(model.evolution, a * state if kind == "aigru" else state, h)
        if kind == "augru":
            update = a * update
        elif kind == "agru":
            update = a
        h = (1 - update) * h + update * candidate
    return h


@pytest.mark.parametrize("kind", ["augru", "agru", "aigru"])
def test_representation_step_by_step(kind: str):
    model, inputs = model_of(evolution=kind).eval(), inputs_of()
    representation, direct, auxiliary = model.represent(inputs)
    assert not direct.any() and auxiliary == {}
    seen = []
    for b in range(B):
        interest = evolved(model, inputs, b, kind)
        x = torch.cat([*inputs.fields[b], interest])
        for layer in model.mlp.modules():
            if isinstance(layer, nn.Linear):
                x = (layer.weight @ x + layer.bias).clamp(min=0)
        torch.testing.assert_close(representation[b], x, rtol=1e-10, atol=1e-13)
        seen.append(interest.any().item())
    assert seen == [length > 0 for length in LENGTHS]


def test_a_hole_in_a_history_is_as_if_it_were_not_there():
    model, inputs, holed = model_of().eval(), inputs_of([3]), inputs_of([4])
    holed.history[:, 3], holed.history[:, 1] = inputs.history[:, 2], 100.0
    holed.history[:, 2] = inputs.history[:, 1]
    holed.mask[:, 1] = False
    found, expected = model.represent(holed)[0], model.represent(inputs)[0]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def negative(inputs: Inputs, b: int, t: int) -> Tensor:
    """The behaviour that row b's next one at step t is told from."""
    lenders = [row for row in range(len(inputs.mask)) if inputs.mask[row].any()]
    shift = len(lenders) // 2 + t
    if len(lenders) > 1:
        shift %= len(lenders) - 1
    row = lenders[(lenders.index(b) + 1 + shift) % len(lenders)]
    return behaviour(inputs, row, row % int(inputs.mask[row].sum()))


def auxiliary_loss(model: DIEN, inputs: Inputs) -> float:
    """Equation 6 by row and step."""
    total, pairs = 0.0, 0
    for b in range(len(inputs.mask)):
        states = interests(model, inputs, b)
        for t in range(1, len(states)):
            positive, other = behaviour(inputs, b, t), negative(inputs, b, t)
            if not torch.equal(positive, other):
                right, wrong = (sigmoid(states[t - 1] @ vector).item() for vector in (positive, other))
                total, pairs = total - math.log(right) - math.log(1 - wrong), pairs + 1
    return total / max(1, pairs)


@pytest.mark.parametrize("lengths", [LENGTHS, [0, 4, 0], [3, 4], [0, 0], [2] * 9, []])
def test_the_auxiliary_loss_by_row_and_step(lengths: list[int]):
    model, inputs = model_of(auxiliary_weight=0.5), inputs_of(lengths)
    found = model.represent(inputs)[2]
    assert list(found) == ["auxiliary"]
    assert found["auxiliary"].item() == pytest.approx(0.5 * auxiliary_loss(model, inputs), rel=1e-10)


def test_an_item_is_not_told_from_itself():
    model, inputs = model_of(), inputs_of([4, 4])
    before = model.represent(inputs)[2]["auxiliary"].item()
    assert before == pytest.approx(auxiliary_loss(model, inputs), rel=1e-10)
    inputs.history[0, 1] = inputs.history[1, 1]  # what row 1 lends
    after = model.represent(inputs)[2]["auxiliary"].item()
    assert after == pytest.approx(auxiliary_loss(model, inputs), rel=1e-10) != pytest.approx(before)
    inputs.history[:] = inputs.history[:1, :1]
    assert model.represent(inputs)[2]["auxiliary"].item() == 0


@pytest.mark.parametrize("rows", [2, 3, 7, 40])
def test_negatives_are_other_rows_behaviours(rows: int):
    lengths = [1 + row % T for row in range(rows)] + [0]
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    code = torch.arange(rows + 1)[:, None] * 10 + torch.arange(T)
    found = model_of().negatives(code[:, :, None].double(), mask)[:rows, :, 0].long()
    row, step = found // 10, found % 10
    assert found.shape == (rows, T) and (row != torch.arange(rows)[:, None]).all() and (row < rows).all()
    assert (step < torch.tensor(lengths)[row]).all()
    assert sorted(set(row.flatten().tolist())) == list(range(rows))
    if rows > T:
        assert all(len(set(those)) == T for those in row.tolist())


def test_padding_does_not_count_in_the_auxiliary_loss():
    model, inputs = model_of(), inputs_of()
    plain = model.represent(inputs)[2]["auxiliary"]
    inputs.history[~inputs.mask] = 100.0
    inputs.history = torch.cat([inputs.history, torch.full((B, 2, FH, D), 50.0, dtype=torch.float64)], 1)
    inputs.mask = torch.cat([inputs.mask, torch.zeros(B, 2, dtype=torch.bool)], 1)
    torch.testing.assert_close(model.represent(inputs)[2]["auxiliary"], plain, rtol=1e-12, atol=0)


def test_no_auxiliary_loss_without_weight_or_histories_or_training():
    inputs = inputs_of()
    assert model_of(auxiliary_weight=0.0).represent(inputs)[2] == {}
    assert model_of().eval().represent(inputs)[2] == {}
    plain = DIEN(Shape(F, 0, D), Config()).double()
    assert plain.represent(Inputs(inputs.fields, inputs.history[:, :0, :0], inputs.mask[:, :0], ()))[2] == {}


def test_the_auxiliary_loss_teaches_what_comes_next():
    # Each of 8 items is followed by the next one, from anywhere.
    draws = torch.Generator().manual_seed(0)
    items = (torch.randint(8, (64, 1), generator=draws) + torch.arange(T)) % 8
    torch.manual_seed(0)
    table, model = nn.Embedding(8, N), model_of().float()
    inputs = inputs_of([T] * 64)
    inputs.fields = inputs.fields.float()
    optimizer = torch.optim.Adam([*table.parameters(), *model.extractor.parameters()], lr=3e-2)
    losses = []
    for _ in range(60):
        inputs.history = table(items).unflatten(2, (FH, D))
        losses.append(model.represent(inputs)[2]["auxiliary"])
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[0].item() > 1.3 and losses[-1].item() < 0.8
    scores = model.interests(table(items), inputs.mask)[:, :-1] @ table.weight.T
    following = nn.functional.one_hot(items[:, 1:], 8)
    assert auc(following.flatten(), scores.detach().flatten()) > 0.9
