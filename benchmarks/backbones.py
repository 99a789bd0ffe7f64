"""Every backbone on MovieTweetings, alone: AUC, log loss, AUC on cold items, parameters and time of one thread.

The last fifth of the rows, by whole days, is the test; the week before it is for validation and not trained on.
Clicks are ratings of 8 or more, histories are the last 20 items with one. All networks have the project's defaults,
which were chosen on earlier days; nothing is chosen here.
"""

import json
import sys
from concurrent.futures import as_completed
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.cells import study  # noqa: E402
from benchmarks.cells.click import score, train_click  # noqa: E402
from benchmarks.cells.log import Log  # noqa: E402
from benchmarks.cells.options import LogOptions, kept_in  # noqa: E402
from ctrdist.backbones import NAMES  # noqa: E402
from ctrdist.tasks.click import ClickConfig  # noqa: E402


@dataclass(frozen=True)
class Options:
    """What is measured.

    Args:
        log: rows and days.
        names: backbones to train.
        seeds: one run each.
        epochs: passes over the training days.
        processes: runs at a time, a thread each; 0 is one a core.
    """

    log: LogOptions = field(default_factory=lambda: LogOptions(window="last-fifth"))
    names: tuple[str, ...] = NAMES
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int = 4
    processes: int = 0


def run(name: str, seed: int, options: Options) -> dict:
    """Train one backbone; what it scores on the test rows."""
    model, facts = train_click(study.LOG, ClickConfig(backbone=name, epochs=options.epochs), seed)
    return {"network": name, "seed": seed} | score(study.LOG, model) | facts


def main(options: Options) -> None:
    """Measure, print a table, and the JSON line."""
    with kept_in(None) as folder:
        log = options.log.open(folder)
    with study.processes(log, options.processes) as pool:
        runs = [pool.submit(run, name, seed, options) for seed in options.seeds for name in options.names]
        for done in as_completed(runs):
            row = done.result()
            study.say(f"{row['network']:10} seed {row['seed']}: AUC {row['auc']:.4f}, {row['seconds']:.0f} s")
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
