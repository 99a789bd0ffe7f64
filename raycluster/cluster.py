"""Connect to Ray, and turn the cluster's resources into a plan."""

import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

import psutil

from ctrdist.errors import UserError
from ctrdist.storage import masked
from raycluster.autoscaler import wait_for


@dataclass(frozen=True)
class PlanConfig:
    """What the cluster is for, where its resources alone do not say it.

    Args:
        cpus: CPUs to reckon with on a cluster that grows by itself, idle as it may be: they are asked of its
            autoscaler, and waited for. 0 takes what is there.
        gpus: GPUs to train on, to reckon with likewise.
        train_on: custom resource of the GPU nodes that may train, as many of it as they have GPUs: each training
            process holds one. Any GPU if not given.
        wait_minutes: how long to wait for `cpus` and `gpus`; then the job goes on with what has come.
        worker_cpus: CPUs that each training, encoding or scoring process reserves; 0 takes one, or a quarter where CPUs
            are few.
        threads: threads that each of them computes with; 0 shares the CPUs out.
        readers: tasks that read the log at once; 0 takes as many as there are CPUs, and memory for.
        reader_gib: memory that each of them reserves.
    """

    cpus: int = 0
    gpus: int = 0
    train_on: str = ""
    wait_minutes: float = 20.0
    worker_cpus: float = 0.0
    threads: int = 0
    readers: int = 0
    reader_gib: float = 0.5

    def __post_init__(self) -> None:
        for name in ("cpus", "gpus", "wait_minutes", "worker_cpus", "threads", "readers", "reader_gib"):
            if getattr(self, name) < 0:
                raise UserError(f"plan.{name}: {getattr(self, name)} is under 0")


@dataclass(frozen=True)
class Plan:
    """Who does what on this cluster.

    Args:
        workers: processes that train one model together, one a GPU where there are GPUs; as many score.
        gpus: GPUs of each, 0 or 1.
        worker_cpus: CPUs that each of them reserves; what is left is Ray Data's.
        threads: threads that each of them computes with.
        encoders: processes that encode at most.
        encoder_gpus: GPUs of each, a share of one or 0.
        readers: tasks that read the log at once at most.
        reader_bytes: memory that each of them reserves.
        train_on: custom resource that each training process holds one of; "" for none.
        wait_minutes: for nodes to come back that it has places on.
        cluster: what all nodes together have, by Ray's names (CPU, GPU, memory in bytes), and the number of `nodes`.
    """

    workers: int
    gpus: int
    worker_cpus: float
    threads: int
    encoders: int = 1
    encoder_gpus: float = 0.0
    readers: int = 1
    reader_bytes: int = 0
    train_on: str = ""
    wait_minutes: float = 20.0
    cluster: dict[str, float] = field(default_factory=dict, compare=False)

    @property
    def worker_resources(self) -> dict[str, float]:
        """What Ray reserves for each training process."""
        return {"CPU": self.worker_cpus} | ({"GPU": self.gpus} if self.gpus else {}) | _one(self.train_on)

    @property
    def reader_resources(self) -> dict[str, float]:
        """What Ray reserves for each task that reads the log, as its options call it."""
        return {"num_cpus": 0.5} | ({"memory": self.reader_bytes} if self.reader_bytes else {})

    def wait_for_places(self) -> None:
        """Returns when the nodes have places for the training processes: some may leave while nobody trains.

        Raises:
            UserError: they have not had them for `wait_minutes`.
        """
        if missing := wait_for([self.worker_resources] * self.workers, 60 * self.wait_minutes):
            each = ", ".join(f"{number:g} {name}" for name, number in self.worker_resources.items())
            raise UserError(
                f"{self.workers} training workers of {each} each: no node of the cluster has room for {missing} of "
                "that by now (`ray status` says why): run the job again, it goes on from here"
            )

    def lines(self) -> tuple[str, str, str]:
        """The plan, for people."""
        device, where = (f"{self.gpus} GPU and " if self.gpus else ""), f" on '{self.train_on}'" * bool(self.train_on)
        share = f"{self.encoder_gpus:g} GPU and " if self.encoder_gpus else ""
        each = f"{self.worker_cpus:g} CPUs each"
        return (
            f"train    {self.workers} at once{where}, {device}{each}, {self.threads} threads",
            f"encode   {self.encoders} at once, {share}{each}",
            f"read     {self.readers} at once, {self.reader_bytes / 2**30:g} GiB each",
        )


