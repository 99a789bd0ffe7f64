"""A Parquet file of raw ids scored into another one, whole or not at all; what is done is known by its footer."""

import hashlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ctrdist.errors import UserError
from ctrdist.items import require_columns
from ctrdist.log import with_reasons
from ctrdist.schema import ITEM_ID, USER_ID
from ctrdist.serving.model import ServedModel
from ctrdist.storage import filesystem, fingerprint, write_whole

PROBABILITY = "probability"
MARK, BAD_ROWS = b"ctrdist.scored", b"ctrdist.bad_rows"
"""In a scored file's footer: what it was made of, and how many rows were set aside."""
READ, SCORED = 65_536, 4096
"""Rows that are read, and scored, at a time."""


@dataclass(frozen=True)
class Job:
    """One file to score.

    Args:
        source: Parquet file, a path or URI.
        target: the scored file.
        quarantine: Parquet file for bad rows; there is none without any.
    """

    source: str
    target: str
    quarantine: str


@dataclass(frozen=True)
class Scored:
    """What became of a file.

    Args:
        rows: that were scored.
        bad: that were set aside.
        before: whether an earlier run did it.
    """

    rows: int
    bad: int
    before: bool


def needed(model: ServedModel, keep: tuple[str, ...]) -> list[str]:
    """The columns that a file to score must have."""
    return list(dict.fromkeys([*(name for name in model.columns if name not in model.optional), *keep]))


def score_file(job: Job, model: ServedModel, keep: tuple[str, ...] = ()) -> Scored:
    """Score a file's rows, in their order, unless that was done by the same model and of the same content.

    The scored file has `user_id`, if the source has it, `item_id`, the columns to keep, and `probability`, float32. A
    row whose user or item is null is set aside, with the columns `reason`, `file` and `row` beside its own.

    Args:
        keep: columns that the scored file has besides the ids and the probability.

    Raises:
        UserError: the file is not there, is no Parquet file or a damaged one, or lacks a column or has one of another
            type than the log.
        OSError: the scored file cannot be written.
    """
    with _told_of(job.source):
        filesystem_, path = filesystem(job.source)
        stream = filesystem_.open_input_file(path)
    with stream:
        mark = fingerprint(model.identity, hashlib.file_digest(stream, "sha256").hexdigest(), keep)
        if (done := _done(job.target, mark)) is not None:
            return done
        stream.seek(0)
        file = open_parquet(stream, job.source)
        found = file.schema_arrow
        require_columns(job.source, needed(model, keep), found.names)
        given = [name for name in dict.fromkeys([USER_ID, *model.columns, *keep]) if name in found.names]
        told = [name for name in dict.fromkeys([USER_ID, ITEM_ID, *keep]) if name in given]
        fields = [found.field(name) for name in told]
        bad, first, rows = [], 0, 0
        with write_whole(job.target) as local:
            with closing(pq.ParquetWriter(local, pa.schema([*fields, (PROBABILITY, pa.float32())]))) as writer:
                for table in _batches(file, given, job.source):
                    reasons = _reasons(table)
                    good, at = table.filter(pc.is_null(reasons)), np.flatnonzero(pc.is_valid(reasons).to_numpy(False))
                    if len(at):
                        said = reasons.take(pa.array(at)).to_pylist()
                        bad.append(with_reasons(table, at, said, job.source, first))
                    scores = pa.array(_predict(model, good, job.source))
                    writer.write_table(good.select(told).append_column(PROBABILITY, scores).cast(writer.schema))
                    first, rows = first + table.num_rows, rows + good.num_rows
                writer.add_key_value_metadata({MARK: mark.encode(), BAD_ROWS: str(first - rows).encode()})
            _write_quarantine(job.quarantine, bad)
    return Scored(rows, first - rows, before=False)


def _batches(file: pq.ParquetFile, columns: list[str], path: str) -> Iterator[pa.Table]:
    batches = file.iter_batches(READ, columns=columns)
    while True:
        with _told_of(path):
            batch = next(batches, None)
        if batch is None:
            return
        yield pa.Table.from_batches([batch])


def _predict(model: ServedModel, rows: pa.Table, path: str) -> np.ndarray:
    with _told_of(path):
        parts = [model.predict(rows.slice(start, SCORED)) for start in range(0, rows.num_rows, SCORED)]
    return np.concatenate(parts) if parts else np.empty(0, np.float32)


@contextmanager
def _told_of(path: str) -> Iterator[None]:
    """What is wrong with a file is a UserError that names it: its pages are damaged, or a column is of another type."""
    try:
        yield
    except (UserError, OSError, pa.ArrowException) as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{path}: {said[0]}") from error


def open_parquet(stream: pa.NativeFile, path: str) -> pq.ParquetFile:
    """An open Parquet file. Raises UserError if it is none."""
    try:
        return pq.ParquetFile(stream)
    except pa.ArrowInvalid as error:
        raise UserError(f"{path}: not a readable Parquet file ({error}); restore or remove it") from None


def _done(target: str, mark: str) -> Scored | None:
    """What an earlier run made of the same file and model; None if it did not."""
    filesystem_, path = filesystem(target)
    try:
        with filesystem_.open_input_file(path) as stream:
            about = pq.read_metadata(stream)
    except (FileNotFoundError, pa.ArrowInvalid):
        return None
    facts = about.metadata or {}
    return Scored(about.num_rows, int(facts[BAD_ROWS]), before=True) if facts.get(MARK) == mark.encode() else None


def _reasons(table: pa.Table) -> pa.Array:
    """What is wrong with each row; null for a good one."""
    reasons = pa.nulls(table.num_rows, pa.string())
    for name in (ITEM_ID, USER_ID):
        if name in table.column_names:
            reasons = pc.if_else(pc.is_null(table[name].combine_chunks()), f"null {name}", reasons)
    return reasons


def _write_quarantine(target: str, bad: list[pa.Table]) -> None:
    """Write the bad rows of a file; where there are none, none stay of an earlier run."""
    if bad:
        with write_whole(target) as local:
            pq.write_table(pa.concat_tables(bad), local)
        return
    filesystem_, path = filesystem(target)
    if filesystem_.get_file_info(path).is_file:
        filesystem_.delete_file(path)
