"""ClickPrompt: a language model reads a row's text with prompts that the CTR model wrote from its ids (section 3.5)."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctrdist.batch import Batch
from ctrdist.errors import UserError
from ctrdist.group import Group
from ctrdist.language.masking import MaskVocabulary, mask_tokens, next_tokens
from ctrdist.language.parts import in_parts
from ctrdist.language.prompts import PromptedLanguageModel, PromptWriter
from ctrdist.language.tokens import TokenBatch
from ctrdist.losses import global_mean, language_model_total
from ctrdist.optim import Schedule, split_decay
from ctrdist.precision import Precision, computing_in
from ctrdist.tasks import Task
from ctrdist.tasks.click import ClickModel

ADAMW_LR = 1e-3
"""The rate that PyTorch's AdamW gives to a group that names none."""


@dataclass(frozen=True)
class PromptedConfig:
    """How a CTR model and a language model that reads its prompts are trained together.

    Args:
        epochs: passes over the training days.
        batch_size: rows of a global batch, over all workers.
        lr: learning rate of the CTR network; 0 takes that of `ctr`.
        table_lr: of the embedding tables; 0 takes that of `ctr`.
        prompt_lr: of the prompt writer, and of layers that are new.
        lm_lr: of the language model; 0 freezes it. Adapters have `lm.lora.lr`.
        weight_decay: AdamW's, on the matrices of writer and language model; the CTR network has `ctr.weight_decay`.
        bias_lr: of biases and normalisation. `same`: as the matrices beside them. `adamw`: AdamW's own 1e-3 for all of
            them that are trained, as in the authors' code, whose group of them has no rate.
        schedule: course of the learning rates over all epochs.
        warmup: share of the steps over which they rise.
        lm_schedule: that of the language model's; the others' if not given.
        lm_warmup: that of the language model's; the others' if not given.
        chunk: with more than 0, texts computed at a time: memory follows the chunk and not the batch, for one more
            forward pass (gradients stay the same). 0 = the whole batch at once.
    """

    epochs: int = 2
    batch_size: int = 256
    lr: float = 0.0
    table_lr: float = 0.0
    prompt_lr: float = 1e-3
    lm_lr: float = 2e-5
    weight_decay: float = 0.01
    bias_lr: Literal["same", "adamw"] = "same"
    schedule: Schedule = "linear"
    warmup: float = 0.05
    lm_schedule: Schedule | None = None
    lm_warmup: float | None = None
    chunk: int = 0

    group = ""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"{self.group}.batch_size: {self.batch_size} is under 1")
        for name in ("lr", "table_lr", "prompt_lr", "lm_lr", "weight_decay", "chunk"):
            if getattr(self, name) < 0:
                raise UserError(f"{self.group}.{name}: {getattr(self, name)} is under 0")


@dataclass(frozen=True)
class PromptPretrainConfig(PromptedConfig):
    """Prompt-augmented masked language modelling.

    Args:
        epochs: passes over the training days; 0 leaves pre-training out (table 5's "w/o Pretrain"). The paper's are 20.
        head_lr: of a head that predicts words and is drawn anew, because the model's checkpoint has none.
        mask_probability: share of the tokens that an encoder is to predict; a decoder predicts each next one.
        every_days: a daily run pre-trains again when the last time is this many days ago; 0 = never again.
    """

    head_lr: float = 1e-3
    mask_probability: float = 0.15
    every_days: int = 7

    group = "pretrain"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.mask_probability <= 1:
            raise UserError(f"pretrain.mask_probability: {self.mask_probability} is not over 0 and at most 1")
        if self.epochs < 0:
            raise UserError(f"pretrain.epochs: {self.epochs} is under 0; 0 leaves pre-training out")


