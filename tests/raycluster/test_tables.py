"""Tables of any form to the canonical layout, by Ray tasks: against the whole log in memory, and a loop over rows."""

import datetime as dt
import gzip
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from ctrdist.datasets.table import Ledger, TableOptions, bucket_of, finish_bucket, partition, write_items, write_users
from ctrdist.errors import UserError
from ctrdist.schema import Field, Schema
from raycluster import tables

SCHEMA = Schema(
    user=(Field("user_id"), Field("country")), item=(Field("item_id"), Field("tags", "multi")),
    context=(Field("price", "numeric", scale="log"),), history_length=3, text=("{title}",),
)  # fmt: skip
DAY, START = 86_400, 19_000 * 86_400
LAST = dt.date(1970, 1, 1) + dt.timedelta(days=19_003)


def rows_of(count: int, days: int, seed: int, first: int = 0) -> list[dict]:
    """Rows in any order, with ties in time, a few of items and users that the other tables lack."""
    draw = random.Random(seed)
    return [
        {
            "uid": draw.choice([f"u{n}" for n in range(9)] + ["ünknown", None]),
            "item_id": draw.choice([f"i{n}" for n in range(6)] + ["lost"]),
            "stars": draw.randrange(1, 6),
            "ts": (START + (first + draw.randrange(days)) * DAY + draw.randrange(6)) * 1000,
            "price": draw.choice([None, draw.random()]),
        }
        for _ in range(count)
    ]


OPTIONS = TableOptions(rename=("uid=user_id", "ts=timestamp"), rating="stars", positive=4, time_unit="ms")


