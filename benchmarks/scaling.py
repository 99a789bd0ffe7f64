"""How ingest, training, alignment and encoding scale with workers, and what a model fitted to it says of clusters.

Each worker is a process of one thread with as many rows as the one alone (weak scaling): training with both kinds of
tables (`benchmarks/step`), ROMA with negatives from all workers, the encoder; and Ray Data from Parquet to batches,
with as many reading tasks as workers. Beside them run as many processes that have nothing to do with each other
(`apart`): what is lost between the two is communication, and waiting for each other. Workers share cores where these
are fewer.

The model of a step of W workers is

    t(W) = compute + update(W) + hops(W) * latency + bytes(W) / bandwidth

with `compute` of one worker alone; `update` what it takes beyond that to add up and apply the gradients of W workers'
batches, measured in one process; hops around a ring and bytes as they are counted here for two workers (docs/scale.md
has their formulas). Latency and bandwidth of this machine's gloo are fitted to the runs of 2 and more workers; a
prediction takes those that the options say of a network.
"""

import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import tyro
from rich.console import Console
from rich.table import Table
from scipy.optimize import nnls

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import ingest  # noqa: E402
from benchmarks.step.ours import Ours  # noqa: E402
from benchmarks.step.world import DIM, Rows, World  # noqa: E402
from ctrdist.allocator import keep_freed_memory  # noqa: E402
from ctrdist.embedding import EmbeddingTable  # noqa: E402
from ctrdist.group import DistributedGroup, Group, attach_group  # noqa: E402
from ctrdist.items import Ragged  # noqa: E402
from ctrdist.language.encode import EncodeConfig, Encoder  # noqa: E402
from ctrdist.language.encoder import TextEncoder  # noqa: E402
from ctrdist.language.model import LanguageModel  # noqa: E402
from ctrdist.language.tokens import pad  # noqa: E402
from ctrdist.loop import make_optimizer, update, wrap  # noqa: E402
from ctrdist.optim import RowAdam  # noqa: E402
from ctrdist.precision import computing_in  # noqa: E402
from ctrdist.storage import State  # noqa: E402
from ctrdist.tasks.align import AlignConfig, ItemAlignment  # noqa: E402
from raycluster import cluster  # noqa: E402

STAGES = ("train replicated", "train sharded", "align", "encode", "ingest")


@dataclass(frozen=True)
class Options:
    """What is measured, and predicted.

    Args:
        stages: which of them.
        workers: how many at a time; 1 is always among them.
        network: the CTR network.
        users: rows of the users' table.
        batch: rows of a worker's batch in training.
        lm: language model of alignment and encoding.
        items: items of a worker's batch in alignment; texts of a worker in encoding are four times as many.
        tokens: of each text.
        steps: timed steps.
        log_rows: rows of the log that is read.
        predict: workers to predict.
        gigabits: bandwidths of the networks to predict, Gbit/s a worker.
        latency_us: of each of them, from a worker to the next, with all that software adds: an assumption.
        gpu_step_ms: what to predict beside this machine's own step: a worker whose step takes so long.
    """

    stages: tuple[str, ...] = STAGES
    workers: tuple[int, ...] = (1, 2, 3)
    network: str = "din"
    users: int = 1_000_000
    batch: int = 1024
    lm: str = "sentence-transformers/all-MiniLM-L6-v2"
    items: int = 32
    tokens: int = 48
    steps: int = 12
    log_rows: int = 400_000
    predict: tuple[int, ...] = (8, 32, 128)
    gigabits: tuple[float, ...] = (25.0, 400.0)
    latency_us: tuple[float, ...] = (100.0, 10.0)
    gpu_step_ms: float = 3.0


WARM = 3
"""Steps that are not timed."""


