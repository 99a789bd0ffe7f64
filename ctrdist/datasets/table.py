"""Any Parquet, CSV or JSON-lines tables to the canonical layout, in pieces that run anywhere.

    1. `write_items`, `write_users`: the small tables, once.
    2. `partition`, for each file of the log: its rows, brought to the layout's columns, dealt to buckets of users.
    3. `finish_bucket`, for each bucket: histories, and files by day.
    4. `Ledger.save` (`ledger.py`), from which on the dataset is as good as there, and `complete`, which moves it in.

Everything of one user is in one bucket, so a bucket's histories need no other bucket; how much memory it takes is a
matter of the number of buckets, not of the rows of the log. What each user did last is kept, so that later days can be
appended without reading the earlier ones again.

All is written to a `work` folder of this one run, and moved from there at the end, so a run that is cut off leaves the
dataset as it was.
"""

import resource
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ctrdist.datasets.canonical import (
    ROWS_PER_FILE,
    by_day,
    canonical_columns,
    items_with_text,
    write_file,
)
from ctrdist.datasets.table_files import (
    ANY,
    ID,
    LIST,
    NUMERIC,
    TEXT,
    Columns,
    convert,
    read_pieces,
)
from ctrdist.datasets.table_values import to_labels, to_seconds
from ctrdist.errors import UserError
from ctrdist.history import history_column, recent_behaviours
from ctrdist.items import join_items
from ctrdist.schema import CATEGORICAL, HISTORY, ITEM_ID, LABEL, MULTI, SPLIT, TIMESTAMP, USER_ID, Field, Schema
from ctrdist.vocabulary import Vocabulary, to_keys

KINDS = {CATEGORICAL: ID, MULTI: LIST, NUMERIC: NUMERIC}
BEHAVIOURS_AT_ONCE = 10_000_000
NO_TIME, NO_LABEL = "without a timestamp", "without a label"


@dataclass(frozen=True)
class TableOptions:
    """How tables become a canonical log.

    Args:
        rename: `theirs=ours` for each column that has another name than in the layout or the schema, in the files that
            have it.
        rating: column whose values from `positive` up are clicks, in place of a `label`.
        positive: the least rating of a click.
        time_unit: of timestamps that are numbers; columns of a timestamp type need none.
        quote: what CSV and TSV files put around values; `none` where a quote is a character like any other.
        history: `positive` or `all`: derived, from the clicks or from all rows; `column`: the log's own list column.
    """

    rename: tuple[str, ...] = ()
    rating: str = ""
    positive: float = 1.0
    time_unit: Literal["s", "ms", "us", "ns"] = "s"
    quote: str = '"'
    history: Literal["positive", "all", "column"] = "positive"

    def columns(self, kinds: dict[str, str], required: tuple[str, ...]) -> Columns:
        """The columns to read of a file. Raises UserError for options that say nothing."""
        if self.quote != "none" and len(self.quote) != 1:
            raise UserError(f"--quote {self.quote!r}: expected one character, or none")
        return Columns(kinds, required, self.names(), "" if self.quote == "none" else self.quote)

    def names(self) -> dict[str, str]:
        """Ours by theirs. Raises UserError for a pair that is none, or for two names of one column."""
        names: dict[str, str] = {}
        for pair in self.rename:
            theirs, _, ours = pair.partition("=")
            if not theirs or not ours:
                raise UserError(f"--rename {pair}: expected theirs=ours, such as uid=user_id")
            if names.setdefault(theirs, ours) != ours:
                raise UserError(
                    f"--rename {pair}: '{theirs}' is renamed to '{names[theirs]}' already; give it one name"
                )
        return names


def write_items(paths: list[str], schema: Schema, options: TableOptions, work: Path) -> tuple[int, int]:
    """Write `work/items/`; returns the number of items, and of those with text.

    Raises:
        UserError: no items, a missing column, a null item id, or an item twice.
    """
    kinds = dict.fromkeys(schema.text_columns, TEXT) | _kinds(schema.item)
    items = _read_whole(paths, options.columns(kinds, tuple(kinds)))
    if items is None:
        raise UserError(f"--items: {paths[0]}: no rows" + (f", nor in {len(paths) - 1} more" if paths[1:] else ""))
    _refuse_bad_ids(items[ITEM_ID], f"{paths[0]}: column '{ITEM_ID}'")
    write_file(items, work / "items" / "part-00000.parquet")
    return items.num_rows, items_with_text(items, schema)


