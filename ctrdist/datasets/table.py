"""Any Parquet, CSV or JSON-lines tables to the canonical layout, in pieces that run anywhere.

    1. `write_items`, `write_users`: the small tables, once.
    2. `partition`, for each file of the log: its rows, brought to the layout's columns, dealt to buckets of users.
    3. `finish_bucket`, for each bucket: histories, and a file a day.

Everything of one user is in one bucket, so a bucket's histories need no other bucket; how much memory it takes is a
matter of the number of buckets, not of the rows of the log. What each user did last is kept, so that later days can be
appended without reading the earlier ones again.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.dataset as ds
import pyarrow.json
import pyarrow.parquet as pq

from ctrdist.datasets.canonical import HISTORIES, SECONDS_A_DAY, canonical_columns, write_file
from ctrdist.errors import UserError
from ctrdist.history import history_column, recent_behaviours
from ctrdist.items import require_columns
from ctrdist.schema import HISTORY, ITEM_ID, LABEL, MULTI, NUMERIC, TIMESTAMP, USER_ID, Schema
from ctrdist.vocabulary import Vocabulary, to_keys

FORMATS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json"}
ROWS_AT_ONCE = 262_144
UNITS = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}


@dataclass(frozen=True)
class TableOptions:
    """How tables become a canonical log.

    Args:
        rename: `theirs=ours` for each column that has another name than in the layout or the schema.
        rating: column whose values from `positive` up are clicks, where there is no `label`.
        positive: the least rating of a click.
        time_unit: of integer timestamps; columns of a timestamp type need none.
        history: `positive` or `all`: derived, from the clicks or from all rows; `column`: the log's own list column.
    """

    rename: tuple[str, ...] = ()
    rating: str = ""
    positive: float = 1.0
    time_unit: Literal["s", "ms", "us", "ns"] = "s"
    history: Literal["positive", "all", "column"] = "positive"

    def names(self) -> dict[str, str]:
        """Ours by theirs. Raises UserError for a pair that is none."""
        pairs = [pair.split("=", 1) for pair in self.rename]
        for pair in pairs:
            if len(pair) != 2 or not all(pair):
                raise UserError(f"--rename {'='.join(pair)}: expected theirs=ours, such as uid=user_id")
        return {theirs: ours for theirs, ours in pairs}


def open_table(path: str, strings: set[str]) -> ds.Dataset:
    """A file as a pyarrow dataset, by its ending; `.gz` may follow.

    Args:
        strings: columns that a CSV file, which has no types, has strings in: 007 is not 7. Its empty values are null.

    Raises:
        UserError: an ending that is not known, or a file that is not what its ending says.
    """
    suffixes = [suffix for suffix in Path(path).suffixes if suffix != ".gz"]
    kind = FORMATS.get(suffixes[-1] if suffixes else "")
    if kind is None:
        raise UserError(f"{path}: not one of {', '.join(FORMATS)}; convert it, or rename it to what it is")
    options: ds.FileFormat | str = kind
    if kind == "csv":
        options = ds.CsvFileFormat(
            parse_options=pa.csv.ParseOptions(delimiter="\t" if suffixes[-1] == ".tsv" else ","),
            convert_options=pa.csv.ConvertOptions(
                column_types=dict.fromkeys(strings, pa.string()), null_values=[""], strings_can_be_null=True
            ),
        )
    try:
        return ds.dataset(path, format=options)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not a readable {kind} file ({str(error).splitlines()[0]})") from None


def _strings(schema: Schema, names: dict[str, str]) -> set[str]:
    """Their names of the columns that hold strings, ids among them."""
    ours = {field.name for field in schema.row_fields + schema.item if field.kind != NUMERIC}
    ours |= {USER_ID, ITEM_ID, *schema.text_columns}
    return ours - set(names.values()) | {theirs for theirs, own in names.items() if own in ours}


def read_whole(
    paths: list[str], schema: Schema, columns: list[str], optional: list[str], names: dict[str, str]
) -> pa.Table:
    """Small tables, joined: `columns`, and of `optional` those that are there, under our names."""
    tables = []
    for path in paths:
        table = open_table(path, _strings(schema, names)).to_table()
        table = table.rename_columns([names.get(name, name) for name in table.column_names])
        require_columns(path, columns, table.column_names)
        tables.append(table.select([name for name in [*columns, *optional] if name in table.column_names]))
    return pa.concat_tables(tables, promote_options="permissive").combine_chunks()


def write_items(paths: list[str], schema: Schema, options: TableOptions, out: Path) -> int:
    """Write `items/`; returns the number of items. Raises UserError for a missing column or an item twice."""
    wanted = list(dict.fromkeys([field.name for field in schema.item] + list(schema.text_columns)))
    items = read_whole(paths, schema, wanted, [], options.names())
    items = items.set_column(items.column_names.index(ITEM_ID), ITEM_ID, items[ITEM_ID].cast(pa.string()))
    for field in schema.item:
        if field.kind == MULTI and not pa.types.is_list(items[field.name].type):
            lists = pc.split_pattern(pc.cast(items[field.name], pa.string()), "|")
            items = items.set_column(items.column_names.index(field.name), field.name, lists)
    _refuse_repeated(items[ITEM_ID], f"{paths[0]}: column '{ITEM_ID}'")
    write_file(items, out / "items" / "part-00000.parquet")
    return items.num_rows


def write_users(paths: list[str], schema: Schema, options: TableOptions, work: Path) -> list[str]:
    """Keep the users' fields where each piece finds them; returns the names of the fields."""
    wanted = [field.name for field in schema.user if field.name != USER_ID]
    users = read_whole(paths, schema, [USER_ID], wanted, options.names())
    ids = users[USER_ID].cast(pa.string()).combine_chunks()
    _refuse_repeated(ids, f"{paths[0]}: column '{USER_ID}'")
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


