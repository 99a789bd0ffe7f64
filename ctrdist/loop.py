"""**The** training loop: every stage of every method is a task that it runs, on one worker or many."""

import math
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ctrdist.allocator import keep_freed_memory
from ctrdist.checkpoint import Progress, load_checkpoint, save_checkpoint
from ctrdist.embedding import EmbeddingTable, push_all, tables_of
from ctrdist.errors import UserError
from ctrdist.group import Group, attach_group
from ctrdist.metrics import StreamingMetrics
from ctrdist.optim import Schedule, learning_rate
from ctrdist.precision import Precision, computing_in
from ctrdist.sharded import is_collective
from ctrdist.tasks import Task

Record = dict[str, float]


@dataclass(frozen=True)
class LoopConfig:
    """How a task is trained.

    Args:
        steps_per_epoch: global batches of an epoch.
        epochs: epochs, at most.
        patience: stop after this many epochs without a better validation score (see `validate`), and end with the best
            epoch's weights; 0 trains to the end and keeps the last weights.
        schedule: course of the learning rates.
        warmup: share of all steps over which they rise.
        clip_norm: largest norm of the dense gradients; 0 for no limit.
        precision: `bfloat16` is autocast; `auto` is that where the chip computes in it, else float32.
        seed: decides every draw; each step draws from (seed, step, rank).
        log_seconds: seconds between two records of the loss.
        checkpoint_seconds: seconds between two checkpoints within an epoch, or twenty times what one takes to write, if
            that is more; there is one after each epoch in any case.
        threads: threads of this process; 0 leaves PyTorch's choice.
    """

    steps_per_epoch: int
    epochs: int = 1
    patience: int = 0
    schedule: Schedule = "constant"
    warmup: float = 0.0
    clip_norm: float = 0.0
    precision: Precision = "float32"
    seed: int = 0
    log_seconds: float = 2.0
    checkpoint_seconds: float = 300.0
    threads: int = 0


def fit(
    task: Task,
    train: Callable[[int], Iterator[Any]],
    config: LoopConfig,
    *,
    group: Group | None = None,
    valid: Callable[[], Iterator[Any]] | None = None,
    device: str | torch.device = "cpu",
    resume: Path | None = None,
    checkpoint: Callable[[Callable[[Path], None], Progress], None] | None = None,
    record: Callable[[Record], None] | None = None,
) -> Progress:
    """Train `task` in place; it ends with the last weights or, with patience, with the best epoch's by validation.

    Args:
        train: this worker's batches from global batch `step` on, through all the epochs. Every worker gets the same
            number of them; some may be empty.
        group: the workers that train together; alone if None.
        valid: this worker's share of the validation rows, anew at each call. For a task that is judged by its loss,
            every worker gets the same number of batches; some may be empty.
        resume: folder that an earlier `checkpoint` wrote; training goes on from there.
        checkpoint: called with a function that writes a checkpoint to a folder: on rank 0 or, if tables are spread over
            the workers (`is_collective`), on every one of them at the same step, with one folder for all.
        record: called on rank 0 with metrics to log: step, epoch, loss terms, rows/s, share of time waiting for data.

    Raises:
        UserError: the loss is not finite.
    """
    group = group or Group()
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(device)  # what workers share without a tensor of their own goes through it
    else:
        keep_freed_memory()
    if config.threads:
        torch.set_num_threads(config.threads)
    task = task.to(device)
    if config.precision == "float64":
        task.double()
    attach_group(task, group)
    tables, together = tables_of(task), is_collective(task)
    optimizer = make_optimizer(task)
    model = wrap(task, group, device)
    progress, best = Progress(), None
    if resume is not None:
        progress, best = load_checkpoint(resume, task, optimizer)
    meter = Meter(progress, config, record if group.rank == 0 else None)
    total = config.steps_per_epoch * config.epochs
    saved_at, pause = time.monotonic(), 0.0
    batches = prefetch(train(progress.step)) if progress.step < total and not progress.finished else iter(())
    task.train()
    while progress.step < total and not progress.finished:
        with meter.waiting():
            batch = next(batches).to(device)
        torch.manual_seed(hash((config.seed, progress.step, group.rank)) & 0x7FFFFFFF)
        factor = learning_rate(config.schedule, config.warmup, progress.step, total)
        for parameters in optimizer.param_groups:  # some have a course of their own
            own = parameters.get("schedule", config.schedule), parameters.get("warmup", config.warmup)
            parameters["lr"] = parameters["initial_lr"] * learning_rate(*own, progress.step, total)
        with computing_in(config.precision, device):
            losses = model(batch)
        update(losses["loss"], optimizer, tables, group, factor, config.clip_norm)
        progress.step += 1
        meter.add(losses, len(batch) * group.size)
        ended = progress.step % config.steps_per_epoch == 0
        if ended:
            meter.flush()
            if valid is not None:
                best, score = validate(task, valid, progress, config, group, device, best, batch)
                meter.validated(score)
            progress.finished = progress.finished or progress.step >= total
        due = ended or time.monotonic() - saved_at > max(config.checkpoint_seconds, pause)
        if checkpoint and together:  # the first worker's clock counts
            due = bool(group.all_reduce(torch.tensor(int(due and group.rank == 0), device=device)))
        if checkpoint and due and (together or group.rank == 0):
            meter.flush()  # which refuses a loss that is not finite, before it is kept
            write = partial(save_checkpoint, task=task, optimizer=optimizer, progress=progress, best=best, group=group)
            began = time.monotonic()
            checkpoint(write, progress)
            saved_at = time.monotonic()
            pause = 20 * (saved_at - began) if config.checkpoint_seconds > 0 else 0.0
    if best is not None:
        task.load_state_dict(best)
    for table in tables:
        table.settle()
    task.eval()
    return progress


