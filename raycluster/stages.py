"""The stages of a CELA day, each a function from earlier outputs to a new one."""

import datetime as dt
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from ray.data import ActorPoolStrategy

from ctrdist import metrics
from ctrdist.batch import Lookup, collate, load_text_table
from ctrdist.config import to_dict
from ctrdist.errors import UserError
from ctrdist.export import load_click_model, save_click_model
from ctrdist.items import (
    ItemTexts,
    Ragged,
    build_catalog,
    grow_catalog_ids,
    grow_item_vocabularies,
    item_batches,
    read_items,
)
from ctrdist.language.encoder import HEAD, TextEncoder
from ctrdist.language.model import LanguageModel, load_tokenizer
from ctrdist.language.texts import TokenBatch, tokenize
from ctrdist.log import ITEM, plan_epoch
from ctrdist.loop import LoopConfig
from ctrdist.optim import Precision
from ctrdist.scan import Scan, item_counts
from ctrdist.schema import LABEL, USER_ID
from ctrdist.storage import Manifest, State, fingerprint
from ctrdist.tasks.align import AlignConfig, ItemAlignment
from ctrdist.tasks.click import ClickConfig, ClickModel, FuseConfig, table_sizes
from ctrdist.tasks.pretrain import DomainAdaptivePretraining, PretrainConfig
from ctrdist.vocabulary import Vocabulary, load_vocabularies, save_vocabularies
from raycluster import ingest
from raycluster.day import Day, Progress, say
from raycluster.encoder import EncodeConfig, encode_items
from raycluster.ingest import LogReader
from raycluster.trainer import Training, train

Days = tuple[Any, ...]


@dataclass(frozen=True)
class LanguageModelConfig:
    """The language model to start from.

    Args:
        name: a Hugging Face name or a local folder.
        pooling: `mean`, `cls` or `last`; `auto` takes the model's own, else `cls` for encoders and `last` for decoders.
        precision: `auto` trains in bfloat16 where the chip computes in it.
    """

    name: str = "sentence-transformers/all-MiniLM-L6-v2"
    pooling: str = "auto"
    precision: Precision = "auto"


@dataclass
class Read:
    """What the first pass over the day's log gave.

    Args:
        output: the output with schema, vocabularies, catalog and texts.
        train: days that are trained on now: those of the window that no earlier day has trained on.
        counts: training rows of each item in the whole window, by catalog row.
        rows: good rows by day.
        scan: the pass itself, without ids.
    """

    output: Manifest
    train: Days
    counts: np.ndarray
    rows: dict[Any, int]
    faults: dict[str, int]
    strangers: int
    quarantine: str | None

    def total(self, days: Days) -> int:
        """Good rows of some days."""
        return sum(self.rows[str(day)] for day in days)


def read_log(day: Day, whole_window: bool = False) -> Read:
    """Check every row of the days that are used, grow the vocabularies, and number the items.

    Args:
        whole_window: read all days of the window; otherwise those that are new to the state, and the later ones.

    Raises:
        UserError: more bad rows than `max_bad_fraction`.
    """
    before = day.previous
    train = day.window.train if whole_window else day.new_days
    groups = day.groups(train + day.window.valid + day.window.test)
    inputs = fingerprint(
        day.schema.fingerprint, [(g.path, g.index, g.rows) for g in groups], before and before.identity,
        [str(d) for d in day.window.train],
    )  # fmt: skip

    def make(name: str, inputs: str, _metrics: str | None) -> Manifest:
        return _read(day, name, inputs, groups, before)

    output = day.stage("read", inputs, make)
    facts = output.facts
    folder = day.state.local(output.name)
    counts = np.load(folder / "item_counts.npy")
    return Read(
        output, day.new_days, counts, facts["rows_by_day"], facts["faults"], facts["strangers"], facts["quarantine"]
    )


