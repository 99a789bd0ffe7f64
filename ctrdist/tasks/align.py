"""Item alignment: a language model learns to speak in the space of the ID embeddings (CELA's ROMA, section 4.2)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ctrdist.errors import UserError
from ctrdist.group import Group
from ctrdist.language.encoder import TextEncoder
from ctrdist.language.model import decayed
from ctrdist.language.tokens import TokenBatch
from ctrdist.losses import SIMILARITIES, global_mean, in_batch_logits, symmetric_info_nce
from ctrdist.tasks import Task

BUCKETS = 4
"""Parts of like length that a worker's texts are computed in, where memory does not ask for more."""


@dataclass(frozen=True)
class AlignConfig:
    """Options of item alignment.

    Args:
        epochs: passes over the items.
        warm_epochs: the same, for a day that starts from the day before.
        batch_size: items a step, over all workers; all but one are negatives.
        lr: learning rate of the language model. The paper's 5e-5 is for a bare RoBERTa; with it a sentence encoder
            forgets what the embeddings do not hold.
        head_lr: learning rate of the projection head.
        weight_decay: of the language model's matrices.
        head_weight_decay: of the head's matrices.
        warmup: share of the steps in which the learning rates rise, before they fall linearly to 0.
        temperature: divides the similarities (the paper's tau2).
        similarity: `dot` (the paper) or `cosine`.
        head_hidden: widths of the projection head's hidden layers. `(128,)` is the head of the paper's experiments,
            `()` the single linear map of its equation 9.
        max_length: tokens of a text that are read, special tokens included.
        chunk: with more than 0, texts encoded at a time: memory follows the chunk and not the batch, for one more
            forward pass (gradient caching; gradients stay the same). 0 = the whole batch at once.
    """

    epochs: int = 2
    warm_epochs: int = 1
    batch_size: int = 128
    lr: float = 2e-6
    head_lr: float = 3e-3
    weight_decay: float = 0.01
    head_weight_decay: float = 3e-2
    warmup: float = 0.05
    temperature: float = 1.0
    similarity: str = "dot"
    head_hidden: tuple[int, ...] = (128,)
    max_length: int = 64
    chunk: int = 0

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise UserError(f"align.temperature: {self.temperature} is not over 0")
        if self.similarity not in SIMILARITIES:
            raise UserError(f"align.similarity: unknown '{self.similarity}'; known: {', '.join(SIMILARITIES)}")
        if self.chunk < 0:
            raise UserError(f"align.chunk: {self.chunk} is under 0; 0 encodes the whole batch at once")


class ItemAlignment(Task):
    """Each item's text vector should find that item's frozen embeddings among those of the global batch, and back.

        L_ROMA = L_tn + L_nt                                                                    (CELA eq. 10-12)

    Args:
        encoder: language model and projection head; its `out` is the targets' width.
        targets: [items, f * d] float32, the item-side embeddings of the ID model by catalog row. Neither trained nor
            part of the state: they stay where they are (a memory map will do), only a batch's rows are copied.
        config: options.
    """

    def __init__(self, encoder: TextEncoder, targets: Tensor, config: AlignConfig) -> None:
        super().__init__()
        assert targets.ndim == 2 and targets.shape[1] == encoder.out, (targets.shape, encoder.out)
        self.encoder, self.config = encoder, config
        self.targets = targets.detach()
        self.group = Group()

    def forward(self, batch: TokenBatch) -> dict[str, Tensor]:
        """`loss`, and `accuracy`: the share of texts whose own item comes first in the global batch."""
        config = self.config
        parts = batch.buckets(max(1, -(-len(batch) // config.chunk)) if config.chunk else BUCKETS)
        text = torch.cat([self._encode(part) for part in parts])
        items = torch.cat([part.items for part in parts])
        item = self.targets[items.to(self.targets.device)].to(
            text.device, torch.promote_types(text.dtype, torch.float32)
        )
        loss = symmetric_info_nce(text, item, config.temperature, self.group, config.similarity)
        with torch.no_grad():
            logits, own = in_batch_logits(text, item, config.temperature, self.group, config.similarity)
            # A tie is a miss: a model that says the same of every item must not look perfect.
            first = (logits >= logits.gather(1, own.unsqueeze(1))).sum(1) == 1
            accuracy = global_mean(first.sum().to(loss.dtype), len(batch), self.group)
        return {"loss": loss, "accuracy": accuracy}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The language model at `lr` and the head at `head_lr`; no weight decay on biases and LayerNorm."""
        config, encoder = self.config, self.encoder
        head = decayed(list(encoder.head.named_parameters()), config.head_lr, config.head_weight_decay)
        return encoder.language_model.parameter_groups(config.lr, config.weight_decay) + head

    def _encode(self, batch: TokenBatch) -> Tensor:
        if not self.config.chunk:
            return self.encoder(batch.input_ids, batch.attention_mask)
        # The chunk keeps its input and random state only, and is computed again, alike, in the backward pass.
        return checkpoint(self.encoder, batch.input_ids, batch.attention_mask, use_reentrant=False)
