"""A table that is spread over workers beside one that is whole."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ctrdist.batch import Batch, Lookup, collate
from ctrdist.embedding import EmbeddingTable
from ctrdist.group import Group
from ctrdist.items import Ragged
from ctrdist.losses import global_mean
from ctrdist.optim import ROW_OPTIMIZERS, RowAdagrad, RowAdam, RowAdamW, RowSGD
from ctrdist.schema import Field, Schema
from ctrdist.sharded import (
    BUCKETS,
    ShardedTable,
    bucket_of,
    bucket_range,
    bucket_rows,
    choose_store,
    is_collective,
    owner_of,
    row_bytes,
)
from ctrdist.tasks.click import ClickConfig, ClickModel

ROWS = 2 * BUCKETS + 100


class Worker(Group):
    """One of several, for what needs no exchange."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def lookup(*ids: int) -> Lookup:
    return Lookup.of(np.array(ids, np.int64))


def test_every_bucket_has_one_owner_and_every_row_one_bucket():
    rows = torch.arange(3 * BUCKETS)
    buckets = bucket_of(rows)
    assert torch.equal(buckets[:BUCKETS].sort().values, rows[:BUCKETS])
    assert torch.equal(bucket_rows(buckets), rows % BUCKETS)
    for size in (1, 2, 3, 7, 100, 128):
        ranges = [bucket_range(rank, size) for rank in range(size)]
        assert ranges[0][0] == 0 and ranges[-1][1] == BUCKETS
        assert all(a[1] == b[0] for a, b in zip(ranges, ranges[1:], strict=False))
        firsts = torch.tensor([first for first, _ in ranges])
        lasts = torch.tensor([last for _, last in ranges])
        owners = owner_of(rows, size)
        assert (buckets >= firsts[owners]).all() and (buckets < lasts[owners]).all()


@pytest.mark.parametrize("count", [50, 1000, 100_000])
@pytest.mark.parametrize("size", [2, 3, 8])
def test_rows_that_follow_one_another_are_spread_evenly(count: int, size: int):
    for start in (0, 2, 777_777):
        shares = torch.bincount(owner_of(torch.arange(start, start + count), size), minlength=size)
        assert shares.max() - shares.min() <= 4 + 0.002 * count


