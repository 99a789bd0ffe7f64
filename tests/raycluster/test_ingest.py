"""The stream: in order, in exact blocks, every row once."""

import threading
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import ray

from ctrdist.datasets.synthetic import SyntheticConfig, prepare
from ctrdist.epoch import plan_epoch, read_chunk
from ctrdist.fields import save_encoders
from ctrdist.items import build_catalog, grow_catalog_ids, read_items
from ctrdist.log import list_days, list_row_groups
from ctrdist.scan import Scan, scan_row_group
from ctrdist.schema import Schema
from ctrdist.storage import State
from ctrdist.vocabulary import Vocabulary
from raycluster import ingest, planning
from raycluster.in_order import InOrder
from raycluster.ingest import LogReader
from raycluster.planning import make_plan


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> LogReader:
    folder = tmp_path_factory.mktemp("ingest")
    data = str(folder / "data")
    prepare(SyntheticConfig(users=40, items=60, days=4, rows_per_day=250), data)
    schema, state = Schema.load(f"{data}/schema.yaml"), State(folder / "state")
    items = read_items(data, schema)
    ids = grow_catalog_ids(items, Vocabulary())
    blank = {f.name: Vocabulary() for f in schema.row_fields + schema.item}
    with state.create("read") as out:
        schema.save(out / "schema.yaml")
        save_encoders(blank, out / "vocabulary")
        build_catalog(items, ids, schema, blank).save(out / "catalog")
    return LogReader(data, state.uri, "read")


def groups_of(reader: LogReader) -> list:
    """The row groups of the log, of which all rows are good."""
    schema, _, _ = reader.open()
    files = list_days(reader.data)
    groups = list_row_groups(reader.data, files, tuple(files), schema)
    return [replace(group, good=group.rows) for group in groups]


def plain(reader: LogReader, chunks: list, keep: tuple[str, ...] = ()) -> pa.Table:
    schema, vocabularies, catalog = reader.open()
    return pa.concat_tables(read_chunk(reader.data, c, schema, vocabularies, catalog, keep) for c in chunks)


def test_the_stream_is_the_plain_reader_in_exact_blocks(ray_cluster, reader):
    chunks = plan_epoch(groups_of(reader), 96, (3, 0), chunk_rows=300)
    stream = ingest.stream(reader, chunks, 32, plan=make_plan()).materialize()
    assert "MapBatches(read)->StreamingRepartition" in stream.stats(), "the task that reads makes the cut"
    tables = [ray.get(ref) for ref in stream.to_arrow_refs()]
    assert [t.num_rows for t in tables] == [32] * (1056 // 32)
    assert pa.concat_tables(tables)["item"].equals(plain(reader, chunks)["item"])


def test_half_a_cpu_is_enough_to_read_by(ray_cluster, reader):
    """Training workers may leave no whole CPU on any node; a task that asked for one would wait for ever."""
    chunks = plan_epoch(groups_of(reader), 96, (3, 0), chunk_rows=300)

    @ray.remote(num_cpus=1.5)
    class Training:
        def here(self) -> bool:
            return True

    held = Training.remote()
    assert ray.get(held.here.remote())
    stream, rows = ingest.stream(reader, chunks, 32, plan=make_plan()), []
    counts = (table.num_rows for table in ingest.blocks(stream.iterator()))
    reading = threading.Thread(target=lambda: rows.append(sum(counts)), daemon=True)
    reading.start()
    reading.join(600)
    ray.kill(held)
    assert rows == [1056]


def test_blocks_are_dealt_in_turn_and_none_is_dropped(ray_cluster, reader):
    chunks = plan_epoch(groups_of(reader), 64, None, chunk_rows=300)
    stream = ingest.stream(reader, chunks, 16, plan=make_plan())
    shares = InOrder().configure({"train": stream}, 2, None, None)

    @ray.remote(num_cpus=0)
    def consume(shard):
        return [t["item"].to_pylist() for t in ingest.blocks(shard)]

    first, second = ray.get([consume.remote(share["train"]) for share in shares])
    dealt = [items for pair in zip(first, second, strict=True) for items in pair]
    assert sum(dealt, []) == plain(reader, chunks)["item"].to_pylist()
    assert len(sum(dealt, [])) == 1024


def test_a_distributed_scan_is_the_sum_of_plain_ones(ray_cluster, reader, tmp_path):
    groups = groups_of(reader)
    days = {g.day for g in groups[:2]}
    found = ingest.scan(reader, groups, dict.fromkeys(days, "counted"), tmp_path / "q", planning.make_plan())
    schema, _, catalog = reader.open()
    expected = Scan()
    for group in groups:
        expected.add(
            scan_row_group(
                reader.data, group, schema, catalog, tmp_path / "p", ids="counted" if group.day in days else "ignored"
            )
        )
    assert (found.rows, found.clicks, found.faults) == (expected.rows, expected.clicks, expected.faults)
    assert sum(found.rows.values()) == 1000
    for name, (keys, counts) in expected.ids.items():
        np.testing.assert_array_equal(found.ids[name][0], keys)
        np.testing.assert_array_equal(found.ids[name][1], counts)


@pytest.mark.parametrize("rows", [1, 95, 96, 1000, 4321])
def test_global_batches_are_the_same_for_any_number_of_workers(rows):
    batch, most = 24, 5
    together, steps = ingest.deal(rows, batch, most)
    least = -(-rows // batch)
    assert together <= most and steps % together == 0 and least <= steps < least + steps // together
    padded = pa.table({"row": [*range(rows), *[-1] * (-rows % (batch * together))]})
    batches = {}
    for workers in (1, 2, 3, 4):
        size = batch // workers * together
        blocks = [padded.slice(start, size) for start in range(0, padded.num_rows, size)]
        assert len(blocks) % workers == 0
        shares = [[t["row"].to_pylist() for b in blocks[w::workers] for t in ingest.split(b, together)]
                  for w in range(workers)]  # fmt: skip
        assert all(len(share) == steps and {len(rows_) for rows_ in share} == {batch // workers} for share in shares)
        batches[workers] = [sorted(sum(step, [])) for step in zip(*shares, strict=True)]
    assert all(found == batches[1] for found in batches.values())
    assert sorted(row for found in batches[1] for row in found if row >= 0) == list(range(rows))