def partition(
    path: str, number: int, schema: Schema, options: TableOptions, buckets: int, work: Path, user_fields: list[str]
) -> tuple[dict[str, int], str | None]:
    """Deal one file's rows to `work/bucket-K/NUMBER.arrow`.

    Returns:
        Counts: `rows`, and what was left out. The first day of the rows, None without any.

    Raises:
        UserError: a missing or mistyped column.
    """
    writers: dict[int, pa.ipc.RecordBatchFileWriter] = {}
    counts, first = {"rows": 0, "without a timestamp": 0}, None
    table = open_table(path, _strings(schema, options.names()))
    scanner = table.scanner(batch_size=ROWS_AT_ONCE, batch_readahead=1, fragment_readahead=1, use_threads=False)
    for batch in scanner.to_batches():
        rows = _canonical(pa.Table.from_batches([batch]), path, schema, options, work, user_fields)
        timed = rows.filter(rows[TIMESTAMP].is_valid())
        counts["rows"] += timed.num_rows
        counts["without a timestamp"] += rows.num_rows - timed.num_rows
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


def bucket_of(users: pa.Array, buckets: int) -> np.ndarray:
    """The bucket of each user, int64, whatever else is in the array; bucket 0 for null."""
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
    return np.append(number, 0)[indices]


@dataclass(frozen=True)
class Finished:
    """What a bucket became: rows by day (`YYYY-MM-DD`), clicks, distinct users, and rows with a history."""

    days: dict[str, int]
    clicks: int
    users: int
    rows_with_history: int


