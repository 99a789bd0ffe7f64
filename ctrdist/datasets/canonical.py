"""Writes a log in the one layout that every job reads; the adapters of this folder only bring the columns."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ctrdist.errors import UserError
from ctrdist.schema import HISTORY, ITEM_ID, LABEL, MULTI, NUMERIC, SPLIT, TIMESTAMP, USER_ID, Schema
from ctrdist.texts import join_texts

SECONDS_A_DAY = 86_400
ROWS_PER_FILE = 500_000  # keeps the int32 offsets of strings and histories far from their limit
FOLDERS = ("items", "users", "interactions", "work")
HISTORIES = "histories-"  # and the last day in it: what each user did last
LEDGER = "histories.json"
FILES = (LEDGER, f"{LEDGER}.part", "schema.yaml.part")


@dataclass(frozen=True)
class Summary:
    """What was written.

    Args:
        rows: rows of the log.
        days: UTC days with rows.
        users: distinct users of the log.
        items: rows of `items/`, shown in the log or not.
        positives: rows with label 1.
        rows_with_history: rows with one earlier behaviour or more.
        items_with_text: items whose text, by the schema, is not empty.
        free_texts: of these, items with a text of a public dataset's own, or from `--item-text`; None if unknown.
        best_auc: AUC of the true click probability over all rows, which no model can beat but by luck; None where
            the truth is unknown, nan where all labels are the same.
        counts: what was handled on the way, such as {"duplicate rows dropped": 12}.
    """

    rows: int
    days: int
    users: int
    items: int
    positives: int
    rows_with_history: int
    items_with_text: int
    best_auc: float | None = None
    free_texts: int | None = None
    counts: dict[str, int] = field(default_factory=dict)


class CanonicalWriter:
    """Writes `items/`, then `interactions/` in any number of pieces, and last `schema.yaml`, which makes it exist.

    Args:
        out: folder to write: absent, empty, or left half-written by an earlier run (which is cleared).
        schema: what the columns mean.

    Raises:
        UserError: `out` is a file, holds a dataset, or holds anything else that this class does not write.
    """

    def __init__(self, out: str | Path, schema: Schema) -> None:
        self.out, self.schema = Path(out), schema
        self.rows = self.positives = self.rows_with_history = self.items = self.items_with_text = 0
        self._files_of_day: dict[np.datetime64, int] = {}
        clear_unfinished(self.out)
        for name in ("items", "interactions"):
            (self.out / name).mkdir(parents=True, exist_ok=True)

    def write_items(self, items: pa.Table) -> None:
        """Write one file of `items/`: item_id, the schema's item fields, the columns its text names."""
        missing = {f.name for f in self.schema.item}.union(self.schema.text_columns) - set(items.column_names)
        assert not missing, f"items lack {missing}"
        write_file(items, self.out / "items" / "part-00000.parquet")
        self.items = items.num_rows
        self.items_with_text = items_with_text(items, self.schema)

    def write_interactions(self, rows: pa.Table, timed: bool = True) -> None:
        """Append rows of the log, each to a new file of its UTC day.

        Args:
            rows: user_id, item_id, label, timestamp, the schema's user and context fields, `history` and the truth
                column where the schema has them, `split` where the log has one. Days may come in any order; rows in
                order of time are cut without a copy.
            timed: False where `timestamp` is a row number: all rows then are of the day 1970-01-01.
        """
        columns = canonical_columns(self.schema, rows.schema)
        rows = rows.select(columns.names).cast(columns)
        for date, part in by_day(rows, timed):
            number = self._files_of_day[date] = self._files_of_day.get(date, -1) + 1
            write_file(part, self.out / "interactions" / f"dt={date}" / f"part-{number:05d}.parquet")
        self.rows += rows.num_rows
        self.positives += pc.sum(pc.cast(rows[LABEL], pa.int64())).as_py() or 0
        if self.schema.history_length:
            self.rows_with_history += pc.sum(pc.greater(pc.list_value_length(rows[HISTORY]), 0)).as_py() or 0

    def finish(self, users: int, best_auc: float | None = None, counts: dict[str, int] | None = None) -> Summary:
        """Write `schema.yaml` and sum up; `users` is the count of distinct users of the log."""
        save_schema(self.schema, self.out)
        return Summary(
            rows=self.rows, days=len(self._files_of_day), users=users, items=self.items, positives=self.positives,
            rows_with_history=self.rows_with_history, items_with_text=self.items_with_text, best_auc=best_auc,
            counts=counts or {},
        )  # fmt: skip


