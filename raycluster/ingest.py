"""The log as a stream of encoded batches: Ray Data reads, checks and encodes; the order is the plan's."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray
import ray.data

from ctrdist.allocator import keep_freed_memory
from ctrdist.beside import BesideLog
from ctrdist.epoch import Beside, Chunk, read_chunk
from ctrdist.fields import Encoder, load_encoders
from ctrdist.interactions import Interactions
from ctrdist.items import Catalog
from ctrdist.log import Part, RowGroup
from ctrdist.row_texts import RowTexts
from ctrdist.scan import IdsOf, Scan, scan_row_group, sum_scans
from ctrdist.schema import USER_ID, Schema
from ctrdist.serving.ragged import Column
from ctrdist.storage import State
from ctrdist.users import latest, latest_values, read_users, user_fields
from raycluster.cluster import in_parallel, numbers
from raycluster.planning import Plan


@dataclass(frozen=True)
class LogReader:
    """What a process needs to read and encode the log. Pickles small; files are memory-mapped once a process.

    Args:
        data: the prepared log.
        state: URI of the state.
        output: name of the output that holds schema, catalog and vocabularies.
        beside: name of the files beside the log to read along (`ctrdist.beside`); "" for none.
        texts: output with the texts of interactions, whose numbers to read along; "" for none.
        tokens: output with what makes the tokens of rows (`ctrdist.row_texts`); "" for none.
    """

    data: str
    state: str
    output: str
    beside: str = ""
    texts: str = ""
    tokens: str = ""

    def open(self) -> tuple[Schema, dict[str, Encoder], Catalog]:
        """Schema, vocabularies and catalog."""
        return _open(self.state, self.output)

    def read(self, chunk: Chunk, keep: tuple[str, ...] = ()) -> pa.Table:
        """The chunk's good rows, encoded (`ctrdist.epoch.read_chunk`)."""
        schema, vocabularies, catalog = self.open()
        return read_chunk(self.data, chunk, schema, vocabularies, catalog, keep, self.along(keep))

    def along(self, keep: tuple[str, ...] = ()) -> Beside | None:
        """What makes the columns that stand beside the log's, if there are any."""
        if self.beside:
            return BesideLog(State(self.state), self.beside, self.data).columns(keep)
        if self.tokens:
            return self.row_texts().numbers
        return interactions(self.state, self.output, self.texts).numbers if self.texts else None

    def row_texts(self) -> RowTexts | None:
        """What makes the tokens of rows, if they are read."""
        return _row_texts(self.state, self.tokens) if self.tokens else None


@lru_cache(maxsize=2)
def _open(state: str, output: str) -> tuple[Schema, dict[str, Encoder], Catalog]:
    keep_freed_memory()
    folder = State(state).local(output)
    schema = Schema.load(folder / "schema.yaml")
    return schema, load_encoders(folder / "vocabulary"), Catalog.load(folder / "catalog", schema)


@lru_cache(maxsize=2)
def interactions(state: str, output: str, texts: str) -> Interactions:
    """What output `texts` has of the texts of rows that were read as `output`; kept for the next call of a process."""
    schema, _, catalog = _open(state, output)
    return Interactions.load(State(state).local(texts), schema, catalog)


@lru_cache(maxsize=2)
def _row_texts(state: str, tokens: str) -> RowTexts:
    return RowTexts.load(State(state).local(tokens))


BATCHES_A_BLOCK = 32
"""At most so many of a worker's batches travel as one block: Ray takes milliseconds for a block, however small."""


