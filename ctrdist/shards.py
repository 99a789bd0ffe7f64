"""Tables on disk: what all workers write side by side, any other number of workers reads.

A spread table is saved as each worker has it, one safetensors file a worker: `NAME-tables-00000-of-00002.safetensors`
beside `NAME.safetensors`, which holds the rest. There a value of a table is [P, buckets, ...]: its rows by
row // BUCKETS and by bucket, of the buckets that the worker owned. A worker of another run reads the buckets that it
owns now, from the files that have them. A table that is saved whole stands in `NAME.safetensors`, by row.
"""

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ctrdist.embedding import CHUNK, EmbeddingTable
from ctrdist.group import Group
from ctrdist.sharded import BUCKETS, ShardedTable, bucket_of, bucket_range

State = dict[str, Tensor]
Value = tuple[torch.dtype, Sequence[int], Iterable[Tensor]]

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def named_tables(module: nn.Module) -> dict[str, EmbeddingTable]:
    """The tables within a module, by the prefix of their names in its state."""
    return {
        f"{name}." if name else "": table for name, table in module.named_modules() if isinstance(table, EmbeddingTable)
    }


def save_state(path: Path, state: State, module: nn.Module, group: Group) -> None:
    """Write a state of `module` to `path`, spread tables beside it. Every worker calls it if there are any.

    Args:
        state: what `module.state_dict()` has, now or at an earlier time, on this worker.
    """
    spread = {p: table for p, table in named_tables(module).items() if isinstance(table, ShardedTable)}
    if spread:
        own = {}
        for prefix, table in spread.items():
            for name in ("weight", *table.state_names):
                value = state[prefix + name]
                matrix = (len(value) // table.width, table.width) if value.ndim else ()
                own[prefix + name] = in_blocks(value, [*matrix, *value.shape[1:]])
        rows = json.dumps({prefix: table.rows for prefix, table in spread.items()})
        file = f"{path.stem}-tables-{group.rank:05d}-of-{group.size:05d}{path.suffix}"
        save_blocks(path.parent / file, own, {"buckets": str(BUCKETS), "rows": rows})
    if group.rank == 0:
        rest = {name: value for name, value in state.items() if not name.startswith(tuple(spread))}
        save_blocks(path, {name: in_blocks(value, value.shape) for name, value in rest.items()})


def read_state(path: Path, module: nn.Module) -> State:
    """The state of `module` that was saved to `path`: of spread tables, the rows that this worker owns.

    Rows that a table has beyond those saved keep what they have; so does a table what was not saved of it.
    """
    tables = named_tables(module)
    with safe_open(path, "pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys() if not name.startswith(tuple(tables))}  # noqa: SIM118
    return state | dict(read_tables(path, module))


def read_tables(path: Path, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The part of `read_state` that is of the tables, one value at a time."""
    with ExitStack() as stack:
        whole = stack.enter_context(safe_open(path, "pt"))
        shards = [
            stack.enter_context(safe_open(shard, "pt"))
            for shard in sorted(path.parent.glob(f"{path.stem}-tables-*-of-*{path.suffix}"))
        ]
        rows = json.loads(shards[0].metadata()["rows"]) if shards else {}
        assert all(shard.metadata()["buckets"] == str(BUCKETS) for shard in shards), path
        names = set(whole.keys()).union(*(shard.keys() for shard in shards[:1]))
        for prefix, table in named_tables(module).items():
            for part in ("weight", *table.state_names):
                if (name := prefix + part) not in names:
                    continue
                own = getattr(table, part)
                if not own.ndim:
                    yield name, (shards[0] if prefix in rows else whole).get_tensor(name)
                elif prefix in rows:
                    yield name, _from_shards(shards, name, rows[prefix], table, own.clone())
                else:
                    yield name, _from_whole(whole.get_slice(name), table, own.clone())


def _from_shards(shards: list, name: str, rows: int, table: EmbeddingTable, own: Tensor) -> Tensor:
    """`own`, a value of `table` for each of its places, with the first `rows` rows as the workers' files have them."""
    assert rows <= table.rows, f"{name}: {rows} rows were saved, the table has {table.rows}"
    first, last = table.buckets if isinstance(table, ShardedTable) else (0, BUCKETS)
    grid = own.new_zeros(-(-rows // BUCKETS), last - first, *own.shape[1:])
    for rank, shard in enumerate(shards):
        start, end = bucket_range(rank, len(shards))
        a, b = max(start, first), min(end, last)
        if a < b:
            grid[:, a - first : b - first] = shard.get_slice(name)[:, a - start : b - start].to(own)
    for numbers in torch.arange(rows).split(CHUNK):
        numbers = numbers[table.holds(numbers)]
        own[table.places(numbers)] = grid[numbers // BUCKETS, bucket_of(numbers) - first]
    return own


def _from_whole(saved: Any, table: EmbeddingTable, own: Tensor) -> Tensor:
    """`own` with the rows of a slice of a file that has them by row."""
    rows = saved.get_shape()[0]
    assert rows <= table.rows, f"{rows} rows were saved, the table has {table.rows}"
    for start in range(0, rows, CHUNK):
        numbers = torch.arange(start, min(start + CHUNK, rows))
        own[table.places(numbers)] = saved[start : start + CHUNK].to(own)[table.holds(numbers)]
    return own


def save_whole(path: Path, module: nn.Module, group: Group, skip: Collection[str] = ()) -> None:
    """Write the state of `module` to one file, spread tables by row like any other: what serving reads.

    Every worker calls it if there are spread tables. Only the first one writes, a block of rows at a time.

    Args:
        skip: names of the state to leave out.
    """
    values, tables = {}, named_tables(module)
    for name, value in module.state_dict().items():
        prefix = next((p for p in tables if name.startswith(p)), None)
        if name in skip:
            continue
        if prefix is None or not value.ndim:
            values[name] = in_blocks(value, value.shape)
        else:
            table, part = tables[prefix], name.removeprefix(prefix)
            values[name] = value.dtype, [table.rows, *value.shape[1:]], _rows(table, part, group)
    save_blocks(path if group.rank == 0 else None, values)


def _rows(table: EmbeddingTable, part: str, group: Group) -> Iterator[Tensor]:
    """A value of all rows of a table, in blocks, on the first worker; none of them on the others."""
    for numbers in torch.arange(table.rows, device=table.weight.device).split(CHUNK):
        yield table.gather(part, numbers if group.rank == 0 else numbers[:0])


def in_blocks(value: Tensor, shape: Sequence[int]) -> Value:
    """A tensor, as `shape`, in blocks of rows: rows of tables lie apart (`ctrdist.packing`)."""
    return value.dtype, shape, value.split(CHUNK) if value.ndim else [value]


def save_blocks(path: Path | None, values: dict[str, Value], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file in blocks: none of its values need be in memory as it is in the file.

    Args:
        path: None goes through the blocks, which other workers may take part in making, and writes nothing.
        values: dtype, shape and data of each; the blocks follow one another.
        metadata: of the file.
    """
    # The format wants no gaps, and PyTorch values that begin at a multiple of their size.
    values = dict(sorted(values.items(), key=lambda item: (-item[1][0].itemsize, item[0])))
    header, end = {"__metadata__": metadata} if metadata else {}, 0
    for name, (dtype, shape, _) in values.items():
        begin, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": [*shape], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") if path else nullcontext() as file:
        if file:
            file.write(len(text).to_bytes(8, "little") + text)
        for _, _, blocks in values.values():
            for block in blocks:
                if file:
                    file.write(block.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
