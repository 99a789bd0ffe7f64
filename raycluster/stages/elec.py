"""ELEC's stages: texts through a frozen language model, its new layers, representations beside the log, the pair."""

import datetime as dt
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ctrdist.batch import Batch
from ctrdist.beside import BesideLog
from ctrdist.config import to_dict
from ctrdist.encode import encode
from ctrdist.export import save_click_model
from ctrdist.interaction_text import TextConfig, item_texts
from ctrdist.interactions import Interactions, Texts, merged
from ctrdist.items import ItemTexts, by_catalog_row
from ctrdist.language.encode import EncodeConfig, Source
from ctrdist.language.tokenizer import TextTokenizer
from ctrdist.log import RowGroup, find_faults, read_row_group
from ctrdist.storage import Manifest, State, fingerprint
from ctrdist.tasks.click import ClickConfig, table_sizes
from ctrdist.tasks.distill import GAIN_SEED, Distillation, DistillConfig
from ctrdist.tasks.m_llm import MLLMConfig, ModifiedLanguageModel
from ctrdist.text_table import TextTableFacts
from raycluster.cluster import in_parallel
from raycluster.day import Day, Progress, say
from raycluster.encoder import Numbered, catalog_rows
from raycluster.ingest import LogReader, interactions
from raycluster.stages.click import encoded_batch, grown_model, train_on_log
from raycluster.stages.language import encode_stage
from raycluster.stages.read import ITEMS, Days, Read

Granularity = Literal["item", "interaction"]
GAIN = "gain"
"""Folder of the gain network within the pair's output, whose own files are the vanilla network's."""
PART = 8192
"""Rows that are represented at a time."""


@dataclass(frozen=True)
class FrozenLanguageModelConfig:
    """The language model, which stays as it is.

    Args:
        name: a Hugging Face name or a local folder.
        pooling: what a text's state is: the `mean` of its tokens' (the paper's), `cls`, `last`, `first-last`, `top-2`,
            or the model's own, `auto`.
    """

    name: str = "sentence-transformers/all-MiniLM-L6-v2"
    pooling: str = "mean"


def encode_interactions(
    day: Day, read: Read, model: Source, granularity: Granularity, config: EncodeConfig, text: TextConfig, days: Days
) -> Manifest:
    """The states of all texts that the day needs: of its items, or of the interactions of `days_used`.

    A text is encoded once, whatever it was made for: those of earlier runs' tables are taken over.

    Args:
        days: to train on.
    """
    parts = granularity, to_dict(text), to_dict(config), [str(d) for d in days]
    inputs = fingerprint("texts by name", read.identity, model.fingerprint(config), *parts)

    def texts(stage: str) -> tuple[str, Numbered]:
        tokenizer = model.tokenizer(config.max_length)
        if granularity == "item":
            made = item_text_output(day, read, text, tokenizer, stage)
            return made.name, catalog_rows(day.state, read.output.name)
        made = interaction_output(day, read, text, tokenizer, days, stage)
        return made.name, (np.arange(made.facts["rows"]), made.identity)

    made = encode_stage(day, "encode", texts, model, config, inputs)
    for name in day.state.names(made.name.rpartition("/")[0]):  # of other options, whose table is gone too
        if name.startswith((f"{made.name}.texts", f"{made.name}.sides")) and name != made.facts["texts"]:
            day.state.remove(name)
    return made


def days_used(day: Day, days: Days) -> Days:
    """The days that the stages after the texts read: `days` to train on, validation and test. A window that is wider
    than that of the day before has others, which are read for their counts alone."""
    return days + day.window.valid + day.window.test


def meaning(config: TextConfig, tokenizer: TextTokenizer) -> str:
    """Fingerprint of what is said; the tokenizer has a part in it where it cuts."""
    return fingerprint(to_dict(config), tokenizer.fingerprint if config.item_tokens else None)


def item_text_output(day: Day, read: Read, config: TextConfig, tokenizer: TextTokenizer, stage: str) -> Manifest:
    """The text of each item, by catalog row, as an output beside that of `stage`."""
    inputs = fingerprint("item", read.output.identity, meaning(config, tokenizer))
    name = f"{stage}.texts-{inputs}"
    if day.state.find(name, inputs) is None:
        _, _, catalog = _reader(day, read).open()
        items = pq.read_table(day.state.local(read.output.name) / ITEMS)
        with day.state.create(name, inputs, {"rows": items.num_rows}) as folder:
            texts = by_catalog_row(item_texts(items, day.schema, config, tokenizer), items, catalog.ids)
            ItemTexts.write_column(folder / "texts.arrow", texts)
    return day.state.find(name)


