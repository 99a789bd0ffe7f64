"""MovieTweetings: film ratings from tweets, in the dataset's own files, to the canonical layout."""

import json
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ctrdist.datasets.canonical import CanonicalWriter, Summary
from ctrdist.errors import UserError
from ctrdist.history import history_column, recent_behaviours
from ctrdist.schema import HISTORY, ITEM_ID, LABEL, MULTI, TIMESTAMP, USER_ID, Field, Schema

ROWS_AT_ONCE = 500_000


def prepare(
    source: str | Path,
    out: str | Path,
    item_text: str | Path | None = None,
    positive_threshold: int = 8,
    history_length: int = 20,
    history: Literal["positive", "all"] = "positive",
) -> Summary:
    """Write `out` from `ratings.dat` and `movies.dat`. The log is held in memory.

    A rating of a film that `movies.dat` lacks stays in the log, for the daily job to quarantine, but never enters a
    history. A text of a film that `movies.dat` lacks is not used.

    Args:
        source: folder with `ratings.dat` (`user::item::rating::unix time`, ratings 0 to 10) and `movies.dat`
            (`item::title (year)::genre|genre`), UTF-8.
        out: folder to write; see `CanonicalWriter`.
        item_text: JSON lines with `item_id` and `text`; further keys are ignored.
        positive_threshold: label 1 from this rating up.
        history_length: at most this many behaviours in a history; 0 writes none.
        history: what a history holds: `positive` the rows with label 1, `all` every rated film.

    Raises:
        UserError: a file is missing, not UTF-8, or has a malformed line (named with its number); `out` is in use;
            an option is out of range.
    """
    source = Path(source)
    if not 0 <= positive_threshold <= 10:
        raise UserError(f"positive_threshold: {positive_threshold} is not a rating; ratings go from 0 to 10")
    if history_length < 0:
        raise UserError(f"history_length: {history_length} is not a length; use 0 for no history")
    if history not in ("positive", "all"):
        raise UserError(f"history: {history!r} is not known; use 'positive' or 'all'")
    items = _read_items(source / "movies.dat", Path(item_text) if item_text is not None else None)
    log = _read_ratings(source / "ratings.dat", positive_threshold).sort_by(TIMESTAMP)

    schema = Schema(
        user=(Field(USER_ID, min_count=2),),
        item=(Field(ITEM_ID, min_count=2), Field("genres", MULTI), Field("year")),
        history_length=history_length,
        text=("{title}", "({year}).", "{genres}.", "{text}"),
    )
    writer = CanonicalWriter(out, schema)
    writer.write_items(items)

    user = log[USER_ID].combine_chunks().dictionary_encode()
    behaviour = pc.is_in(log[ITEM_ID], items[ITEM_ID].combine_chunks()).to_numpy()
    if history == "positive":
        behaviour = behaviour & (log[LABEL].to_numpy() == 1)
    offsets, rows = recent_behaviours(user.indices.to_numpy(), log[TIMESTAMP].to_numpy(), behaviour, history_length)
    item_id = log[ITEM_ID].combine_chunks()
    for start in range(0, log.num_rows, ROWS_AT_ONCE):
        part = log.slice(start, ROWS_AT_ONCE)
        column = history_column(offsets[start : start + part.num_rows + 1], rows, item_id)
        writer.write_interactions(part.append_column(HISTORY, column))
    return writer.finish(users=len(user.dictionary))


def _read_ratings(path: Path, positive_threshold: int) -> pa.Table:
    """The log without histories, in the order of the file."""
    user, item, rating, time = _columns(path, "user::item::rating::unix time")
    rating, time = _integers(path, "rating", rating), _integers(path, "unix time", time)
    _refuse(path, pc.greater(rating, 10), rating, "the rating", "ratings go from 0 to 10")
    label = pc.cast(pc.greater_equal(rating, positive_threshold), pa.int8())
    return pa.table({USER_ID: user, ITEM_ID: item, LABEL: label, TIMESTAMP: time})


def _read_items(path: Path, item_text: Path | None) -> pa.Table:
    """item_id, title, year (null if the title has none), genres, text (null if unknown)."""
    item, name, genres = _columns(path, "item::title (year)::genres")
    again = np.ones(len(item), bool)
    again[np.unique(item.to_numpy(zero_copy_only=False), return_index=True)[1]] = False
    _refuse(path, pa.array(again), item, "the item", "it is in an earlier line already")
    parts = pc.extract_regex(name, r"^(?P<title>.*) \((?P<year>\d{4})\)$")
    texts = _read_texts(item_text) if item_text is not None else {}
    ids = item.to_pylist()
    if texts and texts.keys().isdisjoint(ids):
        raise UserError(f"{item_text}: item_id: no text is of an item of {path}; are the two of one dataset?")
    return pa.table(
        {
            ITEM_ID: item,
            "title": pc.coalesce(pc.struct_field(parts, "title"), name),
            "year": pc.struct_field(parts, "year"),
            "genres": pa.array([g.split("|") if g else [] for g in genres.to_pylist()], pa.list_(pa.string())),
            "text": pa.array([texts.get(i) for i in ids], pa.string()),
        }
    )


def _read_texts(path: Path) -> dict[str, str]:
    texts: dict[str, str] = {}
    for number, line in enumerate(_lines(path), 1):
        try:
            row = json.loads(line)
            key, text = row[ITEM_ID], row["text"]
        except (ValueError, KeyError, TypeError):
            key = text = None
        if not isinstance(key, str) or not isinstance(text, str):
            raise UserError(
                f"{path}: line {number}: expected a JSON object with strings 'item_id' and 'text', found {line[:80]!r}"
            )
        if key in texts:
            raise UserError(f"{path}: line {number}: item_id '{key}' has a text in an earlier line already; keep one")
        texts[key] = text
    return texts


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; point --source and --item-text at the dataset's own files") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; convert the file to UTF-8 first") from None
    return text.removesuffix("\n").split("\n") if text else []


def _columns(path: Path, form: str) -> list[pa.Array]:
    """The `::`-separated columns of a file as strings, each line of them with as many as `form`."""
    lines = pa.array(_lines(path), pa.string())
    if len(lines) == 0:
        raise UserError(f"{path}: the file is empty; expected lines '{form}'")
    parts, width = pc.split_pattern(lines, "::"), form.count("::") + 1
    _refuse(path, pc.not_equal(pc.list_value_length(parts), width), lines, "the line", f"expected '{form}'")
    columns = [pc.list_element(parts, index) for index in range(width)]
    for name, column in zip(form.split("::"), columns, strict=True):
        if name != "genres":
            _refuse(path, pc.equal(column, ""), lines, "the line", f"'{name}' is empty; expected '{form}'")
    return columns


def _integers(path: Path, name: str, column: pa.Array) -> pa.Array:
    bad = pc.invert(pc.match_substring_regex(column, r"^[0-9]{1,12}$"))
    _refuse(path, bad, column, f"'{name}'", "expected a whole number")
    return pc.cast(column, pa.int64())


def _refuse(path: Path, bad: pa.Array, values: pa.Array, what: str, why: str) -> None:
    """Raise UserError with the first line where `bad` holds, its value, and how many there are."""
    rows = np.flatnonzero(bad.to_numpy(zero_copy_only=False))
    if len(rows):
        value = str(values[int(rows[0])].as_py())[:80]
        many = f" ({len(rows)} such lines)" if len(rows) > 1 else ""
        raise UserError(f"{path}: line {rows[0] + 1}: {what} is {value!r}: {why}{many}; correct or remove it")
