"""What DAP and ROMA are made of, in any process: the language model's options, items, steps, batches and tasks."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ctrdist.batch import Lookup
from ctrdist.draws import held_out
from ctrdist.errors import UserError
from ctrdist.items import Catalog, Ragged, item_batches
from ctrdist.language.encoder import HEAD, TextEncoder
from ctrdist.language.lora import LoraConfig
from ctrdist.language.model import LanguageModel
from ctrdist.language.tokenizer import StoredTokens
from ctrdist.language.tokens import TokenBatch, pad
from ctrdist.loop import LoopConfig
from ctrdist.precision import Precision
from ctrdist.schema import Schema
from ctrdist.tasks.align import AlignConfig, ItemAlignment
from ctrdist.tasks.click import ClickModel
from ctrdist.tasks.pretrain import DomainAdaptivePretraining, PretrainConfig


@dataclass(frozen=True)
class LanguageModelConfig:
    """The language model to start from.

    Args:
        name: a Hugging Face name or a local folder.
        pooling: `cls`, `mean`, `last`, `first-last` or `top-2`; `auto` takes the model's own, else `cls` for encoders
            and `last` for decoders.
        precision: of its arithmetic, where it is trained and, in ClickPrompt, where it scores rows; `auto` is bfloat16
            where the chip computes in it.
        gradient_checkpointing: keep each layer's input only and compute the rest again in the backward pass: memory of
            about one layer, for one more forward pass.
        lora: low-rank adapters in place of training all weights; the default for decoders.
    """

    name: str = "sentence-transformers/all-MiniLM-L6-v2"
    pooling: str = "auto"
    precision: Precision = "auto"
    gradient_checkpointing: bool = False
    lora: LoraConfig = field(default_factory=LoraConfig)

    def prepare(self, model: LanguageModel) -> LanguageModel:
        """The model, ready to be trained as the options say."""
        model.adapt(self.lora)
        if self.gradient_checkpointing:
            model.checkpoint_layers()
        return model


def split_items(
    items: np.ndarray, config: PretrainConfig | AlignConfig, seed: int, stage: str
) -> tuple[np.ndarray, np.ndarray]:
    """The items to train on and those that are held out, where `config` says so.

    Args:
        items: int64 [items], catalog rows.
        stage: what to call it in errors.

    Raises:
        UserError: nothing is left to train or to validate on.
    """
    held = held_out(items, config.valid_share, seed)
    if config.valid_share and not (held.any() and not held.all()):
        raise UserError(
            f"{stage}: valid_share {config.valid_share}: {held.sum()} of {len(items)} items are held out, which leaves "
            "nothing to train or to validate on; choose another share"
        )
    return items[~held], items[held]


def text_loop(
    config: PretrainConfig | AlignConfig, items: int, epochs: int, precision: Precision, seed: int
) -> LoopConfig:
    """How a task on so many items is trained."""
    return LoopConfig(
        steps_per_epoch=-(-items // config.batch_size),
        epochs=epochs,
        patience=config.patience,
        schedule="linear",
        warmup=config.warmup,
        clip_norm=config.clip_norm,
        precision=precision,
        seed=seed,
    )


def text_batches(
    tokens: StoredTokens,
    items: np.ndarray,
    batch: int,
    seed: int,
    epochs: int,
    rank: int = 0,
    workers: int = 1,
    step: int = 0,
) -> Iterator[TokenBatch]:
    """A worker's share of each global batch of items from `step` on.

    Args:
        items: int64 [items], catalog rows that `tokens` has.
        batch: items of a global batch.
    """
    steps = -(-len(items) // batch)
    share = batch // workers
    for epoch in range(step // steps, epochs):
        for number, rows in enumerate(item_batches(items, batch, seed, epoch)):
            if epoch * steps + number >= step:
                own = rows[rank * share : (rank + 1) * share]
                yield pad(tokens.take(own), own, tokens.padding, epoch)


def pretraining_task(lm: LanguageModelConfig, config: PretrainConfig, seed: int) -> DomainAdaptivePretraining:
    """DAP of a language model, which is loaded; a head that its checkpoint lacks is drawn by `seed`."""
    torch.manual_seed(seed)
    model = lm.prepare(LanguageModel.load(lm.name, lm.pooling, head=config.mlm_weight > 0))
    return DomainAdaptivePretraining(model, config, seed)


def alignment_task(
    folder: Path,
    targets: Tensor,
    config: AlignConfig,
    lm: LanguageModelConfig,
    counts: np.ndarray | None,
    seed: int,
) -> ItemAlignment:
    """ROMA of a language model; the projection head goes on where it was or, if it is another, is drawn by `seed`.

    Args:
        folder: with the language model, and its head if there is one.
        targets: float32 [catalog rows, F_item * d] (`alignment_targets`).
        lm: how the language model is trained.
        counts: training rows by catalog row; needed with a `popularity_power` other than 0.
    """
    torch.manual_seed(seed)
    encoder = TextEncoder.load(folder) if (folder / HEAD).exists() else None
    if encoder is None or (encoder.widths, encoder.norm) != ((*config.head_hidden, targets.shape[1]), config.head_norm):
        model = LanguageModel.load(str(folder))
        encoder = TextEncoder(model, targets.shape[1], config.head_hidden, norm=config.head_norm)
    encoder.into_table = config.freeze_language_model  # or the table would be as if nothing had been aligned
    if not config.freeze_language_model:
        lm.prepare(encoder.language_model)
    return ItemAlignment(encoder, targets, config, None if counts is None else torch.from_numpy(counts))


def alignment_targets(model: ClickModel, schema: Schema, catalog: Catalog, block: int = 65536) -> Tensor:
    """A click model's item-side embeddings, joined, by catalog row: float32 [rows, F_item * d] (CELA, eq. 8).

    Each field is scaled to unit mean square: how small embeddings are is a matter of their decay, and no field should
    count more, nor a temperature of 1 mean less, because of it.
    """
    out = torch.zeros(catalog.size, len(schema.item) * model.config.dim)
    for start in range(0, catalog.size, block):
        rows = np.arange(start, min(start + block, catalog.size))
        fields = {}
        for f in schema.item:
            column = catalog.fields[f.name]
            values = column.take(rows) if isinstance(column, Ragged) else np.asarray(column[rows])
            fields[f.name] = Lookup.of(values)
        out[start : start + len(rows)] = model.item_embeddings(fields)
    by_field = out.unflatten(1, (-1, model.config.dim))
    scale = by_field[1:].square().mean((0, 2), keepdim=True).sqrt().clamp(min=1e-12)
    return (by_field / scale).flatten(1)