class CountedGroup(DistributedGroup):
    """The default process group, which counts hops: rounds of a ring in which each worker hears from the one before."""

    hops = 0

    def reduce_(self, value: torch.Tensor) -> torch.Tensor:
        self.hops += 2 * (self.size - 1)
        return super().reduce_(value)

    def gather_equal(self, value: torch.Tensor) -> torch.Tensor:
        self.hops += self.size - 1
        return super().gather_equal(value)

    def exchange(self, counts: torch.Tensor) -> torch.Tensor:
        self.hops += self.size - 1
        return super().exchange(counts)

    def all_to_all(self, value: torch.Tensor, counts: list[int], received: list[int]) -> torch.Tensor:
        self.hops += self.size - 1
        return super().all_to_all(value, counts, received)


# --- the stages: each gives the function of a step, its rows, and the bytes that DDP reduces ---


def training(options: Options, group: Group, store: str) -> tuple[Callable[[int], None], int, int]:
    """Steps of a click model with one kind of tables."""
    world = World.of(options.users)
    ours = Ours(options.network, world, "cpu", group=group, store=store)
    rows = [world.draw(options.batch, 1000 * group.rank + seed) for seed in range(WARM + options.steps)]
    return lambda step: ours.step(rows[step]), options.batch, dense_bytes(ours.task)


def alignment(options: Options, group: Group) -> tuple[Callable[[int], None], int, int]:
    """Steps of ROMA on random tokens."""
    torch.manual_seed(0)
    encoder, count = TextEncoder(LanguageModel.load(options.lm), 48), options.items * (WARM + options.steps)
    tokens = random_tokens(options, count, encoder.language_model, group.rank)
    task = ItemAlignment(encoder, torch.randn(count, 48), AlignConfig()).train()
    attach_group(task, group)
    optimizer, model = make_optimizer(task), wrap(task, group, "cpu")

    def step(number: int) -> None:
        items = np.arange(number * options.items, (number + 1) * options.items)
        with computing_in("auto", "cpu"):
            loss = model(pad(tokens.take(items), items, 0))["loss"]
        update(loss, optimizer, [], group, clip_norm=1.0)

    return step, options.items, dense_bytes(task)


def encoding(options: Options, group: Group) -> tuple[Callable[[int], None], int, int]:
    """Texts through the encoder, which has nothing to say to another."""
    model, count = LanguageModel.load(options.lm), 4 * options.items
    tokens, encoder = random_tokens(options, count, model, group.rank), Encoder(model, EncodeConfig())

    def step(_: int) -> None:
        encoder.encode(tokens)

    return step, count, 0


def random_tokens(options: Options, count: int, model: LanguageModel, seed: int) -> Ragged:
    """Texts of `tokens` words each."""
    values = np.random.default_rng(seed).integers(1, model.vocabulary_size, count * options.tokens)
    return Ragged(values.astype(np.int32), np.arange(0, len(values) + 1, options.tokens))


def dense_bytes(task: torch.nn.Module) -> int:
    """Bytes of the gradients that DDP sums up."""
    return sum(p.numel() * p.element_size() for p in task.parameters() if p.requires_grad)


STEPS: dict[str, Callable[[Options, Group], tuple[Callable[[int], None], int, int]]] = {
    "train replicated": partial(training, store="replicated"),
    "train sharded": partial(training, store="sharded"),
    "align": alignment,
    "encode": encoding,
}


# --- measured ---