class PromptedTask(Task):
    """A CTR model, the writer of its prompts, and the language model that reads them. Nothing else connects the two.

    The writer reads h / sd(h), less its mean (LayerNorm without weights): representations of embeddings that know
    little yet are tiny, and prompts that hardly differ are learnt from late.

    Args:
        click: the CTR model, with the rates of `config`.
        reader: the language model.
        config: options. A language model with rate 0 is frozen, and has no dropout either.
        precision: of the language model's and the writer's arithmetic, in training and without. The CTR model's is
            that of who calls.
    """

    drawn_lr: float | None = None
    """Learning rate of what the language model's checkpoint lacked; that of the others if None."""

    def __init__(
        self,
        click: ClickModel,
        reader: PromptedLanguageModel,
        config: PromptedConfig,
        precision: Precision = "float32",
    ) -> None:
        super().__init__()
        self.click, self.reader, self.config, self.precision = click, reader, config, precision
        self.writer = PromptWriter(click.backbone.width, reader)
        self.group = Group()

    def prompts(self, representation: Tensor, part: TokenBatch) -> Tensor:
        """The prompts [b, layers, 2, K, width] of a part's texts, from representations [B, H] of the whole batch."""
        own = representation if part.places is None else representation[part.places]
        own = own.to(next(self.writer.parameters()).dtype)
        return self.writer(F.layer_norm(own, own.shape[1:]))

    def train(self, mode: bool = True) -> "PromptedTask":
        """Set the mode; a frozen language model has no dropout in either."""
        super().train(mode)
        if not self.config.lm_lr:
            self.reader.eval()
        return self

    def own(self) -> list[nn.Parameter]:
        """The parameters that are neither the CTR model's nor the language model's."""
        others = {*self.click.parameters(), *self.reader.parameters()}
        return [parameter for parameter in self.parameters() if parameter not in others]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """CTR network, writer and new layers, and the language model, unless it is frozen."""
        config, model = self.config, self.reader.language_model
        read = model.parameter_groups(config.lm_lr, config.weight_decay, self.drawn_lr)
        if not config.lm_lr:  # adapters would have a rate of their own
            drawn = {p for name, p in model.model.named_parameters() if name in model.drawn}
            read = [group for group in read if set(group["params"]) <= drawn]
        own = {
            "schedule": config.lm_schedule or config.schedule,
            "warmup": config.warmup if config.lm_warmup is None else config.lm_warmup,
        }
        groups = self.click.parameter_groups() + split_decay(self.own(), config.prompt_lr, config.weight_decay)
        groups += [group | own for group in read]
        if config.bias_lr == "adamw":
            groups = [group | ({"lr": ADAMW_LR} if group["params"][0].ndim < 2 else {}) for group in groups]
        return groups


class PromptPretraining(PromptedTask):
    """Recover masked words of a row's text, which the ids' prompts know something of (PA-MLM, section 3.5.1).

        L = -1/M sum_m log P(x_m | masked text, prompts of the row's ids),  M = the masked tokens of the global batch

    Ids stay intact. A decoder predicts each next word (PA-CLM). The CTR model's head takes no part: it is for clicks.
    Auxiliary losses of the network, such as DIEN's, are added.

    Args:
        click: see `PromptedTask`.
        reader: with a head that predicts words.
        config: options.
        precision: see `PromptedTask`.
        seed: decides, with the step, the text and the position, which words are masked.
    """

    config: PromptPretrainConfig

    def __init__(
        self,
        click: ClickModel,
        reader: PromptedLanguageModel,
        config: PromptPretrainConfig,
        precision: Precision = "float32",
        seed: int = 0,
    ) -> None:
        super().__init__(click, reader, config, precision)
        assert reader.language_model.has_head, "load with head=True"
        self.drawn_lr = config.head_lr
        self.seed, self.masks = seed, not reader.language_model.is_decoder
        self.vocabulary = MaskVocabulary.of(reader.language_model.tokenizer) if self.masks else None

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """`loss`, `mlm` or `clm`, and the network's auxiliary losses, of B rows with `tokens`."""
        tokens = self.drawn(batch.tokens)
        representation, direct, auxiliary = self.click.represent(batch)
        parts = in_parts(partial(self._words, representation), tokens, self.config.chunk)
        totals, counts = zip(*(found for _, found in parts), strict=True)
        words = global_mean(torch.stack(totals).sum(), torch.stack(counts).sum(), self.group)
        # A gradient of 0 for what only clicks train: DDP waits for one of each parameter.
        silent = 0 * (self.click.backbone.head(representation) + direct).sum()
        losses = {"mlm" if self.masks else "clm": words.detach(), **auxiliary}
        return {"loss": words + silent + sum(auxiliary.values()), **losses}

    def drawn(self, tokens: TokenBatch) -> TokenBatch:
        """The texts with a number that masks depend on: another at each step of training, the same on all workers."""
        if not self.training or not self.masks:
            return tokens
        number = torch.randint(2**62, (), device=tokens.items.device) * (self.group.rank == 0)
        return replace(tokens, epoch=self.group.all_reduce(number))

    def _words(self, representation: Tensor, part: TokenBatch) -> tuple[Tensor, Tensor]:
        """The sum of the losses of a part's words, and the number of these."""
        if self.masks:
            words = mask_tokens(part, self.vocabulary, self.config.mask_probability, self.seed)
        else:
            words = next_tokens(part)
        with computing_in(self.precision, words.input_ids.device):
            prompts = self.prompts(representation, part)
            states = self.reader.states(words.input_ids, part.attention_mask, prompts)[0]
            logits = self.reader.language_model.token_logits(states.flatten(0, 1)[words.positions])
            total = language_model_total(logits, words.targets)
        return total, torch.full_like(total, len(words.targets), requires_grad=False)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Those of `PromptedTask`, but for the CTR model's head: no decay wears off what is not trained."""
        head = set(getattr(self.click.backbone, "output", nn.Identity()).parameters())
        groups = [
            group | {"params": [p for p in group["params"] if p not in head]} for group in super().parameter_groups()
        ]
        return [group for group in groups if group["params"]]