def write_users(paths: list[str], schema: Schema, options: TableOptions, work: Path) -> list[str]:
    """Keep the users' fields where each piece finds them; returns the names of the fields.

    Raises:
        UserError: no column `user_id`, a null in it, or a user twice.
    """
    users = _read_whole(paths, options.columns({USER_ID: ID} | _kinds(schema.user), (USER_ID,)))
    if users is None:
        return []
    ids = users[USER_ID].combine_chunks()
    _refuse_bad_ids(ids, f"{paths[0]}: column '{USER_ID}'")
    vocabulary = Vocabulary().grow(to_keys(ids, USER_ID), np.ones(len(ids), np.int64))
    vocabulary.save(work / "users")
    # Rows 0 and 1 of the vocabulary, and users in the order of their rows after them.
    order = pa.array(np.argsort(vocabulary.lookup(ids)))
    found = [name for name in users.column_names if name != USER_ID]
    fields = pa.table({name: pa.chunked_array([pa.nulls(2, users[name].type), *users[name].take(order).chunks])
                       for name in found}).combine_chunks()  # fmt: skip
    with pa.OSFile(str(work / "users.arrow"), "wb") as sink, pa.ipc.new_file(sink, fields.schema) as writer:
        writer.write_table(fields)
    return found


def _kinds(fields: tuple[Field, ...]) -> dict[str, str]:
    return {field.name: KINDS[field.kind] for field in fields}


def _read_whole(paths: list[str], columns: Columns) -> pa.Table | None:
    """Small tables, joined; None without any row."""
    pieces = [piece for path in paths for piece in read_pieces(path, columns) if piece.num_rows]
    return join_items(pieces, paths[0]) if pieces else None


def _refuse_bad_ids(ids: pa.Array | pa.ChunkedArray, where: str) -> None:
    if ids.null_count:
        raise UserError(f"{where}: {ids.null_count:,} of {len(ids):,} ids are null; every row needs one")
    counts = pc.value_counts(ids)
    repeated = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(repeated):
        name = repeated[0]["values"].as_py()
        raise UserError(
            f"{where}: {len(repeated):,} ids stand in more than one row, {name!r} for one; keep one row each"
        )


def partition(
    path: str, number: int, schema: Schema, options: TableOptions, buckets: int, work: Path, user_fields: list[str]
) -> tuple[dict[str, int], str | None]:
    """Deal one file's rows to `work/bucket-K/NUMBER.arrow`.

    Returns:
        Counts: `rows`, those of a file with a split of its own, and what was wrong with some. The first day of the
        rows, None without any.

    Raises:
        UserError: a missing or mistyped column, a label or rating that is no number, a time before 1970 or after 2261.
    """
    _allow_open_files()
    writers: dict[int, pa.ipc.RecordBatchFileWriter] = {}
    counts, first = {"rows": 0, SPLIT: 0, NO_TIME: 0, NO_LABEL: 0}, None
    users = _users(work) if user_fields else None
    for piece in read_pieces(path, _log_columns(schema, options, user_fields)):
        rows = _canonical(piece, path, schema, options, users, user_fields)
        timed = rows.filter(rows[TIMESTAMP].is_valid())
        counts["rows"] += timed.num_rows
        counts[SPLIT] += timed.num_rows if SPLIT in timed.column_names else 0
        counts[NO_TIME] += rows.num_rows - timed.num_rows
        counts[NO_LABEL] += timed[LABEL].null_count
        if timed.num_rows:
            day = str(np.datetime64(pc.min(timed[TIMESTAMP]).as_py(), "s").astype("datetime64[D]"))
            first = min(first or day, day)
        bucket = bucket_of(timed[USER_ID].combine_chunks(), buckets)
        order = np.argsort(bucket, kind="stable")
        bounds = np.searchsorted(bucket[order], np.arange(buckets + 1))
        timed = timed.take(pa.array(order)).combine_chunks()
        for k in np.flatnonzero(np.diff(bounds)):
            if k not in writers:
                folder = work / f"bucket-{k:05d}"
                folder.mkdir(exist_ok=True)
                writers[k] = pa.ipc.new_file(str(folder / f"{number:05d}.arrow"), timed.schema)
            writers[k].write_table(timed.slice(bounds[k], bounds[k + 1] - bounds[k]))
    for writer in writers.values():
        writer.close()
    return counts, first