def connect(object_store_bytes: int | None = None) -> None:
    """Connect to the cluster that `RAY_ADDRESS` names (a submitted job has it), else start a local Ray.

    Args:
        object_store_bytes: memory of a local Ray's object store; Ray's own choice if None.
    """
    import ray

    address = os.environ.get("RAY_ADDRESS", "")
    if address.startswith("http"):  # for `ray job submit`; no cluster to connect to
        address = ""
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "error")
    # Ray Train looks every two seconds whether its workers have ended, several times at the end of each stage.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    if not address:  # nobody takes this machine away, and the watcher is one more process to start
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    ray.init(
        address=address or "local",
        include_dashboard=None if address else False,
        log_to_driver=False,
        logging_level="ERROR",
        ignore_reinit_error=True,
        object_store_memory=None if address else object_store_bytes,
    )
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    # A short stream has fewer blocks than there may be tasks; nobody can do anything about it.
    warnings.filterwarnings("ignore", "The (max|min)imum number of concurrent", UserWarning)


def spilled_bytes() -> int:
    """What all nodes have moved from Ray's object store to disk so far, for want of memory."""
    import ray
    from ray._private.internal_api import node_stats

    nodes = [(node["NodeManagerAddress"], node["NodeManagerPort"]) for node in ray.nodes() if node["Alive"]]
    return sum(node_stats(*node).store_stats.spilled_bytes_total for node in nodes)


