import datetime as dt
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctrdist.errors import UserError
from ctrdist.items import Catalog
from ctrdist.log import (
    REASONS,
    check_types,
    choose_window,
    find_faults,
    list_days,
    list_row_groups,
    log_columns,
)
from ctrdist.schema import Field, Schema
from ctrdist.vocabulary import Vocabulary, to_keys

DAY = dt.date(2024, 3, 1)
MIDNIGHT = int(dt.datetime(2024, 3, 1, tzinfo=dt.UTC).timestamp())


def vocabulary(*names) -> Vocabulary:
    return Vocabulary().grow(to_keys(pa.array(names)), np.ones(len(names), np.int64))


def rows_of(vocabulary: Vocabulary) -> dict:
    """Id -> row, as a dict."""
    pairs = zip(vocabulary.keys.tolist(), vocabulary.rows.tolist(), strict=True)
    return {key.decode() if isinstance(key, bytes) else key: row for key, row in pairs}


# --- days ---


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / "interactions" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "interactions" / name).write_bytes(b"")


def test_what_a_killed_writer_left_is_no_part_of_the_log(tmp_path):
    touch(tmp_path, "dt=2024-02-10/a.parquet", ".spark-staging-1/dt=2024-02-10/a.parquet",
          "_temporary/0/task_1/dt=2024-02-10/a.parquet", "dt=2024-02-10/_part.parquet")  # fmt: skip
    assert list_days(str(tmp_path)) == {
        dt.date(2024, 2, 10): [f"{tmp_path}/interactions/dt=2024-02-10/a.parquet"]
    }  # fmt: skip
    touch(tmp_path, "country=de/dt=2024-02-10/a.parquet")
    with pytest.raises(UserError, match="country=de/dt=2024-02-10/a.parquet: not directly in a folder inter"):
        list_days(str(tmp_path))


def test_list_days(tmp_path):
    touch(tmp_path, "dt=2024-02-10/b.parquet", "dt=2024-02-09/x.parquet", "dt=2024-02-10/a.parquet")
    touch(tmp_path, "dt=2024-02-11/_SUCCESS", "README")
    days = list_days(str(tmp_path))
    root = f"{tmp_path}/interactions"
    assert list(days.items()) == [
        (dt.date(2024, 2, 9), [f"{root}/dt=2024-02-09/x.parquet"]),
        (dt.date(2024, 2, 10), [f"{root}/dt=2024-02-10/{name}.parquet" for name in "ab"]),
    ]
    assert list_days(f"file://{tmp_path}") == days


@pytest.mark.parametrize("name", ["dt=2024-13-01", "2024-01-01", "day=2024-01-01", "dt=20240101", "other"])
def test_a_folder_that_is_no_day_is_named(tmp_path, name):
    touch(tmp_path, "dt=2024-01-01/a.parquet", f"{name}/a.parquet")
    with pytest.raises(UserError, match=f"{name}/.*: not directly in a folder interactions/dt=YYYY-MM-DD"):
        list_days(str(tmp_path))


def test_no_log_and_no_days(tmp_path):
    with pytest.raises(UserError, match="interactions: no such folder; --data"):
        list_days(str(tmp_path))
    touch(tmp_path, "dt=2024-01-01/notes.txt")
    with pytest.raises(UserError, match="no Parquet files"):
        list_days(str(tmp_path))


# --- the window ---


def days(*numbers: int) -> list[dt.date]:
    return [dt.date(2024, 1, number) for number in numbers]


def window(all_days, date, *counts):
    found = choose_window(days(*all_days), date and dt.date(2024, 1, date), *counts)
    return tuple([day.day for day in part] for part in (found.train, found.valid, found.test))


@pytest.mark.parametrize(
    ("all_days", "date", "counts", "expected"),
    [
        (range(1, 11), None, (7, 1, 1), ([3, 4, 5, 6, 7, 8], [9], [10])),
        (range(1, 11), 6, (3, 2, 2), ([4], [5, 6], [7, 8])),
        (range(1, 11), None, (100, 1, 3), ([1, 2, 3, 4, 5, 6], [7], [8, 9, 10])),
        (range(1, 11), 9, (2, 1, 5), ([8], [9], [10])),
        ([1, 2, 5, 6, 9], 6, (5, 2, 3), ([2], [5, 6], [9])),  # counts are of calendar days
        ([1, 3, 6, 9], 6, (6, 3, 3), ([1, 3], [6], [9])),
    ],
)
def test_windows(all_days, date, counts, expected):
    assert window(all_days, date, *counts) == expected


