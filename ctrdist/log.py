"""The canonical log: its days, its row groups, and what is wrong in a row.

<data>/interactions/dt=YYYY-MM-DD/*.parquet    user_id, item_id, label, timestamp, context fields, [history], [split]

A run takes its parts, train, valid and test, from days, or from the log's own column `split`. Data without time has one
day, 1970-01-01, and row numbers for timestamps.
"""

import datetime as dt
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

from ctrdist.errors import UserError
from ctrdist.items import Catalog, require_columns
from ctrdist.schema import HISTORY, ITEM_ID, LABEL, MULTI, NUMERIC, SPLIT, TIMESTAMP, USER_ID, Schema
from ctrdist.storage import filesystem

REASONS = (
    "ok", "null user_id", "null item_id", "item not in items/", "label not 0 or 1", "timestamp outside its day",
    "split not train, valid or test",
)  # fmt: skip
ELSEWHERE = -1  # of a row that belongs to another part
SPLITS = ("train", "valid", "test")
NO_TIME = dt.date(1970, 1, 1)

Part = dt.date | str
"""A day, or the name of a split."""


@dataclass(frozen=True)
class Window:
    """Which days a run trains on, validates on and tests on, each ascending; or which splits."""

    train: tuple[Part, ...]
    valid: tuple[Part, ...]
    test: tuple[Part, ...]


@dataclass(frozen=True)
class RowGroup:
    """One row group of one file of a day, the smallest piece that is read at once.

    Args:
        day: of the file.
        path: of the file.
        index: of the row group in the file.
        rows: its rows, those of other splits and bad ones included.
        split: only its rows of this split are meant; "" = all.
        good: of those meant, the good ones, where a pass has counted them (`ctrdist.scan`).
    """

    day: dt.date
    path: str
    index: int
    rows: int
    split: str = ""
    good: int | None = None

    @property
    def part(self) -> Part:
        """What its rows are counted under: the split, or else the day."""
        return self.split or self.day


def list_days(data: str) -> dict[dt.date, list[str]]:
    """The files of each day, days ascending.

    Raises:
        UserError: no such folder, no days in it, or a folder that is not named `dt=YYYY-MM-DD`.
    """
    filesystem_, root = filesystem(data)
    folder = f"{root}/interactions"
    if filesystem_.get_file_info(folder).type != fs.FileType.Directory:
        raise UserError(
            f"{data}/interactions: no such folder; --data names a prepared log (see jobs/prepare.py --help)"
        )
    days: dict[dt.date, list[str]] = {}
    for info in filesystem_.get_file_info(fs.FileSelector(folder, recursive=True)):
        parts = info.path.removeprefix(folder).strip("/").split("/")
        if info.type != fs.FileType.File or any(part.startswith(("_", ".")) for part in parts):
            continue  # such as what a writer that was killed left in its staging folder
        if not info.path.endswith(".parquet"):
            continue
        try:
            (name, _) = parts
            day = dt.datetime.strptime(name, "dt=%Y-%m-%d").date()
        except ValueError:
            raise UserError(f"{info.path}: not directly in a folder interactions/dt=YYYY-MM-DD; move it") from None
        days.setdefault(day, []).append(info.path)
    if not days:
        raise UserError(f"{data}/interactions: no Parquet files in folders dt=YYYY-MM-DD")
    return {day: sorted(days[day]) for day in sorted(days)}


def file_facts(data: str, paths: list[str]) -> list[list[str | int]]:
    """Path, size and time of change of the given files of the log and of all of `items/`: a change changes a fact."""
    filesystem_, root = filesystem(data)
    items = filesystem_.get_file_info(fs.FileSelector(f"{root}/items", allow_not_found=True))
    listed = [*filesystem_.get_file_info(sorted(set(paths))), *sorted(items, key=lambda info: info.path)]
    return [[info.path.removeprefix(root), info.size, info.mtime_ns or 0] for info in listed]


