"""Optimizers: row-wise for embedding tables, AdamW for the rest, and the learning rate's course."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ctrdist.errors import UserError

Schedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class RowOptimizer:
    """What updates the rows of a table that a step names, given their values, gradients and state.

    Args:
        lr: learning rate.
        weight_decay: L2 coefficient: added to the gradient, times the value, of the rows touched.
    """

    lr: float = 1e-3
    weight_decay: float = 0.0

    state_names: ClassVar[tuple[str, ...]] = ()
    decoupled: ClassVar[bool] = False
    """Whether every row shrinks at every step instead, by the factor `shrink`; the table sees to that."""

    def init_state(self, rows: Tensor) -> dict[str, Tensor]:
        """State of new rows [n, dim]: by name, a tensor [n, ...] each."""
        return {}

    def step(self, values: Tensor, gradients: Tensor, state: dict[str, Tensor], lr_scale: float) -> Tensor:
        """New values of rows [R, dim] with `gradients` [R, dim]; their `state` changes in place."""
        raise TypeError(f"{type(self).__name__} has no step")

    def shrink(self, lr_scale: float) -> float:
        """The factor on every row at a step, over 0 and at most 1."""
        return 1.0


@dataclass(frozen=True)
class RowAdam(RowOptimizer):
    """Adam that touches only the rows a step names: moments of other rows stand still.

    Each row counts its own steps for the bias correction, so that a rare row's first update is a full one. Weight decay
    is added to the gradient of the rows touched, as an L2 penalty on the rows of the batch.

    Args:
        betas: decay of the first and second moment.
        eps: added to the denominator.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    state_names = ("exp_avg", "exp_avg_sq", "steps")

    def init_state(self, rows: Tensor) -> dict[str, Tensor]:
        """Two moments of the rows' shape and a step count [n]."""
        return {
            "exp_avg": torch.zeros_like(rows),
            "exp_avg_sq": torch.zeros_like(rows),
            "steps": rows.new_zeros(len(rows)),
        }

    def step(self, values: Tensor, gradients: Tensor, state: dict[str, Tensor], lr_scale: float) -> Tensor:
        if self.weight_decay and not self.decoupled:
            gradients = torch.add(gradients, values, alpha=self.weight_decay)
        steps = state["steps"].add_(1)
        exp_avg = state["exp_avg"].lerp_(gradients, 1 - self.betas[0])
        exp_avg_sq = state["exp_avg_sq"].mul_(self.betas[1]).addcmul_(gradients, gradients, value=1 - self.betas[1])
        # As in torch.optim.Adam, eps meets the corrected moment, so a first step is a full one for small gradients too.
        first, second = (1 - beta ** steps.unsqueeze(1) for beta in self.betas)
        denominator = (exp_avg_sq / second).sqrt_().add_(self.eps)
        return values - exp_avg.div(denominator).mul_(self.lr * lr_scale / first)


@dataclass(frozen=True)
class RowAdamW(RowAdam):
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019) for a table.

    Moments of rows that a step does not name stand still, but every row decays at every step, as under a dense AdamW,
    by the rate that the schedule has then. A row gets what it missed when it is next read (`EmbeddingTable.read`).
    """

    weight_decay: float = 1e-2

    decoupled = True

    def __post_init__(self) -> None:
        if not 0 <= self.lr * self.weight_decay < 1:
            raise UserError(
                f"tables: learning rate {self.lr} times weight decay {self.weight_decay} is not under 1; lower "
                "--ctr.table-lr or --ctr.table-decay"
            )

    def shrink(self, lr_scale: float) -> float:
        return 1 - self.lr * lr_scale * self.weight_decay


@dataclass(frozen=True)
class RowAdagrad(RowOptimizer):
    """Adagrad with one accumulator a row, of the mean square of its gradient (as in DLRM and FBGEMM).

    Args:
        eps: added to the denominator.
    """

    lr: float = 1e-2
    eps: float = 1e-10

    state_names = ("sum",)

    def init_state(self, rows: Tensor) -> dict[str, Tensor]:
        """The accumulators [n]."""
        return {"sum": rows.new_zeros(len(rows))}

    def step(self, values: Tensor, gradients: Tensor, state: dict[str, Tensor], lr_scale: float) -> Tensor:
        gradients = gradients + self.weight_decay * values
        denominator = state["sum"].add_(gradients.square().mean(1)).sqrt().add_(self.eps)
        return values - self.lr * lr_scale * gradients / denominator.unsqueeze(1)


@dataclass(frozen=True)
class RowSGD(RowOptimizer):
    """Stochastic gradient descent without momentum: no state."""

    lr: float = 1e-2

    def step(self, values: Tensor, gradients: Tensor, state: dict[str, Tensor], lr_scale: float) -> Tensor:
        return values - self.lr * lr_scale * (gradients + self.weight_decay * values)


ROW_OPTIMIZERS: dict[str, type[RowOptimizer]] = {
    "adam": RowAdam,
    "adamw": RowAdamW,
    "adagrad": RowAdagrad,
    "sgd": RowSGD,
}


def split_decay(parameters: list[nn.Parameter], lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for AdamW: weight decay on matrices, none on biases and normalisation."""
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
