"""DAP, ROMA and the text table of a log in memory, in one process: the tasks, loop and encoder of the daily job.

And the controls beside a language model: its first layers, and one like it that has learnt nothing.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from transformers import AutoConfig, AutoModel

from benchmarks.cells.log import Log
from ctrdist.errors import UserError
from ctrdist.items import most_popular
from ctrdist.language import source as language_models
from ctrdist.language.encode import EncodeConfig, Encoder, Source
from ctrdist.language.model import LanguageModel, load_tokenizer
from ctrdist.language.tokenizer import StoredTokens
from ctrdist.loop import fit
from ctrdist.tasks import Task
from ctrdist.tasks.align import AlignConfig
from ctrdist.tasks.pretrain import PretrainConfig
from ctrdist.text_training import (
    LanguageModelConfig,
    alignment_task,
    pretraining_task,
    split_items,
    text_batches,
    text_loop,
)

TABLE = "table.npy"


def pretrain(log: Log, lm: LanguageModelConfig, config: PretrainConfig, seed: int, out: Path) -> dict[str, Any]:
    """DAP on all items' texts; the language model goes to folder `out`. Without epochs, as it comes.

    Returns:
        `seconds` of all of it and, of the training, `train_seconds`, `items` and real `tokens` of an epoch.
    """
    began, facts = time.perf_counter(), {}
    if config.epochs:
        task = pretraining_task(lm, config, seed)
        items = log.items_with_text
        facts = _train("dap", task, log, lm, Source(lm.name), config, items, seed)
        task.language_model.save(out)
    else:
        LanguageModel.load(lm.name, lm.pooling).save(out)
    return facts | {"seconds": time.perf_counter() - began}


def align(
    log: Log, lm: LanguageModelConfig, folder: Path, targets: np.ndarray, config: AlignConfig, seed: int, out: Path
) -> dict[str, Any]:
    """ROMA of a folder's language model, on the items with text and training rows; the encoder goes to folder `out`.

    Args:
        targets: float32 [catalog rows, F_item * d], `alignment_targets` of an ID model.

    Returns:
        As `pretrain`.
    """
    began = time.perf_counter()
    items = log.items_with_text
    items = most_popular(items[log.counts[items] > 0], log.counts, config.popular_share)
    counts = log.counts if config.popularity_power else None
    task = alignment_task(folder, torch.from_numpy(targets), config, lm, counts, seed)
    facts = _train("roma", task, log, lm, Source(str(folder)), config, items, seed)
    task.encoder.save(out)
    return facts | {"seconds": time.perf_counter() - began}


def first_layers(name: str, count: int, out: Path) -> dict[str, Any]:
    """The first layers of a language model, as one of its own in folder `out`.

    Raises:
        UserError: it has fewer.
    """
    folder = language_models.fetch(name)
    with language_models.quiet():
        known = AutoConfig.from_pretrained(folder).num_hidden_layers
        if not 0 < count <= known:
            raise UserError(f"--lms first-{count}: {name} has {known} layers")
        model = AutoModel.from_pretrained(folder, num_hidden_layers=count, dtype=torch.float32, use_safetensors=True)
    return _save(model, name, out)


def random_weights(name: str, seed: int, out: Path) -> dict[str, Any]:
    """A language model of the same architecture and tokenizer that has learnt nothing, in folder `out`."""
    with language_models.quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModel.from_config(AutoConfig.from_pretrained(language_models.fetch(name)))
    return _save(model, name, out)


def _save(model: torch.nn.Module, tokenizer: str, out: Path) -> dict[str, Any]:
    LanguageModel(model, load_tokenizer(tokenizer), "mean").save(out)
    return {"parameters": sum(p.numel() for p in model.parameters())}


def encode(log: Log, source: Source, config: EncodeConfig, out: Path) -> dict[str, Any]:
    """All items' texts by a language model into the text table [catalog rows, width], `table.npy` in `out`.

    Returns:
        `seconds`, tokenising included, `items` and real `tokens`.
    """
    began = time.perf_counter()
    table, tokens = text_table(log, source, config)
    np.save(out / TABLE, table)
    return {"seconds": time.perf_counter() - began, "items": len(log.catalog.items), "tokens": tokens}


def text_table(log: Log, source: Source, config: EncodeConfig) -> tuple[np.ndarray, int]:
    """All items' texts by a language model, [catalog rows, width], zeros without an item; and the real tokens."""
    items = log.catalog.items
    tokens = tokenize(log, source, items, config.max_length).tokens
    vectors = Encoder(source.load(), config).encode(tokens)
    table = np.zeros((log.catalog.size, vectors.shape[1]), vectors.dtype)
    table[items] = vectors
    return table, int(tokens.offsets[-1])


def tokenize(log: Log, source: Source, items: np.ndarray, max_length: int) -> StoredTokens:
    """The tokens of items' texts, in memory.

    Args:
        items: int64 [items], catalog rows, ascending.
    """
    tokenizer = source.tokenizer(max_length)
    return StoredTokens(items, tokenizer(log.texts.take(pa.array(items)).to_pylist()), tokenizer.padding)


def _train(
    stage: str,
    task: Task,
    log: Log,
    lm: LanguageModelConfig,
    source: Source,
    config: PretrainConfig | AlignConfig,
    items: np.ndarray,
    seed: int,
) -> dict[str, Any]:
    trained, held = split_items(items, config, seed, stage)
    tokens = tokenize(log, source, items, config.max_length)
    size, epochs = config.batch_size, config.epochs
    progress = fit(
        task,
        lambda step: text_batches(tokens, trained, size, seed, epochs, step=step),
        text_loop(config, len(trained), epochs, lm.precision, seed),
        valid=(lambda: text_batches(tokens, held, size, seed, 1)) if len(held) else None,
    )
    real = int(tokens.take(trained).offsets[-1])
    return {"train_seconds": progress.seconds, "items": len(trained), "tokens": real}
