"""Company tables to the canonical layout as Ray tasks (`ctrdist.datasets.table`)."""

import glob
import shutil
import uuid
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

from ctrdist.config import to_dict
from ctrdist.datasets.canonical import Summary, clear_unfinished
from ctrdist.datasets.ledger import Ledger, complete
from ctrdist.datasets.table import (
    NO_LABEL,
    NO_TIME,
    Before,
    TableOptions,
    finish_bucket,
    partition,
    write_items,
    write_users,
)
from ctrdist.datasets.table_files import format_of
from ctrdist.errors import UserError
from ctrdist.schema import SPLIT, Schema
from raycluster.cluster import in_parallel
from raycluster.day import Progress

BUCKET_BYTES = 64 * 2**20
"""Bytes of input files in one bucket without histories: about a GB of memory while it is finished, for well compressed
Parquet."""

BEHAVIOURS_LIKE_A_ROW = 8
"""So many behaviours of histories take the memory of a row without them, some 250 bytes."""


def prepare(
    schema: Schema, interactions: str, items: str, users: str, out: Path, options: TableOptions, append: bool = False
) -> Summary:
    """Write the dataset `out`, or append days to it. Ray must be connected, and `out` seen by all its nodes.

    A run that was cut off is run again with the same arguments; where nothing is left to do, it says so in the counts.

    Args:
        interactions, items, users: glob patterns of files; no users if "".
        append: to a dataset that this function made, with the same schema and options; all rows must be of later days
            than those in it. `items/` and what users bring are taken anew.

    Raises:
        UserError: what is wrong with the files, or rows to append that are not of later days. `out` then is as before.
    """
    files = _files(interactions, "--interactions")
    item_files, user_files = _files(items, "--items"), _files(users, "--users") if users else []
    inputs, ledger = _facts([*files, *item_files, *user_files]), Ledger.load(out)
    if append and ledger is None:
        raise UserError(f"{out}: no histories.json; only a dataset that 'prepare.py table' made can be appended to")
    changed = ledger.difference(schema, options) if ledger else ""
    if append and changed:
        raise UserError(f"--append: {changed}; keep it as in {out}, or write a dataset anew")
    if ledger and not changed and (append or inputs == ledger.inputs):
        complete(out, ledger, schema)
        if inputs == ledger.inputs:
            summary = Summary(**ledger.summary)
            return replace(summary, counts=summary.counts | {"files that were in it already, nothing done": len(files)})
    if append:
        then = out / ledger.histories
        needed = _buckets([*files, *map(str, then.iterdir())], schema, options)
        # A multiple of what they were, so that a bucket's users were all in one bucket.
        buckets, before = ledger.buckets * -(-needed // ledger.buckets), Before(then, ledger.buckets)
    else:
        clear_unfinished(out)
        buckets, before = _buckets(files, schema, options), None
    shutil.rmtree(out / "work", ignore_errors=True)
    work = out / "work" / uuid.uuid4().hex  # of this run only: a task of one that was cut off may still be writing
    work.mkdir(parents=True)
    count, with_text = write_items(item_files, schema, options, work)
    user_fields = write_users(user_files, schema, options, work) if users else []

    counts, first, progress = Counter(), None, Progress("deal", "files")
    calls = [(path, number, schema, options, buckets, work, user_fields) for number, path in enumerate(files)]
    for done, (found, day) in enumerate(in_parallel(partition, calls), 1):
        counts.update(found)
        first = min(filter(None, (first, day)), default=None)
        progress.items(done, len(calls))
    if first is None:
        raise UserError(f"--interactions {interactions}: no rows with a timestamp")
    if append and first <= ledger.through:
        raise UserError(f"--append: {out} goes through {ledger.through}, but there are rows of {first}; leave them out")

    split = counts[SPLIT] > 0
    if append and split and not ledger.split:
        raise UserError(f"--append: rows with a '{SPLIT}' to {out}, which has none; leave the column out")
    split = split or (append and ledger.split)

    finished, rows_by_day, progress = [], Counter(), Progress("histories", "buckets")
    calls = [(bucket, buckets, schema, options, work, before, split) for bucket in range(buckets)]
    for found in in_parallel(finish_bucket, calls):
        finished.append(found)
        rows_by_day.update(found.days)
        progress.items(len(finished), buckets)
    summary = Summary(
        rows=counts["rows"], days=len(rows_by_day), users=sum(b.users for b in finished), items=count,
        positives=sum(b.clicks for b in finished), rows_with_history=sum(b.rows_with_history for b in finished),
        items_with_text=with_text,
        counts={"rows without a timestamp, left out": counts[NO_TIME],
                "rows with a label other than 0 and 1, for the job to set aside": counts[NO_LABEL]},
    )  # fmt: skip
    ledger = Ledger(
        through=max(rows_by_day), buckets=buckets, split=split, schema=to_dict(schema), options=to_dict(options),
        inputs=inputs, summary=asdict(summary), work=str(work.relative_to(out)),
    )  # fmt: skip
    ledger.save(out)
    complete(out, ledger, schema)
    return summary


def _buckets(files: list[str], schema: Schema, options: TableOptions) -> int:
    size = sum(Path(path).stat().st_size for path in files)
    if options.history != "column":
        size += size * schema.history_length // BEHAVIOURS_LIKE_A_ROW
    return min(4096, max(1, -(-size // BUCKET_BYTES)))


def _facts(files: list[str]) -> list[list]:
    """What changes when one of the files does, as JSON keeps it."""
    return [[str(Path(path).absolute()), Path(path).stat().st_size, Path(path).stat().st_mtime_ns] for path in files]


def _files(pattern: str, option: str) -> list[str]:
    found = sorted(path for path in glob.glob(pattern, recursive=True) if Path(path).is_file())
    if not found:
        raise UserError(f"{option} {pattern}: no such files; quote a pattern with * so that the shell leaves it alone")
    for path in found:
        format_of(path)  # before anything is read
    return found
