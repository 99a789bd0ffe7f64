"""Company tables to the canonical layout as Ray tasks (`ctrdist.datasets.table`)."""

import glob
import shutil
from collections import Counter
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

from ctrdist.config import to_dict
from ctrdist.datasets.canonical import HISTORIES, Summary, clear_unfinished
from ctrdist.datasets.table import (
    Finished,
    Ledger,
    TableOptions,
    clear_after,
    finish_bucket,
    partition,
    write_items,
    write_users,
)
from ctrdist.errors import UserError
from ctrdist.schema import Schema
from raycluster.cluster import in_parallel
from raycluster.day import Progress

BUCKET_BYTES = 64 * 2**20
"""Bytes of input files in one bucket: about a GB of memory while it is finished, for well compressed Parquet."""


def prepare(
    schema: Schema, interactions: str, items: str, users: str, out: Path, options: TableOptions, append: bool = False
) -> Summary:
    """Write the dataset `out`, or append days to it. Ray must be connected, and `out` seen by all its nodes.

    A run that was cut off is run again with the same arguments.

    Args:
        interactions, items, users: glob patterns of files; no users if "".
        append: to a dataset that this function made; all rows must be of later days than those in it. `items/` and
            what users bring are taken anew.

    Raises:
        UserError: what is wrong with the files, or rows to append that are not of later days.
    """
    files = _files(interactions, "--interactions")
    if append:
        ledger = Ledger.load(out)
        clear_after(out, ledger)
        buckets, before = ledger.buckets, out / ledger.histories
    else:
        clear_unfinished(out)
        size = sum(Path(path).stat().st_size for path in files)
        ledger, buckets, before = None, min(4096, max(1, -(-size // BUCKET_BYTES))), None
    work = out / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    item_files, user_files = _files(items, "--items"), _files(users, "--users") if users else []
    count = write_items(item_files, schema, options, out)
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

    after, finished, progress = out / f"{HISTORIES}part", [], Progress("histories", "buckets")
    shutil.rmtree(after, ignore_errors=True)
    calls = [(bucket, schema, options, work, out, before, after) for bucket in range(buckets)]
    for found in in_parallel(finish_bucket, calls):
        finished.append(found)
        progress.items(len(finished), buckets)
    _finish(schema, options, out, after, buckets, finished)
    rows_by_day = Counter()
    for bucket in finished:
        rows_by_day.update(bucket.days)
    return Summary(
        rows=counts["rows"], days=len(rows_by_day), users=sum(b.users for b in finished), items=count,
        positives=sum(b.clicks for b in finished), rows_with_history=sum(b.rows_with_history for b in finished),
        items_with_text=_with_text(out), counts={"rows without a timestamp, left out": counts["without a timestamp"]},
    )  # fmt: skip


def _finish(
    schema: Schema, options: TableOptions, out: Path, after: Path, buckets: int, finished: list[Finished]
) -> None:
    """Make the dataset exist: the histories under their day, the ledger, the schema; and tidy up."""
    through = max(day for bucket in finished for day in bucket.days)
    histories = f"{HISTORIES}{through}"
    shutil.rmtree(out / histories, ignore_errors=True)
    after.rename(out / histories)
    ledger = Ledger(through, buckets, histories, to_dict(options))
    ledger.save(out)
    schema.save(out / "schema.yaml")
    clear_after(out, ledger)
    shutil.rmtree(out / "work")


def _with_text(out: Path) -> int:
    items = pq.read_table(out / "items")
    return pc.sum(pc.greater(pc.utf8_length(items["text"]), 0)).as_py() or 0 if "text" in items.column_names else 0


def _files(pattern: str, option: str) -> list[str]:
    found = sorted(path for path in glob.glob(pattern, recursive=True) if Path(path).is_file())
    if not found:
        raise UserError(f"{option} {pattern}: no such files; quote a pattern with * so that the shell leaves it alone")
    return found
