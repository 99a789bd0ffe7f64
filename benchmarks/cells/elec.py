"""ELEC's parts on a log in memory: the layers on a language model, their representations, and the pair."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import torch

from benchmarks.cells.click import train_task
from benchmarks.cells.log import Log
from ctrdist.encode import VECTOR
from ctrdist.tasks.click import ClickConfig
from ctrdist.tasks.distill import Distillation, DistillConfig
from ctrdist.tasks.m_llm import MLLMConfig, ModifiedLanguageModel

PARTS = ("train", "valid", "test")


def train_m_llm(
    log: Log, states: np.ndarray, config: MLLMConfig, seed: int
) -> tuple[ModifiedLanguageModel, dict[str, float]]:
    """The layers on the language model, trained as the daily job does on one worker, and what that took."""
    model = ModifiedLanguageModel(states.shape[1], log.schema.history_length > 0, config, seed)
    return model, train_task(log, model, config, seed, states)


@torch.inference_mode()
def with_representations(log: Log, model: ModifiedLanguageModel, states: np.ndarray) -> Log:
    """The log with the representation of every row, float16 as beside a log on disk."""

    def beside(rows: pa.Table) -> pa.Table:
        parts = [model.represent(batch).numpy() for batch in log.batches(rows, 4096, text_table=states)]
        flat = pa.array(np.concatenate(parts).astype(np.float16).ravel())
        return rows.append_column(VECTOR, pa.FixedSizeListArray.from_arrays(flat, model.width))

    return replace(log, **{part: beside(getattr(log, part)) for part in PARTS})


def train_pair(log: Log, ctr: ClickConfig, config: DistillConfig, width: int, seed: int) -> tuple[Distillation, dict]:
    """Gain and vanilla network, trained as the daily job does on one worker, and what that took.

    Args:
        log: with representations, unless `width` is 0.
    """
    pair = Distillation.build(log.schema, log.sizes, ctr, config, width, seed)
    return pair, train_task(log, pair, ctr, seed)
