"""Item alignment: a language model learns to speak in the space of the ID embeddings (CELA's ROMA, section 4.2)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ctrdist.errors import UserError
from ctrdist.group import Group
from ctrdist.language.encoder import TextEncoder
from ctrdist.language.parts import in_parts
from ctrdist.language.tokens import TokenBatch
from ctrdist.losses import NEGATIVES, SIMILARITIES, among, global_mean, in_batch_logits, symmetric_info_nce
from ctrdist.optim import split_decay
from ctrdist.tasks import Task, check_text_options


@dataclass(frozen=True)
class AlignConfig:
    """Options of item alignment.

    Args:
        epochs: passes over the items; 0 leaves the alignment out, and the language model stays as it is.
        warm_epochs: the same, for a day that starts from the day before.
        batch_size: items a step, over all workers; all but one are negatives.
        lr: learning rate of the language model. The paper's 5e-5 is for a bare RoBERTa; with it a sentence encoder
            forgets what the embeddings do not hold. Adapters have `lm.lora.lr`.
        head_lr: learning rate of the projection head.
        weight_decay: of the language model's matrices.
        head_weight_decay: of the head's matrices.
        warmup: share of the steps in which the learning rates rise, before they fall linearly to 0.
        clip_norm: largest norm of the gradients; 0 for no limit.
        temperature: divides the similarities (the paper's tau2).
        similarity: `dot` (the paper) or `cosine`.
        negatives: `global` takes the items of all workers, `local` those of the item's own worker only.
        popular_share: share of the items with training rows that are aligned, the most popular ones (figure 5).
        popularity_power: an item's terms count as much as its training rows to this power, over the global batch's sum
            of these; 0 counts all items alike, 1 all rows.
        freeze_language_model: only the head is trained, on vectors that stay as they are, and the text table takes the
            head's (the paper's "ROMA w/o PLM").
        head_hidden: widths of the projection head's hidden layers. `(128,)` is the head of the paper's experiments,
            `()` the single linear map of its equation 9.
        head_norm: the head ends in ReLU and LayerNorm. With `head_hidden` `()` that is the head of the authors' code.
        max_length: tokens of a text that are read, special tokens included.
        chunk: with more than 0, texts encoded at a time: memory follows the chunk and not the batch, for one more
            forward pass (gradient caching; gradients stay the same). 0 = the whole batch at once.
        valid_share: share of the items that are held out and scored, by the loss, after each epoch.
        patience: with held-out items, stop after this many epochs without a lower loss of theirs, and keep the best
            epoch's weights; 0 trains to the end and keeps the last ones.
        every_days: a daily run aligns again when the last time is this many days ago, and after each DAP; 0 = only
            after DAP. On the days between, the language model stays as it is, and only new texts are encoded.
    """

    epochs: int = 2
    warm_epochs: int = 1
    batch_size: int = 128
    lr: float = 2e-6
    head_lr: float = 3e-3
    weight_decay: float = 0.01
    head_weight_decay: float = 3e-2
    warmup: float = 0.05
    clip_norm: float = 1.0
    temperature: float = 1.0
    similarity: str = "dot"
    negatives: str = "global"
    popular_share: float = 1.0
    popularity_power: float = 0.0
    freeze_language_model: bool = False
    head_hidden: tuple[int, ...] = (128,)
    head_norm: bool = False
    max_length: int = 64
    chunk: int = 0
    valid_share: float = 0.0
    patience: int = 0
    every_days: int = 1

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise UserError(f"align.temperature: {self.temperature} is not over 0")
        if self.similarity not in SIMILARITIES:
            raise UserError(f"align.similarity: unknown '{self.similarity}'; known: {', '.join(SIMILARITIES)}")
        if self.negatives not in NEGATIVES:
            raise UserError(f"align.negatives: unknown '{self.negatives}'; known: {', '.join(NEGATIVES)}")
        if not 0 < self.popular_share <= 1:
            raise UserError(f"align.popular_share: {self.popular_share} is not over 0 and at most 1")
        check_text_options("align", self)


class ItemAlignment(Task):
    """Each item's text vector should find that item's frozen embeddings among those of the global batch, and back.

        L_ROMA = L_tn + L_nt                                                                    (CELA eq. 10-12)

    Both are means over the items of the global batch, with `popularity_power` p weighted by count^p.

    Args:
        encoder: language model and projection head; its `out` is the targets' width.
        targets: [items, f * d] float32, the item-side embeddings of the ID model by catalog row. Neither trained nor
            part of the state: they stay where they are (a memory map will do), only a batch's rows are copied.
        config: options.
        counts: [items], each item's training rows by catalog row; needed with a `popularity_power` other than 0.
    """

    def __init__(
        self, encoder: TextEncoder, targets: Tensor, config: AlignConfig, counts: Tensor | None = None
    ) -> None:
        super().__init__()
        assert targets.ndim == 2 and targets.shape[1] == encoder.out, (targets.shape, encoder.out)
        assert counts is not None or not config.popularity_power, "popularity needs counts"
        self.encoder, self.config = encoder, config
        self.targets, self.counts = targets.detach(), counts
        self.group = Group()

    def forward(self, batch: TokenBatch) -> dict[str, Tensor]:
        """`loss`, and `accuracy`: the share of texts whose own item comes first among the negatives."""
        config = self.config
        parts, vectors = zip(*in_parts(self._encode, batch, config.chunk), strict=True)
        text = torch.cat(vectors)
        items = torch.cat([part.items for part in parts]).to(self.targets.device)
        wide = torch.promote_types(text.dtype, torch.float32)
        item = self.targets[items].to(text.device, wide)
        weight = None
        if config.popularity_power:
            weight = self.counts[items.to(self.counts.device)].to(text.device, wide) ** config.popularity_power
        loss = symmetric_info_nce(
            text, item, config.temperature, self.group, config.similarity, weight, config.negatives
        )
        with torch.no_grad():
            others = among(self.group, config.negatives)
            logits, own = in_batch_logits(text, item, config.temperature, others, config.similarity)
            # A tie is a miss: a model that says the same of every item must not look perfect.
            first = (logits >= logits.gather(1, own.unsqueeze(1))).sum(1) == 1
            accuracy = global_mean(first.sum().to(loss.dtype), len(batch), self.group)
        return {"loss": loss, "accuracy": accuracy}

    def train(self, mode: bool = True) -> "ItemAlignment":
        """Set the mode; a frozen language model has no dropout in either."""
        super().train(mode)
        if self.config.freeze_language_model:
            self.encoder.language_model.eval()
        return self

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The language model at `lr`, if it is trained, and the head at `head_lr`; no weight decay on biases and
        LayerNorm."""
        config, encoder = self.config, self.encoder
        head = split_decay(list(encoder.head.parameters()), config.head_lr, config.head_weight_decay)
        if config.freeze_language_model:
            return head
        return encoder.language_model.parameter_groups(config.lr, config.weight_decay) + head

    def _encode(self, part: TokenBatch) -> Tensor:
        return self.encoder(part.input_ids, part.attention_mask)
