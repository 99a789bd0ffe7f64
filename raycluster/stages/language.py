"""Stages of the language model: domain-adaptive pre-training, item alignment, encoding."""

import datetime as dt
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ctrdist.config import to_dict
from ctrdist.export import load_click_model
from ctrdist.items import ItemTexts, most_popular
from ctrdist.language import source
from ctrdist.language.encode import EncodeConfig, Source
from ctrdist.language.model import LanguageModel, draws_head
from ctrdist.language.tokenizer import StoredTokens
from ctrdist.language.tokens import TokenBatch
from ctrdist.precision import Precision
from ctrdist.storage import Manifest, State, fingerprint
from ctrdist.tasks.align import AlignConfig, ItemAlignment
from ctrdist.tasks.pretrain import DomainAdaptivePretraining, PretrainConfig
from ctrdist.text_table import create_text_table, seal_text_table
from ctrdist.text_training import (
    LanguageModelConfig,
    alignment_targets,
    alignment_task,
    pretraining_task,
    split_items,
    text_batches,
    text_loop,
)
from ctrdist.vocabulary import Vocabulary
from raycluster.day import Day, Progress, say
from raycluster.encoder import Numbered, catalog_rows, encode_items
from raycluster.ingest import LogReader
from raycluster.stages.read import Read
from raycluster.tokens import stored_tokens
from raycluster.trainer import Training, train


def pretraining_due(day: Day, lm: LanguageModelConfig, config: PretrainConfig) -> bool:
    """Whether DAP is due: there is none yet of this language model, or the last one is `every_days` old. Without epochs
    a language model that is taken as it comes stays what it is."""
    last = day.earlier("dap")
    if last is None or last.facts["lm"] != to_dict(lm):
        return True
    return bool(config.epochs) and overdue(day, last.facts["date"], config.every_days)


def alignment_due(day: Day, config: AlignConfig, warm: bool) -> bool:
    """Whether ROMA is due: the day does not start from an earlier one's language model (`warm`), or the last one is
    `every_days` old."""
    last = day.earlier("lm").facts.get("date") if warm else None
    return last is None or overdue(day, last, config.every_days)


def overdue(day: Day, last: str, every_days: int) -> bool:
    """Whether what was done on the day `last` is `every_days` old; never with 0."""
    return bool(every_days) and (day.date - dt.date.fromisoformat(last)).days >= every_days


