"""Optimizers: row-wise for embedding tables, AdamW for the rest, and the learning rate's course."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

Schedule = Literal["constant", "linear", "cosine"]
Precision = Literal["auto", "float32", "bfloat16", "float64"]


@dataclass(frozen=True)
class RowAdam:
    """Adam that touches only the rows a step names: moments of other rows stand still.

    Each row counts its own steps for the bias correction, so that a rare row's first update is a full one. Weight decay
    is added to the gradient of the rows touched, as an L2 penalty on the rows of the batch.

    Args:
        lr: learning rate.
        weight_decay: L2 coefficient.
        betas: decay of the first and second moment.
        eps: added to the denominator.
    """

    lr: float = 1e-3
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    state_names = ("exp_avg", "exp_avg_sq", "steps")

    def init_state(self, rows: Tensor) -> dict[str, Tensor]:
        """State of new rows [n, dim]: two moments of that shape and a step count [n]."""
        return {
            "exp_avg": torch.zeros_like(rows),
            "exp_avg_sq": torch.zeros_like(rows),
            "steps": rows.new_zeros(len(rows)),
        }

    def update(
        self, weight: Tensor, state: dict[str, Tensor], rows: Tensor, gradients: Tensor, lr_scale: float
    ) -> None:
        """One step on `weight[rows]`, in place. `rows` int64 [R] are distinct; `gradients` [R, dim]."""
        values = weight[rows]
        gradients = gradients + self.weight_decay * values
        steps = state["steps"][rows] + 1
        exp_avg = state["exp_avg"][rows].lerp_(gradients, 1 - self.betas[0])
        exp_avg_sq = (
            state["exp_avg_sq"][rows].mul_(self.betas[1]).addcmul_(gradients, gradients, value=1 - self.betas[1])
        )
        # As in torch.optim.Adam, eps meets the corrected moment, so a first step is a full one for small gradients too.
        first, second = (1 - beta ** steps.unsqueeze(1) for beta in self.betas)
        denominator = (exp_avg_sq / second).sqrt_().add_(self.eps)
        weight[rows] = values - self.lr * lr_scale / first * exp_avg / denominator
        state["steps"][rows], state["exp_avg"][rows], state["exp_avg_sq"][rows] = steps, exp_avg, exp_avg_sq


def split_decay(module: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups of a module for AdamW: weight decay on matrices, none on biases and normalisation."""
    parameters = list(module.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "lr": lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def learning_rate(schedule: Schedule, warmup: float, step: int, steps: int) -> float:
    """The factor on every learning rate at `step` of `steps`: linear warm-up for a share of them, then the schedule."""
    progress = (step + 1) / max(1, steps)
    if progress < warmup:
        return progress / warmup
    progress = min(1.0, (progress - warmup) / max(1e-12, 1 - warmup))
    if schedule == "linear":
        return 1 - progress * (1 - 1 / max(1, steps))
    if schedule == "cosine":
        return 0.5 * (1 + torch.cos(torch.tensor(progress * torch.pi)).item())
    return 1.0
