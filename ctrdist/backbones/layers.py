"""Layers that several backbones share."""

from typing import Literal

import torch
from torch import Tensor, nn

from ctrdist.group import Group

Activation = Literal["relu", "dice"]


class GlobalBatchNorm(nn.Module):
    """Batch normalisation over the rows of all workers: [N, width] -> [N, width].

    Statistics are over the global batch, through a differentiable sum, so the result does not depend on the number of
    workers. A global batch of fewer than two rows is normalised with the running statistics.
    """

    def __init__(self, width: int, affine: bool = True, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.group = Group()
        self.momentum, self.eps = momentum, eps
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        if self.training:
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            count = wide.new_full((1,), x.shape[0])
            # Moments around a value near the mean: a large mean would swallow the digits of a small variance.
            origin = mean.to(wide.dtype, copy=True)
            near = wide - origin
            sums = self.group.all_reduce(torch.cat([near.sum(0), near.square().sum(0), count]))
            total, squares, count = sums[: x.shape[1]], sums[x.shape[1] : -1], sums[-1].detach()
            several = count > 1
            near_mean = total / count.clamp(min=1)
            batch_mean = near_mean + origin
            batch_var = (squares / count.clamp(min=1) - near_mean.square()).clamp(min=0)
            with torch.no_grad():
                step = self.momentum * several.to(mean.dtype)
                self.running_mean.lerp_(batch_mean.to(mean.dtype), step)
                unbiased = batch_var * count / (count - 1).clamp(min=1)
                self.running_var.lerp_(unbiased.to(var.dtype), step)
            mean, var = torch.where(several, batch_mean, mean), torch.where(several, batch_var, var)
        x = (x - mean) * torch.rsqrt(var + self.eps)
        return x if self.weight is None else x * self.weight + self.bias


class Dice(nn.Module):
    """DIN's activation (eq. 4 there): p x + (1 - p) a x with p = sigmoid(normalised x), a learned. [N, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = GlobalBatchNorm(width, affine=False, eps=1e-8)
        self.alpha = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        p = torch.sigmoid(self.norm(x))
        return p * x + (1 - p) * self.alpha * x


class MLP(nn.Module):
    """Linear layers, each followed by batch normalisation (if wanted), activation, dropout: [N, in] -> [N, out]."""

    def __init__(
        self,
        width: int,
        hidden: tuple[int, ...],
        activation: Activation = "relu",
        dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for units in hidden:
            layers.append(nn.Linear(width, units))
            if batch_norm:
                layers.append(GlobalBatchNorm(units))
            layers.append(Dice(units) if activation == "dice" else nn.ReLU())
            if dropout:
                layers.append(nn.Dropout(dropout))
            width = units
        self.layers = nn.Sequential(*layers)
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)
