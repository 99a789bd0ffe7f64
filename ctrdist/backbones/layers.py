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


class SelfAttention(nn.Module):
    """Multi-head self-attention: each field gathers from all, [B, F, width] -> [B, F, heads * units].

        a_mk = softmax over k of <W_query e_m, W_key e_k>,  out_m = sum over k of a_mk W_value e_k

    AutoInt, eq. 5 to 7; a head's products are divided by sqrt(units) if `scaled`.
    """

    def __init__(self, width: int, heads: int, units: int, scaled: bool = False) -> None:
        super().__init__()
        self.heads, self.scale = heads, units**-0.5 if scaled else 1.0
        self.query, self.key, self.value = (nn.Linear(width, heads * units, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            project(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for project in (self.query, self.key, self.value)
        )
        weights = torch.softmax(query @ key.transpose(2, 3) * self.scale, 3)
        return (weights @ value).transpose(1, 2).flatten(2)


class GRU(nn.Module):
    """A gated recurrent unit, step by step: the inputs of all steps are projected at once, then come `step`s.

        u = sigmoid(W_u x + U_u h + b_u),  r = sigmoid(W_r x + U_r h + b_r)
        c = tanh(W_c x + r * (U_c h) + b_c),  h <- (1 - s u) * h + s u * c

    DIEN, eq. 2 to 5, for a strength s of 1. At a strength of 0 the state stays. Without `update_gate` u is 1.
    """

    def __init__(self, inputs: int, width: int, update_gate: bool = True) -> None:
        super().__init__()
        self.width, gates = width, 3 if update_gate else 2
        self.project = nn.Linear(inputs, gates * width)
        self.recur = nn.Linear(width, gates * width, bias=False)

    def step(self, projected: Tensor, state: Tensor, strength: Tensor | float = 1.0) -> Tensor:
        """The next state [..., width] from `project`ed inputs and a state; `strength` is [..., 1] or a number."""
        x_candidate, x_reset, *x_update = projected.split(self.width, -1)
        h_candidate, h_reset, *h_update = self.recur(state).split(self.width, -1)
        candidate = torch.tanh(x_candidate + torch.sigmoid(x_reset + h_reset) * h_candidate)
        if x_update:
            strength = strength * torch.sigmoid(x_update[0] + h_update[0])
        return state + strength * (candidate - state)