@pytest.mark.parametrize(
    ("all_days", "date", "counts", "match"),
    [
        ([1, 2, 3], None, (0, 1, 1), "--train-days 0: at least 1"),
        ([1, 2, 3], None, (2, 0, 1), "--valid-days 0: at least 1"),
        ([1, 2, 3], None, (2, 1, 0), "--test-days 0: at least 1"),
        ([1, 2, 3], None, (2, 2, 1), "--valid-days 2 leaves nothing of --train-days 2"),
        ([1, 2, 3], 7, (2, 1, 1), "--date 2024-01-07: no rows of that day; the log has 2024-01-01 to 2024-01-03"),
        ([1, 2, 9], None, (2, 1, 1), "--date 2024-01-08: no rows of that day"),
        ([1, 2, 3], 3, (2, 1, 1), "--test-days 1: no rows after it"),
        ([1, 2, 3, 9], 3, (2, 1, 5), "--test-days 5: no rows after it"),
        ([1, 2, 3], 1, (2, 1, 1), "no rows from 2023-12-31 until the validation days begin on 2024-01-01"),
        ([1, 5, 6], 5, (4, 1, 1), "no rows from 2024-01-02 until"),
        ([1], None, (2, 1, 1), "--date 2023-12-31: no rows"),
    ],
)
def test_windows_that_cannot_be(all_days, date, counts, match):
    with pytest.raises(UserError, match=match):
        window(all_days, date, *counts)


# --- types ---

SCHEMA = Schema(
    (Field("user_id"), Field("likes", "multi")), (Field("item_id"),), (Field("hour"),), history_length=3, truth="p"
)
TYPES = {
    "user_id": pa.string(),
    "item_id": pa.string(),
    "label": pa.int8(),
    "timestamp": pa.int64(),
    "likes": pa.list_(pa.int32()),
    "hour": pa.dictionary(pa.int8(), pa.string()),
    "history": pa.large_list(pa.string()),
    "p": pa.float64(),
}


def test_columns_and_types_that_are_right():
    assert set(log_columns(SCHEMA)) == set(TYPES) and len(log_columns(SCHEMA)) == len(TYPES)
    check_types("f", pa.schema(TYPES | {"more": pa.date32()}), SCHEMA)
    for column, type_ in [
        ("label", pa.bool_()),
        ("label", pa.float32()),
        ("hour", pa.int16()),
        ("user_id", pa.int64()),
    ]:
        check_types("f", pa.schema(TYPES | {column: type_}), SCHEMA)


@pytest.mark.parametrize("column", list(TYPES))
def test_a_missing_column_is_named(column):
    found = pa.schema({(f"{name}s" if name == column else name): type_ for name, type_ in TYPES.items()})
    with pytest.raises(UserError, match=f"part-7: no column '{column}'; did you mean '{column}s'"):
        check_types("part-7", found, SCHEMA)


@pytest.mark.parametrize(
    ("column", "type_", "expected"),
    [
        ("user_id", pa.float64(), "strings or integers"),
        ("item_id", pa.list_(pa.string()), "strings or integers"),
        ("label", pa.string(), "0 and 1"),
        ("timestamp", pa.timestamp("s"), "integers: seconds UTC"),
        ("timestamp", pa.float64(), "integers: seconds UTC"),
        ("likes", pa.string(), "lists of strings or integers"),
        ("likes", pa.list_(pa.float32()), "lists of strings or integers"),
        ("hour", pa.dictionary(pa.int8(), pa.float64()), "strings or integers"),
        ("history", pa.string(), "lists of item ids"),
        ("history", pa.list_(pa.list_(pa.string())), "lists of item ids"),
        ("p", pa.int64(), "probabilities"),
    ],
)
def test_a_mistyped_column_is_named(column, type_, expected):
    with pytest.raises(UserError) as error:
        check_types("part-7", pa.schema(TYPES | {column: type_}), SCHEMA)
    assert str(error.value) == f"part-7: column '{column}' is of type {type_}; expected {expected}"


