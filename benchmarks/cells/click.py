"""A click model on a log in memory: trained, and scored on its test rows."""

import time
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from benchmarks.cells.log import COLD, Log
from ctrdist.loop import LoopConfig, fit
from ctrdist.metrics import auc, log_loss
from ctrdist.tasks.click import ClickConfig, ClickModel, FuseConfig


def train_click(
    log: Log,
    config: ClickConfig,
    seed: int,
    text_table: np.ndarray | None = None,
    fuse: FuseConfig | None = None,
    rows: pa.Table | None = None,
    start: ClickModel | None = None,
) -> tuple[ClickModel, dict[str, Any]]:
    """A model, trained as the daily job does on one worker, and what that took: `ms_a_step`, `seconds` and of these
    `train_seconds` without validation, `parameters` of the network, and the last `valid_auc`.

    Args:
        text_table: float [catalog rows, width], for a fused model.
        rows: what to train on; the log's training rows if None.
        start: a model that is trained on, and returned; a new one if None.
    """
    width, size = 0 if text_table is None else text_table.shape[1], config.batch_size
    rows = log.train if rows is None else rows
    model = start or ClickModel(log.schema, log.sizes, config, width, fuse, seed)
    loop = LoopConfig(
        -(-rows.num_rows // size), config.epochs, config.patience, config.schedule, config.warmup, seed=seed
    )
    began = time.perf_counter()
    progress = fit(
        model,
        lambda _: (b for e in range(config.epochs) for b in log.batches(rows, size, (seed, e), text_table)),
        loop,
        valid=lambda: log.batches(log.valid, 4096, text_table=text_table),
    )
    return model, {
        "valid_auc": progress.best_auc,
        "ms_a_step": (progress.seconds - progress.waited) / progress.step * 1e3,
        "seconds": time.perf_counter() - began,
        "train_seconds": progress.seconds,
        "parameters": sum(p.numel() for p in model.backbone.parameters()),
    }


@torch.inference_mode()
def score(log: Log, model: ClickModel, text_table: np.ndarray | None = None) -> dict[str, float]:
    """`auc`, `log_loss`, and `auc_cold` of rows of cold items, on the test rows."""
    batches = log.batches(log.test, 4096, text_table=text_table)
    scores = np.concatenate([model.predict(batch).numpy() for batch in batches])
    label = log.test["label"].to_numpy()
    cold = log.counts[log.test["item"].to_numpy()] < COLD
    return {
        "auc": auc(label, scores),
        "log_loss": log_loss(label, scores),
        "auc_cold": auc(label[cold], scores[cold]),
    }
