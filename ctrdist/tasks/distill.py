"""ELEC: a gain network, which reads what a language model made of a row, teaches the one that serves (section 2.3)."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ctrdist.batch import Batch
from ctrdist.errors import UserError
from ctrdist.group import Group
from ctrdist.losses import (
    binary_cross_entropy,
    local_score_distillation,
    representation_distillation,
    score_distillation,
)
from ctrdist.schema import Schema
from ctrdist.tasks import Task
from ctrdist.tasks.click import ClickConfig, ClickModel
from ctrdist.vocabulary import FIRST_ROW

GAIN_SEED = 1_000_003
"""Between the seed of a vanilla network and that of its gain network: all that they draw differs."""


@dataclass(frozen=True)
class DistillConfig:
    """How the gain network teaches the vanilla one.

    Args:
        score: what the vanilla network's scores learn from the gain network's: `clid` (the paper's), `softmax`, the
            same of the softmax of the logits, `pointwise`, each row's probability as a soft label, or `none`.
        clid_weight: of that loss, 1 in the paper; 0 leaves it out (the paper's "w/o CLID").
        clid_mean: divide a listwise loss by the rows of the batch, as the paper's equation 1 does. A batch of thousands
            then hardly feels it; as a sum it weighs about as much as the click loss.
        clid_rows: `global` normalises over the rows of all workers, `local` over those of each worker.
        mse_weight: of the squared distance of the representations (the paper's alpha); 0 leaves it out ("w/o MSE").
        vector_dropout: share of a batch's rows whose vector the gain network does not see in training. The language
            model's layers were trained on these rows, and know their clicks better than they will know others'.
        share_embeddings: both networks look ids up in the same tables, which both train; otherwise each has its own.
        without_text: the gain network gets no vector of the language model (the paper's "w/o textual input"), and no
            stage of the language model runs: the networks are alike, and one teaches the other.
    """

    score: Literal["clid", "softmax", "pointwise", "none"] = "clid"
    clid_weight: float = 0.3
    clid_mean: bool = False
    clid_rows: Literal["global", "local"] = "global"
    mse_weight: float = 0.003
    vector_dropout: float = 0.5
    share_embeddings: bool = False
    without_text: bool = False

    def __post_init__(self) -> None:
        for name in ("clid_weight", "mse_weight"):
            if getattr(self, name) < 0:
                raise UserError(f"distill.{name}: {getattr(self, name)} is under 0; 0 leaves the loss out")
        if not 0 <= self.vector_dropout < 1:
            raise UserError(f"distill.vector_dropout: {self.vector_dropout} is not a share from 0 to under 1")

    @property
    def networks(self) -> int:
        """How many networks of the pair have tables of their own."""
        return 1 if self.share_embeddings else 2


class Distillation(Task):
    """Gain and vanilla network, trained together.

        L = L_gain + L_van + w L_score + alpha L_rep                                               (ELEC eq. 5)

    L_gain and L_van are log losses of clicks (eq. 4), L_score of the scores (eq. 1, 2) and L_rep of the representations
    (eq. 3). The last two move the vanilla network alone. It computes before the gain network does, so that without them
    it is trained, draw for draw, as it would be alone.

    Args:
        vanilla: the network that serves, without text and vector.
        gain: the same network with the rows' vectors joined to its representation. With `share_embeddings` its own
            tables are let go.
        config: options.
    """

    def __init__(self, vanilla: ClickModel, gain: ClickModel, config: DistillConfig) -> None:
        super().__init__()
        self.vanilla, self.gain, self.config = vanilla, gain, config
        self.group = Group()
        if config.share_embeddings:
            gain.tables = gain.projections = None

    @classmethod
    def build(
        cls,
        schema: Schema,
        sizes: dict[str, int],
        ctr: ClickConfig,
        config: DistillConfig,
        vector_dim: int,
        seed: int = 0,
    ) -> "Distillation":
        """A new pair of the network that `ctr` names. Its vanilla network is the one that `seed` gives alone.

        Args:
            sizes: rows of each field's table, by name.
            vector_dim: width of `Batch.vector`; 0 without text.
        """
        count = config.networks
        vanilla = ClickModel(schema, sizes, ctr, seed=seed, networks=count)
        rows = dict.fromkeys(sizes, FIRST_ROW) if config.share_embeddings else sizes
        gain = ClickModel(schema, rows, ctr, seed=seed + GAIN_SEED, vector_dim=vector_dim, networks=count)
        return cls(vanilla, gain, config)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """`loss`; `gain` and `vanilla`, the log losses; `score` and `representation`, before their weights."""
        config, group = self.config, self.group
        inputs = self.vanilla.inputs(batch)
        own, direct, auxiliary = self.vanilla.represent(batch, inputs)
        shown = self.hide_vectors(batch)
        its, its_direct, its_auxiliary = self.gain.represent(shown, inputs if config.share_embeddings else None)
        student, teacher = self.vanilla.backbone.head(own) + direct, self.gain.backbone.head(its) + its_direct
        losses = {
            "vanilla": binary_cross_entropy(student, batch.label, group) + sum(auxiliary.values()),
            "gain": binary_cross_entropy(teacher, batch.label, group) + sum(its_auxiliary.values()),
        }
        loss = losses["vanilla"] + losses["gain"]
        if config.score != "none" and config.clid_weight:
            distilled = score_distillation if config.clid_rows == "global" else local_score_distillation
            losses["score"] = distilled(student, teacher, config.score, group, config.clid_mean)
            loss = loss + config.clid_weight * losses["score"]
        if config.mse_weight:
            losses["representation"] = representation_distillation(own, its, group)
            loss = loss + config.mse_weight * losses["representation"]
        return {"loss": loss, **losses}

    def hide_vectors(self, batch: Batch) -> Batch:
        """The batch as the gain network sees it: in training, some rows' vectors are zeros."""
        if not (self.training and self.config.vector_dropout and self.gain.vector_dim):
            return batch
        seen = torch.rand(len(batch), 1, device=batch.vector.device) >= self.config.vector_dropout
        return replace(batch, vector=batch.vector * seen)

    def predict(self, batch: Batch) -> Tensor:
        """The vanilla network's: it is the one that serves, and validation judges it."""
        return self.vanilla.predict(batch)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return self.vanilla.parameter_groups() + self.gain.parameter_groups()

    def whole_gain(self) -> ClickModel:
        """The gain network with its tables, also where they are the vanilla network's: to score with, or to save."""
        if self.config.share_embeddings:
            self.gain.tables, self.gain.projections = self.vanilla.tables, self.vanilla.projections
        return self.gain
