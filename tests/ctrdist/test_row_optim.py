"""The row-wise optimizers, each beside PyTorch's dense one."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ctrdist.batch import Lookup
from ctrdist.embedding import EmbeddingTable
from ctrdist.errors import UserError
from ctrdist.export import load_click_model, save_click_model
from ctrdist.group import Group
from ctrdist.optim import ROW_OPTIMIZERS, RowAdagrad, RowAdam, RowAdamW, RowOptimizer, RowSGD
from ctrdist.schema import Field, Schema
from ctrdist.tasks.click import ClickConfig, ClickModel

DENSE = {
    RowAdam: torch.optim.Adam,
    RowAdamW: torch.optim.AdamW,
    RowAdagrad: torch.optim.Adagrad,
    RowSGD: torch.optim.SGD,
}
SCALES = [1.0, 0.5, 0.0, 0.25, 0.9, 1.0, 0.1, 0.7]


def table_of(optimizer: RowOptimizer, rows: int = 7, dim: int = 3) -> EmbeddingTable:
    return EmbeddingTable(rows, dim, optimizer, std=1.0).double()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def step(table: EmbeddingTable, ids: list[int], gradients: Tensor, lr_scale: float = 1.0) -> None:
    """One step in which each value's gradient is given."""
    (table(Lookup.of(np.array(ids, np.int64))) * gradients).sum().backward()
    table.push(Group(), lr_scale)


def everything(table: EmbeddingTable) -> Tensor:
    return table.read(torch.arange(table.rows))


@pytest.mark.parametrize("rule", DENSE)
@pytest.mark.parametrize("weight_decay", [0.0, 0.4])
def test_with_every_row_touched_it_is_the_dense_one(rule: type[RowOptimizer], weight_decay: float):
    # One accumulator a row is that of each of its values where the row has one.
    table = table_of(rule(lr=0.1, weight_decay=weight_decay), dim=1 if rule is RowAdagrad else 3)
    dense = nn.Parameter(table.weight[1:].clone())
    optimizer = DENSE[rule]([dense], lr=0.1, weight_decay=weight_decay)
    for at, scale in enumerate(SCALES):
        gradients = noise(*dense.shape, seed=at)
        step(table, list(range(1, 7)), gradients, scale)
        optimizer.param_groups[0]["lr"] = 0.1 * scale
        dense.grad = gradients
        optimizer.step()
        torch.testing.assert_close(everything(table)[1:], dense.detach(), rtol=1e-12, atol=1e-14)
        assert not everything(table)[0].any()


@pytest.mark.parametrize("rule", [RowAdagrad, RowSGD, RowAdamW])
def test_each_row_by_itself(rule: type[RowOptimizer]):
    table = table_of(rule(lr=0.1, weight_decay=0.4), rows=12)
    weights, sums = everything(table).clone(), torch.zeros(12, dtype=torch.float64)
    first, second, counts = torch.zeros(12, 3).double(), torch.zeros(12, 3).double(), [0] * 12
    draws = np.random.default_rng(0)
    for at, scale in enumerate(SCALES * 3):
        ids = draws.permutation(12)[: draws.integers(0, 5)].tolist()
        gradients = noise(len(ids), 3, seed=at)
        step(table, ids, gradients, scale)
        lr = 0.1 * scale
        if rule is RowAdamW:
            weights *= 1 - lr * 0.4
        for row, gradient in zip(ids, gradients, strict=True):
            if row == 0:
                continue
            if rule is RowSGD:
                weights[row] -= lr * (gradient + 0.4 * weights[row])
            elif rule is RowAdagrad:
                gradient = gradient + 0.4 * weights[row]
                sums[row] += (gradient**2).sum() / 3
                weights[row] -= lr * gradient / (sums[row] ** 0.5 + 1e-10)
            else:
                counts[row] += 1
                first[row] = 0.9 * first[row] + 0.1 * gradient
                second[row] = 0.999 * second[row] + 0.001 * gradient**2
                unbiased = second[row] / (1 - 0.999 ** counts[row])
                weights[row] -= lr * first[row] / (1 - 0.9 ** counts[row]) / (unbiased.sqrt() + 1e-8)
        torch.testing.assert_close(everything(table), weights, rtol=1e-11, atol=1e-13)
    table.settle()
    torch.testing.assert_close(table.weight, weights, rtol=1e-11, atol=1e-13)


def test_adagrads_accumulator_is_one_number_a_row():
    table = table_of(RowAdagrad(lr=0.1))
    dense = nn.Parameter(table.weight[2:4].clone())
    optimizer = torch.optim.Adagrad([dense], lr=0.1)
    for signs in ([[1.0, -1, 1], [2, 2, -2]], [[-3.0, 3, 3], [1, -1, 1]]):  # of one size within a row
        dense.grad = torch.tensor(signs, dtype=torch.float64)
        step(table, [2, 3], dense.grad)
        optimizer.step()
        torch.testing.assert_close(table.weight[2:4], dense.detach(), rtol=1e-12, atol=0)
    assert table.sum.tolist() == [0, 0, 10, 5, 0, 0, 0]


