"""What some workers saved, others load."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ctrdist.embedding import EmbeddingTable
from ctrdist.group import Group
from ctrdist.optim import ROW_OPTIMIZERS
from ctrdist.sharded import BUCKETS, ShardedTable
from ctrdist.shards import read_state, save_state, save_whole

ROWS = BUCKETS + 77


class Worker(Group):
    """One of several, for what needs no exchange."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


class Model(nn.Module):
    """A table and something dense; every value of the table is its own."""

    def __init__(self, kind: type, rank: int = 0, size: int = 1, rows: int = ROWS, seed: int = 0, rule="adamw") -> None:
        super().__init__()
        self.dense = nn.Linear(2, 1)
        self.dense.weight.data.fill_(seed)
        self.table = kind(rows, 3, ROW_OPTIMIZERS[rule](), seed=seed, group=Worker(rank, size))

    def mark(self) -> "Model":
        """Give each row values that tell which one it is, and the state of a table that has missed decay."""
        numbers = self.table.numbers(torch.arange(len(self.table.weight))).float()
        for at, value in enumerate(self.table.row_buffers().values()):
            value.copy_((numbers + at / 10).view(-1, *[1] * (value.ndim - 1)).expand_as(value))
        self.table.decay.fill_(-0.25)
        return self


def save(path: Path, size: int, kind: type = ShardedTable, rows: int = ROWS) -> None:
    for rank in range(size):
        model = Model(kind, rank, size, rows, seed=7).mark()
        save_state(path, model.state_dict(), model, Worker(rank, size))


def expect(model: Model, rows: int) -> None:
    """The rows up to `rows` are the marked ones, those behind are new ones; the rest of the state was loaded too."""
    numbers = model.table.numbers(torch.arange(len(model.table.weight)))
    fresh = Model(type(model.table), model.table.group.rank, model.table.group.size, model.table.rows, seed=3)
    saved = numbers < rows
    for at, (name, value) in enumerate(model.table.row_buffers().items()):
        own = (numbers[saved].float() + at / 10).view(-1, *[1] * (value.ndim - 1)).expand_as(value[saved])
        assert torch.equal(value[saved], own), name
        assert torch.equal(value[~saved], getattr(fresh.table, name)[~saved]), name
    assert model.table.decay == -0.25 and (model.dense.weight == 7).all()


@pytest.mark.parametrize("rows", [ROWS, 5, 3 * BUCKETS])
@pytest.mark.parametrize("loaders", [1, 2, 3])
@pytest.mark.parametrize("savers", [1, 2, 3])
def test_any_number_of_workers_loads_what_any_number_saved(savers: int, loaders: int, rows: int, tmp_path: Path):
    path = tmp_path / "last.safetensors"
    save(path, savers, rows=rows)
    assert {p.name for p in tmp_path.iterdir()} == {"last.safetensors"} | {
        f"last-tables-{rank:05d}-of-{savers:05d}.safetensors" for rank in range(savers)
    }
    held = 0
    for size in (rows, rows + 3 * BUCKETS):
        for rank in range(loaders):
            model = Model(ShardedTable, rank, loaders, size, seed=3)
            model.load_state_dict(read_state(path, model))
            expect(model, rows)
            held += int((model.table.numbers(torch.arange(len(model.table.weight))) < rows).sum())
    assert held == 2 * rows


@pytest.mark.parametrize("rows", [ROWS, 5])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_whole_and_spread_tables_load_one_anothers(size: int, rows: int, tmp_path: Path):
    spread, whole = tmp_path / "spread.safetensors", tmp_path / "whole.safetensors"
    save(spread, size, rows=rows)
    save(whole, 1, EmbeddingTable, rows)
    assert load_file(whole)["table.weight"].shape == (rows, 3)
    for more in (0, 9000):
        for path in (spread, whole):
            model = Model(EmbeddingTable, rows=rows + more, seed=3)
            model.load_state_dict(read_state(path, model))
            expect(model, rows)
        for rank in range(size):
            model = Model(ShardedTable, rank, size, rows + more, seed=3)
            model.load_state_dict(read_state(whole, model))
            expect(model, rows)


def test_a_worker_reads_no_rows_but_its_own(tmp_path: Path):
    path = tmp_path / "last.safetensors"
    save(path, 2)
    other = tmp_path / "last-tables-00001-of-00002.safetensors"
    with safe_open(other, "pt") as file:
        metadata = file.metadata()
    save_file({name: torch.full_like(value, torch.nan) for name, value in load_file(other).items()}, other, metadata)
    for rank, whole in ((0, True), (1, True), (2, False), (3, False)):
        model = Model(ShardedTable, rank, 4, seed=3)
        model.load_state_dict(read_state(path, model))
        assert model.table.weight.isnan().any() != whole
    first = Model(ShardedTable, 0, 3, seed=3)
    first.load_state_dict(read_state(path, first))
    expect(first, ROWS)


def test_more_rows_than_the_table_has_are_refused(tmp_path: Path):
    path = tmp_path / "last.safetensors"
    save(path, 1)
    with pytest.raises(AssertionError, match=f"table.weight: {ROWS} rows were saved, the table has {ROWS - 1}"):
        read_state(path, Model(ShardedTable, rows=ROWS - 1))


def test_what_was_not_saved_stays(tmp_path: Path):
    path = tmp_path / "last.safetensors"
    save(path, 1, EmbeddingTable)
    model = Model(EmbeddingTable, rule="adagrad")
    model.table.sum.fill_(4.0)
    state = read_state(path, model)
    assert set(state) == {"dense.weight", "dense.bias", "table.weight"}
    model.load_state_dict(state, strict=False)
    assert (model.table.sum == 4).all() and model.table.weight[9, 0] == 9


@pytest.mark.parametrize("kind", [EmbeddingTable, ShardedTable])
def test_a_whole_file_is_plain_safetensors(kind: type, tmp_path: Path):
    model = Model(kind, rows=70_000, seed=7)
    model.register_buffer("counts", torch.arange(5))
    model.register_buffer("nothing", torch.empty(0, 4))
    model.register_buffer("narrow", torch.arange(3.0).bfloat16())
    numbers = model.table.numbers(torch.arange(len(model.table.weight))).float()
    model.table.weight.copy_(numbers[:, None].expand(-1, 3))
    save_whole(tmp_path / "whole.safetensors", model, Group(), skip={"table.exp_avg"})
    found = load_file(tmp_path / "whole.safetensors")
    assert found.keys() == model.state_dict().keys() - {"table.exp_avg"}
    for name in ("dense.weight", "dense.bias", "counts", "nothing", "narrow", "table.decay"):
        assert (
            torch.equal(found[name], model.state_dict()[name]) and found[name].dtype == model.state_dict()[name].dtype
        )
    expected = torch.arange(70_000.0)
    assert torch.equal(found["table.weight"], expected[:, None].expand(-1, 3)) and len(found["table.steps"]) == 70_000


def test_a_module_that_is_a_table(tmp_path: Path):
    def table(rank: int, seed: int) -> Tensor:
        return ShardedTable(50, 2, ROW_OPTIMIZERS["sgd"](), seed=seed, group=Worker(rank, 2))

    for rank in range(2):
        one = table(rank, 1)
        save_state(tmp_path / "x.safetensors", one.state_dict(), one, one.group)
    for rank in range(2):
        other = table(rank, 2)
        other.load_state_dict(read_state(tmp_path / "x.safetensors", other))
        rows = other.numbers(torch.arange(len(other.weight))) < 50
        assert torch.equal(other.weight[rows], table(rank, 1).weight[rows])
