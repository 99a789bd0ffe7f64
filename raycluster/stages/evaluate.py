"""The last stage: every model on the same test rows."""

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from ray.data import ActorPoolStrategy

from ctrdist import metrics
from ctrdist.encode import ITEM
from ctrdist.epoch import plan_pass
from ctrdist.export import load_click_model
from ctrdist.schema import LABEL, USER_ID
from ctrdist.storage import Manifest, State, fingerprint
from raycluster import ingest
from raycluster.day import Day
from raycluster.ingest import LogReader
from raycluster.stages.click import encoded_batch
from raycluster.stages.read import Read


class Scorer:
    """An actor that scores rows with several click models; each row once."""

    def __init__(self, reader: LogReader, models: dict[str, tuple[str, str | None]], threads: int) -> None:
        torch.set_num_threads(threads)
        self.reader, state = reader, State(reader.state)
        schema, _, _ = reader.open()
        self.models = {
            name: (load_click_model(state.local(output), schema), text) for name, (output, text) in models.items()
        }

    @torch.inference_mode()
    def __call__(self, batch):
        columns = {USER_ID: batch[f"raw.{USER_ID}"], ITEM: batch[ITEM], LABEL: batch[LABEL]}
        for name, (model, text) in self.models.items():
            columns[name] = model.predict(encoded_batch(self.reader, text, batch)).numpy()
        truth = self.reader.open()[0].truth
        if truth:
            columns["best"] = batch[f"raw.{truth}"]
        return pa.table(columns)


def evaluate(day: Day, read: Read, models: dict[str, tuple[Manifest, Manifest | None]]) -> dict[str, Any]:
    """Score the test rows with every model, each row exactly once, and compare (`ctrdist.metrics.evaluate`).

    Args:
        models: by name, the model's output and its text table's.

    Returns:
        The parts `rows`, `models`, `gain` (of the last model over the first, if there are two) and `groups` of the
        report.
    """
    inputs = fingerprint(
        read.identity,
        [str(d) for d in day.window.test],
        {name: (m.identity, t and t.identity) for name, (m, t) in models.items()},
    )
    reader = LogReader(day.options.data, day.state.uri, read.output.name)
    groups = read.groups(day.window.test)
    outputs = {name: (model.name, text and text.name) for name, (model, text) in models.items()}

    def make(name: str, inputs: str, _metrics: str | None) -> Manifest:
        keep = (USER_ID, day.schema.truth) if day.schema.truth else (USER_ID,)
        stream = ingest.stream(reader, plan_pass(groups), keep=keep)
        scored = stream.map_batches(
            Scorer,
            batch_size=4096,
            batch_format="pyarrow",
            num_cpus=day.plan.worker_cpus,
            compute=ActorPoolStrategy(size=day.plan.workers),
            fn_constructor_kwargs={"reader": reader, "models": outputs, "threads": day.plan.threads},
        )
        facts = {"rows": read.total(day.window.test)}
        with day.state.create(name, inputs, facts) as folder:
            writer, rows = None, 0
            for table in scored.iter_batches(batch_size=65536, batch_format="pyarrow"):
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
    users = table[USER_ID].combine_chunks().dictionary_encode().indices.to_numpy()
    result = metrics.evaluate(users, seen, label, scores)
    first, last = names[0], list(models)[-1]
    return result | {"gain": metrics.gain(seen, label, scores[first], scores[last]) if first != last else {}}