def interaction_output(
    day: Day, read: Read, config: TextConfig, tokenizer: TextTokenizer, days: Days, stage: str
) -> Manifest:
    """The distinct texts of all rows of `days_used`, as an output beside that of `stage`."""
    used = days_used(day, days)
    inputs = fingerprint("interactions by text hash", read.identity, meaning(config, tokenizer), [str(d) for d in used])
    name, sides = f"{stage}.texts-{inputs}", f"{stage}.sides-{inputs}"
    if day.state.find(name, inputs) is None:
        reader = _reader(day, read)
        _, _, catalog = reader.open()
        items = pq.read_table(day.state.local(read.output.name) / ITEMS)
        made = Interactions.of(items, day.schema, catalog, config, tokenizer)
        with day.state.create(sides, inputs) as folder:  # made once, for all tasks
            made.save(folder)
        groups = {(group.path, group.index): group for group in read.groups(used)}  # a split's are of the same rows
        calls = [(reader, sides, group) for group in groups.values()]
        texts = merged(in_parallel(_distinct_texts, calls, day.plan.readers, **day.plan.reader_resources))
        say(f"encode     {len(texts[0]):,} distinct texts of {read.total(used):,} interactions")
        with day.state.create(name, inputs, {"rows": len(texts[0])}) as folder:
            made.save(folder, texts)
    day.state.remove(sides)
    return day.state.find(name)


def _distinct_texts(reader: LogReader, sides: str, group: RowGroup) -> Texts:
    schema, _, _ = reader.open()
    made = interactions(reader.state, reader.output, sides)
    return made.distinct(group, read_row_group(reader.data, group, schema))


def _reader(day: Day, read: Read, text: Manifest | None = None, granularity: Granularity = "item") -> LogReader:
    """Reads the log and, if interactions have texts of their own, the numbers of these, encoded in `text`."""
    texts = text.facts["texts"] if text and granularity == "interaction" else ""
    return LogReader(day.options.data, day.state.uri, read.output.name, texts=texts)


def train_m_llm(
    day: Day,
    read: Read,
    text: Manifest,
    granularity: Granularity,
    config: MLLMConfig,
    start: Manifest | None,
    days: Days,
) -> Manifest:
    """The new layers of the modified language model, on the states of `text`.

    Args:
        text: output with the text table.
        start: output of the layers to start from.
        days: to train on.
    """
    epochs = config.warm_epochs if start else config.epochs
    parts = (text.identity, granularity, to_dict(config), day.options.seed, epochs, [str(d) for d in days])
    inputs = fingerprint(read.identity, *parts, start and start.identity)
    reader = _reader(day, read, text, granularity)
    return train_on_log(
        day,
        "m_llm",
        read,
        reader,
        config,
        days,
        epochs,
        inputs,
        task=partial(_m_llm_task, reader, text.name, granularity, config, start and start.name, day.options.seed),
        save=_save_m_llm,
        collate=partial(encoded_batch, reader, text.name),
    )


def _m_llm_task(
    reader: LogReader, text: str, granularity: Granularity, config: MLLMConfig, start: str | None, seed: int
) -> ModifiedLanguageModel:
    state = State(reader.state)
    if start:
        return ModifiedLanguageModel.load(state.local(start), config)
    behaviours = granularity == "item" and reader.open()[0].history_length > 0
    return ModifiedLanguageModel(TextTableFacts.load(state.local(text)).dim, behaviours, config, seed)


def _save_m_llm(task: ModifiedLanguageModel, folder: Path) -> None:
    task.save(folder)


def represent(day: Day, read: Read, text: Manifest, m_llm: Manifest, granularity: Granularity, days: Days) -> Manifest:
    """The modified language model's representation and probability of every row of `days_used`, beside the log
    (`ctrdist.beside`).

    Files are written by tasks, each whole or not at all; a run that was cut off goes on with those that are missing.
    Its facts name them (`beside`) and their `width`.

    Args:
        days: to train on.
    """
    used = days_used(day, days)
    inputs = fingerprint(read.identity, text.identity, m_llm.identity, granularity, [str(d) for d in used])
    reader = _reader(day, read, text, granularity)
    files = sorted({(group.day, group.path) for group in read.groups(used)})
    width = ModifiedLanguageModel.load(day.state.local(m_llm.name)).width

    def make(name: str, inputs: str, _metrics: str) -> Manifest:
        day.state.remove(name)  # of other inputs; the files that it names may be replaced from now on
        beside, progress, written = f"{name}.rows", Progress("represent", "files").items, {}
        calls = [(reader, text.name, m_llm.name, beside, inputs, *file) for file in files]
        for output, about in in_parallel(_represent_file, calls, day.plan.readers):
            written[output] = about
            progress(len(written), len(files))
        facts = {"rows": read.total(used), "beside": beside, "width": width}
        with day.state.create(name, inputs, facts) as folder:
            (folder / "files.json").write_text(json.dumps(dict(sorted(written.items())), indent=1))
        return day.state.find(name)

    return day.stage("represent", inputs, make)


