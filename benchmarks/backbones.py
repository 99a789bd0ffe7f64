"""Every backbone on MovieTweetings, alone: AUC, log loss, AUC on cold items, parameters and time of one thread.

The last fifth of the rows, by whole days, is the test; the week before it is for validation and not trained on.
Clicks are ratings of 8 or more, histories are the last 20 items with one. All networks have the project's defaults,
which were chosen on earlier days; nothing is chosen here.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import tyro
from rich.console import Console
from rich.table import Table

from ctrdist.backbones import NAMES
from ctrdist.batch import Batch, collate
from ctrdist.epoch import plan_pass, read_chunk
from ctrdist.items import Catalog, build_catalog, grow_catalog_ids, grow_item_vocabularies, read_items
from ctrdist.log import list_days, list_row_groups
from ctrdist.loop import LoopConfig, fit
from ctrdist.metrics import auc, log_loss
from ctrdist.scan import grow_encoders, item_counts, scan_row_group, sum_scans
from ctrdist.schema import Schema
from ctrdist.tasks.click import ClickConfig, ClickModel, table_sizes
from ctrdist.vocabulary import Vocabulary

ROOT = Path(__file__).parents[1]
COLD = 5


@dataclass(frozen=True)
class Options:
    """What is measured.

    Args:
        source: folder with the dataset's `ratings.dat` and `movies.dat`.
        names: backbones to train.
        seeds: one run each.
        epochs: passes over the training days.
        days: use only the last so many days; 0 uses all.
        processes: runs at a time, a thread each; 0 is one a core.
    """

    source: Path = ROOT.parent / "shared" / "data" / "movietweetings"
    names: tuple[str, ...] = NAMES
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int = 4
    days: int = 0
    processes: int = 0


@dataclass(frozen=True)
class Log:
    """A log in memory, encoded: tables of training, validation and test rows."""

    schema: Schema
    catalog: Catalog
    sizes: dict[str, int]
    counts: np.ndarray
    train: pa.Table
    valid: pa.Table
    test: pa.Table

    def batches(self, rows: pa.Table, size: int, seed: tuple[int, int] | None = None) -> Iterator[Batch]:
        """Rows in their order, or shuffled."""
        if seed is not None:
            rows = rows.take(pa.array(np.random.default_rng(seed).permutation(rows.num_rows)))
        for start in range(0, rows.num_rows, size):
            yield collate(rows.slice(start, size), self.schema, self.catalog)


def open_log(options: Options, folder: Path) -> Log:
    """Prepare the dataset, check it, and encode it."""
    data = str(folder / "data")
    prepare = [sys.executable, str(ROOT / "jobs" / "prepare.py"), "movietweetings", "--source", str(options.source)]
    subprocess.run([*prepare, "--out", data], check=True, stdout=subprocess.DEVNULL)
    schema, files = Schema.load(f"{data}/schema.yaml"), list_days(data)
    days = list(files)[-options.days :]
    groups = {day: list_row_groups(data, files, (day,), schema) for day in days}
    rows = np.cumsum([sum(group.rows for group in groups[day]) for day in days])
    cut = int(np.searchsorted(rows, 0.8 * rows[-1]))
    parts = {"train": days[: cut - 7], "valid": days[cut - 7 : cut], "test": days[cut:]}

    items = read_items(data, schema)
    ids = grow_catalog_ids(items, Vocabulary())
    blank = build_catalog(items, ids, schema, {field.name: Vocabulary() for field in schema.item})
    scan = sum_scans(scan_row_group(data, g, schema, blank, folder / "bad") for d in parts["train"] for g in groups[d])
    counts = item_counts(scan.items, tuple(parts["train"]), ids.size)
    encoders = grow_encoders({}, scan, schema)
    encoders = grow_item_vocabularies(items, ids.lookup(items["item_id"]), counts, schema, encoders)
    catalog = build_catalog(items, ids, schema, encoders)

    def read(name: str) -> pa.Table:
        chunks = plan_pass([g for day in parts[name] for g in groups[day]])
        return pa.concat_tables(read_chunk(data, c, schema, encoders, catalog) for c in chunks).combine_chunks()

    return Log(schema, catalog, table_sizes(encoders, schema), counts, *map(read, ("train", "valid", "test")))


LOG: Log
"""The log of this process."""


def start(log: Log) -> None:
    """Begin a process: its log, and one thread."""
    global LOG
    LOG = log
    torch.set_num_threads(1)


def run(name: str, seed: int, options: Options) -> dict:
    """Train one backbone; what it scores on the test rows."""
    log, config = LOG, ClickConfig(backbone=name, epochs=options.epochs)
    model, size = ClickModel(log.schema, log.sizes, config, seed=seed), config.batch_size
    loop = LoopConfig(-(-log.train.num_rows // size), options.epochs, schedule=config.schedule, seed=seed)
    began = time.perf_counter()
    progress = fit(
        model,
        lambda _: (b for epoch in range(options.epochs) for b in log.batches(log.train, size, (seed, epoch))),
        loop,
        valid=lambda: log.batches(log.valid, 4096),
    )
    seconds = time.perf_counter() - began
    with torch.inference_mode():
        scores = np.concatenate([model.predict(batch).numpy() for batch in log.batches(log.test, 4096)])
    label = log.test["label"].to_numpy()
    cold = log.counts[log.test["item"].to_numpy()] < COLD
    return {
        "network": name,
        "seed": seed,
        "auc": auc(label, scores),
        "log_loss": log_loss(label, scores),
        "auc_cold": auc(label[cold], scores[cold]),
        "valid_auc": progress.best_auc,
        "ms_a_step": (progress.seconds - progress.waited) / progress.step * 1e3,
        "seconds": seconds,
        "parameters": sum(p.numel() for p in model.backbone.parameters()),
    }


def main(options: Options) -> None:
    """Measure, print a table, and the JSON line."""
    if not options.source.is_dir():
        raise SystemExit(f"{options.source}: no such folder; --source names the dataset's own files")
    with tempfile.TemporaryDirectory() as folder:
        log = open_log(options, Path(folder))
    processes = options.processes or len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(processes, get_context("spawn"), start, (log,)) as pool:
        runs = [pool.submit(run, name, seed, options) for seed in options.seeds for name in options.names]
        for done in as_completed(runs):
            row = done.result()
            line = f"{row['network']:10} seed {row['seed']}: AUC {row['auc']:.4f}, {row['seconds']:.0f} s"
            print(line, file=sys.stderr, flush=True)
    rows = [done.result() for done in runs]
    show(rows, log, options)
    best = {name: float(np.mean([r["auc"] for r in rows if r["network"] == name])) for name in options.names}
    print(json.dumps({"benchmark": "backbones", "rows": rows, "ratios": {f"auc_{k}": v for k, v in best.items()}}))


def show(rows: list[dict], log: Log, options: Options) -> None:
    """The table for people: means over the seeds, and the spread from the least to the largest."""
    sizes = f"{log.train.num_rows:,} training, {log.test.num_rows:,} test rows; {len(options.seeds)} seeds"
    table = Table(title=sizes)
    for name in ("network", "parameters", "ms a step", "AUC", "spread", "log loss", "AUC cold", "seconds"):
        table.add_column(name, justify="left" if name == "network" else "right")
    for name in options.names:
        own = [row for row in rows if row["network"] == name]

        def mean(key: str, own: list[dict] = own) -> float:
            return float(np.mean([row[key] for row in own]))

        spread = max(row["auc"] for row in own) - min(row["auc"] for row in own)
        table.add_row(
            name, f"{own[0]['parameters']:,}", f"{mean('ms_a_step'):.0f}", f"{mean('auc'):.4f}", f"{spread:.4f}",
            f"{mean('log_loss'):.4f}", f"{mean('auc_cold'):.4f}", f"{mean('seconds'):.0f}",
        )  # fmt: skip
    Console(width=100).print(table)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
