import datetime as dt
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctrdist.errors import UserError
from ctrdist.log import REASONS, RowGroup, list_days, list_row_groups
from ctrdist.scan import Scan, count_users, item_counts, scan_row_group, sum_scans
from ctrdist.vocabulary import to_keys

THIRD = dt.date(2024, 1, 4)


def scans(small_log, small_read, quarantine, **options) -> tuple[list, list[Scan]]:
    schema, _, catalog = small_read
    files = list_days(str(small_log))
    groups = list_row_groups(str(small_log), files, tuple(files), schema)
    return groups, [scan_row_group(str(small_log), g, schema, catalog, quarantine, **options) for g in groups]


def frames(small_log: Path) -> pd.DataFrame:
    """The whole log with its day, and whether each row is good, by pandas."""
    parts = []
    for path in sorted((small_log / "interactions").rglob("*.parquet")):
        parts.append(pq.ParquetFile(path).read().to_pandas().assign(day=path.parent.name[3:], path=str(path)))
        parts[-1]["row"] = np.arange(len(parts[-1]))
    log = pd.concat(parts, ignore_index=True)
    items = set(pd.concat(pd.read_parquet(path) for path in (small_log / "items").iterdir())["item_id"])
    day = pd.to_datetime(log["timestamp"], unit="s").dt.strftime("%Y-%m-%d")
    log["good"] = log["user_id"].notna() & log["item_id"].isin(items) & log["label"].isin([0, 1]) & (day == log["day"])
    log["strangers"] = [0 if h is None else sum(name not in items for name in h) for h in log["history"]]
    return log


def by_id(counts) -> dict:
    return {(k.decode() if isinstance(k, bytes) else k): n for k, n in zip(*(a.tolist() for a in counts), strict=True)}


def check(scan: Scan, log: pd.DataFrame, catalog) -> None:
    good = log[log["good"]]
    assert {str(day): n for day, n in scan.rows.items()} == {
        day: int(n) for day, n in log.groupby("day")["good"].sum().items()
    }
    assert {str(day): n for day, n in scan.clicks.items()} == {
        day: int(part.loc[part["good"], "label"].sum()) for day, part in log.groupby("day")
    }
    assert scan.quarantined == len(log) - len(good)
    assert scan.strangers == good["strangers"].sum()
    names = dict(zip(catalog.ids.rows.tolist(), (key.decode() for key in catalog.ids.keys.tolist()), strict=True))
    for day, (rows, counts) in scan.items.items():
        found = dict(zip((names[row] for row in rows.tolist()), counts.tolist(), strict=True))
        assert found == Counter(good.loc[good["day"] == str(day), "item_id"])
    assert by_id(scan.ids["user_id"]) == Counter(good["user_id"])
    assert by_id(scan.ids["hour"]) == Counter(good["hour"].dropna().astype(int))
    tags = [tag for tags in good["tags"] if tags is not None for tag in tags if tag is not None]
    assert by_id(scan.ids["tags"]) == Counter(tags)


def test_each_row_group_and_their_sum_against_pandas(small_log, small_read, tmp_path):
    groups, found = scans(small_log, small_read, tmp_path)
    log, catalog = frames(small_log), small_read[2]
    assert log["strangers"].sum() > 0
    parts = []
    for group, scan in zip(groups, found, strict=True):
        first = 6 * group.index
        mine = log[(log["path"] == group.path) & (log["row"] >= first) & (log["row"] < first + group.rows)]
        assert len(mine) == group.rows
        check(scan, mine, catalog)
        parts.append(mine)
    forward, backward = Scan(), Scan()
    for scan in found:
        forward.add(scan)
    _, again = scans(small_log, small_read, tmp_path)
    for scan in reversed(again):
        backward.add(scan)
    check(forward, log, catalog)
    check(backward, log, catalog)
    for count in range(1, len(groups) + 1):
        _, again = scans(small_log, small_read, tmp_path)
        check(sum_scans(iter(again[:count])), pd.concat(parts[:count]), catalog)
    assert forward.faults == {reason: 1 for reason in REASONS[1:-1]} == backward.faults


