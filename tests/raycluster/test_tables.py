"""Tables of any form to the canonical layout, by Ray tasks: against the whole log in memory, and a loop over rows."""

import datetime as dt
import gzip
import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from ctrdist.datasets import ledger, table, table_files
from ctrdist.datasets.table import TableOptions, bucket_of, finish_bucket, partition, write_items, write_users
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
    assert (summary.rows, summary.days, summary.items, summary.users) == (300, 4, 6, 10)
    assert summary.items_with_text == 6
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
    again = run(source, out, pattern="more-*", append=True)
    assert again.rows == 120 and again.counts["files that were in it already, nothing done"] == 3
    agree(out, rows_of(300, 4, 1) + more)
    one = dt.timedelta(days=1)
    (source / "more-0.parquet").touch()
    with pytest.raises(UserError, match=f"{out} goes through {LAST + 2 * one}, but there are rows of {LAST + one}"):
        run(source, out, pattern="more-*", append=True)


@pytest.fixture
def one_process(monkeypatch):
    """In place of Ray: one call after the other."""
    monkeypatch.setattr(tables, "in_parallel", lambda function, calls: (function(*call) for call in calls))


def cut_off(patch: pytest.MonkeyPatch, owner, name: str, calls: int = 0) -> None:
    """From its call number `calls` on, the function `name` is where the run is killed."""
    whole, seen = getattr(owner, name), []

    def killed(*args, **kwargs):
        seen.append(1)
        if len(seen) > calls:
            raise KeyboardInterrupt
        return whole(*args, **kwargs)

    patch.setattr(owner, name, killed)


PLACES = [
    (tables, "partition", 1), (tables, "finish_bucket", 1), (ledger.Ledger, "save", 0), (tables, "complete", 0),
    (Path, "replace", 0), (Path, "replace", 1), (Path, "replace", 2), (Path, "replace", 3), (Path, "replace", 5),
    (Path, "replace", 7), (ledger, "save_schema", 0), (ledger.shutil, "rmtree", 1), (ledger.shutil, "rmtree", 2),
]  # fmt: skip


@pytest.mark.parametrize("append", [False, True])
@pytest.mark.parametrize("place", PLACES, ids=lambda place: f"{place[1]}-{place[2]}")
def test_a_run_that_was_cut_off_is_done_again(one_process, source, tmp_path, monkeypatch, place, append):
    monkeypatch.setattr(tables, "BUCKET_BYTES", 20_000)
    out, rows, pattern = tmp_path / "out", rows_of(300, 4, 1), "log-*"
    if append:
        run(source, out)
        more, pattern = rows_of(120, 2, 5, first=4), "more-*"
        write_log(source, more, "more")
        rows = rows + more
    with monkeypatch.context() as patch:
        cut_off(patch, *place)
        try:
            run(source, out, pattern=pattern, append=append)
        except KeyboardInterrupt:
            cut = True
        else:
            cut = False
    assert cut or place[1] in ("replace", "save_schema", "rmtree")
    assert append or not cut or place[1] == "rmtree" or not (out / "schema.yaml").exists()
    run(source, out, pattern=pattern, append=append)
    agree(out, rows)
    assert sorted(p.name.split("-")[0] for p in out.iterdir()) == [
        "histories", "histories.json", "interactions", "items", "schema.yaml"
    ]  # fmt: skip
    later = rows_of(60, 1, 9, first=6)
    write_log(source, later, "later")
    run(source, out, pattern="later-*", append=True)
    agree(out, rows + later)


def test_an_append_that_fails_leaves_the_dataset_as_it_was(one_process, source, tmp_path):
    out = tmp_path / "out"
    run(source, out)

    def content() -> dict:
        paths = [path for path in out.rglob("*") if path.is_file() and "work" not in path.parts]
        return {path: path.read_bytes() for path in paths}

    before = content()
    with gzip.open(source / "items.jsonl.gz", "wt") as file:
        file.write('{"item_id": "other", "title": "Other", "tags": []}\n')
    with pytest.raises(UserError, match="goes through"):
        run(source, out, append=True)
    with pytest.raises(UserError, match=r"--append: option 'positive' was 4, and is 3 now"):
        run(source, out, options=replace(OPTIONS, positive=3), append=True)
    with pytest.raises(UserError, match=r"--append: schema 'history_length' was 3, and is 9 now"):
        run(source, out, schema=replace(SCHEMA, history_length=9), append=True)
    with pytest.raises(UserError, match="holds a dataset already"):
        run(source, out)
    assert content() == before