def _represent_file(
    reader: LogReader, text: str, m_llm: str, beside: str, inputs: str, day: dt.date, path: str
) -> tuple[str, dict]:
    """Mirror one file of the log; the name of its output, and what it says of its source."""
    torch.set_num_threads(1)
    model = ModifiedLanguageModel.load(State(reader.state).local(m_llm))
    rows = partial(represent_rows, reader, text, model)
    made = BesideLog(State(reader.state), beside, reader.data).write(day, path, inputs, rows)
    return made.name, {"files": made.files} | made.facts


@torch.inference_mode()
def represent_rows(
    reader: LogReader, text: str, model: ModifiedLanguageModel, group: RowGroup
) -> tuple[np.ndarray, np.ndarray]:
    """Representations [rows, width] and probabilities [rows] of a row group, float32; zeros for bad rows."""
    vectors = np.zeros((group.rows, model.width), np.float32)
    probabilities = np.zeros(group.rows, np.float32)
    for at, batch in good_batches(reader, text, group):
        representation = model.represent(batch)
        vectors[at] = representation.numpy()
        probabilities[at] = torch.sigmoid(model.logits(representation)).numpy()
    return vectors, probabilities


def good_batches(reader: LogReader, text: str, group: RowGroup) -> Iterator[tuple[np.ndarray, Batch]]:
    """The good rows of a row group, of whatever split: where they stand, int64 [n], and as a batch."""
    schema, vocabularies, catalog = reader.open()
    table, along = read_row_group(reader.data, group, schema), reader.along()
    for name, column in along(group, table).items() if along else ():
        table = table.append_column(name, column)
    good = np.flatnonzero(find_faults(table, group.day, catalog) == 0)
    encoded = encode(table.take(pa.array(good)), schema, vocabularies, catalog)
    for start in range(0, len(good), PART):
        yield good[start : start + PART], encoded_batch(reader, text, encoded.slice(start, PART))


def distill(
    day: Day,
    read: Read,
    represented: Manifest | None,
    ctr: ClickConfig,
    config: DistillConfig,
    start: Manifest | None,
    days: Days,
) -> Manifest:
    """Gain and vanilla network. The output is the vanilla network's, with the gain network in folder `GAIN`.

    Args:
        represented: output of `represent`; None without text.
        start: output of the pair to start from.
        days: to train on.
    """
    epochs = ctr.warm_epochs if start else ctr.epochs
    identity = represented and represented.identity
    parts = (to_dict(ctr), to_dict(config), day.options.seed, epochs, [str(d) for d in days], start and start.identity)
    inputs = fingerprint(read.identity, identity, *parts)
    beside, width = (represented.facts["beside"], represented.facts["width"]) if represented else ("", 0)
    reader = LogReader(day.options.data, day.state.uri, read.output.name, beside)
    return train_on_log(
        day,
        "distill",
        read,
        reader,
        ctr,
        days,
        epochs,
        inputs,
        order=ctr.order,
        task=partial(_pair, reader, ctr, config, width, start, day.options.seed),
        save=save_pair,
        collate=partial(encoded_batch, reader, None),
    )


def _pair(
    reader: LogReader, ctr: ClickConfig, config: DistillConfig, width: int, start: Manifest | None, seed: int
) -> Distillation:
    if start:
        count = config.networks
        vanilla = grown_model(reader, ctr, start, seed=seed, networks=count)
        gain = grown_model(reader, ctr, start, seed=seed + GAIN_SEED, folder=GAIN, networks=count)
        return Distillation(vanilla, gain, config)
    schema, encoders, _ = reader.open()
    return Distillation.build(schema, table_sizes(encoders, schema), ctr, config, width, seed)


def save_pair(task: Distillation, folder: Path) -> None:
    """Write the vanilla network, and the gain network into a folder of its own."""
    (folder / GAIN).mkdir(exist_ok=True)
    save_click_model(task.vanilla, folder)
    save_click_model(task.whole_gain(), folder / GAIN)
