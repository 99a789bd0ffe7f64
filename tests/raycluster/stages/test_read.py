"""The pass over a day's log, over several days, against the log as pandas sees it. Without Ray: one call at a time."""

import datetime as dt
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctrdist.epoch import plan_pass
from ctrdist.errors import UserError
from ctrdist.fields import load_encoders
from ctrdist.items import Catalog, ItemTexts
from ctrdist.log import read_row_group
from ctrdist.schema import Field, Schema
from ctrdist.storage import State
from ctrdist.vocabulary import UNKNOWN, Vocabulary
from raycluster import ingest
from raycluster.day import DayOptions, open_day
from raycluster.planning import Plan
from raycluster.stages.read import read_log

SCHEMA = Schema(user=(Field("user_id"),), item=(Field("item_id"), Field("brand")), text=("{title}",), history_length=2)
START = dt.date(2024, 1, 1)


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setattr(ingest, "in_parallel", lambda function, calls, *_, **__: (function(*call) for call in calls))


def write_items(data: Path, *names: str) -> None:
    (data / "items").mkdir(parents=True, exist_ok=True)
    table = {"item_id": list(names), "brand": [f"b{n}" for n in names], "title": [f"Title {n}" for n in names]}
    pq.write_table(pa.table(table), data / "items" / "part.parquet")


def write_day(data: Path, number: int, rows: list[tuple[str, str]]) -> None:
    """Rows (user, item) of day `number`, from 1."""
    day = START + dt.timedelta(days=number - 1)
    second = int(dt.datetime.combine(day, dt.time(), dt.UTC).timestamp())
    folder = data / "interactions" / f"dt={day}"
    folder.mkdir(parents=True)
    users, items = zip(*rows, strict=True)
    table = pa.table({"user_id": users, "item_id": items, "label": [1.0] * len(rows), "timestamp": [second] * len(rows),
                      "history": pa.array([[]] * len(rows), pa.list_(pa.string()))})  # fmt: skip
    pq.write_table(table, folder / "part.parquet")


@pytest.fixture
def data(tmp_path) -> Path:
    SCHEMA.save(tmp_path / "schema.yaml")
    write_items(tmp_path, "a", "b", "c")
    for number in range(1, 13):
        write_day(tmp_path, number, [("always", "a"), (f"u{number}", "b")])
    return tmp_path


def run(data: Path, number: int, whole: bool = False, **options):
    """`read_log` for day `number`, and a release of it; a later run starts from there."""
    asked = DayOptions(data=str(data), state=str(data / "state"), date=START + dt.timedelta(days=number - 1),
                       max_bad_fraction=0.0, **{"train_days": 3} | options)  # fmt: skip
    day = open_day(asked)
    day.plan = Plan(1, 0, 1.0, 1)
    day.stage = lambda name, inputs, make: make(day.name(name), inputs, None)
    found = read_log(day, whole_window=whole)
    with day.state.create(day.release, "x", {"read": found.output.name, "trained_days": day.trained_days}):
        pass
    return found, day


def vocabulary(data: Path, number: int, name: str = "user_id") -> Vocabulary:
    folder = State(str(data / "state")).local(f"runs/{START + dt.timedelta(days=number - 1)}/read")
    return load_encoders(folder / "vocabulary")[name]


def test_an_item_that_left_stays_known_within_the_window(data):
    run(data, 4)
    write_items(data, "a", "c", "d")  # `b`, whom every day names, has gone
    found, day = run(data, 5, whole=True)
    folder = day.state.local(found.output.name)
    catalog = Catalog.load(folder / "catalog", SCHEMA)
    row = int(catalog.ids.lookup(pa.array(["b"]))[0])
    assert found.faults == {} and catalog.present[row]
    assert ItemTexts(folder / "texts.arrow").take(np.array([row])) == ["Title b"]
    assert catalog.fields["brand"][row] != UNKNOWN and found.counts[row] == 2
    # Three days later it is out of the window, and so are its rows good no more.
    with pytest.raises(UserError, match=r"4 of 8 rows .* are bad: 4 item not in items/"):
        run(data, 9, train_days=3)


