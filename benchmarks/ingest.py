"""From Parquet to ready tensors: our Ray path beside a plain loop in one process, beside the read alone.

One synthetic log of 10 fields and histories of 20 is made, checked and encoded by the job's own pieces. Three readers
then go over the same row groups in one run: `read` only reads the columns, `plain` also encodes and joins batches in
one process on one core, `ray` does the same through Ray Data as the workers of a training get it, one a core. Memory is
the peak over all processes, at N and at 10 N rows; Ray's object store is small, and what it had to spill is counted.

Beside it the vocabulary of as many users as a large company has: built from counts, grown by a day, and asked for rows,
against a Python dictionary in the same run.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import pyarrow as pa
import tyro
from rich.console import Console
from rich.table import Table

from ctrdist.batch import collate
from ctrdist.datasets.canonical import SECONDS_A_DAY, CanonicalWriter
from ctrdist.epoch import plan_epoch, plan_pass, read_chunk
from ctrdist.fields import new_encoder, save_encoders
from ctrdist.items import build_catalog, grow_catalog_ids, grow_item_vocabularies, read_items
from ctrdist.log import list_days, list_row_groups, read_row_group
from ctrdist.scan import Scan, grow_encoders, item_counts, sum_scans, with_good_rows
from ctrdist.schema import Field, Schema
from ctrdist.storage import State
from ctrdist.vocabulary import Vocabulary, sum_counts
from raycluster import cluster, ingest, planning
from raycluster.ingest import LogReader
from raycluster.trainer import InOrder

ROWS_A_DAY = 1_000_000
BYTES_A_ROW = 4 * (20 + 1 + 1 + 1 + 3 + 2 + 1) + 8 * 4 + 1
"""Of an encoded row, as it passes through the object store: items, fields, numbers and offsets."""
SCHEMA = Schema(
    user=(Field("user_id"), Field("age"), Field("city"), Field("segments", "multi")),
    item=(Field("item_id"), Field("brand"), Field("tags", "multi")),
    context=(Field("device"), Field("hour"), Field("price", "numeric", scale="log")),
    history_length=20,
)


@dataclass(frozen=True)
class Options:
    """What is measured.

    Args:
        rows: N, rows of the smaller log.
        times: the larger log has this many times as many, 2 or more.
        users: distinct users.
        items: distinct items.
        batch_size: rows of a batch, of the plain loop and of each worker.
        ids: ids of the large vocabulary; 0 leaves that part out.
        object_store_mib: memory of Ray's object store.
        readers: which of them go over the logs.
        data: a prepared log to go over in place of the two that are made here.
        folder: where to keep the logs; a temporary one if not given.
    """

    rows: int = 1_000_000
    times: int = 10
    users: int = 200_000
    items: int = 50_000
    batch_size: int = 1024
    ids: int = 10_000_000
    object_store_mib: int = 150
    readers: tuple[Literal["read", "plain", "ray"], ...] = ("read", "plain", "ray")
    data: Path | None = None
    folder: Path | None = None


def write_log(out: Path, rows: int, options: Options) -> None:
    """A log with Zipf-like items; histories are drawn like them."""
    draw = np.random.default_rng(0)
    item_ids = pa.array([f"item{n:07d}" for n in range(options.items)])

    def names(prefix: str, count: int, size: int) -> pa.Array:
        dictionary = pa.array([f"{prefix}{n}" for n in range(count)])
        return dictionary.take(pa.array(draw.integers(0, count, size)))

    def lists(values: pa.Array, length: int) -> pa.Array:
        return pa.ListArray.from_arrays(pa.array(np.arange(0, len(values) + 1, length), pa.int32()), values)

    def items(size: int) -> pa.Array:
        return item_ids.take(pa.array((options.items * draw.random(size) ** 3).astype(np.int64)))

    writer = CanonicalWriter(out, SCHEMA)
    writer.write_items(
        pa.table(
            {
                "item_id": item_ids,
                "brand": names("brand", 500, options.items),
                "tags": lists(names("tag", 300, 3 * options.items), 3),
            }
        )  # fmt: skip
    )
    for day, start in enumerate(range(0, rows, ROWS_A_DAY)):
        count = min(ROWS_A_DAY, rows - start)
        writer.write_interactions(
            pa.table(
                {
                    "user_id": pa.array(draw.integers(0, options.users, count)).cast(pa.string()),
                    "item_id": items(count),
                    "label": (draw.random(count) < 0.2).astype(np.int8),
                    "timestamp": np.sort(draw.integers(0, SECONDS_A_DAY, count)) + day * SECONDS_A_DAY + 1_700_006_400,
                    "age": names("age", 8, count),
                    "city": names("city", 1000, count),
                    "segments": lists(names("segment", 200, 4 * count), 4),
                    "device": names("device", 6, count),
                    "hour": draw.integers(0, 24, count),
                    "price": draw.lognormal(2, 1, count),
                    "history": lists(items(20 * count), 20),
                }
            )  # fmt: skip
        )
    writer.finish(options.users)


def open_log(data: str, state: State, scratch: Path) -> tuple[LogReader, list]:
    """Check and encode the log as the job's first stage does; its row groups."""
    schema, files = Schema.load(f"{data}/schema.yaml"), list_days(data)
    groups = list_row_groups(data, files, tuple(files), schema)
    items = read_items(data, schema)
    ids = grow_catalog_ids(items, Vocabulary())
    encoders = {f.name: new_encoder(f) for f in schema.row_fields + schema.item}

    def save(name: str) -> LogReader:
        with state.create(name) as folder:
            schema.save(folder / "schema.yaml")
            save_encoders(encoders, folder / "vocabulary")
            build_catalog(items, ids, schema, encoders).save(folder / "catalog")
        return LogReader(data, state.uri, name)

    scan = ingest.scan(save("blank"), groups, dict.fromkeys(files, "counted"), scratch, planning.make_plan())
    assert not scan.quarantined
    encoders = grow_encoders(encoders, scan, schema)
    counts = item_counts(scan.items, tuple(files), ids.size)
    encoders = grow_item_vocabularies(items, ids.lookup(items["item_id"]), counts, schema, encoders)
    return save("read"), with_good_rows(groups, [scan.good[group] for group in groups])