def _allow_open_files() -> None:
    """As many open files as this process may have: there is one a bucket."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _log_columns(schema: Schema, options: TableOptions, user_fields: list[str]) -> Columns:
    kinds = {USER_ID: ID, ITEM_ID: ID} | _kinds(schema.row_fields)
    optional = {*user_fields, SPLIT}
    kinds[SPLIT] = ID
    kinds |= {HISTORY: LIST} if schema.history_length and options.history == "column" else {}
    kinds |= {schema.truth: NUMERIC} if schema.truth else {}
    required = [name for name in kinds if name not in optional] + [options.rating or LABEL, TIMESTAMP]
    if options.rating:
        kinds.setdefault(options.rating, NUMERIC)
    return options.columns(kinds | {LABEL: ANY, TIMESTAMP: ANY}, tuple(required))


def _canonical(
    rows: pa.Table, path: str, schema: Schema, options: TableOptions, users: tuple[Vocabulary, pa.Table] | None,
    user_fields: list[str],
) -> pa.Table:  # fmt: skip
    """A piece of the log with our types; fields of the user that it lacks joined from the users' table."""
    columns = dict(zip(rows.column_names, rows.columns, strict=True))
    if options.rating not in ("", LABEL) and LABEL in columns:
        raise UserError(f"{path}: has a column '{LABEL}' beside --rating {options.rating}; leave one of them out")
    if options.rating:
        ratings = convert(columns[options.rating], NUMERIC, path, options.rating)
        clicks = pc.greater_equal(ratings, options.positive).cast(pa.int8())
        columns[LABEL] = pc.if_else(pc.is_nan(ratings), pa.scalar(None, pa.int8()), clicks)
    else:
        columns[LABEL] = to_labels(columns[LABEL], path)
    columns[TIMESTAMP] = to_seconds(columns[TIMESTAMP], path, options.time_unit)
    lacking = [name for name in user_fields if name not in columns]
    if users and lacking:
        vocabulary, fields = users
        place = pa.array(vocabulary.lookup(columns[USER_ID].combine_chunks(), USER_ID))
        columns |= {name: fields[name].take(place) for name in lacking}
    if options.rating not in [LABEL, *(field.name for field in schema.row_fields)]:
        columns.pop(options.rating, None)
    return pa.table({name: columns[name] for name in sorted(columns)})  # in one order, whatever the file's


def _users(work: Path) -> tuple[Vocabulary, pa.Table]:
    return Vocabulary.load(work / "users"), pa.ipc.open_file(pa.memory_map(str(work / "users.arrow"))).read_all()


def bucket_of(users: pa.Array, buckets: int) -> np.ndarray:
    """The bucket of each user, int64, whatever else is in the array; null ones, who have no history, are dealt out."""
    encoded = users.dictionary_encode()
    keys = to_keys(encoded.dictionary, USER_ID)
    content = keys.view(np.uint8).reshape(len(keys), keys.dtype.itemsize).astype(np.uint64)
    with np.errstate(over="ignore"):
        powers = np.cumprod(np.full(content.shape[1], 0x9E3779B97F4A7C15, np.uint64))
        mixed = content @ powers  # the zeros that pad a short id add nothing
        mixed ^= mixed >> np.uint64(29)
        mixed *= np.uint64(0xBF58476D1CE4E5B9)
    number = ((mixed >> np.uint64(32)) % np.uint64(buckets)).astype(np.int64)
    indices = pc.fill_null(encoded.indices.cast(pa.int64()), len(number)).to_numpy(zero_copy_only=False)
    dealt = np.arange(len(users)) % buckets
    return np.where(indices == len(number), dealt, np.append(number, 0)[indices])


@dataclass(frozen=True)
class Finished:
    """What a bucket became: rows by day (`YYYY-MM-DD`), clicks, distinct users, and rows with a history."""

    days: dict[str, int]
    clicks: int
    users: int
    rows_with_history: int


@dataclass(frozen=True)
class Before:
    """What each user did last before the rows that are appended.

    Args:
        folder: where it lies.
        buckets: parts that the users were dealt to; a divisor of what they are dealt to now.
    """

    folder: Path
    buckets: int

    def of(self, bucket: int, buckets: int) -> pa.Table:
        """That of a bucket's users, where there are `buckets` now: all of them are in one bucket of then."""
        path = self.folder / f"bucket-{bucket % self.buckets:05d}.parquet"
        if not path.exists():
            return _nobody()
        then = pq.read_table(path)
        return then.filter(pa.array(bucket_of(then[USER_ID].combine_chunks(), buckets) == bucket))


