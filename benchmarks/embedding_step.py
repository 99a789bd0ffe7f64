"""A training step's cost follows the batch, not the vocabulary: our table beside dense `nn.Embedding` + Adam.

Both look up the same ids, compute the same loss, and take an Adam step, in one process, in turns. Then several
processes train one table of either store: the bytes that each sends a step, beside what `docs/scale.md` predicts.
"""

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import tyro
from rich.console import Console
from rich.table import Table

from ctrdist.batch import Lookup
from ctrdist.embedding import EmbeddingTable
from ctrdist.group import DistributedGroup, Group
from ctrdist.optim import RowAdam
from ctrdist.sharded import ShardedTable, row_bytes


@dataclass(frozen=True)
class Options:
    """What is measured.

    Args:
        rows: sizes of the table.
        ids: ids a step, drawn uniformly.
        dim: width of the table.
        steps: timed steps a size; the median counts.
        threads: threads of PyTorch.
        workers: processes of the second part; 0 leaves it out.
        spread_rows: sizes of its table.
        spread_ids: distinct ids a step and worker, drawn uniformly.
    """

    rows: tuple[int, ...] = (100_000, 1_000_000, 10_000_000)
    ids: int = 4096 * 21
    dim: int = 16
    steps: int = 10
    threads: int = 2
    workers: int = 2
    spread_rows: tuple[int, ...] = (100_000, 1_000_000)
    spread_ids: tuple[int, ...] = (1000, 10_000)


def dense_step(embedding: torch.nn.Embedding, optimizer: torch.optim.Optimizer, ids: np.ndarray) -> None:
    """One step of the reference."""
    embedding(torch.from_numpy(ids)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def row_step(table: EmbeddingTable, ids: np.ndarray) -> None:
    """One step of ours, the look-up of distinct rows included."""
    table(Lookup.of(ids)).square().mean().backward()
    table.push(Group())


STORES: dict[str, type[EmbeddingTable]] = {"replicated": EmbeddingTable, "sharded": ShardedTable}


def predicted_bytes(store: str, ids: int, dim: int, workers: int) -> float:
    """Bytes that a worker sends a step, of which each has `ids` distinct ids, as in `docs/scale.md`."""
    others = workers - 1
    if store == "replicated":
        return others * (ids * (8 + 4 * dim) + 8)
    return others * (ids / workers * (8 + 8 * dim) + 8)


def spread_steps(rank: int, options: Options, folder: str) -> None:
    """One process of the second part."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=options.workers)
    group, found = DistributedGroup(), []
    for rows in options.spread_rows:
        for ids in options.spread_ids:
            for store, kind in STORES.items():
                table, rng = kind(rows, options.dim, RowAdam(), group=group), np.random.default_rng(rank)
                seconds = []
                for _ in range(options.steps + 2):
                    asked = rng.choice(rows - 2, ids, replace=False) + 2
                    began = time.perf_counter()
                    table(Lookup.of(asked)).square().mean().backward()
                    table.push(group)
                    seconds.append(time.perf_counter() - began)
                traffic, memory = table.traffic / (options.steps + 2), table.packed.nbytes
                found.append([store, rows, ids, traffic, memory, np.median(seconds[2:])])
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def spread(options: Options) -> list[dict[str, Any]]:
    """The second part: means over the workers, beside the predictions."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(spread_steps, (options, folder), options.workers)
        found = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(options.workers)]
    out = []
    for parts in zip(*found, strict=True):
        store, rows, ids = parts[0][:3]
        counted, memory, seconds = (float(np.mean([part[k] for part in parts])) for k in (3, 4, 5))
        share = 1 if store == "replicated" else options.workers
        out.append({
            "store": store, "rows": rows, "ids": ids, "workers": options.workers, "ms": 1000 * seconds,
            "predicted_bytes": predicted_bytes(store, ids, options.dim, options.workers), "counted_bytes": counted,
            "predicted_memory": rows * row_bytes(options.dim, RowAdam()) / share, "counted_memory": memory,
        })  # fmt: skip
    shown = Table(title=f"a worker's bytes a step and its memory, {options.workers} workers, width {options.dim}")
    for name in ("store", "table rows", "ids", "KB predicted", "KB sent", "MB predicted", "MB held", "ms"):
        shown.add_column(name, justify="left" if name == "store" else "right")
    for row in out:
        shown.add_row(row["store"], f"{row['rows']:,}", f"{row['ids']:,}", f"{row['predicted_bytes'] / 1e3:.1f}",
                      f"{row['counted_bytes'] / 1e3:.1f}", f"{row['predicted_memory'] / 1e6:.1f}",
                      f"{row['counted_memory'] / 1e6:.1f}", f"{row['ms']:.1f}")  # fmt: skip
    Console(width=110).print(shown)
    return out


def main(options: Options) -> None:
    """Measure, print a table, and the JSON line."""
    torch.set_num_threads(options.threads)
    rng, rows = np.random.default_rng(0), []
    for size in options.rows:
        embedding = torch.nn.Embedding(size, options.dim)
        optimizer = torch.optim.Adam(embedding.parameters())
        table = EmbeddingTable(size, options.dim, RowAdam())
        seconds: dict[str, list[float]] = {"dense": [], "rows": []}
        for _ in range(options.steps + 2):
            ids = rng.integers(2, size, options.ids)
            for name, step in (("dense", lambda i, e=embedding, o=optimizer: dense_step(e, o, i)),
                               ("rows", lambda i, t=table: row_step(t, i))):  # fmt: skip
                began = time.perf_counter()
                step(ids)
                seconds[name].append(time.perf_counter() - began)
        dense, ours = (1000 * float(np.median(seconds[name][2:])) for name in ("dense", "rows"))
        # Weights and two moments of the distinct rows are read and written, their gradients once.
        least_bytes = len(np.unique(ids)) * options.dim * 4 * 8
        rows.append({"rows": size, "dense_ms": dense, "row_wise_ms": ours, "gigabytes_per_s": least_bytes / ours / 1e6})
    shown = Table(title=f"Adam step, {options.ids:,} ids, width {options.dim}")
    for name in ("table rows", "dense ms", "row-wise ms", "dense / row-wise", "row-wise GB/s"):
        shown.add_column(name, justify="right")
    for row in rows:
        shown.add_row(f"{row['rows']:,}", f"{row['dense_ms']:.1f}", f"{row['row_wise_ms']:.1f}",
                      f"{row['dense_ms'] / row['row_wise_ms']:.1f}", f"{row['gigabytes_per_s']:.2f}")  # fmt: skip
    Console(width=100).print(shown)
    ratios = {f"dense_over_row_wise_{row['rows']}": row["dense_ms"] / row["row_wise_ms"] for row in rows} | {
        "largest_over_smallest_row_wise": rows[-1]["row_wise_ms"] / rows[0]["row_wise_ms"]
    }
    stores = spread(options) if options.workers else []
    for row in stores:
        name = f"sent_over_predicted_{row['store']}_{row['rows']}_{row['ids']}"
        ratios[name] = row["counted_bytes"] / row["predicted_bytes"]
    print(json.dumps({"benchmark": "embedding_step", "rows": rows, "stores": stores, "ratios": ratios}))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