def _read(day: Day, name: str, inputs: str, groups: list, before: Manifest | None) -> Manifest:
    schema, state, data = day.schema, day.state, day.options.data
    items = read_items(data, schema)
    old = state.local(before.facts["read"]) if before else None
    vocabularies = load_vocabularies(old / "vocabulary") if old else {}
    ids = grow_catalog_ids(items, Vocabulary.load(old / "catalog" / "ids") if old else Vocabulary())
    blank = {f.name: vocabularies.get(f.name, Vocabulary()) for f in schema.item + schema.row_fields}
    first = f"{name}.catalog"
    with state.create(first, inputs) as folder:
        schema.save(folder / "schema.yaml")
        save_vocabularies(blank, folder / "vocabulary")
        build_catalog(items, ids, schema, blank).save(folder / "catalog")
    reader = LogReader(data, state.uri, first)
    with state.create(f"runs/{day.date}/quarantine", inputs) as quarantine:
        scan = ingest.scan(reader, groups, set(day.new_days), quarantine)
    rows = sum(scan.rows.values())
    where = None
    if scan.quarantined:
        where = state.path(state.find(f"runs/{day.date}/quarantine").folder)
        _judge(scan, rows, day.options.max_bad_fraction, where)
    counts_by_day = _window_counts(day, old, scan)
    counts = item_counts(counts_by_day, day.window.train, ids.size)
    fresh = item_counts(scan.items, day.new_days, ids.size)
    for f in schema.row_fields:
        vocabularies[f.name] = blank[f.name].grow(*scan.ids[f.name], f.min_count, f.name)
    vocabularies = grow_item_vocabularies(items, ids.lookup(items["item_id"]), fresh, schema, vocabularies)
    facts = {
        "rows": rows,
        "rows_by_day": {str(d): n for d, n in sorted(scan.rows.items())},
        "faults": scan.faults,
        "strangers": scan.strangers,
        "quarantine": where,
        "items": items.num_rows,
    }
    with state.create(name, inputs, facts) as folder:
        schema.save(folder / "schema.yaml")
        save_vocabularies(vocabularies, folder / "vocabulary")
        build_catalog(items, ids, schema, vocabularies).save(folder / "catalog")
        ItemTexts.write(folder / "texts.arrow", items, ids, schema)
        np.save(folder / "item_counts.npy", counts)
        np.savez(
            folder / "item_counts_by_day.npz",
            **{
                f"{d}.{part}": a
                for d, pair in counts_by_day.items()
                for part, a in zip(("items", "rows"), pair, strict=True)
            },
        )
    state.remove(first)
    return state.find(name)


def _judge(scan: Scan, rows: int, limit: float, where: str) -> None:
    share = scan.quarantined / (rows + scan.quarantined)
    reasons = ", ".join(f"{n:,} {reason}" for reason, n in sorted(scan.faults.items(), key=lambda pair: -pair[1]))
    if share > limit:
        raise UserError(
            f"{scan.quarantined:,} of {rows + scan.quarantined:,} rows ({share:.1%}) are bad: {reasons}. They "
            f"lie in {where} with file, row and reason; mend the log, or allow more with --max-bad-fraction"
        )
    say(f"read       {scan.quarantined:,} bad rows set aside ({reasons}) in {where}")


