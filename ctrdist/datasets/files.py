"""Reads the files that public datasets come in; what is malformed is an error with file, line and value."""

import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pajson

from ctrdist.errors import UserError
from ctrdist.schema import ITEM_ID

TEXT = "text"
BLOCK_BYTES = 1 << 24  # of a large file, read at once


def read_lines(path: Path, encoding: str = "utf-8") -> list[str]:
    """The lines of a text file, plain or `.gz`, without their ends.

    Raises:
        UserError: no such file, or a byte that is not of `encoding`.
    """
    require(path)
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not {encoding}; convert the file to {encoding} first") from None
    return text.replace("\r\n", "\n").removesuffix("\n").split("\n") if text else []


def require(path: Path) -> Path:
    """The path itself. Raises UserError if there is no such file."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; point --source and --item-text at the dataset's own files")
    return path


def read_columns(
    path: Path, form: str, separator: str = "::", encoding: str = "utf-8", may_be_empty: tuple = ()
) -> dict:
    """The columns of a file without a header, as arrays of strings by name.

    Args:
        form: names of the columns, joined by `separator`.
        may_be_empty: names of the columns in which a value may be empty.

    Raises:
        UserError: an empty file, a line with more or fewer columns, an empty value.
    """
    lines = pa.array(read_lines(path, encoding), pa.string())
    if len(lines) == 0:
        raise UserError(f"{path}: the file is empty; expected lines '{form}'")
    parts, names = pc.split_pattern(lines, separator), form.split(separator)
    refuse(path, pc.not_equal(pc.list_value_length(parts), len(names)), lines, "the line", f"expected '{form}'")
    columns = {name: pc.list_element(parts, index) for index, name in enumerate(names)}
    for name, column in columns.items():
        if name not in may_be_empty:
            refuse(path, pc.equal(column, ""), lines, "the line", f"'{name}' is empty; expected '{form}'")
    return columns


def integers(path: Path, name: str, column: pa.Array, first: int = 1) -> pa.Array:
    """Strings as int64. Raises UserError for one that is no whole number; `first` is the line of the first one."""
    bad = pc.invert(pc.fill_null(pc.match_substring_regex(column, r"^[0-9]{1,12}$"), False))
    refuse(path, bad, column, f"'{name}'", "expected a whole number", first)
    return pc.cast(column, pa.int64())


def refuse(path: Path, bad: pa.Array, values: pa.Array, what: str, why: str, first: int = 1) -> None:
    """Raise UserError with the first line where `bad` holds, its value, and how many there are."""
    rows = np.flatnonzero(bad.to_numpy(zero_copy_only=False))
    if len(rows):
        value = str(values[int(rows[0])].as_py())[:80]
        many = f" ({len(rows)} such lines)" if len(rows) > 1 else ""
        raise UserError(f"{path}: line {rows[0] + first}: {what} is {value!r}: {why}{many}; correct or remove it")


def refuse_repeated(path: Path, ids: pa.Array, first: int = 1, what: str = "the item") -> None:
    """Raise UserError for an id that an earlier line has already."""
    again = np.ones(len(ids), bool)
    again[np.unique(ids.to_numpy(zero_copy_only=False), return_index=True)[1]] = False
    refuse(path, pa.array(again), ids, what, "it is in an earlier line already", first)


def read_json_lines(path: Path, columns: pa.Schema) -> pa.Table:
    """Keys of the objects in a file of JSON lines, plain or `.gz`, a row for each line; in blocks, whatever its size.

    Other keys are skipped, a key that a line lacks is null. Where the type of a key varies from line to line, a value
    takes its column's: one value becomes a list of one, a list a text joined by spaces, a number a text.

    Args:
        columns: names and types of the keys to read: strings, numbers, structs, and lists of them.

    Raises:
        UserError: no such file, an empty or broken one, a line that is no JSON object, a value of another kind.
    """
    tables, first = [], 1
    for block in _blocks_of_lines(require(path)):
        tables.append(_parse_json_lines(path, block, columns, first))
        first += block.count(b"\n")
    if not tables:
        raise UserError(f"{path}: the file is empty; expected JSON lines")
    return pa.concat_tables(tables)


def _blocks_of_lines(path: Path) -> Iterator[bytes]:
    rest = b""
    try:
        with pa.input_stream(str(path)) as stream:
            while data := stream.read(BLOCK_BYTES):
                lines, end, rest = (rest + data).rpartition(b"\n")
                if end:
                    yield lines + end
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error}); download the file again") from None
    if rest:
        yield rest + b"\n"


def _parse_json_lines(path: Path, block: bytes, columns: pa.Schema, first: int) -> pa.Table:
    options = pajson.ParseOptions(explicit_schema=columns, unexpected_field_behavior="ignore")
    try:
        table = pajson.read_json(pa.BufferReader(block), pajson.ReadOptions(block_size=len(block)), options)
        table.validate(full=True)  # bytes that are not UTF-8
        if table.num_rows == block.count(b"\n"):
            return table
    except pa.ArrowInvalid:
        pass
    rows = []  # a line that Arrow does not take, but perhaps Python: a varying type, half of a surrogate pair
    for number, line in enumerate(block.split(b"\n")[:-1], first):
        try:
            found = json.loads(line)
            if not isinstance(found, dict):
                raise ValueError
        except ValueError:
            shown = line[:80].decode(errors="replace")
            raise UserError(f"{path}: line {number}: expected a JSON object, found {shown!r}") from None
        row = {}
        for column in columns:
            try:
                row[column.name] = _convert(found.get(column.name), column.type)
            except ValueError:
                shown = repr(found[column.name])[:80]
                raise UserError(
                    f"{path}: line {number}: '{column.name}' is {shown}: expected {column.type}; correct or remove it"
                ) from None
        rows.append(row)
    return pa.Table.from_pylist(rows, columns)


def _convert(value: Any, kind: pa.DataType) -> Any:
    if value is None:
        return None
    if pa.types.is_list(kind):
        return [_convert(part, kind.value_type) for part in (value if isinstance(value, list) else [value])]
    if pa.types.is_string(kind):
        if isinstance(value, list):
            return " ".join(_convert(part, kind) or "" for part in value)
        if isinstance(value, str):
            return value.encode("utf-8", "replace").decode()
        if type(value) in (int, float):
            return str(value)
    elif pa.types.is_struct(kind) and isinstance(value, dict):
        return {field.name: _convert(value.get(field.name), field.type) for field in kind}
    elif pa.types.is_floating(kind) and type(value) in (int, float):
        return float(value)
    elif pa.types.is_integer(kind) and type(value) is int and abs(value) < 1 << 63:
        return value
    raise ValueError


def drop_repeated(log: pa.Table, keys: Sequence[str]) -> tuple[pa.Table, int]:
    """The rows whose values of `keys` no earlier row has, in their order; and how many were dropped."""
    code = np.zeros(log.num_rows, np.int64)
    for key in keys:
        values = log[key].dictionary_encode("encode").combine_chunks()
        pairs = pa.array(code * len(values.dictionary) + values.indices.to_numpy())
        code = pairs.dictionary_encode().indices.to_numpy().astype(np.int64)  # by first appearance: 0, 1, ...
    new = np.diff(np.maximum.accumulate(code), prepend=-1) > 0
    return log.filter(pa.array(new)), int((~new).sum())


def with_unlisted(items: pa.Table, seen: pa.Array | pa.ChunkedArray) -> tuple[pa.Table, int]:
    """Items, with those that are only `seen` in the log added, all else of them null; and how many were added."""
    seen = pc.unique(seen)
    added = seen.filter(pc.invert(pc.is_in(seen, items[ITEM_ID].combine_chunks())))
    return pa.concat_tables([items, pa.table({ITEM_ID: added})], promote_options="default"), len(added)


def with_item_texts(items: pa.Table, path: Path | None) -> pa.Table:
    """Items with the column `text` from outside: JSON lines with `item_id` and `text`; further keys are ignored.

    An item without a text in the file keeps the `text` it has, if any. A text of an unknown item is not used.

    Raises:
        UserError: a malformed line, an item with two texts, or no text of any item.
    """
    own = items[TEXT].combine_chunks() if TEXT in items.column_names else pa.nulls(items.num_rows, pa.string())
    if path is not None:
        texts = _read_item_texts(Path(path))
        ids = items[ITEM_ID].combine_chunks()
        at = pc.index_in(ids, texts[ITEM_ID])
        if texts.num_rows and at.null_count == len(at):
            raise UserError(f"{path}: item_id: no text is of an item of this dataset, such as '{ids[0]}'")
        own = pc.coalesce(texts[TEXT].combine_chunks().take(at), own)
    kept = items.drop_columns([TEXT]) if TEXT in items.column_names else items
    return kept.append_column(TEXT, own)


def _read_item_texts(path: Path) -> pa.Table:
    texts: dict[str, str] = {}
    for number, line in enumerate(read_lines(path), 1):
        try:
            row = json.loads(line)
            key, text = row[ITEM_ID], row[TEXT]
        except (ValueError, KeyError, TypeError):
            key = text = None
        if not isinstance(key, str) or not isinstance(text, str):
            raise UserError(
                f"{path}: line {number}: expected a JSON object with strings 'item_id' and 'text', found {line[:80]!r}"
            )
        if key in texts:
            raise UserError(f"{path}: line {number}: item_id '{key}' has a text in an earlier line already; keep one")
        texts[key] = text
    return pa.table({ITEM_ID: pa.array(texts, pa.string()), TEXT: pa.array(texts.values(), pa.string())})