@pytest.mark.parametrize("size", [1, 2, 3, 128])
def test_the_workers_shards_are_the_table(size: int):
    whole = EmbeddingTable(ROWS, 2, RowAdam(), seed=5)
    held = torch.zeros(ROWS, dtype=torch.int64)
    for rank in range(size):
        shard = ShardedTable(10, 2, RowAdam(), seed=5, group=Worker(rank, size))
        shard.grow(ROWS)
        assert shard.rows == ROWS and len(shard.weight) <= 3 * (BUCKETS // size + 1)
        places = torch.arange(len(shard.weight))
        numbers = shard.numbers(places)
        there = numbers < ROWS
        held[numbers[there]] += 1
        assert torch.equal(shard.weight[there], whole.weight[numbers[there]])
        assert torch.equal(shard.places(numbers), places) and len(shard.exp_avg) == len(shard.weight)
        rows = torch.arange(100)
        own = rows[owner_of(rows, size) == rank]
        assert torch.equal(shard.numbers(shard.places(rows)), own)
    assert (held == 1).all()


def both(rule: str, rows: int = ROWS) -> list[EmbeddingTable]:
    optimizer = ROW_OPTIMIZERS[rule](lr=0.1, weight_decay=0.2)
    return [kind(rows, 3, optimizer, std=1.0, seed=4).double() for kind in (EmbeddingTable, ShardedTable)]


@pytest.mark.parametrize("rule", ROW_OPTIMIZERS)
def test_alone_it_is_the_whole_table(rule: str):
    tables = both(rule)
    for step, ids in enumerate([[5, 8000, 5, 0], [], [0], [8000, 4097, 1], list(range(50))]):
        for table in tables:
            bags = Lookup.of(Ragged(np.array(ids, np.int64), np.array([0, len(ids) // 2, len(ids)])))
            loss = (table(lookup(*ids)) * noise(len(ids), 3, seed=step)).sum() + table(bags).square().sum()
            loss.backward()
            table.push(Group(), 1 - step / 10)
        assert tables[0].rows_touched == tables[1].rows_touched == len(set(ids) - {0})
        everything = torch.arange(ROWS)
        assert torch.equal(tables[0].fetch(everything), tables[1].fetch(everything))
        for table in tables:
            if step in (1, 3):
                table.renew(torch.tensor([1, 5, 6000]))
                table.grow(ROWS + 5000 * step)
    assert tables[0].traffic == tables[1].traffic == 0


@pytest.mark.parametrize("rule", [RowAdam, RowAdamW, RowAdagrad, RowSGD])
def test_a_step_makes_nothing_of_the_tables_size(rule):
    from tests.ctrdist.test_embedding import Allocations

    table = ShardedTable(100_000, 4, rule(weight_decay=0.1))
    places = {name: buffer.data_ptr() for name, buffer in table.named_buffers()}
    with Allocations() as seen:
        table(lookup(5, 77_000, 5)).sum().backward()
        table.push(Group())
    assert seen.count > 10 and seen.largest <= 3 * table.packed[0].nbytes // 4, "three rows at most"
    assert places == {name: buffer.data_ptr() for name, buffer in table.named_buffers()}


def train(group: Group, rules: list[str], steps: list[list[list[int]]]) -> list[list[dict[str, Tensor]]]:
    return [train_by(group, rule, steps) for rule in rules]


def train_by(group: Group, rule: str, steps: list[list[list[int]]]) -> list[dict[str, Tensor]]:
    """Steps on a table of either store, each with the ids of every worker."""
    out = []
    tables = both(rule, rows=9)
    for step, ids_of in enumerate(steps):
        ids = ids_of[group.rank] if group.size > 1 else [i for part in ids_of for i in part]
        goal, found = noise(9, 3, seed=step), {}
        for name, table in zip(("replicated", "sharded"), tables, strict=True):
            total = (table(lookup(*ids)) - goal[ids]).pow(2).sum() + table(lookup(*ids[::-1])).sin().sum()
            global_mean(total, len(ids), group).backward()
            table.push(group, 1 - step / 20)
            found[name] = table.fetch(torch.arange(9) if step % 2 else torch.arange(9)[group.rank :])
            found[f"{name} touched"] = torch.tensor(table.rows_touched)
        out.append(found)
    return out


STEPS = [
    [[1, 2, 2, 5], [2, 7], [3]],
    [[3, 3], [], []],
    [[], [8, 1, 0], [1]],
    [[], [], []],
    [[0], [0], []],
    [[1, 2, 3, 4, 5, 6, 7], [5, 5, 5], [5, 1]],
    [[], [], [4]],
]


@pytest.mark.parametrize(("size", "rules"), [(2, list(ROW_OPTIMIZERS)), (3, ["adam"])])
def test_workers_keep_the_table_of_one(workers, size: int, rules: list[str]):
    steps = [parts[: size - 1] + [sum(parts[size - 1 :], [])] for parts in STEPS]
    for alone, *everyone in zip(train(Group(), rules, steps), *workers(size, train, rules, steps), strict=True):
        for step, one in enumerate(alone):
            for rank, found in enumerate(everyone):
                for store in ("replicated", "sharded"):
                    expected = one["replicated"][0 if step % 2 else rank :]
                    torch.testing.assert_close(found[step][store], expected, rtol=1e-11, atol=1e-13)
                assert found[step]["replicated touched"] == one["replicated touched"]
            assert sum(found[step]["sharded touched"] for found in everyone) == one["replicated touched"]


def count_traffic(group: Group, cases: list[tuple[int, int, int]]) -> list[dict[str, Any]]:
    """Bytes that a step sends, by store, for (rows, distinct ids of each worker, times each occurs)."""
    out = []
    for rows, distinct, times in cases:
        ids = np.random.default_rng(group.rank).choice(np.arange(1, rows), distinct, replace=False)
        remote = int((owner_of(torch.from_numpy(ids), group.size) != group.rank).sum())
        found: dict[str, Any] = {"remote": remote}
        for name, kind in (("replicated", EmbeddingTable), ("sharded", ShardedTable)):
            table, before = kind(rows, 8, RowAdam()), group.sent
            table.group = group
            table(lookup(*np.tile(ids, times).tolist())).sum().backward()
            table.push(group)
            found[name] = table.traffic
            assert table.traffic == group.sent - before
        out.append(found)
    return out


CASES = [(2000, 0, 1), (2000, 100, 1), (2000, 1000, 1), (50_000, 1000, 1), (50_000, 1000, 5)]


def test_traffic_follows_the_distinct_ids_not_the_table(workers):
    size = 3
    everyone = workers(size, count_traffic, CASES)
    for found in everyone:
        for (rows, distinct, _), sent in zip(CASES, found, strict=True):
            # A ring passes on everyone's ids and gradients, and how many there are; of none, a byte.
            assert sent["replicated"] == (size - 1) * ((distinct * (8 + 4 * 8) or 1) + 8)
            assert sent["sharded"] >= sent["remote"] * 8 + (size - 1) * 8
            assert rows >= distinct
        sharded = [sent["sharded"] for sent in found]
        assert sharded[4] == sharded[3] == pytest.approx(sharded[2], rel=0.1) == pytest.approx(10 * sharded[1], rel=0.2)
        assert sharded[0] == (size - 1) * 8
    totals, remotes = ([sum(s[k] for s in at) for at in zip(*everyone, strict=True)] for k in ("sharded", "remote"))
    # An id there, its row back, its gradient there; and how many.
    assert totals == [remote * (8 + 32 + 32) + size * (size - 1) * 8 for remote in remotes]


def test_the_store_is_chosen_by_memory_or_by_name():
    adam, adagrad = RowAdam(), RowAdagrad()
    assert row_bytes(16, adam) == 16 * 4 * 3 + 4 + 4 and row_bytes(17, adagrad) == 17 * 4 + 4
    assert row_bytes(8, RowAdamW()) == 8 * 4 * 3 + 4 + 4 and row_bytes(8, RowSGD()) == 32
    assert row_bytes(17, RowSGD(), torch.bfloat16) == 17 * 2 + 6, "whole words"
    gib = 3_000_000 * row_bytes(16, adam) / 2**30
    sizes = [(1_000_000, 16), (2_000_000, 16)]
    assert choose_store("auto", sizes, adam, gib * 1.001, 4) is EmbeddingTable
    assert choose_store("auto", sizes, adam, gib * 0.999, 4) is ShardedTable
    assert choose_store("auto", sizes, adagrad, gib * 0.999, 4) is EmbeddingTable
    assert choose_store("auto", sizes, adam, gib * 0.999, 1) is EmbeddingTable, "one worker has all rows anyway"
    narrow = [(1_000_000, 16), (2_000_000, 8)]
    assert choose_store("auto", narrow, adam, gib * 0.7, 4) is EmbeddingTable
    assert choose_store("auto", narrow, adam, gib * 0.65, 4) is ShardedTable
    assert choose_store("sharded", sizes, adam, 1e9, 1) is ShardedTable
    assert choose_store("replicated", sizes, adam, 0.0, 4) is EmbeddingTable


@pytest.mark.parametrize("rule", ROW_OPTIMIZERS)
def test_a_table_takes_the_memory_that_the_choice_counts(rule: str):
    optimizer = ROW_OPTIMIZERS[rule]()
    size = row_bytes(16, optimizer)

    assert EmbeddingTable(9000, 16, optimizer).packed.nbytes == 9000 * size
    shards = [ShardedTable(9000, 16, optimizer, group=Worker(rank, 3)).packed.nbytes for rank in range(3)]
    assert sum(shards) == 3 * BUCKETS * size and max(shards) - min(shards) <= 3 * size


def test_a_click_model_takes_the_store_of_its_configuration():
    schema = Schema(user=(Field("user_id"),), item=(Field("item_id"),), history_length=0)
    for store, kind in (("auto", EmbeddingTable), ("sharded", ShardedTable), ("replicated", EmbeddingTable)):
        config = ClickConfig(backbone="dcnv2", table_store=store)
        model = ClickModel(schema, {"user_id": 5, "item_id": 6}, config)
        assert {type(table) for table in model.tables.values()} == {kind} and not is_collective(model)
    model.tables["user_id"].group = Worker(0, 2)
    assert not is_collective(model)
    spread = torch.nn.Sequential(ShardedTable(5, 2, RowAdam(), group=Worker(0, 2)))
    assert is_collective(spread)
    with pytest.raises(AssertionError, match="another group"):
        spread[0].group = Group()
        spread[0].fetch(torch.tensor([1]))


def test_an_empty_batch_has_the_fields_of_its_model(small_log, small_read):
    from tests.ctrdist.test_export import encoded, text_table

    schema, _, catalog = small_read
    table = encoded(small_log, small_read)
    empty = collate(table, schema, catalog, text_table(catalog)).empty()
    expected = collate(table.slice(0, 0), schema, catalog, text_table(catalog))
    assert isinstance(empty, Batch) and len(empty) == 0
    for name in ("label", "items", "target", "history", "text"):
        assert torch.equal(getattr(empty, name), getattr(expected, name)), name
    for part in ("row_fields", "item_fields"):
        for name, wanted in getattr(expected, part).items():
            found = getattr(empty, part)[name]
            for value in ("rows", "index", "offsets"):
                one, other = getattr(found, value), getattr(wanted, value)
                assert (one is None and other is None) or torch.equal(one, other.to(one)), (part, name, value)