def read_only(reader: LogReader, groups: list, batch: int) -> Iterator[int]:
    """The least that any reader does: the columns, decompressed and decoded."""
    schema, _, _ = reader.open()
    for group in groups:
        yield read_row_group(reader.data, group, schema).num_rows


def plain(reader: LogReader, groups: list, batch: int) -> Iterator[int]:
    """Read, check, encode, cut, join: one process, one thread."""
    schema, encoders, catalog = reader.open()
    for chunk in plan_pass(groups):
        table = read_chunk(reader.data, chunk, schema, encoders, catalog)
        for start in range(0, table.num_rows, batch):
            yield len(collate(table.slice(start, batch), schema, catalog))


def through_ray(
    reader: LogReader, groups: list, batch: int, workers: int, readers: int = 0
) -> tuple[int, float, float]:
    """The same by Ray Data, as the workers of a training get it; rows, seconds until the first batch, and in all.

    Args:
        readers: tasks that read at once; 0 takes one a core.
    """
    began, rows = time.time(), sum(group.rows for group in groups)
    together, _ = ingest.deal(rows, batch * workers)
    plan = planning.make_plan(config=planning.PlanConfig(readers=readers))
    stream = ingest.stream(reader, plan_epoch(groups, batch * workers * together, None), batch * together, plan=plan)
    shares = InOrder().configure({"train": stream}, workers, None, None)
    calls = [(reader, own["train"], together) for own in shares]
    counts, first, last = zip(*cluster.in_parallel(consume, calls, num_cpus=0), strict=True)
    return sum(counts), min(first) - began, max(last) - began


def consume(reader: LogReader, shard: Any, together: int) -> tuple[int, float, float]:
    """One worker: rows, and the times of its first and its last batch."""
    schema, _, catalog = reader.open()
    rows, first = 0, 0.0
    for block in ingest.blocks(shard):
        for table in ingest.split(block, together):
            rows += len(collate(table, schema, catalog))
            first = first or time.time()
    return rows, first, time.time()


def in_process(run: Callable[..., Iterator[int]], reader: LogReader, groups: list, batch: int) -> tuple:
    """What `through_ray` returns, of a loop in this process: on one core, since Arrow would read on all of them."""
    everywhere = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(everywhere)})
    threads = pa.cpu_count()
    pa.set_cpu_count(1)
    try:
        began, rows, first = time.time(), 0, 0.0
        for count in run(reader, groups, batch):
            first = first or time.time() - began
            rows += count
        return rows, first, time.time() - began
    finally:
        pa.set_cpu_count(threads)
        os.sched_setaffinity(0, everywhere)