def small(folder: Path, log: str, items: str = "item_id,title\na,A\nb,\n", users: str = "", **options):
    """A log of CSV text, and of what else is in the folder; returns the summary and the rows in order of time."""
    schema = options.pop(
        "schema", Schema((Field("user_id"),), (Field("item_id"),), history_length=2, text=("{title}",))
    )
    folder.mkdir(exist_ok=True)
    for name, content in {"log.csv": log, "items.csv": items, "users.csv": users}.items():
        (folder / name).write_text(content)
    who = str(folder / "users.csv") if users else ""
    out = folder / f"out-{len(list(folder.iterdir()))}"
    summary = tables.prepare(schema, f"{folder}/log*", f"{folder}/items.csv", who, out, TableOptions(**options))
    rows = ds.dataset(out / "interactions").to_table().to_pylist()
    return summary, sorted(rows, key=lambda row: row["timestamp"])


def test_labels_other_than_0_and_1_are_null_and_counted(one_process, tmp_path):
    log = "user_id,item_id,label,timestamp\nu,a,1,1\nu,a,300,2\nu,a,0.5,3\nu,a,click,4\nu,b,1.0,5\nu,b,,6\nu,b,0,7\n"
    summary, rows = small(tmp_path, log)
    assert [row["label"] for row in rows] == [1, None, None, None, 1, None, 0]
    assert summary.counts["rows with a label other than 0 and 1, for the job to set aside"] == 4
    assert summary.positives == 2 and rows[-1]["history"] == ["a", "b"] and summary.items_with_text == 1
    with pytest.raises(UserError, match=r"log.csv: column 'label': 'click' is no number"):
        small(tmp_path, "user_id,item_id,label,timestamp\nu,a,click,1\n")


SECOND = 1_700_000_000


@pytest.mark.parametrize(
    ("column", "unit"),
    [
        (pa.array([SECOND * 10**9 + 999_999_999, None]), "ns"),
        (pa.array([SECOND * 10**9 + 999_999_999, None], pa.timestamp("ns")), "s"),
        (pa.array([SECOND * 10**3 + 999, None], pa.timestamp("ms", "Asia/Tokyo")), "s"),
        (pa.array([SECOND + 0.9, float("nan")]), "s"),
        (pa.array([SECOND * 1000.0, float("inf")]), "ms"),
        (pa.array(["2023-11-14T22:13:20.5", "NA"]), "s"),
        (pa.array(["2023-11-15 00:13:20+02", None]), "s"),
        (pa.array([f" {SECOND}999", ""]), "ms"),
    ],
)
def test_timestamps_of_all_kinds(one_process, tmp_path, column, unit):
    path = tmp_path / "log.parquet"
    pq.write_table(pa.table({"user_id": ["u", "v"], "item_id": ["a", "a"], "label": [0, 1], "timestamp": column}), path)
    empty = "user_id,item_id,label,timestamp\n"
    summary, rows = small(tmp_path, empty, time_unit=unit)
    assert [row["timestamp"] for row in rows] == [SECOND]
    assert summary.counts["rows without a timestamp, left out"] == 1


@pytest.mark.parametrize("value", ["1700000000000", "-1", "9999-12-31", "soon"])
def test_a_time_that_cannot_be(one_process, tmp_path, value):
    with pytest.raises(UserError, match=r"log.csv: column 'timestamp': (-?[017]+ .*--time-unit s: choose|neither)"):
        small(tmp_path, f"user_id,item_id,label,timestamp\nu,a,1,{value}\n")


