"""The workers that train one model together: what must reach across them goes through a `Group`.

A loss is the same number on every worker: it is computed from sums and gathers over the whole group, which are
differentiable. The backward pass of a sum is a sum, so each worker's gradient is `size` times its own share and the
**mean** of the gradients over the workers (what DDP computes) is the gradient of the loss.
"""

import torch
import torch.distributed as dist
from torch import Tensor


class Group:
    """One worker alone: every operation is the identity."""

    rank: int = 0
    size: int = 1

    def all_reduce(self, value: Tensor) -> Tensor:
        """The sum of `value` over the workers, differentiable. Same shape and dtype on all of them."""
        return value

    def all_gather(self, value: Tensor) -> Tensor:
        """`value` of all workers joined along the first dimension, in rank order, differentiable.

        First dimensions may differ, and may be 0; the others must agree.
        """
        return value

    def sizes(self, value: Tensor) -> list[int]:
        """The length of `value`'s first dimension on each worker, in rank order."""
        return [value.shape[0]]


class DistributedGroup(Group):
    """The default `torch.distributed` process group (gloo or NCCL)."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def all_reduce(self, value: Tensor) -> Tensor:
        return _AllReduce.apply(value)

    def all_gather(self, value: Tensor) -> Tensor:
        return _AllGather.apply(value, self)

    def sizes(self, value: Tensor) -> list[int]:
        own = torch.tensor([value.shape[0]], device=value.device)
        out = torch.empty(self.size, dtype=own.dtype, device=own.device)
        dist.all_gather_into_tensor(out, own)
        return out.tolist()


def attach_group(module: torch.nn.Module, group: Group) -> None:
    """Hand `group` to every submodule that has a `group` attribute (losses with negatives, batch statistics)."""
    for submodule in module.modules():
        if isinstance(getattr(submodule, "group", None), Group):
            submodule.group = group


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: Tensor) -> Tensor:
        out = value.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out)
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: Tensor, group: DistributedGroup) -> Tensor:
        ctx.sizes, ctx.rank = group.sizes(value), group.rank
        longest = max(max(ctx.sizes), 1)
        padded = value.new_zeros((longest, *value.shape[1:]))
        padded[: value.shape[0]] = value.detach()
        out = value.new_empty((group.size * longest, *value.shape[1:]))
        dist.all_gather_into_tensor(out, padded)
        return torch.cat([part[:size] for part, size in zip(out.split(longest), ctx.sizes, strict=True)])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.split(ctx.sizes)[ctx.rank], None
