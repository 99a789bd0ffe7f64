"""ClickPrompt's stages: rows as tokens, masked words with prompts, and fine-tuning with the language model."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq

from ctrdist.config import to_dict
from ctrdist.language import source
from ctrdist.language.model import draws_head
from ctrdist.language.prompts import PromptConfig
from ctrdist.precision import Precision
from ctrdist.prompted import finetuning_task, pretraining_task, rates, row_tokenizer, save_prompted
from ctrdist.row_texts import RowTextConfig, RowTexts, distinct_of_group
from ctrdist.storage import Manifest, State, fingerprint
from ctrdist.tasks.click import ClickConfig, ClickModel, table_sizes
from ctrdist.tasks.prompted import PromptPretrainConfig, PromptPretraining
from ctrdist.tasks.prompted_click import PromptedClick, PromptFinetuneConfig
from ctrdist.text_training import LanguageModelConfig
from raycluster.cluster import in_parallel
from raycluster.day import Day, say
from raycluster.ingest import LogReader
from raycluster.stages.click import encoded_batch, grown_model, train_on_log
from raycluster.stages.language import overdue
from raycluster.stages.read import ITEMS, Days, Read


@dataclass(frozen=True)
class Prompted:
    """What both trainings with the language model are made of.

    Args:
        ctr: the CTR model.
        lm: the language model.
        prompts: what it reads besides words.
    """

    ctr: ClickConfig
    lm: LanguageModelConfig
    prompts: PromptConfig


@dataclass(frozen=True)
class LogTraining:
    """What `train_on_log` asks (`RowTraining`) of such a training, whose precision is the CTR model's."""

    batch_size: int
    schedule: str
    warmup: float
    precision: Precision
    patience: int = 0


def pretraining_due(day: Day, meaning: str, config: PromptPretrainConfig) -> bool:
    """Whether PA-MLM is due: there is none yet of this `meaning`, or the last one is `every_days` old."""
    if day.previous is None or day.previous.facts["meaning"] != meaning:
        return True
    return bool(config.epochs) and overdue(day, day.previous.facts["pretrained"], config.every_days)


def tokens(day: Day, read: Read, lm: str, prompts: PromptConfig, config: RowTextConfig) -> Manifest:
    """What makes the tokens of all rows that were read for the day: every distinct value said and tokenised once."""
    tokenizer = row_tokenizer(lm, config, prompts)
    inputs = fingerprint("by text hash", read.identity, tokenizer.fingerprint, to_dict(config))

    def make(name: str, inputs: str, _metrics: str) -> Manifest:
        reader = LogReader(day.options.data, day.state.uri, read.output.name)
        schema, _, catalog = reader.open()
        items = pq.read_table(day.state.local(read.output.name) / ITEMS)
        groups = {(group.path, group.index): group for group in read.row_groups}  # a split's are of the same rows
        calls = [(reader.data, group, schema, config) for group in groups.values()]
        said = in_parallel(distinct_of_group, calls, day.plan.readers, **day.plan.reader_resources)
        made = RowTexts.of(said, items, schema, catalog, config, tokenizer)
        texts = sum(map(len, made.tokenizer.texts))
        rows = sum(group.good for group in read.row_groups)
        say(f"tokens     {texts:,} distinct texts of fields in {rows:,} rows")
        with day.state.create(name, inputs, {"rows": rows, "texts": texts}) as folder:
            made.save(folder)
        return day.state.find(name)

    return day.stage("tokens", inputs, make)


def pretrain(
    day: Day, read: Read, said: Manifest, parts: Prompted, config: PromptPretrainConfig, days: Days
) -> Manifest:
    """PA-MLM: a new CTR model, and the language model, recover masked words of the rows' texts.

    Args:
        said: output of `tokens`.
        days: to train on.
    """
    if draws_head(parts.lm.name):
        say(f"pretrain   {parts.lm.name} has no head that predicts words: a new one is drawn (pretrain.head_lr)")
    return _train(day, "pretrain", read, said, parts, config, days, config.epochs, None, _pretraining, validated=False)


def finetune(
    day: Day,
    read: Read,
    said: Manifest,
    parts: Prompted,
    config: PromptFinetuneConfig,
    start: Manifest | None,
    days: Days,
    warm: bool,
) -> Manifest:
    """Fine-tuning with the language model.

    Args:
        said: output of `tokens`.
        start: output of `pretrain`, or of an earlier day's `finetune`; None starts from nothing pre-trained.
        days: to train on.
        warm: take `warm_epochs`.
    """
    epochs = config.warm_epochs if warm else config.epochs
    return _train(
        day, "with_plm", read, said, parts, config, days, epochs, start, _finetuning, patience=config.patience
    )


def _train(
    day: Day,
    stage: str,
    read: Read,
    said: Manifest,
    parts: Prompted,
    config: PromptPretrainConfig | PromptFinetuneConfig,
    days: Days,
    epochs: int,
    start: Manifest | None,
    task: Callable[..., PromptPretraining | PromptedClick],
    patience: int = 0,
    validated: bool = True,
) -> Manifest:
    reader = LogReader(day.options.data, day.state.uri, read.output.name, tokens=said.name)
    inputs = fingerprint(
        read.identity,
        said.identity,
        to_dict(parts),
        source.identity(parts.lm.name),
        to_dict(config),
        day.options.seed,
        epochs,
        [str(d) for d in days],
        start and start.identity,
    )
    training = LogTraining(config.batch_size, config.schedule, config.warmup, parts.ctr.precision, patience)
    return train_on_log(
        day,
        stage,
        read,
        reader,
        training,
        days,
        epochs,
        inputs,
        order=parts.ctr.order,
        validated=validated,
        task=partial(task, reader, parts, config, start, day.options.seed),
        save=_save,
        collate=partial(encoded_batch, reader, None),
    )


def _pretraining(
    reader: LogReader, parts: Prompted, config: PromptPretrainConfig, _start: None, seed: int
) -> PromptPretraining:
    click = _new_model(reader, rates(parts.ctr, config), seed)
    return pretraining_task(click, parts.lm, parts.prompts, config, seed)


def _finetuning(
    reader: LogReader, parts: Prompted, config: PromptFinetuneConfig, start: Manifest | None, seed: int
) -> PromptedClick:
    ctr = rates(parts.ctr, config)
    click = grown_model(reader, ctr, start, seed=seed) if start else _new_model(reader, ctr, seed)
    folder = State(reader.state).local(start.name) if start else None
    return finetuning_task(click, parts.lm, parts.prompts, config, folder, seed)


def _new_model(reader: LogReader, ctr: ClickConfig, seed: int) -> ClickModel:
    schema, encoders, _ = reader.open()
    return ClickModel(schema, table_sizes(encoders, schema), ctr, seed=seed)


def _save(task: PromptPretraining | PromptedClick, folder: Path) -> None:
    save_prompted(task, folder)