def test_types_agree_over_files_of_other_types(one_process, tmp_path):
    schema = Schema(
        (Field("user_id"),), (Field("item_id"),), (Field("hour"), Field("price", "numeric"), Field("tags", "multi"))
    )
    names = ["user_id", "item_id", "label", "timestamp", "hour", "price", "tags"]
    for number, (types, row) in enumerate([
        ((pa.int32(), pa.int64(), pa.float64(), pa.int32(), pa.int16(), pa.null(), pa.large_list(pa.int8())),
         [7, 5, 1.0, 20, 3, None, [1, 2]]),
        ((pa.float64(), pa.large_string(), pa.bool_(), pa.float64(), pa.dictionary(pa.int8(), pa.string()), pa.int8(),
          pa.list_(pa.string())), [7.0, "5", True, 30.5, "3", 4, ["1", None]]),
    ]):  # fmt: skip
        columns = [pa.array([value], type_) for value, type_ in zip(row, types, strict=True)]
        pq.write_table(pa.table(columns, names), tmp_path / f"log-{number}.parquet")
    lines = [dict(zip(names, row, strict=True)) for row in (
        ("007", 12345678901234567890, 0, 40, True, "NA", "1|2"), (7, "2024-01-01", 0.0, 50, None, 1.5, ["2024-01-01"]),
    )]  # fmt: skip
    (tmp_path / "log.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    (tmp_path / "log-none.json").write_text("")
    many = "".join(f"7,5,0,{60 + n},,NA,\n" for n in range(3))
    _, rows = small(tmp_path, f"{','.join(names)}\n007,5,1,10,03,,1|2\n{many}", schema=schema)
    assert [tuple(row[name] for name in names) for row in rows] == [
        ("007", "5", 1, 10, "03", None, ["1", "2"]), ("7", "5", 1, 20, "3", None, ["1", "2"]),
        ("7", "5", 1, 30, "3", 4.0, ["1", None]), ("007", "12345678901234567890", 0, 40, "true", None, ["1", "2"]),
        ("7", "2024-01-01", 0, 50, None, 1.5, ["2024-01-01"]),
        *[("7", "5", 0, 60 + n, None, None, None) for n in range(3)],
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"log.csv: column 'price', .*: not numeric \(.*'dear'"):
        small(tmp_path, f"{','.join(names)}\n7,5,1,10,3,dear,\n", schema=schema)


def test_a_type_is_not_a_matter_of_the_first_block(one_process, tmp_path, monkeypatch):
    monkeypatch.setattr(table_files, "BLOCK_BYTES", 1_000)
    schema = Schema((Field("user_id"),), (Field("item_id"),), (Field("note"), Field("price", "numeric")))
    lines = [f"{n},i,0,{n},{'line'},{'' if n < 500 else 0.5}" for n in range(600)] + ['x,007,1,600,"two\nlines, so",1']
    head = "user_id,item_id,label,timestamp,note,price\n"
    rows = small(tmp_path, head + "\n".join(lines) + "\n", schema=schema)[1]
    expected = [(str(n), "i", "line", None if n < 500 else 0.5) for n in range(600)] + [
        ("x", "007", "two\nlines, so", 1.0)
    ]
    assert [(r["user_id"], r["item_id"], r["note"], r["price"]) for r in rows] == expected
    keys = ("user_id", "item_id", "label", "timestamp", "note", "price")
    with open(tmp_path / "log.json", "w") as file:
        for n, row in enumerate(rows):
            values = row | {"user_id": n if n < 500 else str(n)}
            file.write(json.dumps({key: values[key] for key in keys}) + "\n")
    again = small(tmp_path, "", schema=schema)[1]
    assert [r["user_id"] for r in again] == [str(n) for n in range(601)]
    assert [{**r, "user_id": 0} for r in again] == [{**r, "user_id": 0} for r in rows]


def test_broken_files_are_named(one_process, tmp_path):
    head = "user_id,item_id,label,timestamp\n"
    with pytest.raises(UserError, match=r"log.csv: not a readable csv file \(.*Expected 4 columns, got 2"):
        small(tmp_path, head + "u,a,1,1\nu,a\n")
    (tmp_path / "log.jsonl").write_text('{"user_id": 1, "item_id": 1, "label": 1, "timestamp": 1}\n[1]\n')
    with pytest.raises(UserError, match=r"log.jsonl: line 2: expected a JSON object, found '\[1\]'"):
        small(tmp_path, head)
    (tmp_path / "log.jsonl").unlink()
    (tmp_path / "log.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"log.parquet: not a readable parquet file"):
        small(tmp_path, head)


def test_items_need_an_id_and_there_must_be_some(one_process, tmp_path):
    log = "user_id,item_id,label,timestamp\nu,a,1,1\n"
    with pytest.raises(UserError, match=r"items.csv: column 'item_id': 1 of 2 ids are null"):
        small(tmp_path, log, "item_id,title\na,A\n,B\n")
    with pytest.raises(UserError, match=r"--items: .*items.csv: no rows"):
        small(tmp_path, log, "item_id,title\n")
    with pytest.raises(UserError, match=r"users.csv: column 'user_id': 1 of 1 ids are null"):
        small(tmp_path, log, users="user_id,x\n,1\n")


def test_what_the_log_has_of_a_user_wins_and_lists_may_be_text(one_process, tmp_path):
    schema = Schema(
        (Field("user_id"), Field("country"), Field("likes", "multi")), (Field("item_id"),), text=("{title}",)
    )
    users = "user_id,country,likes\nu,A,x|y\nv,B,z\n"
    log = "user_id,item_id,label,timestamp,country\nu,a,1,1,C\nv,a,0,2,\nw,a,0,3,D\n"
    rows = small(tmp_path, log, users=users, schema=schema)[1]
    assert [(row["country"], row["likes"]) for row in rows] == [("C", ["x", "y"]), (None, ["z"]), ("D", None)]
    rows = small(tmp_path, log.replace("country", "region"), users=users, schema=schema)[1]
    assert [(row["country"], row["likes"]) for row in rows] == [("A", ["x", "y"]), ("B", ["z"]), (None, None)]


def test_a_split_of_the_logs_own_is_kept(one_process, tmp_path):
    with_split = "user_id,item_id,label,timestamp,split\nu,a,1,1,train\nv,a,0,2,test\n"
    assert [row["split"] for row in small(tmp_path, with_split)[1]] == ["train", "test"]
    _, rows = small(tmp_path, with_split.replace("split", "part"))
    assert all("split" not in row for row in rows)
    _, rows = small(tmp_path, with_split.replace("split", "part"), rename=("part=split",))
    assert [row["split"] for row in rows] == ["train", "test"]
    (tmp_path / "more.csv").write_text("user_id,item_id,label,timestamp\nu,a,0,3\n")
    (tmp_path / "log.csv").write_text(with_split)
    out, schema = tmp_path / "both", Schema((Field("user_id"),), (Field("item_id"),))
    tables.prepare(schema, f"{tmp_path}/[lm]o*.csv", f"{tmp_path}/items.csv", "", out, TableOptions())
    rows = ds.dataset(out / "interactions").to_table().sort_by("timestamp").to_pylist()
    assert [row["split"] for row in rows] == ["train", "test", None]


def test_every_file_has_the_split_if_any_does(one_process, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "BUCKET_BYTES", 40)
    schema, out = Schema((Field("user_id"),), (Field("item_id"),)), tmp_path / "out"
    (tmp_path / "items.csv").write_text("item_id\na\n")
    (tmp_path / "log-0.csv").write_text("user_id,item_id,label,timestamp,split\nu,a,1,1,train\nv,a,0,2,test\n")
    (tmp_path / "log-1.csv").write_text(
        "user_id,item_id,label,timestamp\n" + "".join(f"w{n},a,0,3\n" for n in range(9))
    )
    arguments = (f"{tmp_path}/items.csv", "", out, TableOptions())
    tables.prepare(schema, f"{tmp_path}/log-*.csv", *arguments)
    (tmp_path / "more.csv").write_text("user_id,item_id,label,timestamp\nu,a,1,90000\n")
    tables.prepare(schema, f"{tmp_path}/more.csv", *arguments, append=True)
    files = sorted((out / "interactions").rglob("*.parquet"))
    assert len(files) > 3 and all("split" in pq.read_schema(file).names for file in files)
    rows = ds.dataset(out / "interactions").to_table()
    assert Counter(rows["split"].to_pylist()) == {"train": 1, "test": 1, None: 10}
    without = tmp_path / "without"
    arguments = (f"{tmp_path}/items.csv", "", without, TableOptions())
    tables.prepare(schema, f"{tmp_path}/log-1.csv", *arguments)
    (tmp_path / "more.csv").write_text("user_id,item_id,label,timestamp,split\nu,a,1,90000,train\n")
    with pytest.raises(UserError, match=f"--append: rows with a 'split' to {without}, which has none"):
        tables.prepare(
            schema, f"{tmp_path}/more.csv", f"{tmp_path}/items.csv", "", without, TableOptions(), append=True
        )


def test_a_large_append_makes_more_buckets(one_process, source, tmp_path, monkeypatch):
    out, more = tmp_path / "out", rows_of(900, 2, 5, first=4)
    run(source, out)
    assert ledger.Ledger.load(out).buckets == 1
    monkeypatch.setattr(tables, "BUCKET_BYTES", 4_000)
    write_log(source, more, "more")
    run(source, out, pattern="more-*", append=True)
    assert ledger.Ledger.load(out).buckets > 5
    agree(out, rows_of(300, 4, 1) + more)
    last = rows_of(60, 1, 6, first=6)
    write_log(source, last, "last")
    run(source, out, pattern="last-*", append=True)
    agree(out, rows_of(300, 4, 1) + more + last)


@pytest.mark.parametrize("name", ["log.csv", "log.tsv"])
@pytest.mark.parametrize("two", [False, True])
def test_a_quote_that_is_not_closed_is_refused(one_process, tmp_path, name, two):
    mark = "\t" if name == "log.tsv" else ","
    lines = ["user_id,item_id,label,timestamp,query"] + [f"u{n},a,1,{n},word{n}" for n in range(2_000)]
    lines[7] = 'u6,a,1,6,"heroes'
    lines[1_500] = 'u1499,a,1,1499,"villains' if two else lines[1_500]
    (tmp_path / name).write_text("\n".join(lines).replace(",", mark) + "\n")
    (tmp_path / "items.csv").write_text("item_id\na\n")
    schema = Schema((Field("user_id"),), (Field("item_id"),), context=(Field("query"),))
    arguments = (schema, f"{tmp_path}/log.*", f"{tmp_path}/items.csv", "", tmp_path / "out")
    with pytest.raises(UserError, match=r"log\....: line 8: a value begins with \" that is not closed .* --quote none"):
        tables.prepare(*arguments, TableOptions())
    assert tables.prepare(*arguments, TableOptions(quote="none")).rows == 2_000
    rows = ds.dataset(tmp_path / "out" / "interactions").to_table().to_pylist()
    assert {row["query"] for row in rows if '"' in row["query"]} == {'"heroes', '"villains'} - (
        set() if two else {'"villains'}
    )
    with pytest.raises(UserError, match="--quote 'ab': expected one character, or none"):
        tables.prepare(*arguments[:-1], tmp_path / "other", TableOptions(quote="ab"))


def test_quotes_that_are_closed_and_quotes_within_values(one_process, tmp_path):
    schema = Schema((Field("user_id"),), (Field("item_id"),), context=(Field("query"),))
    log = 'user_id,item_id,label,timestamp,query\nu,a,1,1,"one, ""two""\nlines"\nv,a,1,2,5" screen\nw,a,1,3,"x"\n'
    rows = small(tmp_path, log, schema=schema, items="item_id\na\n")[1]
    assert [row["query"] for row in rows] == ['one, "two"\nlines', '5" screen', "x"]


def test_a_key_of_json_that_comes_late_is_refused(one_process, tmp_path, monkeypatch):
    monkeypatch.setattr(table_files, "BLOCK_BYTES", 200)
    rows = [{"user_id": "u", "item_id": "a", "label": 1, "timestamp": n, "note": "split"} for n in range(50)]
    (tmp_path / "items.csv").write_text("item_id\na\n")
    schema, arguments = (
        Schema((Field("user_id"),), (Field("item_id"),)),
        (f"{tmp_path}/items.csv", "", tmp_path / "out"),
    )
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tables.prepare(schema, f"{tmp_path}/log.jsonl", *arguments, TableOptions())
    rows[30]["split"] = "test"
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="log.jsonl: 'split' stands first after line .*; put a line that has it"):
        tables.prepare(schema, f"{tmp_path}/log.jsonl", *arguments[:-1], tmp_path / "late", TableOptions())


@pytest.mark.parametrize("other", [2, "x"])
def test_an_empty_multi_value_is_none_whatever_stands_beside_it(one_process, tmp_path, other):
    schema = Schema((Field("user_id"),), (Field("item_id"), Field("tags", "multi")))
    items = [{"item_id": 1, "tags": ""}, {"item_id": other, "tags": "a|b"}]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (tmp_path / "log.csv").write_text("user_id,item_id,label,timestamp\nu,1,1,1\n")
    tables.prepare(schema, f"{tmp_path}/log.csv", f"{tmp_path}/items.jsonl", "", tmp_path / "out", TableOptions())
    assert pq.read_table(tmp_path / "out" / "items")["tags"].to_pylist() == [None, ["a", "b"]]


def test_names_that_do_not_fit_together(one_process, tmp_path):
    log = "user_id,uid,item_id,label,timestamp,stars\nu,u,a,1,1,5\n"
    with pytest.raises(UserError, match=r"log.csv: columns user_id, uid would all be 'user_id'"):
        small(tmp_path, log, rename=("uid=user_id",))
    with pytest.raises(UserError, match=r"--rename uid=item_id: 'uid' is renamed to 'user_id' already"):
        small(tmp_path, log, rename=("uid=user_id", "uid=item_id"))
    with pytest.raises(UserError, match=r"log.csv: has a column 'label' beside --rating stars"):
        small(tmp_path, log, rating="stars")
    _, rows = small(tmp_path, "who,item_id,label,timestamp\nu,a,1,1\n", rename=("id=item_id", "who=user_id"),
                    items="id,title\na,A\n")  # fmt: skip
    assert [(row["user_id"], row["item_id"]) for row in rows] == [("u", "a")]


def test_a_second_run_in_one_process_sees_its_own_items(one_process, tmp_path):
    log = "user_id,item_id,label,timestamp\nu,a,1,1\nu,c,1,2\nu,a,1,3\n"
    out, schema = tmp_path / "out", Schema((Field("user_id"),), (Field("item_id"),), history_length=5)
    (tmp_path / "log.csv").write_text(log)
    (tmp_path / "items.csv").write_text("item_id\na\n")
    arguments = (f"{tmp_path}/log.csv", f"{tmp_path}/items.csv", "", out, TableOptions())
    tables.prepare(schema, *arguments)
    (tmp_path / "log.csv").write_text(log.replace("\nu", "\nv").replace(",1,", ",1,86400"))
    (tmp_path / "items.csv").write_text("item_id\na\nc\n")
    tables.prepare(schema, *arguments, append=True)
    rows = ds.dataset(out / "interactions").to_table().sort_by("timestamp").to_pylist()
    assert [row["history"] for row in rows] == [[], ["a"], ["a"], [], ["a"], ["a", "c"]]


def test_a_large_bucket_is_written_in_slices(one_process, source, tmp_path, monkeypatch):
    monkeypatch.setattr(table, "ROWS_PER_FILE", 7)
    run(source, tmp_path / "out")
    agree(tmp_path / "out", rows_of(300, 4, 1))
    files = sorted((tmp_path / "out" / "interactions").rglob("*.parquet"))
    assert len(files) >= 300 / 7 and max(pq.ParquetFile(file).metadata.num_rows for file in files) == 7


def test_longer_histories_make_more_buckets(source, monkeypatch):
    monkeypatch.setattr(tables, "BUCKET_BYTES", 1_000)
    files, long = [str(path) for path in source.glob("log-*")], replace(SCHEMA, history_length=24)
    size = sum(Path(path).stat().st_size for path in files)
    assert tables._buckets(files, replace(SCHEMA, history_length=0), OPTIONS) == -(-size // 1000)
    assert tables._buckets(files, long, OPTIONS) == -(-4 * size // 1000)
    assert tables._buckets(files, long, replace(OPTIONS, history="column")) == -(-size // 1000)


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
    assert summary.counts["rows without a timestamp, left out"] == 1 and summary.rows == 2
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


def test_wrong_files(one_process, source, tmp_path):
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
    alone = np.concatenate([bucket_of(pa.array([None, user]), 16) for user in users[:50]])
    assert np.array_equal(alone[1::2], together[:50])
    longer = bucket_of(pa.array([*users, "x" * 250]), 16)
    assert np.array_equal(longer[:-1], together)
    counts = np.bincount(together, minlength=16)
    assert counts.min() > 240 and counts.max() < 390
    assert bucket_of(pa.array([], pa.string()), 4).shape == (0,)
    assert Counter(bucket_of(pa.nulls(1_600, pa.string()), 16).tolist()) == dict.fromkeys(range(16), 100)


def test_without_ray_it_is_the_same(source, tmp_path):
    """The pieces run in one plain process."""
    out, work = tmp_path / "out", tmp_path / "work"
    work.mkdir()
    assert write_items([str(source / "items.jsonl.gz")], SCHEMA, OPTIONS, work) == (6, 6)
    fields = write_users([str(source / "users.csv")], SCHEMA, OPTIONS, work)
    for number, path in enumerate(sorted(source.glob("log-*"))):
        partition(str(path), number, SCHEMA, OPTIONS, 3, work, fields)
    for bucket in range(3):
        finish_bucket(bucket, 3, SCHEMA, OPTIONS, work, None, False)
    agree(work, rows_of(300, 4, 1))
    assert not out.exists() and ledger.Ledger.load(out) is None