def update(
    loss: Tensor,
    optimizer: torch.optim.Optimizer,
    tables: list[EmbeddingTable],
    group: Group,
    factor: float = 1.0,
    clip_norm: float = 0.0,
) -> None:
    """What follows the forward pass in a step of training: gradients, and the updates of network and tables.

    Args:
        optimizer: of the network, whose groups have the step's learning rates.
        factor: on the tables' learning rates.
        clip_norm: largest norm of the dense gradients; 0 for no limit.
    """
    loss.backward()
    if clip_norm:
        nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    push_all(tables, group, factor)


def make_optimizer(task: Task) -> torch.optim.AdamW:
    """AdamW over the task's groups; whatever no group names is frozen."""
    groups = task.parameter_groups()
    named = {id(p) for group in groups for p in group["params"]}
    for parameter in task.parameters():
        parameter.requires_grad_(id(parameter) in named)
    groups = [group | {"initial_lr": group["lr"]} for group in groups] or [
        {"params": [nn.Parameter(torch.zeros(1))], "initial_lr": 0.0}
    ]
    return torch.optim.AdamW(groups, fused=True)  # one kernel for all tensors: they are many and small


def wrap(task: Task, group: Group, device: str | torch.device) -> nn.Module:
    """The task in DDP, if there are several workers and something dense to train; DDP skips tables (buffers)."""
    if group.size == 1 or not any(p.requires_grad for p in task.parameters()):
        return task
    ids = [torch.device(device)] if torch.device(device).type == "cuda" else None
    return nn.parallel.DistributedDataParallel(task, device_ids=ids, broadcast_buffers=False)


@torch.no_grad()
def validate(
    task: Task,
    valid: Callable[[], Iterator[Any]],
    progress: Progress,
    config: LoopConfig,
    group: Group,
    device: str | torch.device,
    best: dict[str, Tensor] | None,
    like: Any,
) -> tuple[dict[str, Tensor] | None, Record]:
    """Score the validation rows of all workers and note the score; with patience, keep a copy of the best weights.

    A task that predicts is judged by the AUC, any other by its own loss in evaluation mode.

    Args:
        like: a batch of this task; only sharded tables need it, of which a worker without rows left must take part in
            the look-ups of the others.

    Returns:
        The best weights so far, None without patience, and the score, `valid_auc` or `valid_loss`.
    """
    task.eval()
    for table in tables_of(task):
        table.settle()
    by_auc = type(task).predict is not Task.predict
    name = "auc" if by_auc else "loss"
    if by_auc:
        score = _auc(task, prefetch(valid()), group, device, like)
    else:
        score = _mean_loss(task, prefetch(valid()), config, group, device)
    task.train()
    epoch, before = progress.step // config.steps_per_epoch, getattr(progress, f"best_{name}")
    getattr(progress, f"valid_{name}").append([epoch, score])
    record = {f"valid_{name}": score}
    better = math.isnan(before) or (score > before if by_auc else score < before)
    if better or best is None:
        setattr(progress, f"best_{name}", score)
        progress.best_epoch = epoch
        if config.patience:
            best = {name: value.detach().clone() for name, value in task.state_dict().items()}
    progress.finished = bool(config.patience) and epoch - progress.best_epoch >= config.patience
    return best, record