def large_vocabulary(options: Options, folder: Path) -> dict[str, float]:
    """Build, save, grow and ask a vocabulary of `ids` strings; and a dictionary of the same."""
    draw = np.random.default_rng(0)
    names = np.char.mod("user%010d", draw.permutation(options.ids)).astype("S14")
    pieces = [sum_counts(part, np.ones(len(part))) for part in np.array_split(names, 150)]
    out: dict[str, float] = {"ids": options.ids}

    began = time.perf_counter()
    scan = sum_scans(Scan(ids={"user_id": piece}) for piece in pieces)
    out["merge_150_counts_s"] = time.perf_counter() - began
    began = time.perf_counter()
    vocabulary = Vocabulary().grow(*scan.ids["user_id"])
    out["build_s"] = time.perf_counter() - began
    vocabulary.save(folder / "vocabulary")
    out["bytes_an_id"] = sum(path.stat().st_size for path in (folder / "vocabulary").iterdir()) / options.ids
    del scan, pieces, vocabulary

    mapped = Vocabulary.load(folder / "vocabulary")
    seen = np.unique(np.concatenate([names[: options.ids // 50], [b"new%06d" % n for n in range(options.ids // 1000)]]))
    began = time.perf_counter()
    mapped.grow(seen, np.ones(len(seen), np.int64), day=1)
    out["grow_by_a_day_s"] = time.perf_counter() - began

    batch = pa.array(names[draw.integers(0, options.ids, 65_536)]).cast(pa.string())
    mapped.lookup(batch)
    began = time.perf_counter()
    found = mapped.lookup(batch)
    out["lookup_us_an_id"] = (time.perf_counter() - began) / len(batch) * 1e6

    before, began = psutil.Process().memory_info().rss, time.perf_counter()
    rows = {name: row for row, name in enumerate(pa.array(names).cast(pa.string()).to_pylist(), start=2)}
    out["dict_build_s"] = time.perf_counter() - began
    out["dict_bytes_an_id"] = (psutil.Process().memory_info().rss - before) / options.ids
    began = time.perf_counter()
    of_dict = np.array([rows.get(name, 1) for name in batch.to_pylist()])
    out["dict_lookup_us_an_id"] = (time.perf_counter() - began) / len(batch) * 1e6
    assert len(np.unique(found)) == len(np.unique(of_dict))
    return out


READERS = {"read": partial(in_process, read_only), "plain": partial(in_process, plain), "ray": through_ray}


def main(options: Options) -> None:
    """Measure, print tables, and the JSON line."""
    cluster.connect(options.object_store_mib * 2**20)
    cpus, results = len(os.sched_getaffinity(0)), []
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).absolute()
        for number, rows in enumerate((0,) if options.data else (options.rows, options.rows * options.times)):
            data = (options.data or folder / f"data-{rows}").absolute()
            began = time.perf_counter()
            if not (data / "schema.yaml").exists():
                write_log(data, rows, options)
            written, memory = time.perf_counter(), cluster.PeakMemory(every=0.5)
            reader, groups = open_log(str(data), State(folder / f"state-{number}"), folder / "bad")
            checked, rows = time.perf_counter(), sum(group.rows for group in groups)
            prepared = {"write_s": written - began, "check_s": checked - written, "check_mib": memory.close() / 2**20}
            for name in options.readers:
                memory, cores = cluster.PeakMemory(every=0.5), cpus if name == "ray" else 1
                workers = {"workers": cpus} if name == "ray" else {}
                seen, first, seconds = READERS[name](reader, groups, options.batch_size, **workers)
                assert seen == rows, f"{seen} rows of {rows}"
                # Ray Data takes seconds to start, once a training; what counts is its speed from then on.
                speed = rows / (seconds - (first if name == "ray" else 0))
                peak = memory.close() / 2**20
                results.append(
                    {"reader": name, "rows": rows, "cores": cores, "rows_per_s": speed, "first_batch_s": first}
                    | {"seconds": seconds, "peak_mib": peak, **prepared}
                )
        spilled = cluster.spilled_bytes()
        vocabulary = large_vocabulary(options, folder) if options.ids else {}
    show(results, vocabulary)
    ratios = compare(results, cpus) | {
        "batches_over_object_store": results[-1]["rows"] * BYTES_A_ROW / (options.object_store_mib * 2**20),
        "spilled_bytes": spilled,
    }
    if vocabulary:
        ratios["dict_bytes_over_vocabulary"] = vocabulary["dict_bytes_an_id"] / vocabulary["bytes_an_id"]
        ratios["lookup_over_dict"] = vocabulary["lookup_us_an_id"] / vocabulary["dict_lookup_us_an_id"]
    print(json.dumps({"benchmark": "ingest", "rows": results, "vocabulary": vocabulary, "ratios": ratios}))


def compare(results: list[dict], cpus: int) -> dict[str, float]:
    """What the larger log takes beyond the smaller one: without the start, and what was read ahead by then."""
    of = {name: [r for r in results if r["reader"] == name] for name in READERS}
    if any(len(two) < 2 for two in of.values()):
        return {}
    more = {
        name: (large["rows"] - small["rows"]) / (large["seconds"] - small["seconds"])
        for name, (small, large) in of.items()
    }
    return {
        "ray_per_core_over_plain": more["ray"] / cpus / more["plain"],
        "plain_over_read": more["plain"] / more["read"],
        "memory_large_over_small": of["ray"][1]["peak_mib"] / of["ray"][0]["peak_mib"],
    }


def show(results: list[dict], vocabulary: dict[str, float]) -> None:
    """The tables for people."""
    table = Table(title="Parquet to tensors")
    for name in ("rows", "reader", "rows/s", "cores", "rows/s a core", "first batch s", "peak MiB, all processes"):
        table.add_column(name, justify="left" if name == "reader" else "right")
    for r in results:
        a_core = f"{r['rows_per_s'] / r['cores']:,.0f}"
        last = (f"{r['first_batch_s']:.1f}", f"{r['peak_mib']:,.0f}")
        table.add_row(f"{r['rows']:,}", r["reader"], f"{r['rows_per_s']:,.0f}", str(r["cores"]), a_core, *last)
    Console(width=110).print(table)
    if vocabulary:
        table = Table(title=f"A vocabulary of {vocabulary['ids']:,} ids")
        for name, value in vocabulary.items():
            table.add_row(name.replace("_", " "), f"{value:,.2f}" if isinstance(value, float) else f"{value:,}")
        Console(width=110).print(table)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