def finish_bucket(
    bucket: int, schema: Schema, options: TableOptions, work: Path, out: Path, before: Path | None, after: Path
) -> Finished:
    """Derive a bucket's histories and write its rows, a file a day, in order of time.

    Args:
        before: folder with what each user did last before these rows, if any; `after`: folder for the same after them.
    """
    files = sorted((work / f"bucket-{bucket:05d}").glob("*.arrow"))
    parts = [pa.ipc.open_file(pa.memory_map(str(path))).read_all() for path in files]
    name = f"bucket-{bucket:05d}.parquet"
    earlier = pq.read_table(before / name) if before and (before / name).exists() else _nobody()
    if not parts:
        after.mkdir(parents=True, exist_ok=True)
        write_file(earlier, after / name)
        return Finished({}, 0, 0, 0)
    log = pa.concat_tables(parts).combine_chunks()
    log = log.take(pc.sort_indices(log, [(TIMESTAMP, "ascending")]))
    derived = bool(schema.history_length) and options.history != "column"
    if derived:
        column, last = _histories(log, earlier, schema.history_length, options.history == "all", out)
        log = log.append_column(HISTORY, column)
    else:
        last = earlier
    columns = canonical_columns(schema, log.schema)
    log = log.select(columns.names).cast(columns)
    day = log[TIMESTAMP].to_numpy() // SECONDS_A_DAY
    cuts = np.r_[np.flatnonzero(np.r_[True, day[1:] != day[:-1]]), len(day)]
    days = {}
    for start, stop in zip(cuts[:-1], cuts[1:], strict=True):
        date = str(np.datetime64(int(day[start]), "D"))
        folder = out / "interactions" / f"dt={date}"
        write_file(log.slice(start, stop - start), folder / f"part-{bucket:05d}.parquet")
        days[date] = int(stop - start)
    after.mkdir(parents=True, exist_ok=True)
    write_file(last, after / name)
    with_history = pc.sum(pc.greater(pc.list_value_length(log[HISTORY]), 0)).as_py() if schema.history_length else 0
    clicks = pc.sum(pc.equal(log[LABEL].cast(pa.float64()), 1.0)).as_py() or 0
    return Finished(days, int(clicks), len(log[USER_ID].unique()), int(with_history or 0))


def _histories(log: pa.Table, earlier: pa.Table, length: int, all_rows: bool, out: Path) -> tuple[pa.Array, pa.Table]:
    """The `history` column of a bucket's rows, and each user's last behaviours after them."""
    users = pa.concat_arrays([earlier[USER_ID].combine_chunks(), log[USER_ID].combine_chunks()]).dictionary_encode()
    items = pa.concat_arrays([earlier[ITEM_ID].combine_chunks(), log[ITEM_ID].combine_chunks()])
    time = np.concatenate([earlier[TIMESTAMP].to_numpy(), log[TIMESTAMP].to_numpy()])
    known = _catalog(out).lookup(log[ITEM_ID]) > 1
    clicked = np.ones(log.num_rows, bool) if all_rows else (log[LABEL].cast(pa.float64()).to_numpy() == 1)
    named = log[USER_ID].is_valid().to_numpy(zero_copy_only=False)
    include = np.concatenate([np.ones(earlier.num_rows, bool), known & clicked & named])
    codes = pc.fill_null(users.indices.cast(pa.int64()), -1).to_numpy(zero_copy_only=False)
    offsets, rows = recent_behaviours(codes, time, include, length)
    column = history_column(offsets[earlier.num_rows :], rows, items)
    # A user's last behaviours: those that a row after all of them would have.
    ends = np.unique(codes[codes >= 0])
    late = np.full(len(ends), time.max(initial=0) + 1)
    all_codes, all_time = np.concatenate([codes, ends]), np.concatenate([time, late])
    offsets, rows = recent_behaviours(all_codes, all_time, np.append(include, np.zeros(len(ends), bool)), length)
    kept = pa.array(rows[offsets[len(codes)] :])
    names = users.dictionary.take(users.indices.take(kept))
    last = pa.table({USER_ID: names, ITEM_ID: items.take(kept), TIMESTAMP: time[kept.to_numpy()]})
    return column, last


def _nobody() -> pa.Table:
    empty = pa.array([], pa.string())
    return pa.table({USER_ID: empty, ITEM_ID: empty, TIMESTAMP: pa.array([], pa.int64())})


@lru_cache(maxsize=1)
def _catalog(out: Path) -> Vocabulary:
    items = pq.read_table(out / "items", columns=[ITEM_ID])[ITEM_ID].combine_chunks()
    return Vocabulary().grow(to_keys(items, ITEM_ID), np.ones(len(items), np.int64))