def make_plan(
    workers: int = 0,
    batch_sizes: dict[str, int] | None = None,
    encoders: int = 0,
    gpu_share: float = 1.0,
    config: PlanConfig | None = None,
) -> Plan:
    """A plan for the cluster's resources now, or when its autoscaler has brought what `config` reckons with.

    Training workers reserve a small share of a CPU where CPUs are few, since Ray Data, which feeds them, waits for ever
    if it gets none.

    Args:
        workers: how many train together; 0 takes as many as there is room for and as divide every batch.
        batch_sizes: rows of each global batch, by the option that sets it.
        encoders: how many encode at most; 0 takes as many as there is room for on the nodes that are there.
        gpu_share: share of a GPU that each of them reserves, where there are GPUs.

    Raises:
        UserError: the cluster is too small, says what is missing; or a batch does not divide.
    """
    import ray

    config = config or PlanConfig()
    if missing := wait_for(_wanted(config), config.wait_minutes * 60):
        print(f"warning: {missing} have not come within {config.wait_minutes:g} minutes; going on without", flush=True)
    resources = ray.cluster_resources()
    cpus, gpus, memory = int(resources.get("CPU", 0)), int(resources.get("GPU", 0)), resources.get("memory", 0)
    places = _training_gpus(resources, config)
    if cpus < 2:
        raise UserError(
            f"the cluster has {cpus} CPUs for Ray to use, and needs 2: start it with --num-cpus of 2 or more, or, if "
            "it grows by itself, say what to wait for with --plan.cpus, and --plan.gpus to train on GPUs"
        )
    if (config.gpus or config.train_on) and not places:
        of = f" of nodes with the resource '{config.train_on}'" if config.train_on else ""
        raise UserError(
            f"--plan.gpus {config.gpus}: the cluster has no GPU{of} to train on; `ray status` says why none came "
            "(quota, no capacity); wait longer with --plan.wait-minutes, or leave --plan.gpus and --plan.train-on out"
        )
    workers = _count_workers(workers, places or cpus, "GPUs" if gpus else "CPUs", batch_sizes or {})
    share = config.worker_cpus or (1.0 if cpus >= 4 * workers else 0.25)
    if workers * share > cpus - 0.5:
        raise UserError(
            f"--plan.worker-cpus {share:g}: {workers} workers would leave less than half a CPU of {cpus} to read the "
            "log; give less, or fewer --workers"
        )
    reader = int(config.reader_gib * 2**30)
    fit = min(cpus, int(memory // reader)) if reader else cpus
    if not (config.readers or fit):
        raise UserError(
            f"--plan.reader-gib {config.reader_gib:g}: Ray has {memory / 2**30:.1f} GiB of memory; give less"
        )
    return Plan(
        workers,
        1 if gpus else 0,
        share,
        config.threads or max(1, min(cpus // workers, _cpus_a_gpu(config) if gpus else cpus)),
        encoders=encoders or (int(gpus * int(1 / gpu_share)) if gpus else workers),
        encoder_gpus=gpu_share if gpus else 0.0,
        readers=config.readers or fit,
        reader_bytes=reader,
        train_on=config.train_on,
        wait_minutes=config.wait_minutes,
        cluster=_has(resources, config),
    )


def _training_gpus(resources: dict[str, float], config: PlanConfig) -> int:
    """GPUs of the nodes that train."""
    gpus = resources.get("GPU", 0)
    return int(min(gpus, resources.get(config.train_on, 0)) if config.train_on else gpus)


def _cpus_a_gpu(config: PlanConfig) -> int:
    """CPUs for each GPU of the node that trains and has the fewest."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    training = [n for n in nodes if n.get("GPU") and (not config.train_on or n.get(config.train_on))]
    return int(min((n.get("CPU", 0) // n["GPU"] for n in training), default=1))


def _has(resources: dict[str, float], config: PlanConfig) -> dict[str, float]:
    nodes = sum(name.startswith("node:") and "internal" not in name for name in resources)
    names = ("CPU", "GPU", "memory", config.train_on)
    return {name: resources[name] for name in names if name in resources} | {"nodes": nodes}


def _count_workers(workers: int, room: int, kind: str, sizes: dict[str, int]) -> int:
    """How many train together: `workers`, or, if that is 0, the most that divide every batch; on CPUs, of a quarter."""
    if not 0 <= workers <= room:
        raise UserError(f"--workers {workers}: the cluster has {room} {kind}; 0 to {room} workers")
    for option, size in sizes.items():
        if size < 1 or (workers and size % workers):
            raise UserError(f"{option} {size}: does not divide among {workers or 1} workers; choose a multiple")
    most = room if kind == "GPUs" else max(2, room // 4)
    return workers or max(n for n in range(1, most + 1) if all(size % n == 0 for size in sizes.values()))


def plan_trials(
    workers: int = 0,
    batch_sizes: dict[str, int] | None = None,
    at_once: int = 0,
    encoders: int = 0,
    gpu_share: float = 1.0,
    config: PlanConfig | None = None,
) -> tuple[Plan, int]:
    """A plan of each of several trainings at a time, and how many they are. Arguments as `make_plan`, but for

    Args:
        workers: of one training; 0 takes one.
        at_once: trainings at a time; 0 takes as many as there is room for: a GPU or four CPUs for each worker.

    Raises:
        UserError: as `make_plan`, or more at a time than the cluster has GPUs or CPUs for.
    """
    config = config or PlanConfig()
    plan = make_plan(workers or 1, batch_sizes, encoders, gpu_share, config)
    cpus, gpus = int(plan.cluster["CPU"]), _training_gpus(plan.cluster, config)
    room, kind = (gpus, "GPUs") if gpus else (cpus, "CPUs")
    if at_once * plan.workers > room:
        raise UserError(
            f"--sweep.at-once {at_once}: {at_once * plan.workers} workers, and the cluster has {room} {kind}; at most "
            f"{room // plan.workers}"
        )
    at_once = at_once or max(1, (gpus or cpus // 4) // plan.workers)
    busy = at_once * plan.workers
    share = config.worker_cpus or (1.0 if cpus >= 4 * busy else 0.25)
    return replace(
        plan,
        worker_cpus=share,
        threads=config.threads or max(1, min(cpus // busy, plan.threads)),
        encoders=encoders or max(1, plan.encoders // at_once),
        readers=config.readers or max(1, plan.readers // at_once),
    ), at_once


def _wanted(config: PlanConfig) -> list[dict[str, float]]:
    """What the autoscaler is asked for, in pieces that each fit on a node."""
    gpu = {"GPU": 1} | _one(config.train_on)
    return [{"CPU": 1}] * config.cpus + [gpu] * config.gpus


def _one(resource: str) -> dict[str, float]:
    return {resource: 1} if resource else {}


def numbers(count: int) -> Any:
    """The numbers from 0 to `count`, column `id`, a block each, as a dataset of Ray Data. No task makes them: those of
    Ray's own `range` would ask for a CPU each, and wait for ever where training has left less on every node."""
    import ray

    return ray.data.from_items([{"id": number} for number in range(count)], override_num_blocks=count)


def in_parallel(
    function: Callable[..., Any], calls: list[tuple], at_once: int = 64, **resources: float
) -> Iterator[Any]:
    """What `function` returns for each of `calls`, run as Ray tasks, in the order in which they end.

    Args:
        calls: arguments of each call.
        at_once: at most this many are under way or waiting for a place: `Plan.readers` of tasks that read the log.
        resources: what a task reserves, as Ray's options call it: `Plan.reader_resources` of these; else a CPU.

    Raises:
        UserError: the first that a task raises.
    """
    import ray

    # Said outright, or a caller in a placement group (a trial of Ray Tune) would have its tasks wait within it.
    task = ray.remote(scheduling_strategy="DEFAULT", **({"num_cpus": 1.0} | resources))(function)
    waiting, running = list(reversed(calls)), []
    while waiting or running:
        while waiting and len(running) < at_once:
            running.append(task.remote(*waiting.pop()))
        done, running = ray.wait(running)
        try:
            result = ray.get(done[0])
        except ray.exceptions.RayTaskError as error:
            raise user_error(error) or error from None
        yield result


def user_error(error: BaseException) -> UserError | None:
    """The UserError that an error of Ray Train, Ray Data, a task or an actor stands for, if there is one within."""
    if type(error) is UserError:
        return error
    inner = [getattr(error, "cause", None), error.__cause__, *getattr(error, "worker_failures", {}).values()]
    return next((found for e in inner if isinstance(e, BaseException) and (found := user_error(e))), None)


def in_submitted_job() -> bool:
    """Whether this process was started by `ray job submit`."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def check_path(option: str, value: str) -> None:
    """Raise a UserError for a relative path in a submitted job, or an address with keys in it."""
    if urlsplit(value).username is not None:
        raise UserError(
            f"{option} {masked(value)}: keys in an address would end up in logs and reports; give them to all machines "
            "by the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) or by their role"
        )
    if in_submitted_job() and "://" not in value and not os.path.isabs(value):
        raise UserError(
            f"{option} {value}: a submitted job runs in a copy of its working folder that is thrown away "
            "afterwards, so a relative path would lose its files; give an absolute path or a URI"
        )


def absolute(path: str) -> str:
    """A path as all processes understand it, wherever they run; a URI stays as it is."""
    return path if "://" in path else os.path.abspath(path)


class PeakMemory:
    """The largest memory of this process and of Ray's processes on this machine, sampled in a thread.

    Shared pages count once (proportional set size), so the object store is not counted again for each reader.
    """

    def __init__(self, every: float = 3.0) -> None:
        self.bytes = 0
        self._stop = threading.Event()
        self._every = every
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def close(self) -> int:
        """Stop sampling; returns the peak in bytes."""
        self._stop.set()
        self._thread.join(timeout=10)
        return self.bytes

    def _sample(self) -> None:
        while not self._stop.wait(self._every):
            self.bytes = max(self.bytes, sum(_memory(process) for process in _processes()))


def _processes() -> list[psutil.Process]:
    own = psutil.Process()
    found = [own]
    for process in psutil.process_iter(["name", "cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if process.pid != own.pid and (line.startswith("ray::") or "/ray/" in line):
            found.append(process)
    return found


def _memory(process: psutil.Process) -> int:
    try:
        return (
            process.memory_footprint().pss if hasattr(process, "memory_footprint") else process.memory_full_info().pss
        )
    except (psutil.Error, AttributeError):
        return 0
