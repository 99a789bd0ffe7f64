"""The workers that train one model together: what must reach across them goes through a `Group`.

A loss is the same number on every worker: it is computed from sums and gathers over the whole group, which are
differentiable. The backward pass of a sum is a sum, so each worker's gradient is `size` times its own share and the
**mean** of the gradients over the workers (what DDP computes) is the gradient of the loss.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Group:
    """One worker alone: every operation is the identity."""

    rank: int = 0
    size: int = 1
    sent: int = 0
    """Bytes that this worker has sent to others so far; all-gathers and all-reduces as a ring sends them."""

    def all_reduce(self, value: Tensor, alike: bool = False) -> Tensor:
        """The sum of `value` over the workers, differentiable. Same shape and dtype on all of them.

        Args:
            alike: every worker makes the same of the sum, so that its gradient is the same on all of them: the backward
                pass then needs no message.
        """
        return value

    def all_gather(self, value: Tensor, sizes: list[int] | None = None) -> Tensor:
        """`value` of all workers joined along the first dimension, in rank order, differentiable.

        First dimensions may differ, and may be 0; the others must agree.

        Args:
            sizes: the first dimensions, in rank order, where they are known; asked for otherwise.
        """
        return value

    def sizes(self, value: Tensor) -> list[int]:
        """The length of `value`'s first dimension on each worker, in rank order."""
        return [value.shape[0]]

    def exchange(self, counts: Tensor) -> Tensor:
        """`counts` [size], one for each worker: what each has for this one, [size], in rank order."""
        return counts

    def all_to_all(self, value: Tensor, counts: list[int], received: list[int]) -> Tensor:
        """Rows of `value` [sum(counts), ...], sorted by the worker they are for: [sum(received), ...] for this one.

        Args:
            counts: rows for each worker, in rank order; any may be 0.
            received: rows from each worker, which `exchange` tells.
        """
        return value

    def share(self, value: Any) -> list[Any]:
        """A small plain value of each worker, in rank order."""
        return [value]


class DistributedGroup(Group):
    """The default `torch.distributed` process group (gloo or NCCL)."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def all_reduce(self, value: Tensor, alike: bool = False) -> Tensor:
        return _AllReduce.apply(value, self, alike)

    def all_gather(self, value: Tensor, sizes: list[int] | None = None) -> Tensor:
        return _AllGather.apply(value, self, sizes)

    def sizes(self, value: Tensor) -> list[int]:
        own = torch.tensor([value.shape[0]], device=value.device)
        return self.gather_equal(own).tolist()

    def exchange(self, counts: Tensor) -> Tensor:
        out = torch.empty_like(counts)
        dist.all_to_all_single(out, counts)
        self.sent += (self.size - 1) * counts.itemsize
        return out

    def all_to_all(self, value: Tensor, counts: list[int], received: list[int]) -> Tensor:
        out = value.new_empty((sum(received), *value.shape[1:]))
        dist.all_to_all_single(out, value.contiguous(), received, counts)
        self.sent += (value.shape[0] - counts[self.rank]) * (value.nbytes // max(1, value.shape[0]))
        return out

    def share(self, value: Any) -> list[Any]:
        out = [None] * self.size
        dist.all_gather_object(out, value)
        return out

    def reduce_(self, value: Tensor) -> Tensor:
        """The sum of `value` over the workers, in place."""
        dist.all_reduce(value)
        self.sent += 2 * (self.size - 1) * value.nbytes // self.size
        return value

    def gather_equal(self, value: Tensor) -> Tensor:
        """`value`, of one shape on all workers, joined along the first dimension."""
        out = value.new_empty((self.size * value.shape[0], *value.shape[1:]))
        dist.all_gather_single(out, value)
        self.sent += (self.size - 1) * value.nbytes
        return out


def current_group() -> Group:
    """The workers of this process: alone, unless `torch.distributed` was started."""
    return DistributedGroup() if dist.is_initialized() and dist.get_world_size() > 1 else Group()


def attach_group(module: torch.nn.Module, group: Group) -> None:
    """Hand `group` to every submodule that has a `group` attribute (losses with negatives, batch statistics)."""
    for submodule in module.modules():
        if isinstance(getattr(submodule, "group", None), Group):
            submodule.group = group


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: Tensor, group: DistributedGroup, alike: bool) -> Tensor:
        ctx.group, ctx.alike = group, alike
        return group.reduce_(value.detach().clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        if ctx.alike:
            return gradient * ctx.group.size, None, None
        return ctx.group.reduce_(gradient.clone(memory_format=torch.contiguous_format)), None, None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: Tensor, group: DistributedGroup, sizes: list[int] | None) -> Tensor:
        ctx.sizes, ctx.group = sizes or group.sizes(value), group
        longest = max(max(ctx.sizes), 1)
        padded = value.new_zeros((longest, *value.shape[1:]))
        padded[: value.shape[0]] = value.detach()
        out = group.gather_equal(padded)
        return torch.cat([part[:size] for part, size in zip(out.split(longest), ctx.sizes, strict=True)])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        gradient = ctx.group.reduce_(gradient.clone(memory_format=torch.contiguous_format))
        return gradient.split(ctx.sizes)[ctx.group.rank], None, None