def deal(rows: int, batch_size: int, most: int = BATCHES_A_BLOCK) -> tuple[int, int]:
    """How an epoch is dealt: batches a block, at most `most`, and steps an epoch, a multiple of them.

    Blocks are as even as can be, so that the fillers of the last one are few.

    Args:
        rows: good rows of the epoch.
        batch_size: rows of a global batch.
    """
    steps = -(-rows // batch_size)
    blocks_ = -(-steps // most)
    together = -(-steps // blocks_)
    return together, together * blocks_


def stream(
    reader: LogReader, chunks: list[Chunk], block_rows: int = 0, keep: tuple[str, ...] = (), *, plan: Plan
) -> ray.data.Dataset:
    """The chunks' rows, encoded, in the chunks' order.

    Args:
        block_rows: cut each chunk into blocks of this many rows; 0 leaves a block a chunk.
        plan: how many tasks read at once, and what each reserves. More than there are cores hold more memory and read
            no faster.
    """
    shared = ray.put(chunks)

    def read(batch: dict[str, np.ndarray]) -> pa.Table:
        (number,) = batch["id"]
        return reader.read(ray.get(shared)[int(number)], keep)

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    tasks, reserved = ray.data.TaskPoolStrategy(plan.readers), plan.reader_resources
    dataset = numbers(len(chunks)).map_batches(read, batch_size=1, compute=tasks, **reserved)
    if block_rows:
        dataset = dataset.repartition(target_num_rows_per_block=block_rows, strict=False)
        # The task that reads makes the cut too, if Ray fuses the two: operators that ask for the same, and of
        # `repartition` there is no other way to say so. Unfused it costs half as much again, and what is over 128 MiB
        # would be cut in between.
        dataset._logical_plan.dag.ray_remote_args.update(reserved)
        dataset._logical_plan.dag.compute.size = tasks.size
    return dataset


def scan(reader: LogReader, groups: list[RowGroup], ids: dict[Part, IdsOf], quarantine: Path, plan: Plan) -> Scan:
    """One pass over row groups by Ray tasks (`ctrdist.scan`); the results are added as they come.

    Args:
        ids: what to do with the ids of a day, or a split (`scan_row_group`); those of others are ignored.
        quarantine: local folder for bad rows.
        plan: how many read at once.
    """

    def scans() -> Iterator[Scan]:
        calls = [(reader, part, ids) for part in _pieces(groups)]
        for found, files in in_parallel(_scan, calls, plan.readers, **plan.reader_resources):
            for name, content in files:
                quarantine.mkdir(parents=True, exist_ok=True)
                (quarantine / name).write_bytes(content)
            yield found

    return sum_scans(scans())


def _scan(reader: LogReader, part: list[RowGroup], ids: dict[Part, IdsOf]) -> tuple[Scan, list[tuple[str, bytes]]]:
    schema, _, catalog = reader.open()
    with tempfile.TemporaryDirectory() as folder:
        found = sum_scans(
            scan_row_group(reader.data, group, schema, catalog, Path(folder), ids.get(group.part, "ignored"))
            for group in part
        )
        return found, [(path.name, path.read_bytes()) for path in sorted(Path(folder).iterdir())]


def latest_users(reader: LogReader, groups: list[RowGroup], plan: Plan) -> dict[str, Column]:
    """What the log last says of each user in some row groups (`ctrdist.users`); nothing, where ids tell nothing."""
    schema, encoders, _ = reader.open()
    if not user_fields(schema):
        return {}
    whole = dict.fromkeys(replace(group, split="", good=None) for group in groups)  # a group may be in several splits
    calls, first = [], 0
    for part in _pieces(list(whole)):
        calls.append((reader, part, first))
        first += len(part)
    found = in_parallel(_users, calls, plan.readers, **plan.reader_resources)
    return latest_values(found, schema, encoders[USER_ID].size)


def _users(reader: LogReader, part: list[RowGroup], first: int) -> pa.Table:
    schema, encoders, _ = reader.open()
    found = [read_users(reader.data, group, first + n, schema, encoders) for n, group in enumerate(part)]
    return latest(pa.concat_tables(found))


def _pieces(groups: list[RowGroup], rows: int = 65536) -> list[list[RowGroup]]:
    pieces: list[list[RowGroup]] = [[]]
    for group in groups:
        if pieces[-1] and sum(g.rows for g in pieces[-1]) + group.rows > rows:
            pieces.append([])
        pieces[-1].append(group)
    return [piece for piece in pieces if piece]


def blocks(shard: ray.data.DataIterator, rows: int = 0) -> Iterator[pa.Table]:
    """A worker's blocks as Arrow tables; each must have `rows` rows, if that is not 0."""
    for table in shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2):
        assert isinstance(table, pa.Table) and (not rows or table.num_rows == rows), (table.num_rows, rows)
        yield table


def split(block: pa.Table, batches: int) -> Iterator[pa.Table]:
    """A block as `batches` batches: each has every `batches`-th row, from another one on.

    So the j-th global batch of the W blocks that are dealt together has the rows j, j + k, j + 2 k, ... of them, the
    same for any number of workers.
    """
    order = np.arange(block.num_rows).reshape(-1, batches).T.ravel()
    dealt, share = block.take(pa.array(order)) if batches > 1 else block, block.num_rows // batches
    for start in range(0, block.num_rows, share):
        yield dealt.slice(start, share)
