"""A training step: ours, the same network on dense tables, and other libraries, in one run.

Each contestant runs in a process of its own (`benchmarks/step`), all in turns: the default allocator for ours and for
`nn.Embedding` with AdamW, and large allocations kept for ours, for fused AdamW and for the other libraries, which gain
from it. (Training itself always keeps them: `ctrdist.allocator`.) A log of random ids: users, a tenth as many items
with their category, histories of 20, width 16. Ours finds the distinct ids of a batch within its step. Then two workers
on two cores beside one on one, and beside two that have nothing to do with each other.

Other libraries are measured where they are installed: `pip install -e '.[peers]'`.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import tyro
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.step.ours import Ours  # noqa: E402
from benchmarks.step.peers import NETWORKS, PEERS  # noqa: E402
from benchmarks.step.world import World  # noqa: E402
from ctrdist import backbones  # noqa: E402
from ctrdist.allocator import KEEP, keep_freed_memory  # noqa: E402
from ctrdist.group import DistributedGroup, Group  # noqa: E402

MODULES = {"torch-rechub": "torch_rechub", "deepctr-torch": "deepctr_torch", "fuxictr": "fuxictr"}


@dataclass(frozen=True)
class Options:
    """What is measured.

    Args:
        networks: names of networks, or `all`; peers have din, dcnv2 and deepfm.
        users: rows of the users' table.
        batches: rows of a batch.
        rounds: runs of each contestant, in turns, at the first network and batch size; the median counts. The others
            are run once.
        threads: threads of each process.
        device: cpu or cuda.
        compile: torch.compile our networks.
        peers: measure the other libraries that are installed.
        workers: processes, a thread each, beside one alone; 0 leaves that out.
    """

    networks: tuple[str, ...] = NETWORKS
    users: tuple[int, ...] = (100_000, 1_000_000, 10_000_000)
    batches: tuple[int, ...] = (1024, 4096)
    rounds: int = 3
    threads: int = 2
    device: str = "cpu"
    compile: bool = False
    peers: bool = True
    workers: int = 2


def contestants(network: str, options: Options) -> dict[str, tuple[str, dict[str, str]]]:
    """Who runs, by the name of the figure: the contestant and its process's environment."""
    found = {"ours": ("ours", {}), "dense": ("dense", {}), "ours_kept": ("ours", KEEP), "fused": ("fused", KEEP)}
    if options.peers and network in NETWORKS:
        found |= {name: (name, KEEP) for name in PEERS if find_spec(MODULES[name])}
    return found


def run(contestant: str, environment: dict[str, str], **arguments: object) -> dict:
    """One contestant in its process; what it prints."""
    command = [sys.executable, "-m", "benchmarks.step", "--contestant", contestant]
    for name, value in arguments.items():
        command += [f"--{name}"] if value is True else [] if value is False else [f"--{name}", str(value)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | environment
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.rstrip().splitlines()[-1])


def measure(options: Options) -> Iterator[dict]:
    """A row for each network, batch size and size of the users' table."""
    networks = options.networks
    for network in networks:
        for batch in options.batches:
            rounds = options.rounds if (network, batch) == (networks[0], options.batches[0]) else 1
            for users in options.users:
                common = {"network": network, "users": users, "batch": batch}
                common |= {"threads": options.threads, "device": options.device}
                who, found = contestants(network, options), {}
                for _ in range(rounds):
                    for figure, (name, environment) in who.items():
                        own = {"floor": figure == "ours_kept", "compile": options.compile} if name == "ours" else {}
                        found.setdefault(figure, []).append(run(name, environment, **common, **own))
                ms = {figure: median(one["ms"] for one in runs) for figure, runs in found.items()}
                least = {key: value for key, value in found["ours_kept"][-1].items() if key != "ms"}
                row = {"network": network, "vocab": users, "batch": batch, "rounds": rounds}
                row |= {f"{figure}_ms": ms.pop(figure) for figure in ("ours", "dense", "ours_kept", "fused")}
                yield row | {"peers": ms, **least, "ours_over_floor": row["ours_kept_ms"] / least["floor_ms"]}


def work(rank: int, size: int, together: bool, network: str, users: int, batch: int, folder: str) -> None:
    """One worker of `size`, or, if not `together`, one process beside others: writes its seconds a step."""
    torch.set_num_threads(1)
    keep_freed_memory()
    if together:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    world = World.of(users)
    ours = Ours(network, world, "cpu", group=DistributedGroup() if together else Group())
    batches = [world.draw(batch, 1000 * rank + seed) for seed in range(25)]
    seconds = []
    for rows in batches:
        began = time.perf_counter()
        ours.step(rows)
        seconds.append(time.perf_counter() - began)
    Path(folder, f"{rank}.json").write_text(json.dumps(median(seconds[5:])))
    del ours
    gc.collect()  # if DDP's reducer held the group last, it would wait for threads that wait for Python's lock
    if together:
        dist.destroy_process_group()