def test_counts_of_a_window_that_grows_wider(data):
    for number in (4, 5, 6):
        run(data, number)
    found, day = run(data, 7, train_days=7)
    log = pd.concat(
        pq.read_table(path, partitioning=None).to_pandas()
        for number in range(1, 7)
        for path in (data / "interactions" / f"dt=2024-01-0{number}").iterdir()
    )
    ids = Catalog.load(day.state.local(found.output.name) / "catalog", SCHEMA).ids
    counts = {key.decode(): int(found.counts[row]) for key, row in zip(ids.keys, ids.rows, strict=True)}
    assert {name: n for name, n in counts.items() if n} == log["item_id"].value_counts().to_dict()
    assert found.train == (dt.date(2024, 1, 1), dt.date(2024, 1, 6))  # the first was in no window so far
    # Days that are only counted add nothing to the vocabulary's counts.
    assert vocabulary(data, 7).size == 2 + 1 + 6


def test_ids_of_the_window_do_not_expire_and_rows_are_given_again_later(data):
    write_day(data, 13, [("always", "a"), ("u3", "b")])
    write_day(data, 14, [("always", "a")])
    sizes = []
    for number in range(3, 14):
        _, day = run(data, number, expire_days=4, keep_releases=2)
        known = vocabulary(data, number)
        alive = {key.decode() for key in known.keys}
        assert "always" in alive and {f"u{n}" for n in range(max(1, number - 4), min(number, 12))} <= alive
        sizes.append(known.size)
        for name in day.state.names("releases")[:-2]:
            day.state.remove(name)
    assert sizes[-1] <= 2 + 1 + 8 < 2 + 1 + 12 and len(set(sizes[-4:])) == 1


def test_a_user_who_comes_back_on_a_validation_day_keeps_his_row(data):
    for number in (3, 4, 5, 6):
        run(data, number, train_days=2, expire_days=4, keep_releases=9)
    row = vocabulary(data, 6).lookup(pa.array(["u2"]))[0]
    assert row != UNKNOWN
    path = data / "interactions" / "dt=2024-01-07" / "part.parquet"
    table = pq.read_table(path, partitioning=None).to_pandas()
    table.loc[1, "user_id"] = "u2"
    pq.write_table(pa.Table.from_pandas(table, preserve_index=False), path)
    run(data, 7, train_days=2, expire_days=4, keep_releases=9)
    run(data, 8, train_days=2, expire_days=4, keep_releases=9)
    assert vocabulary(data, 8).lookup(pa.array(["u2"]))[0] == row
    assert vocabulary(data, 8).lookup(pa.array(["u1"]))[0] == UNKNOWN


def test_options_that_would_do_nothing_are_refused(data):
    options = DayOptions(data=str(data), state=str(data / "state"), date=START + dt.timedelta(days=3), train_days=3)
    with pytest.raises(UserError, match="--expire-days 9: no row can be given again .* give --keep-releases too"):
        open_day(replace(options, expire_days=9))
    with pytest.raises(UserError, match="--keep-releases -1: 0 or more"):
        open_day(replace(options, keep_releases=-1))


def test_user_ids_of_other_types_in_other_files(data):
    """Strings in one file and large strings in another: what evaluation keeps of them goes together."""
    day = data / "interactions" / "dt=2024-01-01"
    table = pq.read_table(day / "part.parquet", partitioning=None)
    for name, type_ in (("large", pa.large_string()), ("coded", pa.dictionary(pa.int32(), pa.string()))):
        changed = table.set_column(table.column_names.index("user_id"), "user_id", table["user_id"].cast(type_))
        pq.write_table(changed, day / f"{name}.parquet")
    found, opened = run(data, 4)
    reader = ingest.LogReader(str(data), str(data / "state"), found.output.name)
    groups = opened.groups((dt.date(2024, 1, 1),))
    assert len({str(read_row_group(str(data), g, SCHEMA).schema.field("user_id").type) for g in groups}) > 1
    (chunk,) = plan_pass(groups)
    table = reader.read(chunk, ("user_id",))
    assert sorted(table["raw.user_id"].to_pylist()) == ["always"] * 3 + ["u1"] * 3