def _auc(task: Task, batches: Iterator[Any], group: Group, device: str | torch.device, like: Any) -> float:
    metrics = StreamingMetrics()
    batches = (batch for batch in batches if len(batch))
    for batch in in_step(batches, like.empty(), group, device) if is_collective(task) else batches:
        batch = batch.to(device)
        metrics.update(batch.label.cpu().numpy(), task.predict(batch).cpu().numpy())
    total = group.all_reduce(torch.from_numpy(metrics.state).to(device)).cpu().numpy()
    metrics = StreamingMetrics()
    metrics.merge(total)
    return metrics.auc()


def _mean_loss(
    task: Task, batches: Iterator[Any], config: LoopConfig, group: Group, device: str | torch.device
) -> float:
    """The task's loss over all global batches, each weighted by its rows."""
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in batches:
        batch = batch.to(device)
        with computing_in(config.precision, device):
            loss = task(batch)["loss"]
        sums += len(batch) * torch.stack([loss.double(), loss.new_ones((), dtype=torch.float64)])
    total, rows = group.all_reduce(sums).tolist()
    return total / max(rows, 1.0)


def in_step(batches: Iterator[Any], empty: Any, group: Group, device: str | torch.device) -> Iterator[Any]:
    """The batches, and then `empty` for as long as another worker has some."""
    while True:
        batch = next(batches, None)
        if not group.all_reduce(torch.tensor(int(batch is not None), device=device)):
            return
        yield empty if batch is None else batch


class Meter:
    """Losses and speed between two records. The losses stay on the device until a record is due."""

    def __init__(self, progress: Progress, config: LoopConfig, record: Callable[[Record], None] | None) -> None:
        self.progress, self.config, self.record = progress, config, record
        self.sums: dict[str, Tensor] = {}
        self.steps = self.rows = 0
        self.waited = 0.0
        self.since = time.monotonic()
        self.started = False

    def waiting(self) -> "Meter":
        """A context whose time counts as waiting for data."""
        return self

    def __enter__(self) -> None:
        self.entered = time.monotonic()

    def __exit__(self, *exception: object) -> None:
        now = time.monotonic()
        if self.started:
            self.waited += now - self.entered
        else:  # a stream takes seconds to start, which say nothing of its speed
            self.since, self.started = now, True

    def add(self, losses: dict[str, Tensor], rows: int) -> None:
        """Count a step; a record follows when it is due."""
        for name, value in losses.items():
            value = value.detach()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.steps += 1
        self.rows += rows
        if time.monotonic() - self.since >= self.config.log_seconds:
            self.flush()

    def flush(self) -> None:
        """Record the means since the last record."""
        if not self.steps:
            return
        seconds = max(1e-9, time.monotonic() - self.since)
        means = {name: (value / self.steps).item() for name, value in self.sums.items()}
        if not math.isfinite(means["loss"]):
            raise UserError(
                f"the loss is {means['loss']} at step {self.progress.step}; lower the learning rate "
                "(--ctr.lr, --ctr.table-lr, --pretrain.lr, --align.lr, --finetune.lr, --lm.lora.lr or --m-llm.lr)"
            )
        self.progress.losses.append([self.progress.step, means["loss"]])
        self.progress.seconds += seconds
        self.progress.waited += self.waited
        self._send(means | {"rows_per_second": self.rows / seconds, "data_wait": self.waited / seconds})
        self.sums, self.steps, self.rows, self.waited, self.since = {}, 0, 0, 0.0, time.monotonic()

    def validated(self, score: Record) -> None:
        """Record a validation's score."""
        self._send(score)
        self.since = time.monotonic()

    def _send(self, values: Record) -> None:
        if self.record:
            steps = self.config.steps_per_epoch
            self.record(
                {"step": self.progress.step, "steps": steps * self.config.epochs, "epoch": self.progress.step / steps}
                | values
            )


def prefetch(batches: Iterator[Any], depth: int = 2) -> Iterator[Any]:
    """The same batches, made in a thread that stays `depth` ahead. An error there is raised here."""
    ready: queue.Queue = queue.Queue(depth)
    stop = threading.Event()

    def put(item: tuple[str, Any]) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for batch in batches:
                if not put(("batch", batch)):
                    return
            put(("end", None))
        except BaseException as error:
            put(("error", error))

    threading.Thread(target=work, name="prefetch", daemon=True).start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        stop.set()
