"""ClickPrompt's fine-tuning with the language model: clicks by both, which meet in the prompts (section 3.5.2)."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from ctrdist.batch import Batch
from ctrdist.errors import UserError
from ctrdist.language.parts import BUCKETS, in_parts
from ctrdist.language.prompts import PromptedLanguageModel
from ctrdist.language.tokens import TokenBatch
from ctrdist.losses import binary_cross_entropy
from ctrdist.precision import Precision, computing_in
from ctrdist.tasks.click import ClickModel
from ctrdist.tasks.prompted import PromptedConfig, PromptedTask

PREDICTED = 256
"""Most texts that are read at a time where nothing is trained."""


@dataclass(frozen=True)
class PromptFinetuneConfig(PromptedConfig):
    """Fine-tuning with the language model.

    Args:
        epochs: passes over the training days.
        warm_epochs: the same, for a day that starts from the day before.
        patience: stop after this many epochs without a better validation AUC, and keep the best epoch's weights; 0
            trains to the end and keeps the last ones.
        combine: how the two logits become one. `alpha`: α ctr + (1 - α) lm, α learnt from 0.5 on (the paper); `sum`:
            ctr + lm (the default of the authors' code).
        prompts: whether the language model reads prompts; without them only the logits meet (table 5's "w/o Prompt").
    """

    lm_lr: float = 1e-5
    warm_epochs: int = 1
    patience: int = 0
    combine: Literal["alpha", "sum"] = "alpha"
    prompts: bool = True

    group = "finetune"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("epochs", "warm_epochs"):
            if getattr(self, name) < 1:
                raise UserError(f"finetune.{name}: {getattr(self, name)} is under 1")
        if self.patience < 0:
            raise UserError(f"finetune.patience: {self.patience} is under 0; 0 trains to the end")


class PromptedClick(PromptedTask):
    """A CTR model and a language model that reads its prompts, on clicks.

        p = sigmoid(α z_ctr + (1 - α) z_lm),  z_lm = w . pool(states of the text, read with the prompts) + b   (eq. 9)

    The CTR tower computes once: z_ctr and the prompts come from one representation.

    Args:
        click: see `PromptedTask`.
        reader: pools by its own pooling.
        config: options.
        precision: see `PromptedTask`.
    """

    config: PromptFinetuneConfig

    def __init__(
        self,
        click: ClickModel,
        reader: PromptedLanguageModel,
        config: PromptFinetuneConfig,
        precision: Precision = "float32",
    ) -> None:
        super().__init__(click, reader, config, precision)
        self.output = nn.Linear(reader.language_model.width, 1)
        if config.combine == "alpha":
            self.alpha = nn.Parameter(torch.tensor(0.5))
        if not config.prompts:
            self.writer = None

    def logits(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits [B], and the network's auxiliary losses by name."""
        representation, direct, auxiliary = self.click.represent(batch)
        own = self.click.backbone.head(representation) + direct
        its = self.text_logits(batch.tokens, representation)
        if self.config.combine == "sum":
            return own + its, auxiliary
        return self.alpha * own + (1 - self.alpha) * its, auxiliary

    def text_logits(self, tokens: TokenBatch, representation: Tensor) -> Tensor:
        """z_lm [B] of B texts and representations [B, H]."""
        if torch.is_grad_enabled():
            parts = in_parts(partial(self._pooled, representation), tokens, self.config.chunk)
        else:
            buckets = tokens.buckets(max(BUCKETS, -(-len(tokens) // PREDICTED)))
            parts = [(part, self._pooled(representation, part)) for part in buckets]
        pooled = torch.cat([pooled for _, pooled in parts]).to(self.output.weight.dtype)
        found = self.output(pooled).squeeze(1)
        if parts[0][0].places is None:
            return found
        return torch.empty_like(found).index_copy(0, torch.cat([part.places for part, _ in parts]), found)

    def _pooled(self, representation: Tensor, part: TokenBatch) -> Tensor:
        with computing_in(self.precision, part.input_ids.device):
            if self.writer is None:
                return self.reader.language_model(part.input_ids, part.attention_mask)
            return self.reader(part.input_ids, part.attention_mask, self.prompts(representation, part))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """`loss`, `alpha` if it is learnt, and with auxiliary losses these and `click`, the loss without them."""
        logits, auxiliary = self.logits(batch)
        click = binary_cross_entropy(logits, batch.label, self.group)
        losses = {"click": click.detach(), **auxiliary} if auxiliary else {}
        if self.config.combine == "alpha":
            losses["alpha"] = self.alpha.detach().clone()
        return {"loss": click + sum(auxiliary.values()), **losses}

    def predict(self, batch: Batch) -> Tensor:
        return torch.sigmoid(self.logits(batch)[0].float())
