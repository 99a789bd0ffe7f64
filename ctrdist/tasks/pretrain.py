"""Domain-adaptive pre-training: a language model reads the items' texts (CELA section 4.1.1)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ctrdist.errors import UserError
from ctrdist.group import Group
from ctrdist.language.masking import MaskVocabulary, mask_tokens
from ctrdist.language.model import LanguageModel
from ctrdist.language.tokens import TokenBatch
from ctrdist.losses import info_nce, masked_language_model
from ctrdist.tasks import Task

BUCKETS = 4
"""Parts of like length that a worker's texts are computed in."""


@dataclass(frozen=True)
class PretrainConfig:
    """Options of domain-adaptive pre-training.

    Args:
        epochs: passes over the items; 0 takes the language model as it is.
        batch_size: items a step, over all workers.
        lr: learning rate of AdamW; 5e-5 for a bare model, less for a sentence encoder.
        head_lr: the same for a masked-word head that is drawn anew, because the model's checkpoint has none.
        weight_decay: of matrices; biases and LayerNorm have none.
        warmup: share of the steps in which the learning rate rises, before it falls linearly to 0.
        max_length: tokens of a text that are read, special tokens included.
        mask_probability: share of the words that are to be predicted.
        simcse_weight: the weight of SimCSE beside the masked-word loss (the paper's alpha, 0.1 to 1.5 there).
        simcse_temperature: of SimCSE (the paper's tau1, 0.001 to 0.1 there).
        every_days: a daily run pre-trains again when the last time is this many days ago; 0 = never again.
    """

    epochs: int = 1
    batch_size: int = 32
    lr: float = 2e-6
    head_lr: float = 1e-3
    weight_decay: float = 0.01
    warmup: float = 0.05
    max_length: int = 64
    mask_probability: float = 0.15
    simcse_weight: float = 0.5
    simcse_temperature: float = 0.05
    every_days: int = 7

    def __post_init__(self) -> None:
        if not 0 < self.mask_probability <= 1:
            raise UserError(f"pretrain.mask_probability: {self.mask_probability} is not over 0 and at most 1")
        if self.simcse_temperature <= 0:
            raise UserError(f"pretrain.simcse_temperature: {self.simcse_temperature} is not over 0")
        if self.simcse_weight < 0:
            raise UserError(f"pretrain.simcse_weight: {self.simcse_weight} is under 0; 0 leaves SimCSE out")


class DomainAdaptivePretraining(Task):
    """Predict masked words, and tell each text, seen twice under different dropout, from all others.

        L_DAP = L_MLM + alpha L_SimCSE                                                          (CELA eq. 6)

    L_MLM is eq. 4 as a mean over the masked words; L_SimCSE is eq. 5 with cosine similarity, and all texts of the
    global batch as negatives. In evaluation mode there is no dropout and the two views are the same.

    Args:
        language_model: loaded with `masked_lm=True`.
        config: options.
        seed: decides, with epoch, item and position, which words are masked. Dropout follows torch's random state.
    """

    def __init__(self, language_model: LanguageModel, config: PretrainConfig, seed: int = 0) -> None:
        super().__init__()
        assert language_model.has_head, "load the language model with masked_lm=True"
        self.language_model, self.config, self.seed = language_model, config, seed
        self.vocabulary = MaskVocabulary.of(language_model.tokenizer)
        self.group = Group()

    def forward(self, batch: TokenBatch) -> dict[str, Tensor]:
        """`loss`, `mlm` and `simcse` (unweighted; left out where its weight is 0) of B texts."""
        config, model = self.config, self.language_model
        copies = 3 if config.simcse_weight else 1
        words, targets, views = [], [], []
        for part in batch.buckets(BUCKETS):
            masked = mask_tokens(part, self.vocabulary, config.mask_probability, self.seed)
            ids = torch.cat([masked.input_ids] + [part.input_ids] * (copies - 1))
            mask = part.attention_mask.repeat(copies, 1)
            hidden = model.hidden(ids, mask)
            words.append(hidden[: len(part)].flatten(0, 1)[masked.positions])
            targets.append(masked.targets)
            views.append(model.pool(hidden[len(part) :], mask[len(part) :]).unflatten(0, (copies - 1, len(part))))
        logits, targets = model.token_logits(torch.cat(words)), torch.cat(targets)
        if not config.simcse_weight:
            loss = masked_language_model(logits, targets, self.group)
            return {"loss": loss, "mlm": loss.detach()}
        first, second = torch.cat(views, 1)
        mlm = masked_language_model(logits, targets, self.group)
        simcse = info_nce(first, second, config.simcse_temperature, self.group, similarity="cosine")
        return {"loss": mlm + config.simcse_weight * simcse, "mlm": mlm.detach(), "simcse": simcse.detach()}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The whole language model and its masked-word head."""
        config = self.config
        return self.language_model.parameter_groups(config.lr, config.weight_decay, config.head_lr)
