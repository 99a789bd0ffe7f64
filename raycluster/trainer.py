"""Ray Train around the loop: the same loop on every worker, checkpoints in the state, and a restart where one dies."""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import ray.train
from pyarrow.fs import FileType, LocalFileSystem
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, get_device
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.exceptions import PreemptionError

from ctrdist.checkpoint import Progress
from ctrdist.group import DistributedGroup, Group
from ctrdist.loop import LoopConfig, Record, fit
from ctrdist.sharded import is_collective
from ctrdist.storage import Manifest, State, filesystem
from ctrdist.tasks import Task
from raycluster.cluster import has_dashboard, user_error
from raycluster.in_order import InOrder
from raycluster.ingest import blocks, split
from raycluster.planning import Plan

MAX_FAILURES = 3
"""How often a training is started again after a worker died."""


@dataclass(frozen=True)
class Training:
    """One training run, as every worker gets it. All callables are pickled.

    Args:
        state: URI of the state.
        output: name of what it makes.
        inputs: fingerprint of what it is made from; checkpoints of another one are not used.
        task: builds the task, with its initial weights; the same on every worker.
        save: writes the trained task to a folder; called on rank 0, or on every worker if tables are spread over them.
        loop: how to train.
        batch_size: rows of a global batch; a multiple of the number of workers.
        collate: an Arrow table of this worker's rows -> batch; for tasks on the log.
        train_stream: the training rows from an epoch (from 0) to the last one, as a Ray Dataset whose blocks are one
            worker's share of `batches_a_block` global batches each; for tasks on the log.
        valid_stream: the validation rows; for tasks on the log.
        batches: (rank, workers, step) -> this worker's batches; for tasks on the items.
        valid_batches: the same of the held-out items, from step 0.
        facts: what the output's manifest should say besides; `rows` are those of an epoch, and become those trained on.
        metrics: file, a path or URI, that rank 0 appends its records to, as JSON lines.
    """

    state: str
    output: str
    inputs: str
    task: Callable[[], Task]
    save: Callable[[Task, Path], None]
    loop: LoopConfig
    batch_size: int
    collate: Callable[[Any], Any] | None = None
    train_stream: Callable[[int], "ray.data.Dataset"] | None = None
    batches_a_block: int = 1
    valid_stream: Callable[[], "ray.data.Dataset"] | None = None
    batches: Callable[[int, int, int], Iterator[Any]] | None = None
    valid_batches: Callable[[int, int, int], Iterator[Any]] | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    metrics: str | None = None

    @property
    def checkpoint(self) -> str:
        """Name of the run's checkpoint in the state."""
        return f"{self.output}.checkpoint"

    @property
    def notes(self) -> str:
        """Folder of the state that Ray Train keeps its own notes of the run in."""
        return f"{self.output}.ray"

    def cursor(self) -> int:
        """Global batches that the latest checkpoint has behind it."""
        manifest = State(self.state).find(self.checkpoint, self.inputs)
        return manifest.facts["step"] if manifest else 0


def train(training: Training, plan: Plan) -> Manifest:
    """Run a training to its end and return its output. Goes on from a checkpoint of the same inputs.

    Raises:
        UserError: what a worker found wrong with the input, or workers that keep dying.
    """
    assert training.batch_size % plan.workers == 0, (training.batch_size, plan.workers)
    training = replace(training, loop=replace(training.loop, threads=plan.threads))
    state = State(training.state)
    for failures in range(MAX_FAILURES + 1):
        plan.wait_for_places()
        try:
            _trainer(training, plan).fit()
            break
        except ray.train.TrainingFailedError as error:
            wrong = user_error(error)
            if wrong or failures == MAX_FAILURES or not died(error):
                raise wrong or error from None
            print(f"a training worker died; going on from step {training.cursor():,}", flush=True)
    manifest = state.find(training.output, training.inputs)
    assert manifest is not None, "the trainer ended without writing its output"
    state.remove(training.checkpoint)
    state.clear(training.notes)
    return manifest


class Trainer(TorchTrainer):
    """Ray Train's, without two of its habits."""

    def _create_default_callbacks(self) -> list[Any]:
        """Not the one that asks the dashboard every second whether all is well: where there is none, as in a local Ray,
        a training ends twelve seconds late, when it has waited long enough for an answer."""
        callbacks = super()._create_default_callbacks()
        if has_dashboard():
            return callbacks
        return [each for each in callbacks if not isinstance(each, PlacementGroupCleanerCallback)]

    def _register_sigint_handler(self, controller: Any) -> None:
        """Not at all: it would end the job as if all were well, now and in every later stage."""


