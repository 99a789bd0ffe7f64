"""The log's own column `split` in place of days."""

import datetime as dt
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctrdist.epoch import plan_epoch, read_chunk
from ctrdist.errors import UserError
from ctrdist.items import build_catalog, grow_catalog_ids
from ctrdist.log import (
    ELSEWHERE,
    NO_TIME,
    SPLIT_WINDOW,
    find_faults,
    list_days,
    list_row_groups,
)
from ctrdist.scan import Scan, scan_row_group, with_good_rows
from ctrdist.schema import Field, Schema
from ctrdist.vocabulary import Vocabulary

SCHEMA = Schema(user=(Field("user_id"),), item=(Field("item_id"),))
ITEMS = pa.table({"item_id": ["a", "b", "c"]})


def day_of(date: str, splits: list[str | None], seed: int) -> pa.Table:
    midnight = int(dt.datetime.fromisoformat(f"{date}T00:00:00+00:00").timestamp())
    draw = random.Random(seed)
    return pa.table({
        "user_id": [f"u{draw.randrange(5)}" for _ in splits],
        "item_id": [draw.choice("abc") for _ in splits],
        "label": [draw.randrange(2) for _ in splits],
        "timestamp": [midnight + n for n in range(len(splits))],
        "split": pa.array(splits, pa.string()),
    })  # fmt: skip


@pytest.fixture
def log(tmp_path) -> tuple[str, dict[str, list]]:
    """A log of two days, three row groups of one split and two of several, with two bad splits; and its rows."""
    draw = random.Random(1)
    mixed = [draw.choice(["train", "valid", "test"]) for _ in range(14)] + [None, "tets"]
    tables = {
        "2024-01-01": day_of("2024-01-01", ["train"] * 8, 0),
        "2024-01-02": day_of("2024-01-02", mixed + ["test"] * 8 + ["valid"] * 8, 1),
    }
    for date, table in tables.items():
        folder = tmp_path / "interactions" / f"dt={date}"
        folder.mkdir(parents=True)
        pq.write_table(table, folder / "part-0.parquet", row_group_size=8)
    rows = pa.concat_tables(tables.values()).to_pylist()
    return str(tmp_path), {name: [row for row in rows if row["split"] == name] for name in ("train", "valid", "test")}


def catalog():
    ids = grow_catalog_ids(ITEMS, Vocabulary())
    return build_catalog(ITEMS, ids, SCHEMA, {"item_id": Vocabulary()})


def test_each_split_has_the_row_groups_that_may_hold_its_rows(log):
    data, _ = log
    files = list_days(data)
    groups = {name: list_row_groups(data, files, (name,), SCHEMA) for name in ("train", "valid", "test")}
    at = {name: [(g.day.day, g.index) for g in found] for name, found in groups.items()}
    assert at == {
        "train": [(1, 0), (2, 0), (2, 1)], "valid": [(2, 0), (2, 1), (2, 3)], "test": [(2, 0), (2, 1), (2, 2)]
    }  # fmt: skip
    assert {g.part for found in groups.values() for g in found} == {"train", "valid", "test"}
    by_day = list_row_groups(data, files, tuple(files), SCHEMA)
    assert len(by_day) == 5 and {g.part for g in by_day} == set(files)


def test_the_scan_counts_every_row_once_and_sets_bad_splits_aside(log, tmp_path):
    data, rows = log
    groups = list_row_groups(data, list_days(data), ("train", "valid", "test"), SCHEMA)
    scan = Scan()
    for group in groups:
        scan.add(
            scan_row_group(
                data, group, SCHEMA, catalog(), tmp_path / "bad", ids="counted" if group.part == "train" else "ignored"
            )
        )
    assert scan.rows == {name: len(found) for name, found in rows.items()}
    assert scan.faults == {"split not train, valid or test": 2}
    users = dict(zip(*(part.tolist() for part in scan.ids["user_id"]), strict=True))
    found = [row["user_id"].encode() for row in rows["train"]]
    assert users == {user: found.count(user) for user in set(found)}
    bad = pa.concat_tables(pq.read_table(path) for path in (tmp_path / "bad").iterdir())
    assert sorted((row["row"], row["split"]) for row in bad.to_pylist()) == [(14, None), (15, "tets")]


@pytest.mark.parametrize("part", ["train", "valid", "test"])
def test_a_split_is_read_whole_and_alone(log, part, tmp_path):
    data, rows = log
    groups = list_row_groups(data, list_days(data), (part,), SCHEMA)
    scans = [scan_row_group(data, group, SCHEMA, catalog(), tmp_path) for group in groups]
    groups = with_good_rows(groups, [scan.good[group] for scan, group in zip(scans, groups, strict=True)])
    tables = [
        read_chunk(data, chunk, SCHEMA, {"user_id": Vocabulary()}, catalog(), keep=("timestamp",))
        for chunk in plan_epoch(groups, 1, (3, 1), chunk_rows=10)
    ]
    assert sorted(pa.concat_tables(tables)["raw.timestamp"].to_pylist()) == [row["timestamp"] for row in rows[part]]


def test_a_log_without_the_column_says_the_way_out(log):
    data, _ = log
    path = next(Path(data).rglob("*.parquet"))
    pq.write_table(pq.ParquetFile(path).read().drop_columns(["split"]), path)
    with pytest.raises(UserError, match=r"no column 'split', which --split column needs; leave --split out"):
        list_row_groups(data, list_days(data), ("train",), SCHEMA)


def test_rows_elsewhere_and_row_numbers_for_time():
    table = day_of("2024-01-01", ["train", "test", "valid", "other"], 0)
    assert find_faults(table, NO_TIME, catalog(), "valid").tolist() == [ELSEWHERE, ELSEWHERE, 0, ELSEWHERE]
    assert find_faults(table, NO_TIME, catalog(), "train").tolist() == [0, ELSEWHERE, ELSEWHERE, 6]
    late = table.set_column(3, "timestamp", pa.array([10**6, None, 3, 4], pa.int64()))
    assert find_faults(late, NO_TIME, catalog()).tolist() == [0, 5, 0, 0]
    assert np.all(find_faults(late, dt.date(2024, 1, 1), catalog()) == 5)


def test_the_window_of_splits():
    assert (SPLIT_WINDOW.train, SPLIT_WINDOW.valid, SPLIT_WINDOW.test) == (("train",), ("valid",), ("test",))