def _window_counts(day: Day, old: Path | None, scan: Scan) -> dict:
    """Rows of each item by day of the window: from the day before, and from this run's pass."""
    window = {str(d): d for d in day.window.train}
    counts = {}
    if old:
        with np.load(old / "item_counts_by_day.npz") as saved:
            for key in saved.files:
                d, part = key.rsplit(".", 1)
                if part == "items" and d in window:
                    counts[window[d]] = (saved[key], saved[f"{d}.rows"])
    return counts | {d: pair for d, pair in scan.items.items() if d in set(day.window.train)}


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
) -> Manifest:
    """Train a click model: the ID model, or with `text` the fused one (MF²).

    Args:
        text: output with the text table.
        start: output of a click model whose weights to start from.
        days: days to train on; those that are new to the state if None.
    """
    days = read.train if days is None else days
    warm = start is not None and days == read.train and day.previous is not None
    epochs = config.warm_epochs if warm else config.epochs
    rows, seed = read.total(days), day.options.seed
    inputs = fingerprint(
        read.output.identity,
        to_dict(config),
        to_dict(fuse) if fuse else None,
        seed,
        epochs,
        [str(d) for d in days],
        text and text.identity,
        start and start.identity,
    )
    reader = LogReader(day.options.data, day.state.uri, read.output.name)
    batch = config.batch_size
    shuffled = day.groups(days)
    in_order = day.groups(day.window.valid)
    share = batch // day.plan.workers
    loop = LoopConfig(
        steps_per_epoch=-(-rows // batch),
        epochs=epochs,
        patience=config.patience,
        schedule=config.schedule,
        warmup=config.warmup,
        seed=seed,
        precision=config.precision,
    )

    def make(name: str, inputs: str, metrics_file: str | None) -> Manifest:
        training = Training(
            state=day.state.uri,
            output=name,
            inputs=inputs,
            loop=loop,
            batch_size=batch,
            task=partial(_click_task, reader, config, fuse, text and text.name, start and start.name, seed),
            save=save_click_model,
            collate=partial(_collate, reader, text and text.name),
            train_stream=partial(_train_stream, reader, shuffled, rows, batch, share, seed, epochs),
            valid_stream=partial(_valid_stream, reader, in_order, max(share, 1024)),
            facts={"rows": rows, "epochs": epochs},
            metrics=metrics_file,
        )
        return train(training, day.plan)

    return day.stage(stage, inputs, make)


def _click_task(
    reader: LogReader, config: ClickConfig, fuse: FuseConfig | None, text: str | None, start: str | None, seed: int
) -> ClickModel:
    schema, vocabularies, _ = reader.open()
    sizes = table_sizes(vocabularies, schema)
    state = State(reader.state)
    if start:
        model = load_click_model(state.local(start), schema, config)
        model.grow(sizes)
        return model
    width = load_text_table(state.local(text)).shape[1] if text else 0
    return ClickModel(schema, sizes, config, width, fuse, seed)


@lru_cache(maxsize=2)
def _text_table(state: str, text: str) -> np.ndarray:
    return load_text_table(State(state).local(text))


def _collate(reader: LogReader, text: str | None, table) -> Any:
    schema, _, catalog = reader.open()
    return collate(table, schema, catalog, _text_table(reader.state, text) if text else None)


def _train_stream(
    reader: LogReader, groups: list, rows: int, batch: int, share: int, seed: int, epochs: int, first: int
):
    """The rows of the epochs from `first` on, in blocks of one worker's share of a global batch."""
    chunks = [chunk for epoch in range(first, epochs) for chunk in plan_epoch(groups, rows, batch, (seed, epoch))]
    return ingest.stream(reader, chunks, share)


def _valid_stream(reader: LogReader, groups: list, block_rows: int):
    return ingest.stream(reader, plan_epoch(groups, 0, 1, None), block_rows)


def pretraining_due(day: Day, lm: LanguageModelConfig, config: PretrainConfig) -> bool:
    """Whether DAP is due: there is none yet of this language model, or the last one is `every_days` old."""
    last = day.earlier("dap")
    if last is None or last.facts["lm"] != to_dict(lm):
        return True
    age = day.date - dt.date.fromisoformat(last.facts["date"])
    return bool(config.every_days) and age.days >= config.every_days


def pretrain(day: Day, read: Read, lm: LanguageModelConfig, config: PretrainConfig) -> Manifest:
    """DAP: masked words and SimCSE over all items' texts, when it is due; else the last one's language model."""
    if not pretraining_due(day, lm, config):
        manifest = day.earlier("dap")
        say(f"dap        not due: last on {manifest.facts['date']}, every {config.every_days} days")
        day.stages["dap"] = manifest
        day.skipped.add("dap")
        return manifest
    items = _items_with_text(day, read)
    inputs = fingerprint(read.output.identity, to_dict(lm), to_dict(config), day.options.seed)

    def make(name: str, inputs: str, metrics_file: str | None) -> Manifest:
        training = _text_training(
            day,
            name,
            inputs,
            items,
            config.batch_size,
            config.epochs,
            config.warmup,
            lm.precision,
            metrics_file,
            task=partial(_pretrain_task, lm, config, day.options.seed),
            save=_save_language_model,
            batches=partial(
                _text_batches,
                day.state.uri,
                read.output.name,
                lm.name,
                False,
                items,
                config.batch_size,
                config.max_length,
                day.options.seed,
                config.epochs,
            ),
            facts={"rows": len(items) * config.epochs, "date": str(day.date), "lm": to_dict(lm)},
        )
        return train(training, day.plan)

    return day.stage("dap", inputs, make)


def align(
    day: Day,
    stage: str,
    read: Read,
    lm: Manifest,
    model: Manifest,
    config: AlignConfig,
    precision: Precision,
    warm: bool = False,
) -> Manifest:
    """ROMA: the language model towards a click model's frozen item embeddings, over items with training rows.

    Args:
        lm: output with the language model to start from, and its head if there is one.
        model: output of the click model to align to.
        warm: take `warm_epochs` passes instead of `epochs`.
    """
    items = np.flatnonzero(read.counts)
    epochs = config.warm_epochs if warm else config.epochs
    inputs = fingerprint(
        read.output.identity, lm.identity, model.identity, to_dict(config), precision, epochs, day.options.seed
    )

    def make(name: str, inputs: str, metrics_file: str | None) -> Manifest:
        training = _text_training(
            day,
            name,
            inputs,
            items,
            config.batch_size,
            epochs,
            config.warmup,
            precision,
            metrics_file,
            task=partial(_align_task, day.state.uri, read.output.name, lm.name, model.name, config, day.options.seed),
            save=_save_encoder,
            batches=partial(
                _text_batches,
                day.state.uri,
                read.output.name,
                lm.name,
                True,
                items,
                config.batch_size,
                config.max_length,
                day.options.seed,
                epochs,
            ),
            facts={"rows": len(items) * epochs, "items": len(items)},
        )
        return train(training, day.plan)

    return day.stage(stage, inputs, make)


def _text_training(
    day: Day,
    name: str,
    inputs: str,
    items: np.ndarray,
    batch: int,
    epochs: int,
    warmup: float,
    precision: Precision,
    metrics_file: str | None,
    **parts: Any,
) -> Training:
    loop = LoopConfig(
        steps_per_epoch=-(-len(items) // batch),
        epochs=epochs,
        schedule="linear",
        warmup=warmup,
        clip_norm=1.0,
        precision=precision,
        seed=day.options.seed,
    )
    return Training(
        state=day.state.uri, output=name, inputs=inputs, loop=loop, batch_size=batch, metrics=metrics_file, **parts
    )


def _items_with_text(day: Day, read: Read) -> np.ndarray:
    folder = day.state.local(read.output.name)
    items = np.flatnonzero(np.load(folder / "catalog" / "present.npy"))
    return items[ItemTexts(folder / "texts.arrow").lengths(items) > 0]


def _text_batches(
    state: str,
    read: str,
    lm: str,
    is_output: bool,
    items: np.ndarray,
    batch: int,
    max_length: int,
    seed: int,
    epochs: int,
    rank: int,
    workers: int,
    step: int,
) -> Iterator[TokenBatch]:
    """A worker's share of each global batch of items from `step` on, tokenised."""
    store = State(state)
    texts = ItemTexts(store.local(read) / "texts.arrow")
    tokenizer = load_tokenizer(str(store.local(lm)) if is_output else lm)
    steps = -(-len(items) // batch)
    share = batch // workers
    for epoch in range(step // steps, epochs):
        for number, rows in enumerate(item_batches(items, batch, seed, epoch)):
            if epoch * steps + number >= step:
                own = rows[rank * share : (rank + 1) * share]
                yield tokenize(tokenizer, texts.take(own), own, max_length, epoch)


def _pretrain_task(lm: LanguageModelConfig, config: PretrainConfig, seed: int) -> DomainAdaptivePretraining:
    torch.manual_seed(seed)
    return DomainAdaptivePretraining(LanguageModel.load(lm.name, lm.pooling, masked_lm=True), config, seed)


def _align_task(state: str, read: str, lm: str, model: str, config: AlignConfig, seed: int) -> ItemAlignment:
    store = State(state)
    torch.manual_seed(seed)
    targets = item_embeddings(store, read, model)
    folder = store.local(lm)
    if (folder / HEAD).exists():
        encoder = TextEncoder.load(folder)
        if encoder.out == targets.shape[1]:
            return ItemAlignment(encoder, targets, config)
    return ItemAlignment(
        TextEncoder(LanguageModel.load(str(folder)), targets.shape[1], config.head_hidden), targets, config
    )


def item_embeddings(state: State, read: str, model: str, block: int = 65536) -> torch.Tensor:
    """A click model's item-side embeddings, joined, by catalog row: float32 [rows, F_item * d] (CELA, eq. 8)."""
    reader = LogReader("", state.uri, read)
    schema, _, catalog = reader.open()
    click = load_click_model(state.local(model), schema)
    out = torch.zeros(catalog.size, len(schema.item) * click.config.dim)
    for start in range(0, catalog.size, block):
        rows = np.arange(start, min(start + block, catalog.size))
        fields = {}
        for f in schema.item:
            column = catalog.fields[f.name]
            values = column.take(rows) if isinstance(column, Ragged) else np.asarray(column[rows])
            fields[f.name] = Lookup.of(values)
        out[start : start + len(rows)] = click.item_embeddings(fields)
    return out


def _save_language_model(task: DomainAdaptivePretraining, folder: Path) -> None:
    task.language_model.save(folder)


def _save_encoder(task: ItemAlignment, folder: Path) -> None:
    task.encoder.save(folder)


def encode(day: Day, stage: str, read: Read, lm: Manifest, config: EncodeConfig) -> Manifest:
    """Every item's text through a language model into the text table: its pooled states, at its width."""
    inputs = fingerprint(read.output.identity, lm.identity, to_dict(config))

    def make(name: str, inputs: str, _metrics: str | None) -> Manifest:
        report = Progress(stage).items
        return encode_items(day.state, name, lm.name, read.output.name, config, day.plan, inputs, report)

    return day.stage(stage, inputs, make)


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
            columns[name] = model.predict(_collate(self.reader, text, batch)).numpy()
        truth = self.reader.open()[0].truth
        if truth:
            columns["best"] = batch[f"raw.{truth}"]
        return pa.table(columns)


def evaluate(day: Day, read: Read, models: dict[str, tuple[Manifest, Manifest | None]]) -> dict[str, Any]:
    """Score the test rows with every model, each row exactly once, and compare (`ctrdist.metrics.evaluate`).

    Args:
        models: by name, the model's output and its text table's.

    Returns:
        The parts `rows`, `models`, `gain` and `groups` of the report.
    """
    inputs = fingerprint(
        read.output.identity,
        [str(d) for d in day.window.test],
        {name: (m.identity, t and t.identity) for name, (m, t) in models.items()},
    )
    reader = LogReader(day.options.data, day.state.uri, read.output.name)
    groups = day.groups(day.window.test)
    outputs = {name: (model.name, text and text.name) for name, (model, text) in models.items()}

    def make(name: str, inputs: str, _metrics: str | None) -> Manifest:
        keep = (USER_ID, day.schema.truth) if day.schema.truth else (USER_ID,)
        stream = ingest.stream(reader, plan_epoch(groups, 0, 1, None), keep=keep)
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
    return result | {"gain": metrics.gain(seen, label, scores[first], scores[last])}
