from pathlib import Path

import numpy as np
import pytest
import torch

from ctrdist.batch import Lookup
from ctrdist.embedding import EmbeddingTable
from ctrdist.export import load_click_model, save_click_model
from ctrdist.group import Group
from ctrdist.optim import ROW_OPTIMIZERS, RowSGD
from ctrdist.rounding import random_bits, round_randomly
from ctrdist.schema import Field, Schema
from ctrdist.sharded import ShardedTable, row_bytes
from ctrdist.tasks.click import ClickConfig, ClickModel


def step_of(number: int) -> torch.Tensor:
    return torch.tensor(number)


def test_the_bits_are_even_and_independent():
    bits = random_bits(torch.arange(3000), 16, 3, step_of(5)).float() / 2**16
    assert bits.shape == (3000, 16) and bits.min() >= 0 and bits.max() < 1
    counts = torch.histc(bits, 64, 0, 1)
    assert ((counts - 750).square() / 750).sum() < 110  # chi-square of 63 degrees of freedom, p = 0.0002
    for other in (
        random_bits(torch.arange(3000), 16, 3, step_of(6)).float() / 2**16,
        random_bits(torch.arange(3000), 16, 4, step_of(5)).float() / 2**16,
        bits.roll(1, 0),
        bits.roll(1, 1),
    ):
        assert torch.corrcoef(torch.stack([bits.flatten(), other.flatten()]))[0, 1].abs() < 0.02


def test_they_depend_on_the_row_not_on_its_place():
    rows = torch.tensor([9_999_999_999, 4, 70_000])
    bits = random_bits(rows, 4, 0, step_of(1))
    assert torch.equal(random_bits(rows[[2, 0]], 4, 0, step_of(1)), bits[[2, 0]])


def test_the_mean_stays_and_only_neighbours_come_out():
    values = torch.tensor([1.001, -0.3333, 1e-12, -7e5, 0.0, 1.0]).expand(20_000, -1).contiguous()
    rounded = round_randomly(values, torch.arange(20_000), 0, step_of(0))
    assert rounded.dtype == torch.bfloat16
    for column, value in enumerate(values[0]):
        found = rounded[:, column].float().unique()
        assert len(found) == (1 if value in (0, 1) else 2)
        assert found.min() <= value <= found.max() and found.max() - found.min() <= value.abs() / 128
        spread = (found.max() - found.min()).item() / 2 / 20_000**0.5
        assert rounded[:, column].float().double().mean().item() == pytest.approx(value.item(), abs=5 * spread + 1e-20)


def test_small_steps_add_up():
    table = EmbeddingTable(500, 2, RowSGD(lr=1e-4), storage=torch.bfloat16)
    table.weight.fill_(1.0)
    ids = torch.arange(1, 500)
    for _ in range(300):
        table._update(ids, torch.ones(499, 2), 1.0)
    assert table.weight[1:].float().mean().item() == pytest.approx(0.97, abs=1e-3)
    assert (torch.ones((), dtype=torch.bfloat16) - 1e-4).item() == 1, "to the nearest it would stay"


@pytest.mark.parametrize("rule", ROW_OPTIMIZERS)
def test_a_spread_table_rounds_as_a_whole_one(rule: str):
    optimizer = ROW_OPTIMIZERS[rule](lr=0.01, weight_decay=0.1)
    tables = [kind(6000, 3, optimizer, storage=torch.bfloat16, seed=2) for kind in (EmbeddingTable, ShardedTable)]
    for table in tables:
        assert table.weight.dtype == torch.bfloat16
        assert all(getattr(table, name).dtype == torch.float32 for name in optimizer.state_names)
        for _ in range(4):
            vectors = table(Lookup.of(np.array([5, 5999, 5, 0])))
            assert vectors.dtype == torch.float32 and not vectors[3].any()
            (vectors - 1).square().sum().backward()
            table.push(Group())
        assert table.packed.nbytes == len(table.weight) * row_bytes(3, optimizer, torch.bfloat16)
    rows = torch.arange(6000)
    assert torch.equal(tables[0].fetch(rows), tables[1].fetch(rows))
    before = tables[0].fetch(rows)
    for table in tables:
        table.settle()
        table.grow(9000)
    torch.testing.assert_close(tables[0].fetch(rows), before, rtol=2**-7, atol=0)


def test_it_follows_the_float32_table():
    tables = [EmbeddingTable(50, 4, ROW_OPTIMIZERS["adam"](lr=0.01), storage=getattr(torch, s)) for s in
              ("float32", "bfloat16")]  # fmt: skip
    goal = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    for table in tables:
        for _ in range(400):
            (table(Lookup.of(np.arange(50))) - goal).square().sum().backward()
            table.push(Group())
    reached = [(table.fetch(torch.arange(1, 50)) - goal[1:]).abs().mean() for table in tables]
    assert reached[0] < 0.02 and reached[1] < 0.03


def test_a_model_of_it_is_saved_and_loaded(tmp_path: Path):
    schema = Schema(user=(Field("user_id"),), item=(Field("item_id"),), history_length=0)
    model = ClickModel(schema, {"user_id": 5, "item_id": 6}, ClickConfig(backbone="dcnv2", table_precision="bfloat16"))
    table = model.tables["user_id"]
    table(Lookup.of(np.array([2, 3]))).sum().backward()
    table.push(Group())
    save_click_model(model, tmp_path)
    loaded = load_click_model(tmp_path, schema).tables["user_id"]
    for name in ("weight", *table.state_names):
        one, other = getattr(loaded, name), getattr(table, name)
        assert torch.equal(one, other) and one.dtype == other.dtype, name
    assert loaded.roundings == 1, "one update"
