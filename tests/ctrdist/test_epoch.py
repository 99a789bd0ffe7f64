import datetime as dt
import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctrdist.epoch import Chunk, Piece, plan_epoch, plan_pass, read_chunk
from ctrdist.errors import UserError
from ctrdist.log import RowGroup, list_days, list_row_groups
from ctrdist.scan import scan_row_group, with_good_rows
from tests.ctrdist.test_log import DAY, rows_of


def row_groups(*sizes: int) -> list[RowGroup]:
    """Row groups of so many good rows, and a bad one in every third."""
    return [RowGroup(DAY, f"f{n // 3}", n % 3, size + (n % 3 == 0), "", size) for n, size in enumerate(sizes)]


def rows_in(chunk: Chunk) -> list[tuple]:
    """The good rows of a chunk, one by one, as (file, row group, number)."""
    return [(p.group.path, p.group.index, n) for p in chunk.pieces for n in range(p.start, p.stop)]


SIZES = [10 * n % 37 for n in range(30)]
"""With an empty row group among them, and some that are larger than a multiple."""


@pytest.mark.parametrize("multiple", [1, 8, 24, 30, 64, 1000])
@pytest.mark.parametrize("seed", [None, (1, 2)])
def test_every_good_row_once_in_chunks_of_whole_multiples(multiple, seed):
    groups = row_groups(*SIZES)
    chunks = plan_epoch(groups, multiple, seed, chunk_rows=50)
    size = -(-50 // multiple) * multiple
    everything = [(g.path, g.index, n) for g in groups for n in range(g.good)]
    found = [row for chunk in chunks for row in rows_in(chunk)]
    assert len(set(found)) == len(found) and sorted(found) == sorted(everything)
    assert all(len(rows_in(chunk)) == size and not chunk.fillers for chunk in chunks[:-1])
    assert (len(rows_in(chunks[-1])) + chunks[-1].fillers) % multiple == 0 and chunks[-1].fillers < multiple
    if seed is None:
        assert found == everything and all(chunk.seed is None for chunk in chunks)
    else:
        assert found != everything and len({chunk.seed for chunk in chunks}) == len(chunks)


def test_chunks_do_not_depend_on_what_is_cut_from_them():
    groups = row_groups(*SIZES)
    assert plan_epoch(groups, 8, (1,), chunk_rows=48) == plan_epoch(groups, 16, (1,), chunk_rows=48)


def test_a_large_row_group_is_read_twice_at_most():
    groups = row_groups(1000, 30, 1000, 900, 1000)
    for multiple, seed in itertools.product((1, 8, 64, 960), range(40)):
        chunks = plan_epoch(groups, multiple, (seed,), chunk_rows=16)
        reads = Counter(piece.group for chunk in chunks for piece in chunk.pieces)
        assert set(reads) == set(groups) and max(reads.values()) <= 2


def test_no_rows_are_no_chunks():
    assert plan_epoch([], 8, (0,)) == plan_epoch(row_groups(0, 0), 8, (0,)) == plan_pass([]) == []


def test_the_order_is_the_seeds():
    groups = row_groups(*[20] * 20)
    plans = {seed: plan_epoch(groups, 32, seed, chunk_rows=40) for seed in [(0, 0), (0, 1), (1, 0)]}
    assert plans[0, 0] == plan_epoch(groups, 32, (0, 0), chunk_rows=40)
    assert len({tuple(chunk.pieces for chunk in plan) for plan in plans.values()}) == 3


@pytest.mark.parametrize("seed", [None, (0,), (1,)])
def test_days_in_order_and_row_groups_shuffled_within_a_day(seed):
    groups = [replace(group, day=dt.date(2024, 1, 1 + n // 6)) for n, group in enumerate(row_groups(*[20] * 24))]
    chunks = plan_epoch(groups, 32, seed, by_day=True, chunk_rows=64)
    pieces = [piece.group for chunk in chunks for piece in chunk.pieces]
    days = [group.day for group in pieces]
    assert days == sorted(days) and set(pieces) == set(groups) and all(chunk.by_day for chunk in chunks)
    assert (list(dict.fromkeys(pieces)) == groups) == (seed is None)


def test_a_pass_takes_whole_row_groups_in_order():
    groups = row_groups(10, 500, 10, 20, 15, 30)
    assert [[piece.group for piece in chunk.pieces] for chunk in plan_pass(groups, 50)] == [
        [groups[0]], [groups[1]], groups[2:5], [groups[5]]
    ]  # fmt: skip
    assert all(piece == Piece(piece.group) for chunk in plan_pass(groups) for piece in chunk.pieces)


def raw_rows(folder: Path, day: dt.date) -> list[dict]:
    paths = sorted((folder / "interactions" / f"dt={day}").iterdir())
    return [row for path in paths for row in pq.ParquetFile(path).read().to_pylist()]


def is_good(row: dict, day: dt.date, items: set) -> bool:
    at = dt.datetime.fromtimestamp(row["timestamp"], dt.UTC).date()
    return row["user_id"] is not None and row["item_id"] in items and row["label"] in (0.0, 1.0) and at == day


@pytest.fixture
def counted(small_log, small_read, tmp_path):
    """The row groups of `small_log`, with their good rows."""
    schema, _, catalog = small_read
    data, files = str(small_log), list_days(str(small_log))
    groups = list_row_groups(data, files, tuple(files), schema)
    scans = [scan_row_group(data, group, schema, catalog, tmp_path / "bad") for group in groups]
    return with_good_rows(groups, [scan.good[group] for scan, group in zip(scans, groups, strict=True)])


def test_read_chunk_gives_the_good_rows(small_log, small_read, counted):
    schema, vocabularies, catalog = small_read
    data, files = str(small_log), list_days(str(small_log))
    items = {name for path in (small_log / "items").iterdir() for name in pq.read_table(path)["item_id"].to_pylist()}
    good = [row for day in files for row in raw_rows(small_log, day) if is_good(row, day, items)]
    assert len(good) == 44 - 5
    users, item_rows = rows_of(vocabularies["user_id"]), rows_of(catalog.ids)
    expected = [(users.get(r["user_id"], 1), item_rows[r["item_id"]], r["label"]) for r in good]

    def read(chunks, keep=()):
        return pa.concat_tables(read_chunk(data, c, schema, vocabularies, catalog, keep) for c in chunks).to_pylist()

    def key(row):
        return row["user_id"], row["item"], row["label"]

    in_order = read(plan_pass(counted))
    assert [key(row) for row in in_order] == expected
    assert in_order == read(plan_pass([replace(group, good=None) for group in counted], 14))
    assert in_order == read(plan_epoch(counted, 1, None, chunk_rows=1)) == read(plan_epoch(counted, 13, None))
    shuffled = read(plan_epoch(counted, 16, (4,), chunk_rows=16))
    assert len(shuffled) == 48 and [row["filler"] for row in shuffled[-9:]] == [True] * 9
    assert Counter(map(str, shuffled[:39])) == Counter(map(str, in_order)) and shuffled[:39] != in_order
    assert shuffled == read(plan_epoch(counted, 16, (4,), chunk_rows=16))
    assert shuffled[:39] != read(plan_epoch(counted, 16, (5,), chunk_rows=16))[:39]
    kept = read(plan_pass(counted), keep=("timestamp", "user_id"))
    assert [row["raw.timestamp"] for row in kept] == [row["timestamp"] for row in good]
    assert [row["raw.user_id"] for row in kept] == [row["user_id"] for row in good]


def test_rows_stay_in_their_day(small_log, small_read, counted):
    schema, vocabularies, catalog = small_read
    chunks = plan_epoch(counted, 13, (7,), by_day=True, chunk_rows=26)
    assert any(len({piece.group.day for piece in chunk.pieces}) > 1 for chunk in chunks), "a cut within a day"
    table = pa.concat_tables(
        read_chunk(str(small_log), c, schema, vocabularies, catalog, keep=("timestamp",)) for c in chunks
    )
    times = np.array(table["raw.timestamp"].to_pylist())
    days = times // 86400
    assert (np.diff(days) >= 0).all() and len(times) == 39 and (np.diff(times) < 0).any()


def test_a_file_that_changed_since_it_was_counted_is_named(small_log, small_read, counted):
    schema, vocabularies, catalog = small_read
    for off in (-1, 1):
        wrong = replace(counted[0], good=counted[0].good + off)
        with pytest.raises(UserError, match=r"row group 0 has other rows than when it was checked.*run the job again"):
            read_chunk(str(small_log), Chunk((Piece(wrong, 0, 2),)), schema, vocabularies, catalog)
