"""ELEC's parts on a log in memory: the layers on a language model, their representations, and the pair."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from benchmarks.cells.click import score, train_task
from benchmarks.cells.log import Log
from ctrdist.config import to_dict
from ctrdist.encode import VECTOR
from ctrdist.storage import State
from ctrdist.tasks.click import ClickConfig
from ctrdist.tasks.distill import Distillation, DistillConfig
from ctrdist.tasks.m_llm import MLLMConfig, ModifiedLanguageModel

PARTS = ("train", "valid", "test")


def train_m_llm(log: Log, states: np.ndarray, config: MLLMConfig, seed: int, out: Path) -> dict[str, Any]:
    """The layers on the language model, trained as the daily job does on one worker.

    The representations of the log's rows go to folder `out`, a file for each of `PARTS`: float16 [rows, width], as
    beside a log on disk.

    Returns:
        What it scores on the test rows, and what it took.
    """
    model = ModifiedLanguageModel(states.shape[1], log.schema.history_length > 0, config, seed)
    facts = train_task(log, model, config, seed, states)
    with torch.inference_mode():
        for part in PARTS:
            batches = log.batches(getattr(log, part), 4096, text_table=states)
            vectors = [model.represent(batch).numpy().astype(np.float16) for batch in batches]
            np.save(out / f"{part}.npy", np.concatenate(vectors))
    return score(log, model, states) | facts


def with_representations(log: Log, folder: Path) -> Log:
    """The log with the representation of every row that `train_m_llm` wrote."""

    def beside(part: str) -> pa.Table:
        vectors = np.load(folder / f"{part}.npy")
        lists = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
        return getattr(log, part).append_column(VECTOR, lists)

    return replace(log, **{part: beside(part) for part in PARTS})


@dataclass(frozen=True)
class PairCell:
    """Gain and vanilla network of a study (`benchmarks.cells.study`).

    Args:
        config: of both networks.
        distill: how the gain network teaches.
        seed: of the pair's weights and batches.
        m_llm: output with the rows' representations; "" without text.
        name: what to call it.
    """

    config: ClickConfig
    distill: DistillConfig
    seed: int
    m_llm: str = ""
    name: str = ""

    @property
    def said(self) -> str:
        """Network, name and seed; what is said of its scores is the vanilla network's."""
        return f"{self.config.backbone} {self.name}, seed {self.seed}"

    def inputs(self, log: Log) -> list[Any]:
        """All that its scores depend on."""
        return [log.fingerprint, to_dict(self.config), to_dict(self.distill), self.seed, self.m_llm]

    def train(self, log: Log, state: State, _out: Path) -> dict[str, Any]:
        """Train the pair as the daily job does on one worker; what the vanilla network scores on the test rows, what
        the `gain` network does, and what it took."""
        along, width = log, 0
        if self.m_llm:
            along = with_representations(log, state.local(self.m_llm))
            width = along.test.schema.field(VECTOR).type.list_size
        pair = Distillation.build(log.schema, log.sizes, self.config, self.distill, width, self.seed)
        took = train_task(along, pair, self.config, self.seed)
        return score(along, pair.vanilla) | {"gain": score(along, pair.whole_gain())} | took