def pretrain(day: Day, read: Read, lm: LanguageModelConfig, config: PretrainConfig) -> Manifest:
    """DAP: words and SimCSE over all items' texts, when it is due; else the last one's language model."""
    if not pretraining_due(day, lm, config):
        manifest = day.earlier("dap")
        say(f"dap        not due: last on {manifest.facts['date']}, every {config.every_days} days")
        day.stages["dap"] = manifest
        day.skipped.add("dap")
        return manifest
    items = _items_with_text(day, read)
    inputs = fingerprint(
        read.output.identity, to_dict(lm), source.identity(lm.name), to_dict(config), day.options.seed
    )  # fmt: skip

    def make(name: str, inputs: str, metrics_file: str) -> Manifest:
        if not config.epochs:
            facts = {"rows": 0, "date": str(day.date), "lm": to_dict(lm)}
            with day.state.create(name, inputs, facts) as folder:
                LanguageModel.load(lm.name, lm.pooling).save(folder)
            return day.state.find(name)
        if config.mlm_weight and draws_head(lm.name):
            say(f"dap        {lm.name} has no head that predicts words: a new one is drawn (pretrain.head_lr)")
        training = _text_training(
            day,
            name,
            inputs,
            items,
            config,
            config.epochs,
            lm.precision,
            metrics_file,
            partial(_text_batches, day.state.uri, _tokens(day, read, Source(lm.name), config.max_length)),
            task=partial(pretraining_task, lm, config, day.options.seed),
            save=_save_language_model,
            facts={"date": str(day.date), "lm": to_dict(lm)},
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
    options: LanguageModelConfig,
    warm: bool = False,
    due: bool = True,
) -> Manifest:
    """ROMA: the language model towards a click model's frozen item embeddings, over items with training rows.

    With no epochs, or where it is not due, it is left out, and `lm` is returned.

    Args:
        lm: output with the language model to start from, and its head if there is one.
        model: output of the click model to align to.
        options: how the language model is trained.
        warm: take `warm_epochs` passes instead of `epochs`.
        due: `alignment_due` of the day.
    """
    epochs = config.warm_epochs if warm and config.epochs else config.epochs
    if not epochs:
        say(f"{stage:10} left out: no epochs of alignment")
        return lm
    if not due:
        say(f"{stage:10} not due: last on {lm.facts['date']}, every {config.every_days} days")
        day.stages[stage] = lm
        day.skipped.add(stage)
        return lm
    items = _items_with_text(day, read)
    items = most_popular(items[read.counts[items] > 0], read.counts, config.popular_share)
    inputs = fingerprint(
        read.output.identity, lm.identity, model.identity, to_dict(config), to_dict(options), epochs, day.options.seed
    )
    counts = read.counts if config.popularity_power else None

    def make(name: str, inputs: str, metrics_file: str) -> Manifest:
        tokens = _tokens(day, read, Source(lm.name, day.state.uri), config.max_length)
        training = _text_training(
            day,
            name,
            inputs,
            items,
            config,
            epochs,
            options.precision,
            metrics_file,
            partial(_text_batches, day.state.uri, tokens),
            task=partial(
                _align_task,
                day.state.uri,
                read.output.name,
                lm.name,
                model.name,
                config,
                options,
                counts,
                day.options.seed,
            ),
            save=_save_encoder,
            facts={"items": len(items), "date": str(day.date)},
        )
        return train(training, day.plan)

    return day.stage(stage, inputs, make)


def _text_training(
    day: Day,
    name: str,
    inputs: str,
    items: np.ndarray,
    config: PretrainConfig | AlignConfig,
    epochs: int,
    precision: Precision,
    metrics_file: str,
    batches: Callable[..., Iterator[TokenBatch]],
    facts: dict[str, Any],
    **parts: Any,
) -> Training:
    """A training on items' texts, with some of them held out where `config` says so."""
    seed = day.options.seed
    trained, held = split_items(items, config, seed, name)

    def passes(of: np.ndarray, count: int) -> Callable[[int, int, int], Iterator[TokenBatch]]:
        return partial(batches, of, config.batch_size, seed, count)

    return Training(
        state=day.state.uri,
        output=name,
        inputs=inputs,
        loop=text_loop(config, len(trained), epochs, precision, seed),
        batch_size=config.batch_size,
        metrics=metrics_file,
        batches=passes(trained, epochs),
        valid_batches=passes(held, 1) if len(held) else None,
        facts={"rows": len(trained)} | facts,
        **parts,
    )


def _items_with_text(day: Day, read: Read) -> np.ndarray:
    folder = day.state.local(read.output.name)
    items = np.flatnonzero(np.load(folder / "catalog" / "present.npy"))
    return items[ItemTexts(folder / "texts.arrow").lengths(items) > 0]


def _tokens(day: Day, read: Read, lm: Source, max_length: int) -> str:
    """The output with the tokens of all texts of the day: DAP and ROMA share it if they read as much of a text."""
    items = _items_with_text(day, read)
    with day.alone(f"{read.output.name}.tokens"):
        return stored_tokens(day.state, read.output, lm.tokenizer(max_length), items).name


def _text_batches(
    state: str,
    tokens: str,
    items: np.ndarray,
    batch: int,
    seed: int,
    epochs: int,
    rank: int,
    workers: int,
    step: int,
) -> Iterator[TokenBatch]:
    """`text_batches` of an output with tokens."""
    stored = StoredTokens.load(State(state).local(tokens))
    return text_batches(stored, items, batch, seed, epochs, rank, workers, step)


