"""Latency: requests that are drawn once and answered by all, in turns, and how their milliseconds spread."""

import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from benchmarks.cells.log import Log
from ctrdist.batch import collate, row_columns
from ctrdist.encode import ITEM
from ctrdist.items import Catalog
from ctrdist.schema import Schema
from ctrdist.serving.model import Rows, ServedModel
from ctrdist.tasks.click import ClickModel

Score = Callable[[pa.Table], Tensor]
"""A request, encoded rows (`ctrdist.encode`), one a candidate -> their click probabilities [candidates]."""
Clock = Callable[[list[pa.Table]], list[float]]
"""Requests -> the milliseconds of each."""


def draw_requests(log: Log, candidates: int, seed: int, count: int) -> Iterator[pa.Table]:
    """Requests: the user, context and history of a test row, with candidates of the catalog, each there once.

    Args:
        candidates: of a request, at most all items.
        count: of the requests.
    """
    draw, items = np.random.default_rng(seed), log.catalog.items
    size = min(candidates, len(items))
    for _ in range(count):
        request = log.test.take(pa.array(np.full(size, draw.integers(log.test.num_rows))))
        drawn = pa.array(draw.choice(items, size, replace=False).astype(np.int32))
        yield request.set_column(request.column_names.index(ITEM), ITEM, drawn)


def scorer(schema: Schema, catalog: Catalog, model: ClickModel, text_table: np.ndarray | None = None) -> Score:
    """Scores by a click model: distinct ids are found, items' fields and texts gathered, and it computes."""
    return lambda request: model.predict(collate(request, schema, catalog, text_table))


def server(schema: Schema, model: ServedModel) -> Score:
    """Scores by what is served: what the user has is gathered and computed once, and the network is a compiled graph.

    The server's threads are those of the process. Where nothing compiled the graph, it is the exported one.
    """

    def score(request: pa.Table) -> Tensor:
        fields, history = row_columns(request, schema)
        return torch.from_numpy(model.score(Rows(request[ITEM].to_numpy(), fields, history)))

    return score


@torch.inference_mode()
def time_requests(score: Score, requests: list[pa.Table]) -> list[float]:
    """Milliseconds of each request, one after the other."""
    found = []
    for request in requests:
        began = time.perf_counter()
        score(request)
        found.append((time.perf_counter() - began) * 1e3)
    return found


def answer_in_turns(clocks: dict[str, Clock], rounds: Iterable[list[pa.Table]]) -> dict[str, np.ndarray]:
    """Milliseconds [rounds, requests of a round] by name. In each round all answer the same requests, one after the
    other, every second time in the other order: what else the machine does meets all of them."""
    found: dict[str, list[list[float]]] = {name: [] for name in clocks}
    for number, requests in enumerate(rounds):
        for name in sorted(clocks, reverse=bool(number % 2)):
            found[name].append(clocks[name](requests))
    return {name: np.array(values) for name, values in found.items()}


def summary(ms: np.ndarray) -> dict[str, float]:
    """Median, 99th percentile, mean and standard deviation of milliseconds."""
    p50, p99 = np.percentile(ms, (50, 99))
    return {"p50_ms": float(p50), "p99_ms": float(p99), "mean_ms": float(ms.mean()), "sd_ms": float(ms.std())}
