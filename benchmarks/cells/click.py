"""A task on a log in memory: trained, and scored on its test rows."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from benchmarks.cells import language
from benchmarks.cells.log import COLD, Log
from ctrdist.config import to_dict
from ctrdist.export import load_click_model
from ctrdist.loop import LoopConfig, fit
from ctrdist.metrics import auc, calibration, calibration_error, log_loss
from ctrdist.storage import State
from ctrdist.tasks import Task
from ctrdist.tasks.click import ClickConfig, ClickModel
from ctrdist.text_field import FuseConfig
from ctrdist.text_training import alignment_targets

TARGETS = "targets.npy"


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
    if start is None and width:
        model.text_field.measure(text_table)
    facts = train_task(log, model, config, seed, text_table, rows)
    return model, facts | {"parameters": sum(p.numel() for p in model.backbone.parameters())}


@torch.inference_mode()
def score(log: Log, model: Task, text_table: np.ndarray | None = None) -> dict[str, float]:
    """`auc`, `log_loss`, `calibration_error`, and `auc_cold` of rows of cold items, on the test rows."""
    batches = log.batches(log.test, 4096, text_table=text_table)
    device = next(model.parameters()).device
    scores = np.concatenate([model.predict(batch.to(device)).cpu().numpy() for batch in batches])
    label = log.test["label"].to_numpy()
    cold = log.counts[log.test["item"].to_numpy()] < COLD
    return {
        "auc": auc(label, scores),
        "log_loss": log_loss(label, scores),
        "calibration_error": calibration_error(calibration(label, scores)),
        "auc_cold": auc(label[cold], scores[cold]),
    }


@dataclass(frozen=True)
class ClickCell:
    """A CTR model of a study (`benchmarks.cells.study`).

    Args:
        config: the model.
        seed: of its weights and batches.
        table: output with its text table; "" for an ID model, which leaves its item embeddings (`TARGETS`).
        fuse: the text field of a model with text.
        name: what to call it.
        start: output with a click model to begin with; "" for a new one.
    """

    config: ClickConfig
    seed: int
    table: str = ""
    fuse: FuseConfig | None = None
    name: str = ""
    start: str = ""

    @property
    def said(self) -> str:
        """Network, name and seed."""
        return f"{self.config.backbone} {self.name}, seed {self.seed}"

    def inputs(self, log: Log) -> list[Any]:
        """All that its scores depend on."""
        fuse = self.fuse and to_dict(self.fuse)
        return [log.fingerprint, to_dict(self.config), self.seed, self.table, fuse, self.start]

    def train(self, log: Log, state: State, out: Path) -> dict[str, Any]:
        """Train and score it; what it scores on the test rows, and what it took."""
        table = np.load(state.local(self.table) / language.TABLE, mmap_mode="r") if self.table else None
        start = load_click_model(state.local(self.start), log.schema, self.config) if self.start else None
        model, facts = train_click(log, self.config, self.seed, table, self.fuse, start=start)
        if table is None:
            np.save(out / TARGETS, alignment_targets(model, log.schema, log.catalog).numpy())
        return score(log, model, table) | facts