def _align_task(
    state: str,
    read: str,
    lm: str,
    model: str,
    config: AlignConfig,
    options: LanguageModelConfig,
    counts: np.ndarray | None,
    seed: int,
) -> ItemAlignment:
    store = State(state)
    return alignment_task(store.local(lm), item_embeddings(store, read, model), config, options, counts, seed)


def item_embeddings(state: State, read: str, model: str) -> torch.Tensor:
    """`alignment_targets` of an output with a click model."""
    schema, _, catalog = LogReader("", state.uri, read).open()
    return alignment_targets(load_click_model(state.local(model), schema), schema, catalog)


def table_of_embeddings(day: Day, stage: str, read: Read, model: Manifest) -> Manifest:
    """A click model's item embeddings in place of the text table: MF² "w/o text" (CELA, table 4)."""
    inputs = fingerprint(read.output.identity, model.identity)

    def make(name: str, inputs: str, _metrics: str) -> Manifest:
        source = day.state.local(read.output.name)
        present = np.load(source / "catalog" / "present.npy")
        vectors = item_embeddings(day.state, read.output.name, model.name).numpy()
        facts = {"model": model.identity, "items": int(present.sum()), "rows": int(present.sum())}
        with day.state.create(name, inputs, facts) as folder:
            table = create_text_table(folder, *vectors.shape, "float32")
            table[present] = vectors[present]
            catalog = Vocabulary.load(source / "catalog" / "ids").fingerprint()
            facts["dim"] = seal_text_table(folder, table, present.astype(np.uint64), model.identity, catalog).dim
        return day.state.find(name)

    return day.stage(stage, inputs, make)


def _save_language_model(task: DomainAdaptivePretraining, folder: Path) -> None:
    task.language_model.save(folder)


def _save_encoder(task: ItemAlignment, folder: Path) -> None:
    task.encoder.save(folder)


def encode(day: Day, stage: str, read: Read, lm: Manifest, config: EncodeConfig) -> Manifest:
    """Every item's text through a language model into the text table: its pooled states, at its width.

    What a table of an earlier run has of the same text and the same model is taken from there.
    """
    inputs = fingerprint(read.output.identity, lm.identity, to_dict(config))
    texts = lambda _stage: (read.output.name, catalog_rows(day.state, read.output.name))
    return encode_stage(day, stage, texts, Source(lm.name, day.state.uri), config, inputs)


def encode_stage(
    day: Day,
    stage: str,
    texts: Callable[[str], tuple[str, Numbered]],
    model: Source,
    config: EncodeConfig,
    inputs: str,
) -> Manifest:
    """`encode_items` as a stage. What a table of an earlier run has of the same text and model is taken over. Its facts
    name the output with the `texts`.

    Args:
        texts: called with the name of the stage's output, to make the texts or find them: the output that holds them,
            and which of them are encoded.
    """

    def make(name: str, inputs: str, _metrics: str) -> Manifest:
        report, previous = Progress(stage, "texts").items, _earlier_tables(day.state)
        source, numbered = texts(name)
        made = encode_items(day.state, name, model, source, config, day.plan, inputs, previous, report, numbered)
        day.state.annotate(name, {"texts": source})
        say(f"{stage:10} {made.facts['texts_encoded']:,} texts encoded, {made.facts['copied']:,} rows copied")
        return made

    return day.stage(stage, inputs, make)


def _earlier_tables(state: State) -> Iterator[Manifest]:
    """The text tables of all runs that the state keeps, the newest first; each is looked up when it is asked for."""
    for date in sorted(state.folders("runs"), reverse=True):
        for name in reversed(state.names(f"runs/{date}")):
            if name.rsplit("/", 1)[1].startswith("encode") and (found := state.find(name)):
                yield found