@pytest.mark.parametrize("kind", [torch.float64, torch.float32])
def test_the_decay_that_a_row_missed_follows_the_schedule(kind: torch.dtype):
    table = table_of(RowAdamW(lr=0.1, weight_decay=0.3)).to(kind)
    table.weight.fill_(2.0)
    stored, gone = table.weight.clone(), 1.0
    for lr_scale in SCALES:
        step(table, [2], torch.ones(1, 3).to(kind), lr_scale)
        gone *= 1 - 0.03 * lr_scale
    untouched = [1, 3, 4, 5, 6]
    assert torch.equal(table.weight[untouched], stored[untouched]), "a step leaves other rows where they are"
    tolerance = 1e-14 if kind == torch.float64 else 1e-6
    torch.testing.assert_close(everything(table)[untouched], stored[untouched] * gone, rtol=tolerance, atol=0)
    before = everything(table).clone()
    table.settle()
    assert torch.equal(table.weight, before) and torch.equal(everything(table), before)
    assert not table.decay and not table.decayed.any()
    table.settle()
    assert torch.equal(table.weight, before)


def test_reading_often_is_reading_once():
    """Rounding does not pile up: a row read two thousand times has the decay of one that was never read."""
    table = EmbeddingTable(4, 1, RowAdamW(lr=1e-3, weight_decay=1e-1), std=1.0)
    table.weight.fill_(1.0)
    for _ in range(2000):
        table._update(torch.tensor([2]), torch.zeros(1, 1), 1.0)
    exact = (1 - 1e-4) ** 2000
    assert table.read(torch.tensor([2, 3])).flatten().tolist() == pytest.approx([exact, exact], rel=2e-4)
    assert table.read(torch.tensor([3])).item() == pytest.approx(exact, rel=1e-6)


def test_new_rows_have_missed_nothing():
    table = table_of(RowAdamW(lr=0.1, weight_decay=0.4))
    for _ in range(3):
        step(table, [2, 5], noise(2, 3))
    before = everything(table).clone()
    table.grow(9)
    table.renew(torch.tensor([3, 5]))
    kept = [0, 1, 2, 4, 6]
    assert torch.equal(everything(table)[kept], before[kept])
    assert torch.equal(everything(table)[7:], table_of(table.optimizer, rows=9).weight[7:])
    assert not table.exp_avg_sq[5].any() and table.exp_avg_sq[2].any()
    step(table, [], noise(0, 3))
    torch.testing.assert_close(everything(table)[3], table.weight[3] * 0.96)


def test_a_rate_that_would_turn_weights_over_is_refused():
    with pytest.raises(UserError, match="rate 2.0 times weight decay 0.5 is not under 1; lower --ctr.table-lr"):
        RowAdamW(lr=2.0, weight_decay=0.5)


SCHEMA = Schema(user=(Field("user_id"),), item=(Field("item_id"),), history_length=0)


def click_model(name: str) -> ClickModel:
    return ClickModel(SCHEMA, {"user_id": 5, "item_id": 6}, ClickConfig(dim=2, backbone="dcnv2", table_optimizer=name))


@pytest.mark.parametrize("name", ROW_OPTIMIZERS)
def test_a_model_of_each_is_saved_as_one_evaluates_it(name: str, tmp_path: Path):
    model = click_model(name)
    table = model.tables["user_id"]
    assert type(table.optimizer) is ROW_OPTIMIZERS[name]
    for _ in range(3):
        table(Lookup.of(np.array([2, 3]))).square().sum().backward()
        table.push(Group(), 90.0)
    read = everything(table).clone()
    assert not torch.equal(read[2:4], click_model(name).tables["user_id"].weight[2:4])
    for state in (True, False):
        save_click_model(model, tmp_path, optimizer_state=state)
        loaded = load_click_model(tmp_path, SCHEMA).tables["user_id"]
        assert torch.equal(loaded.weight, read)
        for part in table.optimizer.state_names:
            assert getattr(table, part).any()
            assert torch.equal(getattr(loaded, part), getattr(table, part) * state)


@pytest.mark.parametrize(("before", "after"), [("adam", "adagrad"), ("adagrad", "adamw"), ("adamw", "sgd")])
def test_another_optimizer_starts_from_the_weights(before: str, after: str, tmp_path: Path):
    model = click_model(before)
    table = model.tables["item_id"]
    step(table.double(), [2], noise(1, 2))
    table.float()
    save_click_model(model, tmp_path)
    other = load_click_model(tmp_path, SCHEMA, replace(model.config, table_optimizer=after)).tables["item_id"]
    assert torch.equal(other.weight, table.weight) and type(other.optimizer) is ROW_OPTIMIZERS[after]
    assert not any(getattr(other, name).any() for name in other.state_names)


def test_default_rates_are_numbers():
    for rule in ROW_OPTIMIZERS.values():
        assert 0 < rule().lr < 1 and math.isfinite(rule().weight_decay)