@pytest.fixture
def source(tmp_path) -> Path:
    """Items as gzipped JSON lines, users as CSV, the log as Parquet, CSV and JSON lines."""
    folder = tmp_path / "source"
    folder.mkdir()
    items = [{"item_id": f"i{n}", "title": f"Title {n}", "tags": ["a", "b"][: n % 3]} for n in range(6)]
    with gzip.open(folder / "items.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(item) + "\n" for item in items)
    (folder / "users.csv").write_text("user_id,country,shoe\n" + "".join(f"u{n},{'AB'[n % 2]},7\n" for n in range(9)))
    write_log(folder, rows_of(300, 4, 1))
    return folder


def write_log(folder: Path, rows: list[dict], name: str = "log") -> None:
    third = len(rows) // 3
    pq.write_table(pa.Table.from_pylist(rows[:third]), folder / f"{name}-0.parquet", row_group_size=40)
    pa.csv.write_csv(pa.Table.from_pylist(rows[third : 2 * third]), folder / f"{name}-1.csv")
    with open(folder / f"{name}-2.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows[2 * third :])


def by_hand(rows: list[dict], all_rows: bool = False) -> list[dict]:
    """The canonical rows: for each row a look at all the others."""
    items = {f"i{n}" for n in range(6)}
    out = []
    for row in rows:
        earlier = [
            other for other in rows
            if row["uid"] is not None and other["uid"] == row["uid"] and other["ts"] < row["ts"]
            and other["item_id"] in items and (all_rows or other["stars"] >= 4)
        ]  # fmt: skip
        times = sorted({other["ts"] for other in earlier})
        known = row["uid"] is not None and row["uid"].startswith("u")
        out.append({
            "user_id": row["uid"] or "", "item_id": row["item_id"], "label": int(row["stars"] >= 4),
            "timestamp": row["ts"] // 1000, "price": -1.0 if row["price"] is None else round(row["price"], 9),
            "country": "AB"[int(row["uid"][1:]) % 2] if known else "",
            "history": [sorted(o["item_id"] for o in earlier if o["ts"] == time) for time in times],
        })  # fmt: skip
    return out


def agree(out: Path, rows: list[dict], all_rows: bool = False) -> None:
    """The dataset's rows are those by hand; behaviours of one second may stand in any order."""
    found = ds.dataset(out / "interactions").to_table().to_pylist()
    expected = by_hand(rows, all_rows)
    assert len(found) == len(expected)

    def key(row: dict) -> tuple:
        price = -1.0 if row["price"] is None else round(row["price"], 9)
        return (row["user_id"] or "", row["item_id"], row["label"], row["timestamp"], price, row["country"] or "")

    found, expected = sorted(found, key=key), sorted(expected, key=key)
    assert [key(row) for row in found] == [key(row) for row in expected]
    for row, wanted in zip(found, expected, strict=True):
        flat = [item for group in wanted["history"] for item in group]
        history, at = row["history"], 0
        assert len(history) == min(SCHEMA.history_length, len(flat)), (row, wanted)
        for group in reversed(wanted["history"]):  # the latest second first, from the end of the history
            part = history[max(0, len(history) - at - len(group)) : max(0, len(history) - at)]
            assert sorted(part) == group or (len(part) < len(group) and set(part) <= set(group))
            at += len(group)


def run(source: Path, out: Path, schema: Schema = SCHEMA, options: TableOptions = OPTIONS, pattern="log-*", **kwargs):
    return tables.prepare(
        schema, str(source / pattern), str(source / "items.*"), str(source / "users.csv"), out, options, **kwargs
    )


@pytest.mark.parametrize("size", [10**9, 2_000])
@pytest.mark.parametrize("history", ["positive", "all"])
def test_tables_of_three_forms(ray_cluster, source, tmp_path, monkeypatch, size, history):
    monkeypatch.setattr(tables, "BUCKET_BYTES", size)
    out, rows = tmp_path / "out", rows_of(300, 4, 1)
    summary = run(source, out, options=replace(OPTIONS, history=history))
    agree(out, rows, history == "all")
    assert (summary.rows, summary.days, summary.items, summary.users) == (300, 4, 6, 11)
    assert summary.positives == sum(row["stars"] >= 4 for row in rows)
    assert Schema.load(out / "schema.yaml") == SCHEMA
    assert sorted(p.name for p in out.iterdir()) == [
        f"histories-{LAST}", "histories.json", "interactions", "items", "schema.yaml"
    ]  # fmt: skip
    day = pq.read_table(next((out / "interactions").iterdir()), partitioning=None)
    assert day.schema.field("price").type == pa.float64() and day.schema.field("label").type == pa.int8()


def test_days_are_appended_as_if_they_had_been_there(ray_cluster, source, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "BUCKET_BYTES", 4_000)
    out, more = tmp_path / "out", rows_of(120, 2, 5, first=4)
    run(source, out)
    write_log(source, more, "more")
    run(source, out, pattern="more-*", append=True)
    agree(out, rows_of(300, 4, 1) + more)
    one = dt.timedelta(days=1)
    with pytest.raises(UserError, match=f"{out} goes through {LAST + 2 * one}, but there are rows of {LAST + one}"):
        run(source, out, pattern="more-*", append=True)


def test_an_append_that_was_cut_off_is_done_again(ray_cluster, source, tmp_path, monkeypatch):
    out, more = tmp_path / "out", rows_of(120, 2, 5, first=4)
    run(source, out)
    write_log(source, more, "more")
    with monkeypatch.context() as patch:
        patch.setattr(tables, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(source, out, pattern="more-*", append=True)
    run(source, out, pattern="more-*", append=True)
    agree(out, rows_of(300, 4, 1) + more)


def test_a_first_run_that_was_cut_off_is_done_again(ray_cluster, source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(tables, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(source, out)
    assert not (out / "schema.yaml").exists()
    run(source, out)
    agree(out, rows_of(300, 4, 1))


def test_the_logs_own_histories_and_rows_without_time(ray_cluster, tmp_path):
    schema = Schema(user=(Field("user_id"),), item=(Field("item_id"),), history_length=3)
    log = pa.table({
        "user_id": [1, 2, 1], "item_id": [7, 8, 7], "label": [0, 1, 1], "history": [[8], None, [7, 8, 9, 10]],
        "timestamp": pa.array([5, None, 90_000], pa.timestamp("s")),
    })  # fmt: skip
    pq.write_table(log, tmp_path / "log.parquet")
    (tmp_path / "items.tsv").write_text("item_id\tnote\n7\tx\n8\ty\n")
    out = tmp_path / "out"
    options = TableOptions(history="column")
    summary = tables.prepare(schema, f"{tmp_path}/log.parquet", f"{tmp_path}/items.tsv", "", out, options)
    assert summary.counts == {"rows without a timestamp, left out": 1} and summary.rows == 2
    rows = sorted(ds.dataset(out / "interactions").to_table().to_pylist(), key=lambda row: row["timestamp"])
    assert [(r["user_id"], r["item_id"], r["history"]) for r in rows] == [
        ("1", "7", ["8"]), ("1", "7", ["7", "8", "9", "10"])
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rename": ("uid",)}, "--rename uid: expected theirs=ours"),
        ({"rename": ("ts=timestamp",)}, r"log-\d.*: no column 'user_id'"),
        ({"rating": "star"}, r"log-\d.*: no column 'star'"),
    ],
)
def test_wrong_options(ray_cluster, source, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        run(source, tmp_path / "out", options=replace(OPTIONS, **change))


def test_wrong_files(ray_cluster, source, tmp_path):
    with pytest.raises(UserError, match=r"--interactions .*none\*: no such files"):
        run(source, tmp_path / "out", pattern="none*")
    with pytest.raises(UserError, match="no histories.json; only a dataset that 'prepare.py table' made"):
        run(source, tmp_path / "out", append=True)
    (source / "users.csv").write_text("user_id,country\nu1,A\nu1,B\n")
    with pytest.raises(UserError, match=r"users.csv: column 'user_id': 1 ids stand in more than one row, 'u1'"):
        run(source, tmp_path / "out")
    (source / "log-9.xls").write_text("")
    with pytest.raises(UserError, match="log-9.xls: not one of .parquet"):
        run(source, tmp_path / "other", pattern="log-9*")


def test_a_user_is_in_one_bucket_whoever_else_is_there():
    users = [f"user {n}" for n in range(5_000)]
    together = bucket_of(pa.array(users), 16)
    alone = np.concatenate([bucket_of(pa.array([user, None]), 16) for user in users[:50]])
    assert np.array_equal(alone[::2], together[:50]) and not alone[1::2].any()
    longer = bucket_of(pa.array([*users, "x" * 300]), 16)
    assert np.array_equal(longer[:-1], together)
    counts = np.bincount(together, minlength=16)
    assert counts.min() > 240 and counts.max() < 390
    assert bucket_of(pa.array([], pa.string()), 4).shape == (0,)


def test_without_ray_it_is_the_same(source, tmp_path):
    """The pieces run in one plain process."""
    out, work = tmp_path / "out", tmp_path / "work"
    work.mkdir()
    write_items([str(source / "items.jsonl.gz")], SCHEMA, OPTIONS, out)
    fields = write_users([str(source / "users.csv")], SCHEMA, OPTIONS, work)
    for number, path in enumerate(sorted(source.glob("log-*"))):
        partition(str(path), number, SCHEMA, OPTIONS, 3, work, fields)
    for bucket in range(3):
        finish_bucket(bucket, SCHEMA, OPTIONS, work, out, None, tmp_path / "after")
    agree(out, rows_of(300, 4, 1))
    with pytest.raises(UserError):
        Ledger.load(out)