def scaling(options: Options) -> list[dict]:
    """Samples a second of several workers over those of one, a thread each: with as many rows a worker, with as many in
    all, and, as what the machine has to give, of as many processes that have nothing to do with each other."""
    network, users, size, rows = options.networks[0], options.users[0], options.workers, []
    for batch in options.batches:

        def speed(workers: int, together: bool, share: int) -> float:
            with tempfile.TemporaryDirectory() as folder:
                mp.spawn(work, (workers, together, network, users, share, folder), workers)
                slowest = max(json.loads(path.read_text()) for path in Path(folder).glob("*.json"))
            return workers * share / slowest

        alone = speed(1, False, batch)
        runs = {
            "same_batch_a_worker": (True, batch),
            "same_global_batch": (True, batch // size),
            "apart": (False, batch),
        }
        for what, (together, share) in runs.items():
            found = speed(size, together, share)
            rows.append({
                "network": network, "vocab": users, "workers": size, "batch_a_worker": share, "what": what,
                "samples_per_s": found, "speedup": found / alone,
            })  # fmt: skip
    return rows


def ratios(rows: list[dict], spread: list[dict]) -> dict[str, float]:
    """What is claimed, of each network at each batch size."""
    out: dict[str, float] = {}
    for network, batch in dict.fromkeys((row["network"], row["batch"]) for row in rows):
        of = {row["vocab"]: row for row in rows if (row["network"], row["batch"]) == (network, batch)}
        name = f"{network}_{batch}"
        if len(of) > 1:
            out[f"{name}_flatness"] = of[max(of)]["ours_ms"] / of[min(of)]["ours_ms"]
        for vocab, row in of.items():
            out[f"{name}_vs_dense_{vocab}"] = row["dense_ms"] / row["ours_ms"]
            out[f"{name}_vs_dense_as_trained_{vocab}"] = row["dense_ms"] / row["ours_kept_ms"]
            out[f"{name}_vs_fused_{vocab}"] = row["fused_ms"] / row["ours_kept_ms"]
            out |= {f"{name}_vs_{peer}_{vocab}": ms / row["ours_kept_ms"] for peer, ms in row["peers"].items()}
    return out | {f"{row['what']}_{row['batch_a_worker']}_speedup": row["speedup"] for row in spread}


def show(rows: list[dict], profile: dict[str, float], spread: list[dict], options: Options) -> None:
    """The tables for people."""
    title = f"ms a step, {options.threads} threads, {options.device}{', compiled' if options.compile else ''}"
    table = Table(title=title + "; * large allocations kept")
    peers = [name for name in PEERS if any(name in row["peers"] for row in rows)]
    columns = ["network", "users", "batch", "ours", "AdamW", "ours*", "fused AdamW*", *(f"{name}*" for name in peers)]
    for name in (*columns, "floor", "ours*/floor"):
        table.add_column(name, justify="left" if name == "network" else "right")
    for row in rows:
        own = [f"{row[f'{figure}_ms']:.1f}" for figure in ("ours", "dense", "ours_kept", "fused")]
        theirs = [f"{row['peers'][name]:.1f}" if name in row["peers"] else "" for name in peers]
        floor = (f"{row['floor_ms']:.1f}", f"{row['ours_over_floor']:.1f}")
        table.add_row(row["network"], f"{row['vocab']:,}", f"{row['batch']:,}", *own, *theirs, *floor)
    console = Console(width=140)
    console.print(table)
    table = Table(
        title=f"Where a step of {rows[0]['network']} goes, {rows[0]['vocab']:,} users, batch {rows[0]['batch']}"
    )
    table.add_column("operator")
    table.add_column("ms of its own", justify="right")
    for name, ms in profile.items():
        table.add_row(name, f"{ms:.2f}")
    console.print(table)
    if spread:
        table = Table(title="Workers of one thread each, beside one alone")
        for name in ("workers", "", "batch a worker", "samples/s", "times one worker"):
            table.add_column(name, justify="left" if not name else "right")
        for row in spread:
            speed = (f"{row['samples_per_s']:,.0f}", f"{row['speedup']:.2f}")
            table.add_row(str(row["workers"]), row["what"].replace("_", " "), f"{row['batch_a_worker']:,}", *speed)
        console.print(table)


def main(options: Options) -> None:
    """Measure, print tables, and the JSON line."""
    if options.networks == ("all",):
        options = replace(options, networks=backbones.NAMES)
    rows = []
    for row in measure(options):
        rows.append(row)
        print(
            f"{row['network']} {row['vocab']:,} users, batch {row['batch']}: {row['ours_ms']:.1f} ms", file=sys.stderr
        )
    first = {"network": rows[0]["network"], "users": rows[0]["vocab"], "batch": rows[0]["batch"]}
    profile = run("ours", KEEP, **first, threads=options.threads, device=options.device, profile=True)["profile"]
    spread = scaling(options) if options.workers and options.device == "cpu" else []
    show(rows, profile, spread, options)
    result = {"rows": rows, "profile": profile, "scaling": spread, "ratios": ratios(rows, spread)}
    print(json.dumps({"benchmark": "train_step", **result}))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
