"""The last stage: every model on the same test rows."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from ray.data import ActorPoolStrategy

from ctrdist import metrics
from ctrdist.beside import PROBABILITY
from ctrdist.encode import ITEM
from ctrdist.epoch import Chunk, plan_pass
from ctrdist.export import load_click_model
from ctrdist.log import RowGroup
from ctrdist.schema import LABEL, USER_ID
from ctrdist.storage import Manifest, State, fingerprint
from raycluster import ingest
from raycluster.day import Day
from raycluster.ingest import LogReader
from raycluster.planning import Plan
from raycluster.stages.click import encoded_batch
from raycluster.stages.read import Read


class Scored(NamedTuple):
    """What scores the test rows.

    Args:
        output: of a click model; None for a model whose probabilities stand beside the log.
        text: output of its text table, if it has one.
        folder: of the model within its output.
    """

    output: Manifest | None
    text: Manifest | None = None
    folder: str = ""

    @property
    def names(self) -> tuple[str, str | None, str]:
        """By name, as actors get them."""
        return self.output.name, self.text and self.text.name, self.folder

    @property
    def identity(self) -> tuple:
        """What the scores depend on."""
        return self.output and self.output.identity, self.text and self.text.identity, self.folder


class Scorer:
    """An actor that scores rows with several click models; each row once.

    Args:
        models: by name, output, text table's output and folder (`Scored.names`).
        beside: name of the model whose probabilities stand beside the log; "" for none.
        device: that computes.
    """

    def __init__(
        self,
        reader: LogReader,
        models: dict[str, tuple[str, str | None, str]],
        beside: str,
        threads: int,
        device: str = "cpu",
    ) -> None:
        torch.set_num_threads(threads)
        self.reader, self.beside, self.device, state = reader, beside, device, State(reader.state)
        schema, _, _ = reader.open()
        load = load_click_model
        if reader.tokens:  # models that read none do without transformers, which take seconds to load
            from ctrdist.prompted import load_scorer as load
        self.models = {
            name: (load(state.local(output) / folder, schema).to(device), text)
            for name, (output, text, folder) in models.items()
        }

    @torch.inference_mode()
    def __call__(self, batch):
        columns = {USER_ID: batch[f"raw.{USER_ID}"], ITEM: batch[ITEM], LABEL: batch[LABEL]}
        if self.beside:
            columns[self.beside] = batch[f"raw.{PROBABILITY}"]
        batches = {text: encoded_batch(self.reader, text, batch).to(self.device) for _, text in self.models.values()}
        for name, (model, text) in self.models.items():
            columns[name] = model.predict(batches[text]).cpu().numpy()
        truth = self.reader.open()[0].truth
        if truth:
            columns["best"] = batch[f"raw.{truth}"]
        return pa.table(columns)


FEW_ROWS = 16_384
"""So many rows are scored by the driver itself: to start actors takes longer than that."""
BATCH_ROWS = 4096


def score(
    reader: LogReader,
    groups: list[RowGroup],
    keep: tuple[str, ...],
    plan: Plan,
    actor: type,
    gpus: int = 0,
    **arguments: Any,
) -> Iterator[pa.Table]:
    """Rows of the log through actors that score them, each row once, in tables as they come. Few rows that need no
    language model are scored here.

    Args:
        keep: columns that the actors need as they are in the log.
        actor: class whose instances take encoded rows and return a table with as many.
        gpus: that each of them computes on.
        arguments: of the class, besides `reader` and `threads`.
    """
    chunks, arguments = plan_pass(groups), {"reader": reader, "threads": plan.threads, **arguments}
    if sum(group.rows for group in groups) <= FEW_ROWS and not (gpus or reader.tokens):
        return _score_here(reader, chunks, keep, partial(actor, **arguments))
    scored = ingest.stream(reader, chunks, keep=keep, plan=plan).map_batches(
        actor,
        batch_size=BATCH_ROWS,
        batch_format="pyarrow",
        num_cpus=plan.worker_cpus,
        num_gpus=gpus,
        compute=ActorPoolStrategy(size=plan.workers),
        fn_constructor_kwargs=arguments,
    )
    return iter(scored.iter_batches(batch_size=65536, batch_format="pyarrow"))


def _score_here(
    reader: LogReader, chunks: list[Chunk], keep: tuple[str, ...], make: Callable[[], Callable[[pa.Table], pa.Table]]
) -> Iterator[pa.Table]:
    threads = torch.get_num_threads()
    try:
        scorer = make()
        for chunk in chunks:
            rows = reader.read(chunk, keep)
            for start in range(0, rows.num_rows, BATCH_ROWS):
                yield scorer(rows.slice(start, BATCH_ROWS))
    finally:
        torch.set_num_threads(threads)


def evaluate(
    day: Day,
    read: Read,
    models: dict[str, tuple[Manifest | None, Manifest | None]],
    beside: Manifest | None = None,
    tokens: Manifest | None = None,
) -> dict[str, Any]:
    """Score the test rows with every model, each row exactly once, and compare (`ctrdist.metrics.evaluate`).

    Args:
        models: by name, what `Scored` says of each.
        beside: output that tells what stands beside the log (`stages.elec.represent`), if a model needs it.
        tokens: output that makes the tokens of rows (`stages.clickprompt.tokens`), if a model reads them; models then
            compute on GPUs where there are any.

    Returns:
        The parts `rows`, `models`, `gain` (of the last model over the first, if there are two) and `groups` of the
        report.
    """
    scored_by = {name: Scored(*model) for name, model in models.items()}
    inputs = fingerprint(
        read.identity,
        [str(d) for d in day.window.test],
        {name: model.identity for name, model in scored_by.items()},
        beside and beside.identity,
        *([tokens.identity] if tokens else []),
    )
    where = beside.facts["beside"] if beside else ""
    reader = LogReader(day.options.data, day.state.uri, read.output.name, where, tokens=tokens.name if tokens else "")
    gpus = day.plan.gpus if tokens else 0
    groups = read.groups(day.window.test)
    outputs = {name: model.names for name, model in scored_by.items() if model.output}
    written = "".join(name for name, model in scored_by.items() if not model.output)

    def make(name: str, inputs: str, _metrics: str) -> Manifest:
        keep = (USER_ID, *filter(None, (day.schema.truth, written and PROBABILITY)))
        device = "cuda" if gpus else "cpu"
        scored = score(reader, groups, keep, day.plan, Scorer, gpus, models=outputs, beside=written, device=device)
        facts = {"rows": read.total(day.window.test)}
        with day.state.create(name, inputs, facts) as folder:
            writer, rows = None, 0
            for table in scored:
                writer = writer or pq.ParquetWriter(folder / "predictions.parquet", table.schema)
                writer.write_table(table)
                rows += table.num_rows
            if writer:
                writer.close()
            assert rows == facts["rows"], f"{rows} test rows were scored of {facts['rows']}"
        return day.state.find(name)

    output = day.stage("evaluate", inputs, make)
    table = pq.read_table(day.state.local(output.name) / "predictions.parquet")
    names = [*models, *(["best"] if day.schema.truth else [])]
    scores = {name: table[name].to_numpy() for name in names}
    seen, label = read.counts[table[ITEM].to_numpy()], table[LABEL].to_numpy()
    result = metrics.evaluate(user_numbers(table), seen, label, scores)
    first, last = names[0], list(models)[-1]
    return result | {"gain": metrics.gain(seen, label, scores[first], scores[last]) if first != last else {}}


def user_numbers(table: pa.Table) -> np.ndarray:
    """The user of each row as an integer from 0, [n], in the order in which they come."""
    return table[USER_ID].combine_chunks().dictionary_encode().indices.to_numpy()
