"""Domain-adaptive pre-training: a language model reads the items' texts (CELA section 4.1.1)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ctrdist.errors import UserError
from ctrdist.group import Group
from ctrdist.language.masking import MaskVocabulary, mask_tokens, next_tokens
from ctrdist.language.model import LanguageModel
from ctrdist.language.parts import in_parts
from ctrdist.language.tokens import TokenBatch
from ctrdist.losses import global_mean, info_nce, language_model_total
from ctrdist.tasks import Task, check_text_options


@dataclass(frozen=True)
class PretrainConfig:
    """Options of domain-adaptive pre-training.

    Args:
        epochs: passes over the items; 0 takes the language model as it is.
        batch_size: items a step, over all workers.
        lr: learning rate of AdamW; 5e-5 for a bare model, less for a sentence encoder. Adapters have `lm.lora.lr`.
        head_lr: the same for a head that is drawn anew, because the model's checkpoint has none.
        weight_decay: of matrices; biases and LayerNorm have none.
        warmup: share of the steps in which the learning rate rises, before it falls linearly to 0.
        clip_norm: largest norm of the gradients; 0 for no limit.
        max_length: tokens of a text that are read, special tokens included.
        mask_probability: share of the words that an encoder is to predict; a decoder predicts each next one.
        mlm_weight: the weight of the loss of these words; 0 leaves it out (the paper's "without MLM").
        simcse_weight: the weight of SimCSE beside it (the paper's alpha, 0.1 to 1.5 there); 0 leaves it out.
        simcse_temperature: of SimCSE (the paper's tau1, 0.001 to 0.1 there).
        chunk: with more than 0, texts computed at a time: memory follows the chunk and not the batch, for one more
            forward pass (gradient caching; gradients stay the same). 0 = the whole batch at once.
        valid_share: share of the items that are held out and scored, by the loss, after each epoch.
        patience: with held-out items, stop after this many epochs without a lower loss of theirs, and keep the best
            epoch's weights; 0 trains to the end and keeps the last ones.
        every_days: a daily run pre-trains again when the last time is this many days ago; 0 = never again.
    """

    epochs: int = 1
    batch_size: int = 32
    lr: float = 2e-6
    head_lr: float = 1e-3
    weight_decay: float = 0.01
    warmup: float = 0.05
    clip_norm: float = 1.0
    max_length: int = 64
    mask_probability: float = 0.15
    mlm_weight: float = 1.0
    simcse_weight: float = 0.5
    simcse_temperature: float = 0.05
    chunk: int = 0
    valid_share: float = 0.0
    patience: int = 0
    every_days: int = 7

    def __post_init__(self) -> None:
        if not 0 < self.mask_probability <= 1:
            raise UserError(f"pretrain.mask_probability: {self.mask_probability} is not over 0 and at most 1")
        if self.simcse_temperature <= 0:
            raise UserError(f"pretrain.simcse_temperature: {self.simcse_temperature} is not over 0")
        if self.simcse_weight < 0:
            raise UserError(f"pretrain.simcse_weight: {self.simcse_weight} is under 0; 0 leaves SimCSE out")
        if self.mlm_weight < 0:
            raise UserError(f"pretrain.mlm_weight: {self.mlm_weight} is under 0; 0 leaves the words' loss out")
        if not (self.mlm_weight or self.simcse_weight):
            raise UserError(
                "pretrain.mlm_weight and pretrain.simcse_weight are both 0: nothing is left to learn; "
                "pretrain.epochs 0 leaves pre-training out"
            )
        check_text_options("pretrain", self)


class DomainAdaptivePretraining(Task):
    """Predict words, and tell each text, seen twice under different dropout, from all others.

        L_DAP = L_LM + alpha L_SimCSE                                                           (CELA eq. 6)

    L_LM is the mean over all words to predict of the global batch: masked ones (`mlm`, eq. 4) for an encoder, each next
    one (`clm`) for a decoder, which reads the first of SimCSE's two views for it. L_SimCSE is eq. 5 with cosine
    similarity, and all texts of the global batch as negatives. In evaluation mode there is no dropout and the two views
    are the same.

    Args:
        language_model: loaded with a head, if `mlm_weight` is over 0.
        config: options.
        seed: decides, with epoch, item and position, which words are masked. Dropout follows torch's random state.
    """

    def __init__(self, language_model: LanguageModel, config: PretrainConfig, seed: int = 0) -> None:
        super().__init__()
        assert language_model.has_head == bool(config.mlm_weight), "a head if, and only if, words are predicted"
        self.language_model, self.config, self.seed = language_model, config, seed
        self.masks = bool(config.mlm_weight) and not language_model.is_decoder
        self.vocabulary = MaskVocabulary.of(language_model.tokenizer) if self.masks else None
        self.group = Group()

    def forward(self, batch: TokenBatch) -> dict[str, Tensor]:
        """`loss`, `mlm` or `clm`, and `simcse` (both unweighted; left out where the weight is 0) of B texts."""
        config = self.config
        parts = [found for _, found in in_parts(self._read, batch, config.chunk)]
        totals, counts, views = zip(*parts, strict=True)
        losses = {}
        if config.mlm_weight:
            name = "mlm" if self.masks else "clm"
            losses[name] = global_mean(torch.stack(totals).sum(), torch.stack(counts).sum(), self.group)
        if config.simcse_weight:
            first, second = torch.cat(views, 1)
            losses["simcse"] = info_nce(first, second, config.simcse_temperature, self.group, similarity="cosine")
        weights = {"mlm": config.mlm_weight, "clm": config.mlm_weight, "simcse": config.simcse_weight}
        total = sum(weights[name] * value for name, value in losses.items())
        return {"loss": total} | {name: value.detach() for name, value in losses.items()}

    def _read(self, part: TokenBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Of b texts the sum of L_LM over their words, the number of these, and the views [2, b, width]."""
        config, model, rows = self.config, self.language_model, len(part)
        views = 2 if config.simcse_weight else 0
        if self.masks:
            words = mask_tokens(part, self.vocabulary, config.mask_probability, self.seed)
            texts, first = [words.input_ids] + [part.input_ids] * views, rows
        else:
            words = next_tokens(part)
            texts, first = [part.input_ids] * max(views, 1), 0
        mask = part.attention_mask.repeat(len(texts), 1)
        last, states = model.states(torch.cat(texts), mask)
        total = count = last.new_zeros((), dtype=torch.promote_types(last.dtype, torch.float32))
        if config.mlm_weight:
            logits = model.token_logits(last[:rows].flatten(0, 1)[words.positions])
            total, count = language_model_total(logits, words.targets), count + len(words.targets)
        seen = slice(first, first + views * rows)
        return total, count, model.pool(states[seen], mask[seen]).unflatten(0, (views, rows))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The whole language model, or its adapters, and its head where there is one to train."""
        config = self.config
        return self.language_model.parameter_groups(config.lr, config.weight_decay, config.head_lr)
