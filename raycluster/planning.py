"""The cluster's resources become a plan: how many processes train, encode and read, and what each of them reserves."""

import math
from dataclasses import dataclass, field, replace

from ctrdist.errors import UserError
from raycluster.autoscaler import alive_nodes, in_words, wait_for, without_place

READER_CPUS = 0.5
"""CPUs that a task reserves which reads the log: what it reads mostly waits for storage."""
TRIAL_CPUS = 0.01
"""CPUs that a trial's own process reserves: it waits for its stages' workers, which have theirs."""


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
    def places(self) -> list[dict[str, float]]:
        """What Ray must have room for at a time: all training processes, and a task that reads for them."""
        return [self.worker_resources] * self.workers + [{"CPU": READER_CPUS} | self._reader_memory]

    @property
    def reader_resources(self) -> dict[str, float]:
        """What Ray reserves for each task that reads the log, as its options call it."""
        return {"num_cpus": READER_CPUS} | self._reader_memory

    @property
    def _reader_memory(self) -> dict[str, int]:
        return {"memory": self.reader_bytes} if self.reader_bytes else {}

    def wait_for_places(self) -> None:
        """Returns when the nodes have all `places`: some may leave while nobody trains.

        Raises:
            UserError: they have not had them for `wait_minutes`.
        """
        if missing := wait_for(self.places, 60 * self.wait_minutes):
            raise UserError(
                f"{self.places_in_words()}: no node has a place for {missing} of that by now (`ray status` says why): "
                "run the job again, it goes on from here"
            )

    def places_in_words(self) -> str:
        """Its `places`, for people."""
        *_, worker, reader = map(in_words, self.places)
        return f"{self.workers} workers of {worker} each, and a task beside them that reads the log ({reader})"

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