@lru_cache(maxsize=1)
def _users(work: Path) -> tuple[Vocabulary, pa.Table]:
    return Vocabulary.load(work / "users"), pa.ipc.open_file(pa.memory_map(str(work / "users.arrow"))).read_all()


def _canonical(
    table: pa.Table, path: str, schema: Schema, options: TableOptions, work: Path, user_fields: list[str]
) -> pa.Table:
    """A piece of the log under our names and with our types; fields of the user joined from the users' table."""
    names = options.names()
    table = table.rename_columns([names.get(name, name) for name in table.column_names])
    if options.rating and LABEL not in table.column_names:
        require_columns(path, [options.rating], table.column_names)
        clicks = pc.greater_equal(table[options.rating].cast(pa.float64()), options.positive)
        table = table.append_column(LABEL, clicks.cast(pa.int8()))
    wanted = [USER_ID, ITEM_ID, LABEL, TIMESTAMP]
    wanted += [f.name for f in schema.row_fields if f.name not in (*user_fields, USER_ID)]
    wanted += [HISTORY] if schema.history_length and options.history == "column" else []
    require_columns(path, wanted, table.column_names)
    columns = {name: table[name] for name in wanted}
    for name in (USER_ID, ITEM_ID):
        columns[name] = columns[name].cast(pa.string())
    columns[TIMESTAMP] = _seconds(columns[TIMESTAMP], path, options.time_unit)
    if user_fields:
        vocabulary, fields = _users(work)
        rows = pa.array(vocabulary.lookup(columns[USER_ID].combine_chunks(), USER_ID))
        columns |= {name: fields[name].take(rows) for name in user_fields}
    return pa.table(columns)


def _seconds(column: pa.ChunkedArray, path: str, unit: str) -> pa.ChunkedArray:
    type_ = column.type
    if pa.types.is_timestamp(type_):
        return pc.floor(pc.divide(column.cast(pa.timestamp("us")).cast(pa.int64()), 1e6)).cast(pa.int64())
    if pa.types.is_date(type_):
        return pc.multiply(column.cast(pa.date32()).cast(pa.int32()).cast(pa.int64()), SECONDS_A_DAY)
    if not (pa.types.is_integer(type_) or pa.types.is_floating(type_)):
        raise UserError(f"{path}: column '{TIMESTAMP}' is of type {type_}; expected integers ({unit}) or timestamps")
    return pc.floor(pc.divide(column.cast(pa.float64()), float(UNITS[unit]))).cast(pa.int64(), safe=False)


def _refuse_repeated(ids: pa.Array | pa.ChunkedArray, where: str) -> None:
    counts = pc.value_counts(ids)
    repeated = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(repeated):
        name = repeated[0]["values"].as_py()
        raise UserError(
            f"{where}: {len(repeated):,} ids stand in more than one row, {name!r} for one; keep one row each"
        )


@dataclass(frozen=True)
class Ledger:
    """What a dataset was made of, so that it can be appended to: `histories.json` in it, written last.

    Args:
        through: last day in it.
        buckets: how many parts its users are dealt to.
        histories: folder, relative to the dataset, of what each user did last.
        options: how its log was made.
    """

    through: str
    buckets: int
    histories: str
    options: dict

    def save(self, out: Path) -> None:
        """Write it in one piece."""
        part = out / "histories.json.part"
        part.write_text(json.dumps(asdict(self)))
        part.replace(out / "histories.json")

    @classmethod
    def load(cls, out: Path) -> "Ledger":
        """Raises UserError where there is none."""
        path = out / "histories.json"
        if not path.exists():
            raise UserError(f"{out}: no histories.json; only a dataset that 'prepare.py table' made can be appended to")
        return cls(**json.loads(path.read_text()))


def clear_after(out: Path, ledger: Ledger) -> None:
    """Remove days and histories that an append which was cut off has left."""
    for folder in (out / "interactions").glob("dt=*"):
        if folder.name[3:] > ledger.through:
            shutil.rmtree(folder)
    for folder in out.glob(f"{HISTORIES}*"):
        if folder.name != ledger.histories:
            shutil.rmtree(folder)
