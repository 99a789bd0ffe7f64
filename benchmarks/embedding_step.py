"""A training step's cost follows the batch, not the vocabulary: our table beside dense `nn.Embedding` + Adam.

Both look up the same ids, compute the same loss, and take an Adam step, in one process, in turns.
"""

import json
import time
from dataclasses import dataclass

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from ctrdist.batch import Lookup
from ctrdist.embedding import EmbeddingTable
from ctrdist.group import Group
from ctrdist.optim import RowAdam


@dataclass(frozen=True)
class Options:
    """What is measured.

    Args:
        rows: sizes of the table.
        ids: ids a step, drawn uniformly.
        dim: width of the table.
        steps: timed steps a size; the median counts.
        threads: threads of PyTorch.
    """

    rows: tuple[int, ...] = (100_000, 1_000_000, 10_000_000)
    ids: int = 4096 * 21
    dim: int = 16
    steps: int = 10
    threads: int = 2


def dense_step(embedding: torch.nn.Embedding, optimizer: torch.optim.Optimizer, ids: np.ndarray) -> None:
    """One step of the reference."""
    embedding(torch.from_numpy(ids)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def row_step(table: EmbeddingTable, ids: np.ndarray) -> None:
    """One step of ours, the look-up of distinct rows included."""
    table(Lookup.of(ids)).square().mean().backward()
    table.push(Group())


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
    print(json.dumps({"benchmark": "embedding_step", "rows": rows, "ratios": ratios}))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
