"""A task on a log in memory: trained, and scored on its test rows."""

import time
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from benchmarks.cells.log import COLD, Log
from ctrdist.loop import LoopConfig, fit
from ctrdist.metrics import auc, log_loss
from ctrdist.tasks import Task
from ctrdist.tasks.click import ClickConfig, ClickModel, FuseConfig


def train_task(
    log: Log,
    task: Task,
    config: Any,
    seed: int,
    text_table: np.ndarray | None = None,
    rows: pa.Table | None = None,
    device: str = "cpu",
) -> dict[str, float]:
    """Train a task on a log as the daily job does on one worker; what that took: `ms_a_step`, `seconds` and of these
    `train_seconds` without validation, and the last `valid_auc`.

    Args:
        config: its options; an epoch's rows are shuffled, whatever `order` it may have.
        text_table: float [catalog rows, width], for a task that takes texts.
        rows: what to train on; the log's training rows if None.
    """
    rows, size = log.train if rows is None else rows, config.batch_size
    loop = LoopConfig(
        -(-rows.num_rows // size),
        config.epochs,
        config.patience,
        config.schedule,
        config.warmup,
        precision=config.precision,
        seed=seed,
    )
    began = time.perf_counter()
    progress = fit(
        task,
        lambda _: (b for e in range(config.epochs) for b in log.batches(rows, size, (seed, e), text_table)),
        loop,
        valid=lambda: log.batches(log.valid, 4096, text_table=text_table),
        device=device,
    )
    return {
        "valid_auc": progress.best_auc,
        "ms_a_step": (progress.seconds - progress.waited) / progress.step * 1e3,
        "seconds": time.perf_counter() - began,
        "train_seconds": progress.seconds,
    }


def train_click(
    log: Log,
    config: ClickConfig,
    seed: int,
    text_table: np.ndarray | None = None,
    fuse: FuseConfig | None = None,
    rows: pa.Table | None = None,
    start: ClickModel | None = None,
) -> tuple[ClickModel, dict[str, float]]:
    """A model, and what `train_task` says of its training; `parameters` are those of the network.

    Args:
        text_table: float [catalog rows, width], for a fused model.
        rows: what to train on; the log's training rows if None.
        start: a model that is trained on, and returned; a new one if None.
    """
    width = 0 if text_table is None else text_table.shape[1]
    model = start or ClickModel(log.schema, log.sizes, config, width, fuse, seed)
    facts = train_task(log, model, config, seed, text_table, rows)
    return model, facts | {"parameters": sum(p.numel() for p in model.backbone.parameters())}


@torch.inference_mode()
def score(log: Log, model: Task, text_table: np.ndarray | None = None) -> dict[str, float]:
    """`auc`, `log_loss`, and `auc_cold` of rows of cold items, on the test rows."""
    batches = log.batches(log.test, 4096, text_table=text_table)
    device = next(model.parameters()).device
    scores = np.concatenate([model.predict(batch.to(device)).cpu().numpy() for batch in batches])
    label = log.test["label"].to_numpy()
    cold = log.counts[log.test["item"].to_numpy()] < COLD
    return {
        "auc": auc(label, scores),
        "log_loss": log_loss(label, scores),
        "auc_cold": auc(label[cold], scores[cold]),
    }