def by_day(rows: pa.Table, timed: bool = True) -> Iterator[tuple[np.datetime64, pa.Table]]:
    """Rows of the log with their UTC day, at most ROWS_PER_FILE at once, days ascending.

    Args:
        rows: in any order; those in order of time are cut without a copy.
        timed: False where `timestamp` is a row number: all rows then are of the day 1970-01-01.
    """
    day = rows[TIMESTAMP].to_numpy() // (SECONDS_A_DAY if timed else np.iinfo(np.int64).max)
    if np.any(day[1:] < day[:-1]):
        order = np.argsort(day, kind="stable")
        rows, day = rows.take(order), day[order]
    cuts = np.r_[np.flatnonzero(np.r_[True, day[1:] != day[:-1]]), len(day)] if len(day) else [0]
    for start, stop in zip(cuts[:-1], cuts[1:], strict=True):
        for first in range(start, stop, ROWS_PER_FILE):
            yield np.datetime64(int(day[start]), "D"), rows.slice(first, min(ROWS_PER_FILE, stop - first))


def items_with_text(items: pa.Table, schema: Schema) -> int:
    """How many items have any text, by the schema's parts of it."""
    return pc.sum(pc.not_equal(join_texts(items, schema.text), "")).as_py() or 0


def save_schema(schema: Schema, out: Path) -> None:
    """Write `schema.yaml` in one piece: from then on the dataset exists."""
    part = out / "schema.yaml.part"
    schema.save(part)
    part.replace(out / "schema.yaml")


def canonical_columns(schema: Schema, found: pa.Schema) -> pa.Schema:
    """Columns of the log with their types; other fields than the fixed ones keep integers and numbers as they are."""
    columns = {USER_ID: pa.string(), ITEM_ID: pa.string(), LABEL: pa.int8(), TIMESTAMP: pa.int64()}
    for column in schema.row_fields:
        value, kept = pa.list_(pa.string()) if column.kind == MULTI else pa.string(), found.field(column.name).type
        columns.setdefault(column.name, kept if pa.types.is_integer(kept) or column.kind == NUMERIC else value)
    if schema.history_length:
        columns[HISTORY] = pa.list_(pa.string())
    if schema.truth:
        columns[schema.truth] = pa.float64()
    if SPLIT in found.names:
        columns[SPLIT] = pa.string()
    return pa.schema(columns)


def write_file(table: pa.Table, path: Path) -> None:
    """Write one file of a dataset; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, compression="zstd", use_dictionary=True, row_group_size=32_768)


def clear_unfinished(out: Path) -> None:
    """Remove what an earlier run left without `schema.yaml`; refuse a folder with anything that it did not write."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out}: is a file; --out takes the folder to write the dataset to")
    if (out / "schema.yaml").exists():
        raise UserError(f"{out}: holds a dataset already (schema.yaml is there); remove it or choose another --out")
    for path in out.rglob("*"):
        top, *below = path.relative_to(out).parts
        files = ("part-*.parquet", "bucket-*.parquet", "*.arrow", "*.npy")
        ours = (top in FOLDERS or top.startswith(HISTORIES)) and (
            path.is_dir() or (below and any(path.match(name) for name in files))
        )
        ours = ours or (top in FILES and not below and path.is_file())
        if not ours or path.is_symlink():
            raise UserError(f"{out}: is not empty ('{path.relative_to(out)}' is there); choose an empty or new --out")
    for path in out.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
