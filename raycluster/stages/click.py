"""Stages that train a click model on the log: the ID model and MF²."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, Protocol

import numpy as np

from ctrdist.batch import Batch, collate
from ctrdist.config import to_dict
from ctrdist.epoch import plan_epoch, plan_pass
from ctrdist.export import load_click_model, save_click_model
from ctrdist.fields import rows_with_new_ids
from ctrdist.loop import LoopConfig
from ctrdist.precision import Precision
from ctrdist.storage import Manifest, State, fingerprint
from ctrdist.tasks.click import ClickConfig, ClickModel, table_sizes
from ctrdist.text_field import FuseConfig
from ctrdist.text_table import load_text_table
from raycluster import ingest
from raycluster.day import Day
from raycluster.ingest import LogReader
from raycluster.planning import Plan
from raycluster.stages.read import Days, Read
from raycluster.trainer import Training, train


def train_click(
    day: Day,
    stage: str,
    read: Read,
    config: ClickConfig,
    *,
    text: Manifest | None = None,
    fuse: FuseConfig | None = None,
    start: Manifest | None = None,
    days: Days | None = None,
    warm: bool | None = None,
) -> Manifest:
    """Train a click model: the ID model, or with `text` the fused one (MF²).

    Args:
        text: output with the text table.
        start: output of a click model whose weights to start from.
        days: days to train on; those that are new to the state if None.
        warm: take `warm_epochs`; if None, where it starts from an earlier day's and trains on new days.
    """
    days = read.train if days is None else days
    if warm is None:
        warm = start is not None and days == read.train and day.previous is not None
    epochs = config.warm_epochs if warm else config.epochs
    inputs = fingerprint(
        read.identity,
        to_dict(config),
        to_dict(fuse) if fuse else None,
        day.options.seed,
        epochs,
        [str(d) for d in days],
        text and text.identity,
        start and start.identity,
    )
    reader = LogReader(day.options.data, day.state.uri, read.output.name)
    return train_on_log(
        day,
        stage,
        read,
        reader,
        config,
        days,
        epochs,
        inputs,
        order=config.order,
        task=partial(_click_task, reader, config, fuse, text and text.name, start, day.options.seed),
        save=save_click_model,
        collate=partial(encoded_batch, reader, text and text.name),
    )


class RowTraining(Protocol):
    """What the options of every task on the log say of its training."""

    batch_size: int
    patience: int
    schedule: str
    warmup: float
    precision: Precision


def train_on_log(
    day: Day,
    stage: str,
    read: Read,
    reader: LogReader,
    config: RowTraining,
    days: Days,
    epochs: int,
    inputs: str,
    order: str = "shuffled",
    validated: bool = True,
    **parts: Callable,
) -> Manifest:
    """Train a task on rows of the log, as a stage.

    Args:
        reader: reads the rows, and what stands beside them.
        days: to train on.
        inputs: fingerprint of all that the task depends on.
        order: of the rows, as `ClickConfig` has it.
        validated: whether the validation rows are scored after each epoch.
        parts: `task`, `save` and `collate` of the `Training`.
    """
    rows, seed, batch = read.total(days), day.options.seed, config.batch_size
    training_groups, validation_groups = read.groups(days), read.groups(day.window.valid)
    plan, share = day.plan, batch // day.plan.workers
    most = ingest.BATCHES_A_BLOCK
    if order == "chronological":  # a block's batches are of its rows in any order: no more than a day's
        most = max(1, min(most, min(read.total((d,)) for d in days) // batch))
    together, steps = ingest.deal(rows, batch, most)
    loop = LoopConfig(
        steps_per_epoch=steps,
        epochs=epochs,
        patience=config.patience,
        schedule=config.schedule,
        warmup=config.warmup,
        seed=seed,
        precision=config.precision,
    )

    def make(name: str, inputs: str, metrics_file: str) -> Manifest:
        training = Training(
            state=day.state.uri,
            output=name,
            inputs=inputs,
            loop=loop,
            batch_size=batch,
            train_stream=partial(
                _train_stream,
                reader,
                training_groups,
                order,
                batch * together,
                share * together,
                seed,
                epochs,
                plan=plan,
            ),
            batches_a_block=together,
            valid_stream=partial(_valid_stream, reader, validation_groups, 8 * max(share, 1024), plan)
            if validated
            else None,
            facts={"rows": rows, "epochs": epochs, "read": read.output.name},
            metrics=metrics_file,
            **parts,
        )
        return train(training, plan)

    return day.stage(stage, inputs, make)


def _click_task(
    reader: LogReader, config: ClickConfig, fuse: FuseConfig | None, text: str | None, start: Manifest | None, seed: int
) -> ClickModel:
    if start:
        return grown_model(reader, config, start, fuse, seed)
    schema, encoders, _ = reader.open()
    table = _text_table(reader, text) if text else None
    model = ClickModel(schema, table_sizes(encoders, schema), config, table.shape[1] if text else 0, fuse, seed)
    if text:
        model.text_field.measure(table)
    return model


def grown_model(
    reader: LogReader,
    config: ClickConfig,
    start: Manifest,
    fuse: FuseConfig | None = None,
    seed: int = 0,
    folder: str = "",
    networks: int = 1,
) -> ClickModel:
    """A click model of an earlier day, with rows for ids that have come since.

    Args:
        start: its output.
        folder: of the model within it.
        networks: how many like it a worker has (`ClickModel`).
    """
    schema, encoders, _ = reader.open()
    model = load_click_model(State(reader.state).local(start.name) / folder, schema, config, fuse, seed, networks)
    model.grow(table_sizes(encoders, schema))
    model.renew(rows_with_new_ids(encoders, LogReader(reader.data, reader.state, start.facts["read"]).open()[1]))
    return model


@lru_cache(maxsize=2)
def _text_table(reader: LogReader, text: str) -> np.ndarray:
    state = State(reader.state)
    if reader.texts:
        texts = state.find(reader.texts)
        return load_text_table(state.local(text), rows=texts.facts["rows"], catalog=texts.identity)
    ids = reader.open()[2].ids
    return load_text_table(state.local(text), rows=ids.size, catalog=ids.fingerprint())


def encoded_batch(reader: LogReader, text: str | None, table: Any) -> Batch:
    """Encoded rows of the log as a batch, with the item side and the text table of output `text` joined: the items', or
    that of the interactions' own texts, if `reader` reads their numbers; and with the tokens of the rows' texts, if
    `reader` has what makes them."""
    schema, _, catalog = reader.open()
    return collate(table, schema, catalog, _text_table(reader, text) if text else None, reader.row_texts())


def _train_stream(
    reader: LogReader,
    groups: list,
    order: str,
    dealt: int,
    block_rows: int,
    seed: int,
    epochs: int,
    first: int,
    plan: Plan,
):
    """The rows of the epochs from `first` on, in blocks of one worker's; `dealt` rows go round all workers once."""
    by_day = order == "chronological"
    chunks = [chunk for epoch in range(first, epochs) for chunk in plan_epoch(groups, dealt, (seed, epoch), by_day)]
    return ingest.stream(reader, chunks, block_rows, plan=plan)


def _valid_stream(reader: LogReader, groups: list, block_rows: int, plan: Plan):
    return ingest.stream(reader, plan_pass(groups), block_rows, plan=plan)
