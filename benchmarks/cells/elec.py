"""ELEC's parts on a log in memory: a language model's states, its layers, representations, and the pair."""

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from benchmarks.cells.log import Log
from ctrdist.encode import VECTOR
from ctrdist.language.encode import EncodeConfig, Encoder, Source
from ctrdist.loop import LoopConfig, fit
from ctrdist.tasks.click import ClickConfig
from ctrdist.tasks.distill import Distillation, DistillConfig
from ctrdist.tasks.m_llm import MLLMConfig, ModifiedLanguageModel

PARTS = ("train", "valid", "test")


def item_states(log: Log, model: Source, config: EncodeConfig) -> np.ndarray:
    """The states of all items' texts, [catalog rows, width], zeros without an item."""
    texts = log.texts.to_pylist()
    states = Encoder(model.load(), config).encode(model.tokenizer(config.max_length)(texts))
    states[~log.catalog.present] = 0
    return states


def train_m_llm(
    log: Log, states: np.ndarray, config: MLLMConfig, seed: int
) -> tuple[ModifiedLanguageModel, dict[str, float]]:
    """The layers on the language model, trained as the daily job does on one worker, and what that took."""
    model = ModifiedLanguageModel(states.shape[1], log.schema.history_length > 0, config, seed)
    return model, _train(model, log, config, seed, states)


@torch.inference_mode()
def with_representations(log: Log, model: ModifiedLanguageModel, states: np.ndarray) -> Log:
    """The log with the representation of every row, float16 as beside a log on disk."""

    def beside(rows: pa.Table) -> pa.Table:
        parts = [model.represent(batch).numpy() for batch in log.batches(rows, 4096, text_table=states)]
        flat = pa.array(np.concatenate(parts).astype(np.float16).ravel())
        return rows.append_column(VECTOR, pa.FixedSizeListArray.from_arrays(flat, model.width))

    return replace(log, **{part: beside(getattr(log, part)) for part in PARTS})


def train_pair(log: Log, ctr: ClickConfig, config: DistillConfig, width: int, seed: int) -> tuple[Distillation, dict]:
    """Gain and vanilla network, trained as the daily job does on one worker, and what that took: `ms_a_step`.

    Args:
        log: with representations, unless `width` is 0.
    """
    pair = Distillation.build(log.schema, log.sizes, ctr, config, width, seed)
    return pair, _train(pair, log, ctr, seed)


def _train(task: Any, log: Log, config: Any, seed: int, text_table: np.ndarray | None = None) -> dict[str, float]:
    size = config.batch_size
    loop = LoopConfig(
        -(-log.train.num_rows // size), config.epochs, schedule=config.schedule, warmup=config.warmup, seed=seed
    )
    began = time.perf_counter()
    epochs = range(config.epochs)
    progress = fit(
        task, lambda _: (b for e in epochs for b in log.batches(log.train, size, (seed, e), text_table)), loop
    )
    return {
        "ms_a_step": (progress.seconds - progress.waited) / progress.step * 1e3,
        "seconds": time.perf_counter() - began,
    }