def finish_bucket(
    bucket: int, buckets: int, schema: Schema, options: TableOptions, work: Path, before: Before | None, split: bool
) -> Finished:
    """Derive a bucket's histories and write its rows to `work/interactions/`, in order of time.

    What each user did last goes to `work/histories/`.

    Args:
        before: what each user did last before these rows, if any.
        split: whether the dataset has a column `split`; rows of files without one then have none in it.
    """
    files = sorted((work / f"bucket-{bucket:05d}").glob("*.arrow"))
    parts = [pa.ipc.open_file(pa.memory_map(str(path))).read_all() for path in files]
    name = f"bucket-{bucket:05d}.parquet"
    earlier = before.of(bucket, buckets) if before else _nobody()
    if not parts:
        write_file(earlier, work / "histories" / name)
        return Finished({}, 0, 0, 0)
    log = pa.concat_tables(parts, promote_options="default").combine_chunks()  # not all may have a split
    if split and SPLIT not in log.column_names:
        log = log.append_column(SPLIT, pa.nulls(log.num_rows, pa.string()))
    log = log.take(pc.sort_indices(log, [(TIMESTAMP, "ascending")]))
    derived = bool(schema.history_length) and options.history != "column"
    if derived:
        known = pq.read_table(work / "items", columns=[ITEM_ID])[ITEM_ID].combine_chunks()
        offsets, behaviours, items, last = _histories(
            log, earlier, schema.history_length, options.history == "all", known
        )
    else:
        last = earlier
    days: Counter[str] = Counter()
    with_history = 0
    # A column of histories has int32 offsets, and their ids are the most of the memory.
    step = max(1, min(ROWS_PER_FILE, BEHAVIOURS_AT_ONCE // max(1, schema.history_length)))
    for number, start in enumerate(range(0, log.num_rows, step)):
        rows = log.slice(start, step)
        if derived:
            column = history_column(offsets[start : start + rows.num_rows + 1], behaviours, items)
            rows = rows.append_column(HISTORY, column)
        columns = canonical_columns(schema, rows.schema)
        rows = rows.select(columns.names).cast(columns)
        for date, part in by_day(rows):
            path = work / "interactions" / f"dt={date}" / f"part-{bucket:05d}-{number:05d}.parquet"
            write_file(part, path)
            days[str(date)] += part.num_rows
        if schema.history_length:
            with_history += pc.sum(pc.greater(pc.list_value_length(rows[HISTORY]), 0)).as_py() or 0
    write_file(last, work / "histories" / name)
    clicks = pc.sum(pc.equal(log[LABEL], 1)).as_py() or 0
    return Finished(dict(days), clicks, len(log[USER_ID].drop_null().unique()), with_history)


def _histories(
    log: pa.Table, earlier: pa.Table, length: int, all_rows: bool, known: pa.Array
) -> tuple[np.ndarray, np.ndarray, pa.Array, pa.Table]:
    """What `history_column` makes the rows' histories of (offsets, places, items); and each user's last behaviours."""
    users = pa.concat_arrays([earlier[USER_ID].combine_chunks(), log[USER_ID].combine_chunks()]).dictionary_encode()
    items = pa.concat_arrays([earlier[ITEM_ID].combine_chunks(), log[ITEM_ID].combine_chunks()])
    time = np.concatenate([earlier[TIMESTAMP].to_numpy(), log[TIMESTAMP].to_numpy()])
    behaviour = pc.and_(log[USER_ID].is_valid(), pc.is_in(log[ITEM_ID], known, skip_nulls=True))
    if not all_rows:
        behaviour = pc.and_(behaviour, pc.fill_null(pc.equal(log[LABEL], 1), False))
    include = np.concatenate([np.ones(earlier.num_rows, bool), behaviour.to_numpy()])
    codes = pc.fill_null(users.indices.cast(pa.int64()), -1).to_numpy(zero_copy_only=False)
    # A user's last behaviours are those that a row after all of them would have.
    ends = np.unique(codes[codes >= 0])
    codes, include = np.concatenate([codes, ends]), np.append(include, np.zeros(len(ends), bool))
    time = np.concatenate([time, np.full(len(ends), time.max(initial=0) + 1)])
    offsets, places = recent_behaviours(codes, time, include, length)
    kept = pa.array(places[offsets[len(items)] :])
    names = users.dictionary.take(users.indices.take(kept))
    last = pa.table({USER_ID: names, ITEM_ID: items.take(kept), TIMESTAMP: time[kept.to_numpy()]})
    return offsets[earlier.num_rows : len(items) + 1], places, items, last


def _nobody() -> pa.Table:
    empty = pa.array([], pa.string())
    return pa.table({USER_ID: empty, ITEM_ID: empty, TIMESTAMP: pa.array([], pa.int64())})