def choose_window(
    days: list[dt.date], date: dt.date | None, train_days: int, valid_days: int, test_days: int
) -> Window:
    """Days of the log for a run dated `date`, the last day of its training window.

    Counts are of calendar days; the default date is the newest day less `test_days`. The last `valid_days` of the
    window are for validation.

    Raises:
        UserError: a count out of range, a date without data, or nothing to train, validate or test on.
    """
    for name, count, least in (
        ("train-days", train_days, 1),
        ("valid-days", valid_days, 1),
        ("test-days", test_days, 1),
    ):
        if count < least:
            raise UserError(f"--{name} {count}: at least {least}")
    if valid_days >= train_days:
        raise UserError(f"--valid-days {valid_days} leaves nothing of --train-days {train_days} to train on")
    span = f"the log has {days[0]} to {days[-1]}"
    date = date or days[-1] - dt.timedelta(days=test_days)
    if date not in days:
        raise UserError(f"--date {date}: no rows of that day; {span}")
    first_valid = date - dt.timedelta(days=valid_days - 1)
    first_train = date - dt.timedelta(days=train_days - 1)
    train = tuple(day for day in days if first_train <= day < first_valid)
    if not train:
        raise UserError(
            f"--date {date} --train-days {train_days}: no rows from {first_train} until the validation days "
            f"begin on {first_valid}; {span}"
        )
    valid = tuple(day for day in days if first_valid <= day <= date)
    return Window(train, valid, days_after(days, date, test_days))


def days_after(days: list[dt.date], date: dt.date, count: int) -> tuple[dt.date, ...]:
    """Those of `days` that are within `count` calendar days after a date. Raises UserError if there are none."""
    test = tuple(day for day in days if date < day <= date + dt.timedelta(days=count))
    if not test:
        span = f"the log has {days[0]} to {days[-1]}"
        raise UserError(f"--date {date} --test-days {count}: no rows after it to test on; {span}")
    return test


SPLIT_WINDOW = Window(*((name,) for name in SPLITS))
"""The window of a run that takes the log's own column `split`."""


def log_columns(schema: Schema, split: bool = False) -> list[str]:
    """The columns of the log that a schema needs, and `split` where that is asked for."""
    names = [USER_ID, ITEM_ID, LABEL, TIMESTAMP] + [field.name for field in schema.row_fields]
    if schema.history_length:
        names.append(HISTORY)
    if schema.truth:
        names.append(schema.truth)
    if split:
        names.append(SPLIT)
    return list(dict.fromkeys(names))


def list_row_groups(
    data: str, files: dict[dt.date, list[str]], parts: tuple[Part, ...], schema: Schema
) -> list[RowGroup]:
    """The row groups of some days or splits in the order of the log, their columns checked against the schema.

    A row group with rows of several splits is listed for each of them.

    Raises:
        UserError: an unreadable file, or a missing or mistyped column.
    """
    return [
        group
        for part in parts
        for day in ([part] if isinstance(part, dt.date) else files)
        for path in files[day]
        for group in _row_groups_of_file(data, path, day, "" if part == day else part, schema)
    ]


def _row_groups_of_file(data: str, path: str, day: dt.date, split: str, schema: Schema) -> list[RowGroup]:
    filesystem_, _ = filesystem(data)
    try:
        with filesystem_.open_input_file(path) as stream:
            metadata = pq.read_metadata(stream)
    except pa.ArrowInvalid as error:
        raise UserError(f"{path}: not a readable Parquet file ({error}); restore or remove it") from None
    check_types(path, metadata.schema.to_arrow_schema(), schema, split != "")
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    return [
        RowGroup(day, path, index, group.num_rows, split)
        for index, group in enumerate(groups)
        if group.num_rows and not (split and _has_only_others(group, split))
    ]


def _has_only_others(group: pq.RowGroupMetaData, split: str) -> bool:
    """Whether the statistics of the column `split` tell that a row group has rows of one other split alone."""
    for index in range(group.num_columns):
        column = group.column(index)
        if column.path_in_schema == SPLIT and column.is_stats_set and column.statistics.has_min_max:
            found = column.statistics
            alone = found.min == found.max and found.min in SPLITS and found.has_null_count and not found.null_count
            return alone and found.min != split
    return False