def test_without_ids_nothing_else_changes(small_log, small_read, tmp_path):
    _, with_ids = scans(small_log, small_read, tmp_path)
    _, without = scans(small_log, small_read, tmp_path, ids="ignored")
    assert all(scan.ids == {} for scan in without) and all(scan.ids for scan in with_ids)
    for a, b in zip(with_ids, without, strict=True):
        assert (a.rows, a.clicks, a.faults, a.strangers) == (b.rows, b.clicks, b.faults, b.strangers)


def test_quarantine_holds_the_bad_rows_with_their_reason(small_log, small_read, tmp_path):
    scans(small_log, small_read, tmp_path / "bad")
    path = small_log / "interactions" / f"dt={THIRD}" / "part-0.parquet"
    source = pq.ParquetFile(path).read().to_pylist()
    reasons = {
        1: "null user_id",
        2: "item not in items/",
        7: "label not 0 or 1",
        8: "null item_id",
        9: "timestamp outside its day",
    }
    files = sorted((tmp_path / "bad").iterdir())
    assert len(files) == 2, "one for each row group with bad rows"
    found = [row for file in files for row in pq.read_table(file).to_pylist()]
    assert found == [source[n] | {"reason": reasons[n], "file": str(path), "row": n} for n in sorted(reasons)]


def test_no_quarantine_without_bad_rows(small_log, small_read, tmp_path):
    schema, _, catalog = small_read
    files = list_days(str(small_log))
    day = dt.date(2024, 1, 1)
    for group in list_row_groups(str(small_log), files, (day,), schema):
        scan = scan_row_group(str(small_log), group, schema, catalog, tmp_path / "bad")
        assert scan.faults == {} and scan.quarantined == 0
    assert not (tmp_path / "bad").exists()


def test_a_row_group_of_bad_rows_only(small_log, small_read, tmp_path):
    schema, _, catalog = small_read
    day = "dt=2024-01-01"
    table = pq.ParquetFile(small_log / "interactions" / day / "part-0.parquet").read()
    nulls = pa.array([None] * table.num_rows, pa.string())
    table = table.set_column(table.column_names.index("user_id"), "user_id", nulls)
    (tmp_path / "interactions" / day).mkdir(parents=True)
    pq.write_table(table, tmp_path / "interactions" / day / "x.parquet")
    files = list_days(str(tmp_path))
    (group,) = list_row_groups(str(tmp_path), files, tuple(files), schema)
    scan = scan_row_group(str(tmp_path), group, schema, catalog, tmp_path / "bad")
    assert scan.faults == {"null user_id": 8} and scan.rows == {group.day: 0} and scan.clicks == {group.day: 0}
    assert scan.strangers == 0 and by_id(scan.items[group.day]) == {} and by_id(scan.ids["hour"]) == {}


def test_adding_scans_of_two_types_is_refused():
    one = np.ones(1, np.int64)
    total = Scan(ids={"user_id": (to_keys(pa.array(["a"])), one)})
    with pytest.raises(UserError, match="column 'user_id'"):
        total.add(Scan(ids={"user_id": (to_keys(pa.array([1])), one)}))


def test_item_counts():
    days = [dt.date(2024, 1, n) for n in (1, 2, 3)]
    counts = {
        days[0]: (np.array([2, 4]), np.array([3, 1])),
        days[1]: (np.array([4]), np.array([5])),
        days[2]: (np.array([2]), np.array([9])),
    }
    assert item_counts(counts, (days[0], days[1], dt.date(2024, 2, 1)), 6).tolist() == [0, 0, 3, 0, 6, 0]
    assert item_counts(counts, (), 3).tolist() == [0, 0, 0]


@pytest.mark.parametrize("kind", [pa.string(), pa.int64(), pa.dictionary(pa.int32(), pa.string())])
def test_users_are_counted_by_row_group_and_split(kind: pa.DataType, tmp_path: Path):
    users = pa.array(["7", "8", None, "7", "9", "7"]).cast(kind.value_type if hasattr(kind, "value_type") else kind)
    users = users.dictionary_encode() if pa.types.is_dictionary(kind) else users
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"user_id": users, "split": ["train"] * 4 + ["test"] * 2}), path)
    for split, expected in (("", {"7": 3, "8": 1, "9": 1}), ("train", {"7": 2, "8": 1}), ("test", {"9": 1, "7": 1})):
        found = count_users(str(tmp_path), RowGroup(THIRD, str(path), 0, 6, split)).to_pydict()
        assert dict(zip(found["values"], found["counts"], strict=True)) == expected
