"""A study: cells, each a model, in processes of one thread, and what they share, by all cores. What is done is kept."""

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from scipy.stats import ttest_rel

from benchmarks.cells import language
from benchmarks.cells.kept import find, once
from benchmarks.cells.log import Log
from ctrdist.config import to_dict
from ctrdist.language import source
from ctrdist.storage import Manifest, State
from ctrdist.tasks.pretrain import PretrainConfig
from ctrdist.text_training import LanguageModelConfig


class Cell(Protocol):
    """A frozen dataclass that says all of what is to be trained."""

    @property
    def said(self) -> str:
        """What to call it."""

    def inputs(self, log: Log) -> list[Any]:
        """All that its scores depend on."""

    def train(self, log: Log, state: State, out: Path) -> dict[str, Any]:
        """Train and score it; what it scores on the test rows, `auc` and `auc_cold` among it, and what it took."""


LOG: Log
"""The log of this process."""


@contextmanager
def processes(log: Log, count: int) -> Iterator[ProcessPoolExecutor]:
    """Processes of one thread each, with `LOG`; 0 is one a core."""
    count = count or len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(count, get_context("spawn"), _begin, (log,)) as pool:
        yield pool


def _begin(log: Log) -> None:
    global LOG
    LOG = log
    torch.set_num_threads(1)


def run(cell: Cell, state: State) -> Manifest:
    """Compute a cell, if it is not there."""
    return once(state, "cells", *cell.inputs(LOG), make=partial(cell.train, LOG, state))


@dataclass
class Study:
    """A log, and who computes what is not known of it.

    Args:
        log: the log.
        state: where outputs are kept.
        pool: processes that compute cells.
    """

    log: Log
    state: State
    pool: ProcessPoolExecutor

    def cells(self, cells: list[Cell]) -> dict[Cell, Manifest]:
        """Those that are there, and the others as the pool has done them."""
        found = {cell: find(self.state, "cells", *cell.inputs(self.log)) for cell in cells}
        running = {self.pool.submit(run, cell, self.state): cell for cell, done in found.items() if done is None}
        for done in as_completed(running):
            cell = running[done]
            found[cell] = done.result()
            facts = found[cell].facts
            say(f"{cell.said}: AUC {facts['auc']:.4f}, cold {facts['auc_cold']:.4f}, {facts['seconds']:.0f} s")
        return found

    def stage(self, kind: str, *inputs: Any, make: Callable[[Path], dict[str, Any]]) -> Manifest:
        """An output that cells share, made by all cores if it is not there."""
        known = find(self.state, kind, *inputs)
        made = known or once(self.state, kind, *inputs, make=make)
        if known is None:
            say(f"{kind}: {made.facts.get('seconds', 0):.0f} s")
        return made

    def pretrained(self, lm: LanguageModelConfig, config: PretrainConfig, seed: int) -> Manifest:
        """A language model after DAP on the items' texts; without epochs, as it comes."""
        made_of = [to_dict(lm), source.identity(lm.name)]
        if config.epochs:
            made_of += [to_dict(config), seed, self.log.text_fingerprint]
        return self.stage("dap", *made_of, make=partial(language.pretrain, self.log, lm, config, seed))


def spread(values: np.ndarray) -> float:
    """Standard deviation of a sample, 0 of a single value."""
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0


def paired_p(values: np.ndarray, others: np.ndarray) -> float:
    """p of a paired t-test; NaN where it says nothing: of one pair, or of the same difference in all."""
    tested = len(values) > 1 and np.ptp(values - others) > 0
    return float(ttest_rel(values, others).pvalue) if tested else float("nan")


def say(line: str) -> None:
    """A line for who waits."""
    print(line, file=sys.stderr, flush=True)
