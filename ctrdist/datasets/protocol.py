"""From a public dataset's ratings to a labelled log: which rows stay, what a click is, histories, and the split.

An adapter reads its dataset's own files into `Raw`; `write` does the rest, alike for all of them.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ctrdist.datasets.canonical import CanonicalWriter, Summary
from ctrdist.datasets.files import TEXT, with_item_texts
from ctrdist.errors import UserError
from ctrdist.history import history_column, recent_behaviours
from ctrdist.schema import HISTORY, ITEM_ID, LABEL, SPLIT, TIMESTAMP, USER_ID, Field, Schema

RATING = "rating"
ROWS_AT_ONCE = 500_000


@dataclass(frozen=True)
class Raw:
    """What a dataset's own files hold.

    Args:
        log: user_id and item_id (strings), `rating` (a number) or `label` (0 and 1), `timestamp` (int64 seconds UTC;
            absent where the dataset has no time), and the columns of the user and context fields. In file order.
            Where the dataset has histories of its own, also `history`: lists of item ids, oldest first, or a
            dictionary of such lists that many rows point to.
        items: item_id, the columns of the item fields, and those that the text names. No item twice.
        item: fields of the item, `item_id` among them.
        user: fields of the user.
        context: fields of the impression.
        text: the parts of an item's text (`Schema.text`). `{text}` is what `--item-text` brings, or the items' own.
        counts: what was handled while reading, such as {"duplicate rows dropped": 12}.
    """

    log: pa.Table
    items: pa.Table
    item: tuple[Field, ...]
    user: tuple[Field, ...] = (Field(USER_ID),)
    context: tuple[Field, ...] = ()
    text: tuple[str, ...] = ()
    counts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Protocol:
    """How a paper makes a labelled log of ratings, in the order of these options.

    Args:
        drop: ratings whose rows are left out.
        core: keep users and items with at least this many rows, until all have.
        positive: a rating from here up is a click; None takes every row for one, or the log's own labels.
        negatives: rows with label 0 for each click, at its time: an item of the rows that are kept, drawn evenly among
            those that the user has no row of.
        split: how rows are dealt to train, valid and test. `day`: not at all, the job's dates decide. `time`: by
            `shares` in order of time, rows of one second together. `last-day`: test is the last day, valid the one
            before. `random`: each row by chance. `file`: by `shares` in the order of the file, for data without time.
        shares: of train, valid and test.
        history: what a user's history holds: only clicks (`positive`), or `all` rows. A log's own histories stay.
        history_length: at most this many behaviours; 0 writes none.
    """

    drop: tuple[float, ...] = ()
    core: int = 0
    positive: float | None = None
    negatives: int = 0
    split: Literal["day", "time", "last-day", "random", "file"] = "day"
    shares: tuple[float, float, float] = (8, 1, 1)
    history: Literal["positive", "all"] = "positive"
    history_length: int = 20


def write(raw: Raw, protocol: Protocol, out: str | Path, item_text: Path | None = None, seed: int = 0) -> Summary:
    """Write a dataset in the canonical layout. The log is held in memory.

    A row of an item that `raw.items` lacks stays in the log, for the job to quarantine, but never enters a history.

    Args:
        item_text: JSON lines with `item_id` and `text`, for as many items as there are; the items' column `text`.
        seed: decides sampled negatives and the random split.

    Raises:
        UserError: `out` is in use, an item text is malformed, a split by time of data without, or nothing is left of
            the log.
    """
    items = with_item_texts(raw.items, item_text)
    free = pc.sum(pc.greater(pc.utf8_length(items[TEXT]), 0)).as_py() or 0
    timed = TIMESTAMP in raw.log.column_names
    if not timed and protocol.split not in ("file", "random"):
        raise UserError(f"--split {protocol.split}: this dataset has no time; take file or random")
    schema = Schema(
        user=raw.user, item=raw.item, context=raw.context, text=raw.text,
        history_length=protocol.history_length if timed or HISTORY in raw.log.column_names else 0,
    )  # fmt: skip
    writer = CanonicalWriter(out, schema)
    log, lacking = _label(_keep(raw.log, protocol), protocol, items, np.random.default_rng([seed, 0]))
    if not log.num_rows:
        raise UserError(f"{out}: the protocol leaves no row of {raw.log.num_rows:,}")
    log = log.sort_by(TIMESTAMP) if timed else log.append_column(TIMESTAMP, pa.array(np.arange(log.num_rows)))
    if protocol.split != "day":
        log = log.append_column(SPLIT, split(log[TIMESTAMP].to_numpy(), protocol, np.random.default_rng([seed, 1])))
    writer.write_items(items)

    own = None
    user, item_id = log[USER_ID].combine_chunks().dictionary_encode(), log[ITEM_ID].combine_chunks()
    if HISTORY in log.column_names:
        known, length = items[ITEM_ID].combine_chunks(), schema.history_length
        own, place = own_histories(log[HISTORY].combine_chunks(), known, length)
        log = log.drop_columns([HISTORY])
    elif schema.history_length:
        behaviour = pc.is_in(item_id, items[ITEM_ID].combine_chunks()).to_numpy(zero_copy_only=False)
        if protocol.history == "positive":
            behaviour = behaviour & (log[LABEL].to_numpy() == 1)
        offsets, rows = recent_behaviours(
            user.indices.to_numpy(), log[TIMESTAMP].to_numpy(), behaviour, schema.history_length
        )
    for start in range(0, log.num_rows, ROWS_AT_ONCE):
        part = log.slice(start, ROWS_AT_ONCE)
        if schema.history_length:
            if own is None:
                column = history_column(offsets[start : start + part.num_rows + 1], rows, item_id)
            else:
                column = own.take(pa.array(place[start : start + part.num_rows]))
            part = part.append_column(HISTORY, column)
        writer.write_interactions(part, timed)
    return replace(writer.finish(len(user.dictionary), counts=raw.counts | lacking), free_texts=free)


def own_histories(column: pa.Array, known: pa.Array, length: int) -> tuple[pa.ListArray, np.ndarray]:
    """The distinct lists of a log's own `history` column, and for each row the number of its list.

    Args:
        column: lists of item ids, oldest first, or a dictionary of such lists.
        known: items that may be in a history.
        length: at most this many are kept, the latest.
    """
    shared = pa.types.is_dictionary(column.type)
    lists = column.dictionary if shared else column
    place = column.indices.to_numpy() if shared else np.arange(len(column))
    kept = pc.is_in(pc.list_flatten(lists), known)
    values, number = pc.list_flatten(lists).filter(kept), pc.list_parent_indices(lists).filter(kept).to_numpy()
    ends = np.searchsorted(number, np.arange(len(lists)), side="right")
    late = ends[number] - np.arange(len(number)) <= length
    offsets = np.searchsorted(number[late], np.arange(len(lists) + 1))
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values.filter(pa.array(late))), place


def _keep(log: pa.Table, protocol: Protocol) -> pa.Table:
    if protocol.drop:
        log = log.filter(pc.invert(pc.is_in(log[RATING].cast(pa.float64()), pa.array(protocol.drop, pa.float64()))))
    if protocol.core:
        codes = [log[name].combine_chunks().dictionary_encode().indices.to_numpy() for name in (USER_ID, ITEM_ID)]
        log = log.take(pa.array(core(*codes, protocol.core)))
    return log


def core(user: np.ndarray, item: np.ndarray, least: int) -> np.ndarray:
    """The largest set of rows in which every user and every item has at least `least` rows; row numbers, ascending.

    Args:
        user, item: [N] integer codes from 0.
    """
    rows = np.arange(len(user))
    while len(rows):
        often = np.ones(len(rows), bool)
        for codes in (user[rows], item[rows]):
            often &= np.bincount(codes)[codes] >= least
        if often.all():
            break
        rows = rows[often]
    return rows


def _label(
    log: pa.Table, protocol: Protocol, items: pa.Table, draws: np.random.Generator
) -> tuple[pa.Table, dict[str, int]]:
    """The log with `label` (int8) in place of `rating`, and the sampled negatives below their clicks; and how many of
    these found no item."""
    if LABEL not in log.column_names:
        if protocol.positive is None:
            label = pa.array(np.ones(log.num_rows, np.int8))
        else:
            label = pc.cast(pc.greater_equal(log[RATING], protocol.positive), pa.int8())
        log = log.append_column(LABEL, label)
    log = log.drop_columns([RATING]) if RATING in log.column_names else log
    if not protocol.negatives:
        return log, {}
    known = log[ITEM_ID].filter(pc.is_in(log[ITEM_ID], items[ITEM_ID].combine_chunks())).unique()
    user = log[USER_ID].combine_chunks().dictionary_encode().indices.to_numpy()
    item = pc.index_in(log[ITEM_ID], known).combine_chunks()
    clicks = np.flatnonzero(log[LABEL].to_numpy() == 1)
    at = np.repeat(clicks, protocol.negatives)
    chosen = sample_negatives(user, pc.fill_null(item, -1).to_numpy(), at, len(known), draws)
    found = chosen >= 0
    negatives = log.take(pa.array(at[found]))
    negatives = negatives.set_column(
        negatives.column_names.index(ITEM_ID), ITEM_ID, known.take(pa.array(chosen[found])).cast(log[ITEM_ID].type)
    ).set_column(negatives.column_names.index(LABEL), LABEL, pa.array(np.zeros(int(found.sum()), np.int8)))
    order = np.argsort(np.concatenate([np.arange(log.num_rows), at[found]]), kind="stable")
    lacking = {"negatives left out, as the user has rows of nearly all items": int((~found).sum())}
    return pa.concat_tables([log, negatives]).take(pa.array(order)), lacking


def sample_negatives(
    user: np.ndarray, item: np.ndarray, rows: np.ndarray, items: int, draws: np.random.Generator, tries: int = 50
) -> np.ndarray:
    """For each of `rows` an item that its user has no row of, drawn evenly; -1 after `tries` without one.

    Args:
        user: [N] codes from 0.
        item: [N] 0 to items - 1, or -1 for none.
    """
    stride = items + 1  # an unknown item, -1, has a place of its own
    pairs = np.unique(user.astype(np.int64) * stride + item)
    chosen = np.full(len(rows), -1, np.int64)
    open_ = np.arange(len(rows))
    for _ in range(tries):
        if not len(open_) or not items:
            break
        drawn = draws.integers(0, items, len(open_))
        key = user[rows[open_]].astype(np.int64) * stride + drawn
        at = np.minimum(np.searchsorted(pairs, key), len(pairs) - 1)
        free = pairs[at] != key
        chosen[open_[free]] = drawn[free]
        open_ = open_[~free]
    return chosen


def split(timestamp: np.ndarray, protocol: Protocol, draws: np.random.Generator) -> pa.Array:
    """`train`, `valid` or `test` for rows in ascending order of time (of the file, for `split="file"`)."""
    count, shares = len(timestamp), np.cumsum(protocol.shares) / sum(protocol.shares)
    if protocol.split == "random":
        part = np.searchsorted(shares[:2], draws.random(count), side="right")
    elif protocol.split == "last-day":
        days = timestamp // 86_400
        part = np.where(days == days[-1], 2, np.where(days == days[days < days[-1]].max(initial=-1), 1, 0))
    else:
        cuts = np.round(shares[:2] * count).astype(np.int64)
        if protocol.split == "time":  # rows of one second stay together, in the earlier part
            cuts = np.searchsorted(timestamp, timestamp[np.maximum(cuts - 1, 0)], side="right")
        part = np.searchsorted(cuts, np.arange(count), side="right")
    return pa.DictionaryArray.from_arrays(pa.array(part, pa.int8()), ["train", "valid", "test"]).cast(pa.string())