def _trainer(training: Training, plan: Plan) -> Trainer:
    datasets = {}
    if training.train_stream:
        # After the last epoch's checkpoint nothing is left to train on, but the stream must have something in it.
        epoch = min(training.cursor() // training.loop.steps_per_epoch, training.loop.epochs - 1)
        datasets["train"] = training.train_stream(epoch)
    if training.valid_stream:
        datasets["valid"] = training.valid_stream()
    # Ray Train restores an earlier run of the same name; ours goes on from its own checkpoint.
    name = f"{training.inputs}-{time.time_ns()}"
    return Trainer(
        _work,
        train_loop_config={"training": training},
        datasets=datasets,
        dataset_config=InOrder(),
        scaling_config=ScalingConfig(
            num_workers=plan.workers,
            use_gpu=plan.gpus > 0,
            resources_per_worker=plan.worker_resources,
            # Shares of CPUs are small, and a node's cores few: side by side on one they would share these.
            placement_strategy="PACK" if plan.gpus else "SPREAD",
        ),
        run_config=RunConfig(
            name=name,
            storage_path=State(training.state).path(training.notes),
            # Ray Train would go on by itself, with a stream that began at an earlier epoch.
            failure_config=FailureConfig(max_preemption_failures=0),
        ),
    )


def died(error: ray.train.TrainingFailedError) -> bool:
    """Whether a process died (an error of Ray's own), or lost one that did: only that is worth another try."""
    failures = getattr(error, "worker_failures", {}).values()
    gone = any(type(e).__module__.startswith("ray.") or isinstance(e, RuntimeError | OSError) for e in failures)
    return gone or isinstance(error, PreemptionError)


def _work(config: dict[str, Any]) -> None:
    """What each worker runs."""
    training: Training = config["training"]
    context = ray.train.get_context()
    group = DistributedGroup() if context.get_world_size() > 1 else Group()
    state = State(training.state)
    share = training.batch_size // group.size

    def batches(step: int) -> Iterator[Any]:
        if training.batches:
            return training.batches(group.rank, group.size, step)
        # The stream begins with the epoch: what a checkpoint has behind it is read and dropped.
        done, together = step % training.loop.steps_per_epoch, training.batches_a_block
        dealt = blocks(ray.train.get_dataset_shard("train"), share * together)
        tables = (table for block in dealt for table in split(block, together))
        return map(training.collate, islice(tables, done, None))

    def valid() -> Iterator[Any]:
        if training.valid_batches:
            return training.valid_batches(group.rank, group.size, 0)
        rows = max(share, 1024)
        dealt = blocks(ray.train.get_dataset_shard("valid"))
        return (training.collate(b.slice(start, rows)) for b in dealt for start in range(0, b.num_rows, rows))

    def save_checkpoint(write: Callable[[Path], None], progress: Progress) -> None:
        with state.create(training.checkpoint, training.inputs, {"step": progress.step}, writers) as folder:
            write(folder)

    resume = state.find(training.checkpoint, training.inputs)
    task = training.task()
    writers, record = group if is_collective(task) else Group(), Recorder(training.metrics)
    with contextlib.closing(record):
        progress = fit(
            task,
            batches,
            training.loop,
            group=group,
            device=get_device(),
            valid=valid if training.valid_stream or training.valid_batches else None,
            resume=state.local(training.checkpoint) if resume else None,
            checkpoint=save_checkpoint,
            record=record,
        )
    if group.rank == 0 or writers.size > 1:
        rows = round(training.facts["rows"] * progress.step / training.loop.steps_per_epoch)
        facts = training.facts | {
            "rows": rows,
            "losses": progress.losses,
            "valid_auc": progress.valid_auc,
            "valid_loss": progress.valid_loss,
            "best_epoch": progress.best_epoch,
            "data_wait": progress.waited / max(progress.seconds, 1e-9),
            "workers": group.size,
        }
        with state.create(training.output, training.inputs, facts, writers) as folder:
            training.save(task, folder)
    ray.train.report({"step": progress.step})


class Recorder:
    """Appends records to a file as JSON lines, with the time; nothing without a file.

    On object storage, where nothing is appended to, the file is written anew: at once after a validation, else not more
    often than `every` seconds, and for a fiftieth of the time.

    Args:
        path: a path or URI.
        every: seconds.
    """

    def __init__(self, path: str | None, every: float = 5.0) -> None:
        self.path, self.every = path, every
        self.lines: bytes | None = None
        self.next, self.waiting = -math.inf, False
        if path:
            self.filesystem, self.file = filesystem(path)

    def __call__(self, record: Record) -> None:
        if not self.path:
            return
        line = (json.dumps(record | {"time": time.time()}) + "\n").encode()
        # A console line is not worth a training: on another node the folder may not be there.
        with contextlib.suppress(OSError):
            if isinstance(self.filesystem, LocalFileSystem):
                with open(self.file, "ab") as stream:
                    stream.write(line)
                return
            if self.lines is None:  # of a worker that died
                known = self.filesystem.get_file_info(self.file).type == FileType.File
                self.lines = self.filesystem.open_input_stream(self.file).read() if known else b""
            self.lines, self.waiting = self.lines + line, True
            if time.monotonic() > self.next or not {"valid_auc", "valid_loss"}.isdisjoint(record):
                self.send()

    def send(self) -> None:
        """Write what there is to object storage."""
        began = time.monotonic()
        with self.filesystem.open_output_stream(self.file) as stream:
            stream.write(self.lines)
        ended, self.waiting = time.monotonic(), False
        self.next = ended + max(self.every, 50 * (ended - began))

    def close(self) -> None:
        """Write what waits."""
        if self.waiting:
            with contextlib.suppress(OSError):
                self.send()