def check_types(path: str, found: pa.Schema, schema: Schema, split: bool = False) -> None:
    """Raise a UserError for the first missing or mistyped column of a log file."""
    if split and SPLIT not in found.names:
        raise UserError(
            f"{path}: no column '{SPLIT}', which --split column needs; leave --split out to take the parts from days, "
            "or prepare the log with a protocol that has a split"
        )
    require_columns(path, log_columns(schema, split), found.names)

    def is_id(type_: pa.DataType) -> bool:
        type_ = type_.value_type if pa.types.is_dictionary(type_) else type_
        return pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_integer(type_)

    def is_list(type_: pa.DataType) -> bool:
        if not (pa.types.is_list(type_) or pa.types.is_large_list(type_)):
            return False
        return is_id(type_.value_type) or pa.types.is_null(type_.value_type)  # all lists of a file may be empty

    def is_value(type_: pa.DataType) -> bool:
        return pa.types.is_integer(type_) or pa.types.is_floating(type_)

    def is_number(type_: pa.DataType) -> bool:
        return is_value(type_) or pa.types.is_boolean(type_)

    wanted = [
        (USER_ID, is_id, "strings or integers"),
        (ITEM_ID, is_id, "strings or integers"),
        (LABEL, is_number, "0 and 1"),
        (TIMESTAMP, pa.types.is_integer, "integers: seconds UTC"),
    ]
    for field in schema.row_fields:
        if field.kind == MULTI:
            wanted.append((field.name, is_list, "lists of strings or integers"))
        elif field.kind == NUMERIC:
            wanted.append((field.name, is_value, "integers or floats"))
        else:
            wanted.append((field.name, is_id, "strings or integers"))
    if schema.history_length:
        wanted.append((HISTORY, is_list, "lists of item ids"))
    if schema.truth:
        wanted.append((schema.truth, pa.types.is_floating, "probabilities"))
    if split:
        wanted.append((SPLIT, is_id, "strings: train, valid or test"))
    for name, right, expected in wanted:
        if not right(found.field(name).type):
            raise UserError(f"{path}: column '{name}' is of type {found.field(name).type}; expected {expected}")


def read_row_group(data: str, group: RowGroup, schema: Schema) -> pa.Table:
    """One row group, with the schema's columns, and `split` where only rows of one are meant."""
    filesystem_, _ = filesystem(data)
    columns = log_columns(schema, group.split != "")
    with filesystem_.open_input_file(group.path) as stream:
        return pq.ParquetFile(stream).read_row_group(group.index, columns=columns)


def first_row(data: str, group: RowGroup) -> int:
    """Rows of the file before a row group."""
    filesystem_, _ = filesystem(data)
    with filesystem_.open_input_file(group.path) as stream:
        metadata = pq.read_metadata(stream)
    return sum(metadata.row_group(index).num_rows for index in range(group.index))


def find_faults(table: pa.Table, day: dt.date, catalog: Catalog, split: str = "") -> np.ndarray:
    """What is wrong with each row.

    Args:
        split: rows of the other splits are `ELSEWHERE`; a row whose split is none of the three counts as one of
            `train`.

    Returns:
        int8 index into REASONS: 0 for a good row, else the first that applies; or ELSEWHERE.
    """
    faults = np.zeros(table.num_rows, np.int8)
    midnight = int(dt.datetime.combine(day, dt.time(), dt.UTC).timestamp())
    label, timestamp = table[LABEL].cast(pa.float64(), safe=False), table[TIMESTAMP]
    rows = catalog.ids.lookup(table[ITEM_ID], ITEM_ID)
    inside = pc.is_valid(timestamp)
    if day != NO_TIME:
        inside = pc.and_(pc.greater_equal(timestamp, midnight), pc.less(timestamp, midnight + 86400))
    checks = [
        pc.is_null(table[USER_ID]).to_numpy(),
        pc.is_null(table[ITEM_ID]).to_numpy(),
        ~catalog.present[rows],
        ~pc.fill_null(pc.or_(pc.equal(label, 0.0), pc.equal(label, 1.0)), False).to_numpy(),
        ~pc.fill_null(inside, False).to_numpy(),
    ]
    if split:
        number = pc.fill_null(pc.index_in(table[SPLIT].cast(pa.string()), pa.array(SPLITS)), -1).to_numpy()
        checks.append(number < 0)
        others = np.maximum(number, 0) != SPLITS.index(split)
    for code in range(len(checks), 0, -1):
        faults[checks[code - 1]] = code
    if split:
        faults[others] = ELSEWHERE
    return faults


def with_reasons(table: pa.Table, bad: np.ndarray, reasons: list[str], path: str, first: int) -> pa.Table:
    """Bad rows as they are, with the columns `reason`, `file` and `row` beside them.

    Args:
        bad: their places in the table, int64.
        reasons: what is wrong with each.
        path: of the file that the table is of.
        first: rows of the file before the table's.
    """
    out = table.take(pa.array(bad)).append_column("reason", pa.array(reasons, pa.string()))
    return out.append_column("file", pa.array([path] * len(bad))).append_column("row", pa.array(first + bad))
