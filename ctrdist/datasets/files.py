"""Reads the files that public datasets come in; what is malformed is an error with file, line and value."""

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ctrdist.errors import UserError
from ctrdist.schema import ITEM_ID

TEXT = "text"


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
    return text.removesuffix("\n").replace("\r\n", "\n").split("\n") if text else []


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