def work(rank: int, size: int, together: bool, stage: str, options: Options, folder: str) -> None:
    """One process of `size`: writes what its steps took, sent and waited for."""
    torch.set_num_threads(1)
    keep_freed_memory()
    if together:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    group = CountedGroup() if together else Group()
    step, rows, dense = STEPS[stage](options, group)
    seconds, sent, hops = [], 0, 0
    for number in range(WARM + options.steps):
        if number == WARM:
            sent, hops = group.sent, getattr(group, "hops", 0)
        began = time.perf_counter()
        step(number)
        seconds.append(time.perf_counter() - began)
    others = size - 1 if together else 0
    found = {
        "ms": median(seconds[WARM:]) * 1e3,
        "rows": rows,
        "table_bytes": (group.sent - sent) / options.steps,
        "dense_bytes": 2 * others / size * dense,
        "hops": (getattr(group, "hops", 0) - hops) / options.steps + 2 * others * buckets(dense),
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    del step
    gc.collect()  # if DDP's reducer held the group last, it would wait for threads that wait for Python's lock
    if together:
        dist.destroy_process_group()


def buckets(dense: int) -> int:
    """Messages that DDP cuts its gradients into: one of a MiB, then of 25."""
    return 1 + -(-max(0, dense - 2**20) // (25 * 2**20)) if dense else 0


def run(stage: str, size: int, together: bool, options: Options) -> dict[str, float]:
    """What the slowest of `size` processes says."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (size, together, stage, options, folder), size)
        return max((json.loads(path.read_text()) for path in Path(folder).glob("*.json")), key=lambda one: one["ms"])


def measure(options: Options) -> Iterator[dict[str, Any]]:
    """A row for each stage and number of workers."""
    for stage in options.stages:
        sizes = sorted({1, *options.workers})
        rows = list(ingested(sizes, options) if stage == "ingest" else stepped(stage, sizes, options))
        for row in rows:
            row["efficiency"] = row["rows_per_s"] / row["workers"] / rows[0]["rows_per_s"]
            yield {"stage": stage, **row}


def stepped(stage: str, sizes: list[int], options: Options) -> Iterator[dict[str, Any]]:
    """Rows of a stage that takes steps; `lost` is the share of a step that goes when workers talk to each other."""
    for size in sizes:
        apart = run(stage, size, False, options)
        found = run(stage, size, True, options) if size > 1 and stage != "encode" else apart
        speed = size * found["rows"] / found["ms"] * 1e3
        lost = max(0.0, 1 - apart["ms"] / found["ms"])
        yield {"workers": size, "rows_per_s": speed, "apart_ms": apart["ms"], "lost": lost, **found}


def ingested(sizes: list[int], options: Options) -> Iterator[dict[str, Any]]:
    """Rows of Ray Data from Parquet to batches, once it has started."""
    cluster.connect(2**29)
    with tempfile.TemporaryDirectory() as folder:
        ingest.write_log(Path(folder) / "data", options.log_rows, ingest.Options())
        reader, groups = ingest.open_log(f"{folder}/data", State(f"{folder}/state"), Path(folder) / "bad")
        for size in sizes:
            rows, first, seconds = ingest.through_ray(reader, groups, options.batch, size, readers=size)
            yield {"workers": size, "rows_per_s": rows / (seconds - first)}


def update_seconds(options: Options, stage: str, counts: set[int]) -> dict[int, float]:
    """Seconds that a worker of so many takes to add up and apply the gradients of a step: of a replica the rows of all
    workers' batches, of a shard those of them that it owns."""
    torch.set_num_threads(1)
    world, found = World.of(options.users), {}
    tables = {name: EmbeddingTable(size, DIM, RowAdam()) for name, size in world.sizes.items()}
    for count in sorted(counts):
        got = [received(world.draw(options.batch, seed), count if "sharded" in stage else 1) for seed in range(count)]
        ids = {name: torch.from_numpy(np.concatenate([one[name] for one in got])) for name in tables}
        gradients, taken = {name: torch.randn(len(of), DIM) for name, of in ids.items()}, []
        for _ in range(5):
            began = time.perf_counter()
            for name, table in tables.items():
                table._descend(ids[name], gradients[name], distinct=count == 1, lr_scale=1.0)
            taken.append(time.perf_counter() - began)
        found[count] = median(taken)
    return found


def received(rows: Rows, owners: int) -> dict[str, np.ndarray]:
    """Of a worker's batch, the ids that one of so many owners gets, by table: int64, distinct."""
    of = {
        "user": rows.user,
        "hour": rows.hour,
        "item": np.concatenate([rows.item, rows.history.ravel()]),
        "category": np.concatenate([rows.category, rows.history_category.ravel()]),
    }
    return {name: ids[ids % owners == 0] for name, ids in ((name, np.unique(ids)) for name, ids in of.items())}


# --- predicted ---


@dataclass(frozen=True)
class Step:
    """What a step of training costs a worker of W.

    Args:
        sharded: how its tables lie.
        compute: seconds, of one alone.
        update: seconds to add up and apply what a worker's tables get, by the number of workers.
        table_bytes, dense_bytes, hops: with two workers.
    """

    sharded: bool
    compute: float
    update: dict[int, float]
    table_bytes: float
    dense_bytes: float
    hops: float

    def bytes(self, workers: int) -> float:
        """Bytes that a worker sends: of replicas all ids and gradients to all others, of shards to their owners."""
        share = 2 * (workers - 1) / workers
        return self.table_bytes * (share if self.sharded else workers - 1) + self.dense_bytes * share

    def seconds(self, workers: int, latency: float, bandwidth: float) -> dict[str, float]:
        """Where a step's time goes, by term.

        Args:
            latency: seconds from a worker to the next; collectives go round a ring, a tree would take less.
            bandwidth: bytes a second of a worker.
        """
        return {
            "compute": self.compute,
            "update": max(0.0, self.update[workers] - self.update[1]),
            "latency": self.hops * (workers - 1) * latency,
            "bandwidth": self.bytes(workers) / bandwidth,
        }


def steps_of(rows: list[dict[str, Any]], updates: dict[str, dict[int, float]]) -> dict[str, Step]:
    """The model's terms of each kind of tables, from the runs of one and of two workers."""
    found = {}
    for stage in ("train replicated", "train sharded"):
        of = {row["workers"]: row for row in rows if row["stage"] == stage}
        if 1 in of and 2 in of:
            costs = (of[2]["table_bytes"], of[2]["dense_bytes"], of[2]["hops"])
            found[stage] = Step(stage == "train sharded", of[1]["ms"] / 1e3, updates[stage], *costs)
    return found


def fit(rows: list[dict[str, Any]], steps: dict[str, Step]) -> tuple[float, float, float]:
    """Latency and bandwidth of this machine, in seconds and bytes a second, and the mean error of the fitted steps, as
    a share of them. What is fitted is what steps take beyond those of as many workers apart."""
    several = [row for row in rows if row["stage"] in steps and row["workers"] > 1]
    terms = [steps[row["stage"]].seconds(row["workers"], 1.0, 1.0) for row in several]
    beyond = [(row["ms"] - row["apart_ms"]) / 1e3 - term["update"] for row, term in zip(several, terms, strict=True)]
    matrix = np.array([[term["latency"], term["bandwidth"]] for term in terms])
    (latency, inverse), _ = nnls(matrix, np.maximum(beyond, 0))
    found = matrix @ (latency, inverse) + [
        row["apart_ms"] / 1e3 + t["update"] for row, t in zip(several, terms, strict=True)
    ]
    taken = np.array([row["ms"] / 1e3 for row in several])
    return latency, 1 / inverse if inverse else float("inf"), float(np.mean(np.abs(found - taken) / taken))


def predict(steps: dict[str, Step], options: Options) -> list[dict[str, Any]]:
    """Speed and efficiency of large clusters, and the term that takes most of a step."""
    out = []
    for stage, step in steps.items():
        for compute in (step.compute, options.gpu_step_ms / 1e3):
            for gigabits, latency in zip(options.gigabits, options.latency_us, strict=True):
                for workers in options.predict:
                    terms = replace(step, compute=compute).seconds(workers, latency / 1e6, gigabits * 1e9 / 8)
                    total = sum(terms.values())
                    out.append({
                        "stage": stage, "compute_ms": compute * 1e3, "gigabits": gigabits, "latency_us": latency,
                        "workers": workers, "rows_per_s": workers * options.batch / total,
                        "efficiency": compute / total, "limit": max(terms, key=terms.get),
                        "ms": {k: v * 1e3 for k, v in terms.items()},
                    })  # fmt: skip
    return out


# --- the tables ---


def show(
    rows: list[dict[str, Any]], fitted: dict[str, float], predicted: list[dict[str, Any]], options: Options
) -> None:
    """The tables for people."""
    cores = len(os.sched_getaffinity(0))
    table = Table(title=f"Workers of one thread on {cores} cores, {options.batch:,} rows a worker's batch")
    for name in ("stage", "workers", "rows/s", "efficiency", "ms a step", "apart", "lost to talk", "KB a step"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for row in rows:
        shown = [f"{row['rows_per_s']:,.0f}", f"{row['efficiency']:.2f}"]
        if "ms" in row:
            sent = row["table_bytes"] + row["dense_bytes"]
            shown += [f"{row['ms']:.1f}", f"{row['apart_ms']:.1f}", f"{row['lost']:.0%}", f"{sent / 1e3:,.0f}"]
        table.add_row(row["stage"], str(row["workers"]), *shown)
    console = Console(width=120)
    console.print(table)
    if not predicted:
        return
    console.print(
        f"fitted here: {fitted['latency_us']:.0f} us a message, {fitted['gigabytes_per_s']:.2f} GB/s, "
        f"mean error {fitted['error']:.0%} of {fitted['steps']} steps by these two"
    )
    table = Table(title="Predicted")
    for name in ("stage", "compute ms", "Gbit/s", "us", "workers", "rows/s", "efficiency", "limited by", "update ms"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for row in predicted:
        table.add_row(
            row["stage"], f"{row['compute_ms']:.1f}", f"{row['gigabits']:g}", f"{row['latency_us']:g}",
            str(row["workers"]), f"{row['rows_per_s']:,.0f}", f"{row['efficiency']:.2f}", row["limit"],
            f"{row['ms']['update']:.1f}",
        )  # fmt: skip
    console.print(table)


def main(options: Options) -> None:
    """Measure, fit, predict; tables and the JSON line."""
    unknown = set(options.stages) - set(STAGES)
    if unknown:
        raise SystemExit(f"--stages: unknown {', '.join(sorted(unknown))}; known: {', '.join(STAGES)}")
    if len(options.gigabits) != len(options.latency_us):
        raise SystemExit(f"--latency-us: one for each of --gigabits, of which there are {len(options.gigabits)}")
    rows = []
    for row in measure(options):
        rows.append(row)
        print(f"{row['stage']}, {row['workers']} workers: {row['rows_per_s']:,.0f} rows/s", file=sys.stderr)
    counts = {1, *options.workers, *options.predict}
    trained = [stage for stage in ("train replicated", "train sharded") if stage in options.stages]
    steps, fitted = steps_of(rows, {stage: update_seconds(options, stage, counts) for stage in trained}), {}
    if steps:
        latency, bandwidth, error = fit(rows, steps)
        fitted = {"latency_us": latency * 1e6, "gigabytes_per_s": bandwidth / 1e9, "error": error}
        fitted["steps"] = sum(row["stage"] in steps and row["workers"] > 1 for row in rows)
    predicted = predict(steps, options)
    show(rows, fitted, predicted, options)
    ratios = {f"efficiency_{row['stage'].replace(' ', '_')}_{row['workers']}": row["efficiency"] for row in rows}
    ratios |= {f"lost_{row['stage'].replace(' ', '_')}_{row['workers']}": row["lost"] for row in rows if "lost" in row}
    print(
        json.dumps({"benchmark": "scaling", "rows": rows, "fitted": fitted, "predicted": predicted, "ratios": ratios})
    )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
