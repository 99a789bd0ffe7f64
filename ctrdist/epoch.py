"""What is read together, and in which order: chunks of rows, for an epoch of training or for one pass in order."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import pyarrow as pa

from ctrdist.encode import encode, fillers
from ctrdist.errors import UserError
from ctrdist.fields import Encoder
from ctrdist.items import Catalog
from ctrdist.log import RowGroup, find_faults, read_row_group
from ctrdist.schema import Schema

Beside = Callable[[RowGroup, pa.Table], dict[str, pa.ChunkedArray | pa.Array]]
"""A row group and its rows -> columns to stand beside them, by name (`ctrdist.beside`, `ctrdist.interactions`)."""

CHUNK_ROWS = 131_072
"""Rows of a chunk, more or less: what a task of the stream holds in memory.

A cut through a row group has it read twice, so a chunk is several of those that `jobs/prepare.py` writes.
"""


@dataclass(frozen=True)
class Piece:
    """Good rows of a row group, from `start` to before `stop`; None is its end."""

    group: RowGroup
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class Chunk:
    """Rows that are read, shuffled and streamed together, then fillers.

    Args:
        pieces: where they lie.
        seed: decides their order; None keeps the order of the pieces.
        by_day: only rows of one day, neighbours among the pieces, change places.
        fillers: rows that stand for nothing, at the end.
    """

    pieces: tuple[Piece, ...]
    seed: tuple[int, ...] | None = None
    by_day: bool = False
    fillers: int = 0


def plan_epoch(
    groups: list[RowGroup],
    multiple: int,
    seed: tuple[int, ...] | None,
    by_day: bool = False,
    chunk_rows: int = CHUNK_ROWS,
) -> list[Chunk]:
    """An epoch over the good rows of `groups`, cut into chunks of a multiple of `multiple` rows.

    All chunks but the last have the same size; the last ends in fillers. So blocks can be cut from each by itself, and
    what they hold does not depend on how many workers they are dealt to. A row group that a cut goes through is read
    for both chunks.

    Args:
        groups: with their good rows counted.
        multiple: rows that all workers together take at once.
        seed: decides the order of row groups, and of rows within a chunk; None keeps the order of the log.
        by_day: days stay in the order of `groups`; only row groups of one day, and rows of one day, change places.
        chunk_rows: rows of a chunk at least; as many as the largest row group in any case, so that none is read more
            than twice.
    """
    order = np.arange(len(groups)) if seed is None else np.random.default_rng(seed).permutation(len(groups))
    if by_day and groups:
        number = {day: n for n, day in enumerate(dict.fromkeys(group.day for group in groups))}
        order = order[np.argsort([number[groups[i].day] for i in order], kind="stable")]
    size = -(-max([chunk_rows, *(group.rows for group in groups)]) // multiple) * multiple
    cuts: list[list[Piece]] = [[]]
    room = size
    for group in (groups[i] for i in order):
        start = 0
        while start < group.good:
            if not room:
                cuts.append([])
                room = size
            stop = min(group.good, start + room)
            cuts[-1].append(Piece(group, start, stop))
            room -= stop - start
            start = stop
    if not cuts[0]:
        return []
    missing = -(size - room) % multiple
    seeds = [None if seed is None else (*seed, number) for number in range(len(cuts))]
    last = len(cuts) - 1
    return [Chunk(tuple(cut), seeds[n], by_day, missing if n == last else 0) for n, cut in enumerate(cuts)]


def plan_pass(groups: list[RowGroup], chunk_rows: int = CHUNK_ROWS) -> list[Chunk]:
    """One pass over the good rows of `groups` in the order of the log, in chunks of whole row groups."""
    chunks: list[list[RowGroup]] = [[]]
    for group in groups:
        if chunks[-1] and sum(g.rows for g in chunks[-1]) + group.rows > chunk_rows:
            chunks.append([])
        chunks[-1].append(group)
    return [Chunk(tuple(map(Piece, chunk))) for chunk in chunks if chunk]


def read_chunk(
    data: str,
    chunk: Chunk,
    schema: Schema,
    vocabularies: dict[str, Encoder],
    catalog: Catalog,
    keep: tuple[str, ...] = (),
    beside: Beside | None = None,
) -> pa.Table:
    """The rows of a chunk, encoded (`ctrdist.encode`) and in the order of its seed, then its fillers.

    Args:
        keep: columns to keep as they are.
        beside: what makes columns that stand beside the log's.

    Raises:
        UserError: a row group has another number of good rows than the pass that counted them found.
    """
    tables = [
        encode(read_piece(data, piece, schema, catalog, beside), schema, vocabularies, catalog, keep)
        for piece in chunk.pieces
    ]
    if chunk.seed is not None:
        order = shuffle(chunk, [table.num_rows for table in tables])
        tables = [pa.concat_tables(tables).combine_chunks().take(pa.array(order))]
    if chunk.fillers:
        tables.append(fillers(schema, chunk.fillers, tables[0].schema))
    return pa.concat_tables(tables).combine_chunks()


def read_piece(data: str, piece: Piece, schema: Schema, catalog: Catalog, beside: Beside | None = None) -> pa.Table:
    """Good rows of a row group as they stand in the log, with the columns that stand beside it, if any."""
    group, length = piece.group, None if piece.stop is None else piece.stop - piece.start
    table = read_row_group(data, group, schema)
    for name, column in beside(group, table).items() if beside else ():
        table = table.append_column(name, column)
    clean = group.good == table.num_rows
    if clean:  # then the piece can be cut out before its rows are checked
        table = table.slice(piece.start, length)
    good = table.filter(pa.array(find_faults(table, group.day, catalog, group.split) == 0))
    if group.good is not None and good.num_rows != (table.num_rows if clean else group.good):
        raise UserError(
            f"{group.path}: row group {group.index} has other rows than when it was checked: the file was changed "
            "since; run the job again"
        )
    return good if clean else good.slice(piece.start, length)


def shuffle(chunk: Chunk, rows: list[int]) -> np.ndarray:
    """The order, int64, of a chunk's rows, of which its pieces have `rows`."""
    draw, order, start = np.random.default_rng(chunk.seed), [], 0
    together = groupby(zip(chunk.pieces, rows, strict=True), lambda pair: pair[0].group.day if chunk.by_day else None)
    for _, pairs in together:
        count = sum(number for _, number in pairs)
        order.append(start + draw.permutation(count))
        start += count
    return np.concatenate(order) if order else np.empty(0, np.int64)