def make_plan(
    workers: int = 0,
    batch_sizes: dict[str, int] | None = None,
    encoders: int = 0,
    gpu_share: float = 1.0,
    config: PlanConfig | None = None,
    on_gpus: bool = True,
) -> Plan:
    """A plan for the cluster's resources now, or when its autoscaler has brought what `config` reckons with.

    Training workers reserve a small share of a CPU where CPUs are few, since Ray Data, which feeds them, waits for ever
    if it gets none: there must be a place for a task that reads, beside all of them.

    Args:
        workers: how many train together; 0 takes as many as there is room for and as divide every batch.
        batch_sizes: rows of each global batch, by the option that sets it.
        encoders: how many encode at most; 0 takes as many as there is room for on the nodes that are there.
        gpu_share: share of a GPU that each of them reserves, where there are GPUs.
        on_gpus: without, GPUs are left alone, and those that `config` names not waited for.

    Raises:
        UserError: the cluster is too small, says what is missing; or a batch does not divide.
    """
    config = config or PlanConfig()
    if not on_gpus:
        config = replace(config, gpus=0, train_on="")
    if missing := wait_for(_wanted(config), config.wait_minutes * 60):
        print(f"warning: {missing} have not come within {config.wait_minutes:g} minutes; going on without", flush=True)
    nodes = alive_nodes()
    has = _has(nodes, config)
    cpus, gpus = int(has.get("CPU", 0)), int(has.get("GPU", 0)) if on_gpus else 0
    places = _training_gpus(nodes, config)
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
    if gpus:
        workers = _count_workers(workers, places, places, "GPUs to train on", batch_sizes or {})
    else:
        workers = _count_workers(workers, cpus, max(2, cpus // 4), "CPUs", batch_sizes or {})
    fit = _places_to_read(nodes, config)
    plan = Plan(
        workers,
        1 if gpus else 0,
        0.0,
        config.threads or max(1, min(cpus // workers, _cpus_a_gpu(nodes, config) if gpus else cpus)),
        encoders=encoders or (int(gpus * int(1 / gpu_share)) if gpus else workers),
        encoder_gpus=gpu_share if gpus else 0.0,
        readers=config.readers or fit,
        reader_bytes=int(config.reader_gib * 2**30),
        train_on=config.train_on,
        wait_minutes=config.wait_minutes,
        cluster=has,
    )
    return replace(plan, worker_cpus=_worker_cpus(plan, [], nodes, config))


def _training_gpus(nodes: list[dict[str, float]], config: PlanConfig) -> int:
    """GPUs of the nodes that train."""
    gpus = [(node.get("GPU", 0), node.get(config.train_on, 0) if config.train_on else math.inf) for node in nodes]
    return int(sum(map(min, gpus)))


def _cpus_a_gpu(nodes: list[dict[str, float]], config: PlanConfig) -> int:
    """CPUs for each GPU of the node that trains and has the fewest."""
    training = [n for n in nodes if n.get("GPU") and (not config.train_on or n.get(config.train_on))]
    return int(min((n.get("CPU", 0) // n["GPU"] for n in training), default=1))


def _has(nodes: list[dict[str, float]], config: PlanConfig) -> dict[str, float]:
    """What all nodes together have of what matters, and their number."""
    has = {name: sum(n.get(name, 0) for n in nodes) for name in ("CPU", "GPU", "memory", config.train_on)}
    return {name: number for name, number in has.items() if number} | {"nodes": len(nodes)}


def _places_to_read(nodes: list[dict[str, float]], config: PlanConfig) -> int:
    """Tasks that read the log at once: one a CPU, as far as their node has memory for them."""
    bytes_ = config.reader_gib * 2**30
    fit = sum(int(min(n.get("CPU", 0), n.get("memory", 0) // bytes_ if bytes_ else math.inf)) for n in nodes)
    if not fit:
        most = max((n.get("memory", 0) for n in nodes if n.get("CPU")), default=0)
        raise UserError(
            f"--plan.reader-gib {config.reader_gib:g}: no node has so much memory for Ray's tasks, at most "
            f"{most / 2**30:.1f} GiB; give less"
        )
    return fit


def _worker_cpus(
    plan: Plan, beside: list[dict[str, float]], nodes: list[dict[str, float]], config: PlanConfig
) -> float:
    """CPUs that each of a plan's workers reserves: what the options say, else one where there are four for each and
    places for them, and for what else runs `beside`, else a quarter."""
    few = plan.cluster["CPU"] < 4 * plan.workers
    for share in [config.worker_cpus] if config.worker_cpus else [0.25] if few else [1.0, 0.25]:
        plan = replace(plan, worker_cpus=share)
        missing = without_place(beside + plan.places, nodes)
        if not missing:
            return share
    given = f"--plan.worker-cpus {share:g}: " if config.worker_cpus else ""
    raise UserError(
        f"{given}{plan.places_in_words()}: no node has a place for {missing} of that; give less of it, or fewer workers"
    )


def _count_workers(workers: int, room: int, most: int, kind: str, sizes: dict[str, int]) -> int:
    """How many train together: `workers`, which may be all of `room`; if that is 0, at most `most` that divide every
    batch."""
    if not 0 <= workers <= room:
        raise UserError(f"--workers {workers}: the cluster has {room} {kind}; 0 to {room} workers")
    for option, size in sizes.items():
        if size < 1 or (workers and size % workers):
            raise UserError(f"{option} {size}: does not divide among {workers or 1} workers; choose a multiple")
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
    nodes = alive_nodes()
    cpus, gpus = int(plan.cluster["CPU"]), _training_gpus(nodes, config)
    room, kind = (gpus, "GPUs to train on") if gpus else (cpus, "CPUs")
    if at_once * plan.workers > room:
        raise UserError(
            f"--sweep.at-once {at_once}: {at_once * plan.workers} workers, and the cluster has {room} {kind}; at most "
            f"{room // plan.workers}"
        )
    at_once = at_once or max(1, (gpus or cpus // 4) // plan.workers)
    busy = at_once * plan.workers
    return replace(
        plan,
        worker_cpus=_worker_cpus(replace(plan, workers=busy), [{"CPU": TRIAL_CPUS}] * at_once, nodes, config),
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
