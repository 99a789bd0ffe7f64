"""ELEC's modified language model: what a frozen one made of an interaction's text, adapted to clicks (section 2.2)."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ctrdist.backbones.layers import MLP
from ctrdist.batch import Batch
from ctrdist.config import from_dict, to_dict
from ctrdist.embedding import gather
from ctrdist.errors import UserError
from ctrdist.group import Group
from ctrdist.losses import binary_cross_entropy
from ctrdist.optim import Schedule, split_decay
from ctrdist.precision import Precision
from ctrdist.tasks import Task

WEIGHTS, DESCRIPTION = "m_llm.safetensors", "m_llm.json"


@dataclass(frozen=True)
class MLLMConfig:
    """The layers on the frozen language model, and how they are trained.

    Args:
        hidden: widths of the transformation MLP; the last is the representation's.
        dropout: after each of them.
        epochs: passes over the training days.
        warm_epochs: the same, for a day that starts from the day before.
        patience: stop after this many epochs without a better validation AUC, and keep the best epoch's weights; 0
            trains to the end.
        batch_size: rows of a global batch, over all workers.
        lr: learning rate.
        weight_decay: AdamW's, on the matrices.
        schedule: course of the learning rate over all epochs.
        warmup: share of the steps over which it rises.
        precision: of the arithmetic.
    """

    hidden: tuple[int, ...] = (512, 256, 128)
    dropout: float = 0.1
    epochs: int = 2
    warm_epochs: int = 1
    patience: int = 0
    batch_size: int = 1024
    lr: float = 1e-3
    weight_decay: float = 1e-2
    schedule: Schedule = "linear"
    warmup: float = 0.05
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        for name in ("epochs", "warm_epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"m_llm.{name}: {getattr(self, name)} is under 1")
        if not self.hidden or min(self.hidden) < 1:
            raise UserError(f"m_llm.hidden: {self.hidden} is not one or more widths of 1 or more")


class ModifiedLanguageModel(Task):
    """State of a text -> LayerNorm -> transformation MLP -> representation -> probability of a click.

    The state of an interaction is `Batch.vector` where there is one. Otherwise it is put together from the items'
    texts: that of the target and, with `behaviours`, the mean of those of the behaviours (zeros without any).

    Args:
        text_dim: width of the language model's states.
        behaviours: whether the mean of the behaviours' states stands beside the target's.
        config: options.
        seed: decides the initial weights.
    """

    def __init__(self, text_dim: int, behaviours: bool, config: MLLMConfig, seed: int = 0) -> None:
        super().__init__()
        self.group = Group()
        self.text_dim, self.behaviours, self.config = text_dim, behaviours, config
        width = text_dim * (2 if behaviours else 1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.norm = nn.LayerNorm(width)
            self.transform = MLP(width, config.hidden, dropout=config.dropout)
            self.output = nn.Linear(self.transform.width, 1)

    @property
    def width(self) -> int:
        """Width of a representation."""
        return self.transform.width

    def states(self, batch: Batch) -> Tensor:
        """What the language model made of each row's text, [B, width of a state]."""
        if batch.vector is not None:
            return batch.vector
        text = batch.text.to(self.output.weight.dtype)
        target = gather(text, batch.target)
        if not self.behaviours:
            return target
        # Padding is a row of zeros: it adds nothing to the sum.
        behaviours = F.embedding_bag(batch.history, text, mode="sum")
        return torch.cat([target, behaviours / (batch.history != 0).sum(1, keepdim=True).clamp(min=1)], 1)

    def represent(self, batch: Batch) -> Tensor:
        """The representation of each row, [B, width], no number under 0."""
        return self.adapted(self.states(batch))

    def adapted(self, states: Tensor) -> Tensor:
        """The representations [B, width] of `states`."""
        return self.transform(self.norm(states.to(self.norm.weight.dtype)))

    def logits(self, representation: Tensor) -> Tensor:
        """Logits [B] of representations [B, width]."""
        return self.output(representation).squeeze(1)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return {"loss": binary_cross_entropy(self.logits(self.represent(batch)), batch.label, self.group)}

    def predict(self, batch: Batch) -> Tensor:
        return torch.sigmoid(self.logits(self.represent(batch)).float())

    def parameter_groups(self) -> list[dict[str, Any]]:
        return split_decay(list(self.parameters()), self.config.lr, self.config.weight_decay)

    def save(self, folder: Path) -> None:
        """Write the layers, without the language model, and what they are built from."""
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, folder / WEIGHTS)
        description = {"text_dim": self.text_dim, "behaviours": self.behaviours, "config": to_dict(self.config)}
        (folder / DESCRIPTION).write_text(json.dumps(description, indent=1))

    @classmethod
    def load(cls, folder: Path, config: MLLMConfig | None = None) -> "ModifiedLanguageModel":
        """Read what `save` wrote.

        Args:
            config: replaces how it is trained on; its layers must be as wide.

        Raises:
            UserError: `config` has other layers.
        """
        described = json.loads((folder / DESCRIPTION).read_text())
        saved = from_dict(MLLMConfig(), described["config"], str(folder / DESCRIPTION))
        if config and config.hidden != saved.hidden:
            raise UserError(
                f"--m-llm.hidden: the model in {folder} has {saved.hidden}, not {config.hidden}; use the same, "
                "--from-scratch, or another --state"
            )
        model = cls(described["text_dim"], described["behaviours"], config or saved)
        model.load_state_dict(load_file(folder / WEIGHTS))
        return model.eval()
