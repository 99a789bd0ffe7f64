"""Time one contestant, in a process of its own: `python -m benchmarks.step`."""

import json
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.step.ours import CONTESTANTS, FIND, Ours
from benchmarks.step.peers import PEERS
from benchmarks.step.world import World


@dataclass(frozen=True)
class Options:
    """What is timed.

    Args:
        contestant: ours, dense, fused or a peer.
        network: name of the network.
        users: rows of the users' table.
        batch: rows of a batch.
        steps: timed steps; the median counts.
        threads: threads of PyTorch.
        device: cpu or cuda.
        compile: torch.compile our network.
        floor: also count what a step must do at least, and what this machine could do (ours alone).
        profile: also say where the time of a step goes (ours alone).
    """

    contestant: str = "ours"
    network: str = "din"
    users: int = 100_000
    batch: int = 1024
    steps: int = 12
    threads: int = 2
    device: str = "cpu"
    compile: bool = False
    floor: bool = False
    profile: bool = False


def main(options: Options) -> None:
    """Build, warm up, time, print one JSON line."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    world = World.of(options.users)
    make = (CONTESTANTS | PEERS)[options.contestant]
    own = {"compile_": True} if options.compile and options.contestant == "ours" else {}
    contestant = make(options.network, world, options.device, **own)
    warm = 3
    batches = [contestant.prepare(world.draw(options.batch, seed)) for seed in range(warm + options.steps)]
    seconds = []
    for batch in batches:
        began = time.perf_counter()
        contestant.step(batch)
        if options.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    out: dict[str, Any] = {"ms": 1000 * float(np.median(seconds[warm:]))}
    if options.floor:
        out |= floor(contestant, batches[0])
    if options.profile:
        out["profile"] = profile(contestant, batches[: warm + 1])
    print(json.dumps(out))


def floor(contestant: Ours, rows: Any) -> dict[str, float]:
    """The least time of a step: its matrix products at the speed of a large one, and the bytes of its rows at the speed
    of a large copy."""
    with FlopCounterMode(display=False) as counter:
        contestant.step(rows)
    touched = sum(table.rows_touched * table.dim for table in contestant.tables)
    dense = sum(p.numel() for p in contestant.task.parameters())
    # Weight and two moments are read and written, the gradient too.
    moved = 8 * 4 * (touched + dense)
    a, device = torch.randn(2048, 2048, device=contestant.device), contestant.device
    b, out = torch.randn(2**26, device=device), torch.empty(2**26, device=device)
    flops_a_second = 2 * 2048**3 / best(lambda: a @ a, device)
    bytes_a_second = 2 * b.nbytes / best(lambda: out.copy_(b), device)
    return {
        "gflop": counter.get_total_flops() / 1e9,
        "mbytes": moved / 1e6,
        "peak_gflops": flops_a_second / 1e9,
        "bandwidth_gbs": bytes_a_second / 1e9,
        "floor_ms": 1000 * (counter.get_total_flops() / flops_a_second + moved / bytes_a_second),
    }


def best(run: Any, device: str) -> float:
    """Seconds of the fastest of ten runs."""
    seconds = []
    for _ in range(10):
        began = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def profile(contestant: Ours, batches: list[Any], most: int = 12) -> dict[str, float]:
    """Milliseconds a step of the operators that take the most time of their own."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if contestant.device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as found:
        for rows in batches:
            contestant.step(rows)
    own = "self_device_time_total" if contestant.device == "cuda" else "self_cpu_time_total"
    events = sorted(found.key_averages(), key=lambda event: -getattr(event, own))
    events = events[:most] + [event for event in events[most:] if event.key == FIND]
    return {event.key: getattr(event, own) / 1000 / len(batches) for event in events}


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
