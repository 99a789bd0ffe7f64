"""Reads Parquet, CSV and JSON-lines files in pieces, the wanted columns only, under our names and with one type each.

A type never depends on which rows a file or a piece happens to have: 007 is not 7 in a CSV file, a title that looks
like a date stays as it is, and a column that is empty in one file has the type that it has in the others.
"""

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.json as pajson
import pyarrow.parquet as pq

from ctrdist.errors import UserError
from ctrdist.items import require_columns
from ctrdist.texts import join_texts

FORMATS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json"}
ROWS_AT_ONCE = 262_144
BLOCK_BYTES = 1 << 24  # of CSV and JSON, read at once
LINES_TO_GUESS = 100
NO_VALUE = pa.array(["", "na", "n/a", "nan", "null", "none"])
NUMBER = r"^-?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$"
LISTS = pa.list_(pa.string())

# What a column holds. `ANY` leaves a Parquet column as it is; in CSV it is strings, in JSON what its values are.
ID, LIST, NUMERIC, TEXT, ANY = "id", "list", "numeric", "text", "any"


@dataclass(frozen=True)
class Columns:
    """The columns to read.

    Args:
        kinds: what each holds, by our name.
        required: those that a file must have.
        names: ours by theirs, where they differ; a file need not have them.
        quote: what CSV and TSV files put around values; "" for files that use none.
    """

    kinds: dict[str, str]
    required: tuple[str, ...]
    names: dict[str, str]
    quote: str = '"'

    def choose(self, path: str, found: list[str]) -> dict[str, str]:
        """Theirs by ours, of those `found` in a file. Raises UserError for a missing or an ambiguous one."""
        ours = [self.names.get(name, name) for name in found]
        for name in self.kinds:
            if ours.count(name) > 1:
                theirs = [other for other, own in zip(found, ours, strict=True) if own == name]
                raise UserError(
                    f"{path}: columns {', '.join(theirs)} would all be '{name}'; rename or remove all but one"
                )
        require_columns(path, list(self.required), ours)
        return {name: found[ours.index(name)] for name in self.kinds if name in ours}


def format_of(path: str) -> str:
    """`parquet`, `csv` or `json`. Raises UserError for another ending."""
    suffixes = [suffix for suffix in Path(path).suffixes if suffix != ".gz"]
    kind = FORMATS.get(suffixes[-1] if suffixes else "")
    if kind is None:
        raise UserError(f"{path}: not one of {', '.join(FORMATS)}; convert it, or rename it to what it is")
    return kind


def read_pieces(path: str, columns: Columns) -> Iterator[pa.Table]:
    """A file's rows in pieces, in order. A file without rows, or a quite empty one, gives no rows.

    Args:
        path: its ending says what it is; `.gz` may follow `.csv`, `.tsv`, `.json` and `.jsonl`.

    Returns:
        Tables of those columns that the file has: strings (`ID`, `TEXT`), lists of strings, float64, or anything.

    Raises:
        UserError: an unknown ending, a broken file, a missing column, or a value that its column cannot hold.
    """
    kind = format_of(path)
    read = {"parquet": _parquet, "csv": _csv, "json": _json}[kind]
    try:
        if Path(path).stat().st_size:
            for piece, theirs in read(path, columns):
                yield pa.table({
                    name: convert(piece[other], columns.kinds[name], path, name) for name, other in theirs.items()
                })  # fmt: skip
    except (pa.ArrowException, OSError, EOFError, zlib.error, csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable {kind} file ({_first_line(error)}); correct or remove it") from None


def convert(column: pa.ChunkedArray, kind: str, path: str, name: str) -> pa.ChunkedArray | pa.Array:
    """A column as its kind. Raises UserError with file and column for one that is of no such kind."""
    try:
        return CONVERTERS[kind](column)
    except pa.ArrowException as error:
        raise UserError(
            f"{path}: column '{name}', of type {column.type}: not {kind} ({_first_line(error)}); correct it"
        ) from None


def as_strings(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Strings; the whole numbers among floats as such, so that 7.0 of one file is the 7 of another."""
    if not pa.types.is_floating(column.type):
        return column.cast(pa.string())
    column = column.cast(pa.float64())
    finite = pc.if_else(pc.is_finite(column), column, pa.scalar(None, pa.float64()))
    whole = pc.and_(pc.equal(finite, pc.floor(finite)), pc.less(pc.abs(finite), 2.0**63))
    integers = pc.if_else(whole, finite, 0.0).cast(pa.int64(), safe=False)
    return pc.if_else(whole, integers.cast(pa.string()), finite.cast(pa.string()))


def as_lists(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Lists of strings, from lists of any kind or from strings with `|` between the values."""
    if _is_list(column.type):
        return column.cast(LISTS)
    text = as_strings(column)
    return pc.split_pattern(pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.string()), text), "|")


