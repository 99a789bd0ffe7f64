"""What ClickPrompt's report says of the long tail, of attention on prompts, and of what a prediction costs (tables 6 to
8)."""

import time
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from ctrdist import metrics
from ctrdist.encode import ITEM
from ctrdist.epoch import plan_pass
from ctrdist.prompted import attention_by_field, load_prompted, load_scorer
from ctrdist.scan import count_users
from ctrdist.schema import LABEL, USER_ID
from ctrdist.storage import Manifest, fingerprint
from raycluster.cluster import in_parallel
from raycluster.day import Day
from raycluster.ingest import LogReader
from raycluster.stages.click import encoded_batch
from raycluster.stages.read import Read

ROWS, TIMES = 128, 20
"""Rows of a batch that is timed, and how often it is."""


def quadrants(day: Day, read: Read, names: list[str]) -> list[dict[str, Any]]:
    """AUC by whether user and item of a test row are of the long tail of the window's training rows.

    Args:
        names: of the models that `evaluate` has scored.
    """
    scored = pq.read_table(day.state.local(day.stages["evaluate"].name) / "predictions.parquet")
    users, counts = _user_counts(day)
    at = pc.index_in(scored[USER_ID].cast(pa.large_string()), users)
    of_row = np.append(counts, 0)[pc.fill_null(at, len(counts)).to_numpy()]
    edges = metrics.tail_edge(counts), metrics.tail_edge(read.counts)
    scores = {name: scored[name].to_numpy() for name in names}
    return metrics.quadrants(of_row, read.counts[scored[ITEM].to_numpy()], edges, scored[LABEL].to_numpy(), scores)


def _user_counts(day: Day) -> tuple[pa.Array, np.ndarray]:
    """The users of the window's training days, and the rows of each, bad ones included."""
    groups = day.groups(day.window.train)
    calls = [(day.options.data, group) for group in groups]
    parts = list(in_parallel(count_users, calls, day.plan.readers, **day.plan.reader_resources))
    total = pa.concat_tables(parts).group_by("values").aggregate([("counts", "sum")])
    return total["values"].combine_chunks(), total["counts_sum"].to_numpy()


def _some_rows(day: Day, read: Read, said: Manifest) -> tuple[LogReader, pa.Table]:
    """The first test rows, encoded, and what has read them."""
    reader = LogReader(day.options.data, day.state.uri, read.output.name, tokens=said.name)
    first = plan_pass(read.groups(day.window.test)[:1])[0]
    return reader, reader.read(first).slice(0, ROWS)


def prompt_attention(day: Day, read: Read, said: Manifest, pretrained: Manifest) -> dict[str, list[float]]:
    """`attention_by_field` of the pre-trained models on 128 test rows.

    Args:
        said: output of `stages.clickprompt.tokens`.
        pretrained: output of `stages.clickprompt.pretrain`.
    """
    reader, rows = _some_rows(day, read, said)
    texts, task = reader.row_texts(), load_prompted(day.state.local(pretrained.name), reader.open()[0])
    return attention_by_field(task, encoded_batch(reader, None, rows), texts.tokens_by_field(rows), texts.fields)


def inference_times(day: Day, read: Read, said: Manifest, models: dict[str, Manifest]) -> Manifest:
    """Milliseconds that each model takes to score a batch of 128 test rows, in this process: fact `batch_ms`.

    Args:
        said: output of `stages.clickprompt.tokens`.
        models: outputs, by name.
    """
    inputs = fingerprint(read.identity, said.identity, {name: model.identity for name, model in models.items()})

    def make(name: str, inputs: str, _metrics: str) -> Manifest:
        reader, rows = _some_rows(day, read, said)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        batch = encoded_batch(reader, None, rows).to(device)
        loaded = {n: load_scorer(day.state.local(m.name), reader.open()[0]).to(device) for n, m in models.items()}
        took: dict[str, list[float]] = {name: [] for name in loaded}
        with torch.inference_mode():
            for _ in range(TIMES + 1):
                for model, score in loaded.items():
                    began = time.perf_counter()
                    score.predict(batch).cpu()
                    took[model].append(1000 * (time.perf_counter() - began))
        facts = {"rows": len(batch), "batch_ms": {model: median(times[1:]) for model, times in took.items()}}
        with day.state.create(name, inputs, facts):
            pass
        return day.state.find(name)

    return day.stage("inference", inputs, make)
