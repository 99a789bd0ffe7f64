"""ClickPrompt's parts on a log in memory: rows as tokens, pre-training, and both fine-tunings."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa

from benchmarks.cells.click import score, train_task
from benchmarks.cells.log import Log
from ctrdist.export import load_click_model
from ctrdist.language.prompts import PromptConfig
from ctrdist.prompted import finetuning_task, pretraining_task, rates, row_tokenizer, save_prompted
from ctrdist.row_texts import RowTextConfig, RowTexts, distinct
from ctrdist.tasks import Task
from ctrdist.tasks.click import ClickConfig, ClickModel
from ctrdist.tasks.prompted import PromptPretrainConfig
from ctrdist.tasks.prompted_click import PromptFinetuneConfig
from ctrdist.text_training import LanguageModelConfig

PARTS = ("train", "valid", "test")


def with_tokens(log: Log, items: pa.Table, lm: str, config: RowTextConfig, prompts: PromptConfig) -> Log:
    """The log with what is said of every row.

    Args:
        log: opened with `raw`.
        items: of the log.
    """
    raw = {part: _raw(getattr(log, part)) for part in PARTS}
    said = [distinct(rows, log.schema, config) for rows in raw.values()]
    made = RowTexts.of(said, items, log.schema, log.catalog, config, row_tokenizer(lm, config, prompts))
    parts = {}
    for part, rows in raw.items():
        (column,) = made.numbers(None, rows).items()
        parts[part] = getattr(log, part).append_column(*column)
    return replace(log, row_texts=made, **parts)


def _raw(rows: pa.Table) -> pa.Table:
    names = [name for name in rows.column_names if name.startswith("raw.")]
    return rows.select(names).rename_columns([name.removeprefix("raw.") for name in names])


def pretrain(
    log: Log,
    ctr: ClickConfig,
    lm: LanguageModelConfig,
    prompts: PromptConfig,
    config: PromptPretrainConfig,
    seed: int,
    device: str,
    out: Path,
) -> dict[str, float]:
    """Pre-train as the daily job does on one worker, and write the result to folder `out`; what that took."""
    click = ClickModel(log.schema, log.sizes, rates(ctr, config), seed=seed)
    task = pretraining_task(click, lm, prompts, config, seed)
    took = _train(log, task, config, ctr, seed, device)
    save_prompted(task.cpu(), out)
    return took


def finetune(
    log: Log,
    ctr: ClickConfig,
    lm: LanguageModelConfig,
    prompts: PromptConfig,
    config: PromptFinetuneConfig,
    seed: int,
    start: Path | None,
    device: str,
    _out: Path,
) -> dict[str, float]:
    """Fine-tune both models; what they score together on the test rows, and what that took.

    Args:
        start: folder that `pretrain` wrote; None leaves pre-training out.
    """
    own = rates(ctr, config)
    click = load_click_model(start, log.schema, own) if start else ClickModel(log.schema, log.sizes, own, seed=seed)
    task = finetuning_task(click, lm, prompts, config, start, seed)
    took = _train(log, task, config, ctr, seed, device)
    return score(log, task) | took


def _train(log: Log, task: Task, config: Any, ctr: ClickConfig, seed: int, device: str) -> dict[str, float]:
    names = ("batch_size", "epochs", "schedule", "warmup")
    options = {name: getattr(config, name) for name in names} | {"precision": ctr.precision}
    patience = getattr(config, "patience", 0)
    return train_task(log, task, SimpleNamespace(**options, patience=patience), seed, device=device)