def as_numbers(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """float64; of strings, those that stand for no value are null."""
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        column = without_no_value(column)
    return column.cast(pa.float64(), safe=False)


def as_texts(column: pa.ChunkedArray) -> pa.ChunkedArray | pa.Array:
    """Strings; lists as they stand in an item's text."""
    if not _is_list(column.type):
        return as_strings(column)
    return join_texts(pa.table({"list": column}), ["{list}"]).cast(pa.string())


def without_no_value(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Strings, trimmed; null in place of "NA" and others of that kind."""
    text = pc.utf8_trim_whitespace(column.cast(pa.string()))
    return pc.if_else(pc.is_in(pc.utf8_lower(text), NO_VALUE), pa.scalar(None, pa.string()), text)


CONVERTERS: dict[str, Callable] = {
    ID: as_strings, LIST: as_lists, NUMERIC: as_numbers, TEXT: as_texts, ANY: lambda column: column,
}  # fmt: skip

Piece = tuple[pa.Table, dict[str, str]]  # columns under their names, and these by ours


def _parquet(path: str, columns: Columns) -> Iterator[Piece]:
    file = pq.ParquetFile(path)
    theirs = columns.choose(path, file.schema_arrow.names)
    for batch in file.iter_batches(ROWS_AT_ONCE, columns=list(theirs.values()), use_threads=False):
        yield pa.Table.from_batches([batch]), theirs


def _csv(path: str, columns: Columns) -> Iterator[Piece]:
    delimiter = "\t" if ".tsv" in Path(path).suffixes else ","
    style = {"delimiter": delimiter, "quotechar": columns.quote or None, "strict": True}
    style |= {} if columns.quote else {"quoting": csv.QUOTE_NONE}
    with _open(path, "rt", encoding="utf-8-sig", newline="") as file:
        header = next((row for row in csv.reader(file, **style) if row), None)
    if header is None:
        return
    theirs = columns.choose(path, header)
    if columns.quote:
        _check_quotes(path, columns.quote, style)
    reader = pacsv.open_csv(
        path,
        pacsv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES),
        pacsv.ParseOptions(
            delimiter=delimiter, quote_char=columns.quote or False, newlines_in_values=bool(columns.quote)
        ),
        pacsv.ConvertOptions(
            include_columns=list(theirs.values()), column_types=dict.fromkeys(theirs.values(), pa.string()),
            null_values=[""], strings_can_be_null=True,
        ),
    )  # fmt: skip
    for batch in reader:
        yield pa.Table.from_batches([batch]), theirs


def _check_quotes(path: str, quote: str, style: dict[str, Any]) -> None:
    """Raise a UserError for a quote that is not closed where its value ends: Arrow would read on, over lines and rows.

    Files without a quote, the most of them, are only searched for one.
    """
    with _open(path, "rb") as file:
        if not any(quote.encode() in block for block in iter(lambda: file.read(BLOCK_BYTES), b"")):
            return
    with _open(path, "rt", encoding="utf-8-sig", newline="") as file:
        reader, line = csv.reader(file, **style), 0
        try:
            for _ in reader:
                line = reader.line_num
        except csv.Error as error:
            raise UserError(
                f"{path}: line {line + 1}: a value begins with {quote} that is not closed where the value ends "
                f"({error}); double a {quote} within quotes, or give --quote none where {quote} is a character like "
                "any other"
            ) from None


def _json(path: str, columns: Columns) -> Iterator[Piece]:
    theirs, number = None, 1
    with _open(path, "rb") as file:
        while lines := file.readlines(BLOCK_BYTES):
            if theirs is None:
                keys = dict.fromkeys(key for row in _objects(path, lines, number) for key in row)
                theirs = columns.choose(path, list(keys)) if keys else None
            else:
                _refuse_late_keys(path, columns, lines, number, set(theirs.values()))
            if theirs is not None:
                kinds = {other: columns.kinds[name] for name, other in theirs.items()}
                yield _parse(path, lines, number, kinds), theirs
            number += len(lines)


def _refuse_late_keys(path: str, columns: Columns, lines: list[bytes], number: int, chosen: set[str]) -> None:
    """Raise a UserError for a wanted key that no object of the file's first block had: its values would be lost."""
    wanted = {*columns.kinds, *columns.names} - chosen
    block = b"".join(lines)
    mentioned = {name for name in wanted if f'"{name}"'.encode() in block}
    for row in _objects(path, lines, number) if mentioned else ():
        for name in mentioned & row.keys():
            if columns.names.get(name, name) in columns.kinds:
                raise UserError(
                    f"{path}: '{name}' stands first after line {number - 1:,}; put a line that has it (null will do) "
                    "at the beginning"
                )


def _parse(path: str, lines: list[bytes], number: int, kinds: dict[str, str]) -> pa.Table:
    """Lines of JSON as columns: by Arrow, which is fast but takes one type a column, or else line by line."""
    first = list(_objects(path, lines[:LINES_TO_GUESS], number))
    types = pa.schema({name: _guess([row.get(name) for row in first], kind) for name, kind in kinds.items()})
    options = pajson.ParseOptions(explicit_schema=types, unexpected_field_behavior="ignore")
    block = b"".join(lines)
    try:
        table = pajson.read_json(pa.BufferReader(block), pajson.ReadOptions(True, len(block)), options)
        table.validate(full=True)  # bytes that are not UTF-8
        if table.num_rows == len(lines):
            return table
    except pa.ArrowInvalid:
        pass
    rows = list(_objects(path, lines, number))
    return pa.table({name: _column([row.get(name) for row in rows], kind, path, name) for name, kind in kinds.items()})


def _guess(values: list, kind: str) -> pa.DataType:
    """The type of a column by its first values; one that later values break is only slow."""
    lists = any(isinstance(value, list) for value in values)
    parts = [part for value in values for part in (value if isinstance(value, list) else [value])]
    found = {type(part) for part in parts if part is not None}
    numbers = {int, float} if kind in (NUMERIC, ANY) else set()  # a float for an id would lose the digits of a long one
    type_ = pa.float64() if kind == NUMERIC else pa.string()
    if found == {bool}:
        type_ = pa.bool_()
    elif found == {int} and kind != NUMERIC:
        type_ = pa.int64()
    elif found and found <= numbers:
        type_ = pa.float64()
    elif found:
        type_ = pa.string()
    return pa.list_(type_) if lists or (kind == LIST and not found) else type_


def _column(values: list, kind: str, path: str, name: str) -> pa.Array:
    """A column whose values may be of several types."""
    if kind == ANY and not any(isinstance(value, str) for value in values):
        return pa.array(values)
    if kind == LIST:
        values = [(value.split("|") if value else None) if isinstance(value, str) else value for value in values]
        values = [[value] if value is not None and not isinstance(value, list) else value for value in values]
        return pa.array([None if value is None else [_text(part, path, name) for part in value] for value in values],
                        LISTS)  # fmt: skip
    if kind == TEXT:
        values = [", ".join(_text(part, path, name) or "" for part in value) if isinstance(value, list) else value
                  for value in values]  # fmt: skip
    return pa.array([_text(value, path, name) for value in values], pa.string())


def _text(value: Any, path: str, name: str) -> str | None:
    if value is None or isinstance(value, str):
        return value and value.encode("utf-8", "replace").decode()  # half of a surrogate pair
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
    raise UserError(f"{path}: column '{name}': {str(value)[:80]!r} is neither text nor number; correct or remove it")


def _objects(path: str, lines: list[bytes], number: int) -> Iterator[dict]:
    for at, line in enumerate(lines, number):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            shown = line[:80].decode(errors="replace").rstrip()
            raise UserError(f"{path}: line {at}: expected a JSON object, found {shown!r}")
        yield row


def _open(path: str, mode: str, **options: str) -> IO:
    return (gzip.open if path.endswith(".gz") else open)(path, mode, **options)


def _is_list(type_: pa.DataType) -> bool:
    return pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