def test_row_groups_of_the_log(small_log):
    schema, files = Schema.load(small_log / "schema.yaml"), list_days(str(small_log))
    groups = list_row_groups(str(small_log), files, tuple(files), schema)
    assert [(g.day.day, Path(g.path).name, g.index, g.rows) for g in groups] == [
        (1, "part-0.parquet", 0, 8), (1, "part-1.parquet", 0, 4), (2, "part-0.parquet", 0, 10),
        (4, "part-0.parquet", 0, 6), (4, "part-0.parquet", 1, 6), (5, "part-0.parquet", 0, 10),
    ]  # fmt: skip
    assert [g.day.day for g in list_row_groups(str(small_log), files, tuple(files)[1:2], schema)] == [2]


def test_unreadable_and_empty_files(tmp_path):
    table = pa.table({name: pa.array([], type_) for name, type_ in TYPES.items()})
    touch(tmp_path, "dt=2024-01-01/a.parquet")
    path = tmp_path / "interactions" / "dt=2024-01-01" / "a.parquet"
    pq.write_table(table, path)
    files = list_days(str(tmp_path))
    assert list_row_groups(str(tmp_path), files, tuple(files), SCHEMA) == []
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"a\.parquet: not a readable Parquet file"):
        list_row_groups(str(tmp_path), files, tuple(files), SCHEMA)


# --- faults ---


def catalog(present=("a", "b"), gone=("old",)) -> Catalog:
    ids = vocabulary(*present, *gone)
    flags = np.zeros(ids.size, bool)
    flags[[rows_of(ids)[name] for name in present]] = True
    return Catalog(ids, flags, {})


def faults(rows: list[tuple], label=None) -> list[str]:
    user, item, labels, timestamp = zip(*rows, strict=True)
    table = pa.table({
        "user_id": pa.array(user, pa.string()), "item_id": pa.array(item, pa.string()),
        "label": pa.array(labels, label or pa.float64()), "timestamp": pa.array(timestamp, pa.int64()),
    })  # fmt: skip
    return [REASONS[code] for code in find_faults(table, DAY, catalog())]


def test_each_fault_and_the_bounds_of_the_day():
    nan, label, outside = float("nan"), "label not 0 or 1", "timestamp outside its day"
    cases = [
        (("u", "a", 0.0, MIDNIGHT), "ok"),
        (("", "b", 1.0, MIDNIGHT + 86399), "ok"),
        ((None, "a", 1.0, MIDNIGHT), "null user_id"),
        (("u", None, 1.0, MIDNIGHT), "null item_id"),
        (("u", "c", 1.0, MIDNIGHT), "item not in items/"),
        (("u", "", 1.0, MIDNIGHT), "item not in items/"),
        (("u", "old", 1.0, MIDNIGHT), "item not in items/"),
        *((("u", "a", value, MIDNIGHT), label) for value in (0.5, 2.0, -1.0, nan, None, float("inf"))),
        *((("u", "a", 0.0, t), outside) for t in (MIDNIGHT - 1, MIDNIGHT + 86400, None, 0, MIDNIGHT * 1000)),
    ]
    assert faults([row for row, _ in cases]) == [reason for _, reason in cases]


def test_the_first_fault_is_the_one_that_is_named():
    bad = [None, None, 0.5, 0]
    good = ["u", "a", 1.0, MIDNIGHT]
    expected = ["null user_id", "null item_id", "label not 0 or 1", "timestamp outside its day", "ok"]
    assert faults([tuple(good[:n] + bad[n:]) for n in range(5)]) == expected
    assert faults([("u", "c", 0.5, 0)]) == ["item not in items/"]


@pytest.mark.parametrize(
    ("type_", "labels", "expected"),
    [
        (pa.int8(), [0, 1, 2, None], [0, 0, 4, 4]),
        (pa.bool_(), [True, False, None], [0, 0, 4]),
        (pa.int64(), [1, 2**60 + 1], [0, 4]),
        (pa.float32(), [1.0, 0.1], [0, 4]),
    ],
)
def test_labels_of_any_number(type_, labels, expected):
    found = faults([("u", "a", label, MIDNIGHT) for label in labels], type_)
    assert [REASONS.index(reason) for reason in found] == expected
