"""Rows in one buffer: all that belongs to a row lies side by side.

A step reads and writes the weights and the optimizer's state of rows at random. In buffers of their own each of these
would miss the processor's caches, and its table of page addresses (TLB), once a row; side by side they miss once.
"""

import numpy as np
import torch
from torch import Tensor

WORD = 8
"""Bytes of a word, by which rows are read and written: the fewer, the faster."""


def pack(values: dict[str, Tensor], rows: int) -> Tensor:
    """`values`, by name [n, ...] for each of the first rows, and zeros up to `rows`: int64 [rows, words]."""
    _, words = layout(values)
    packed = zeros(rows, words, next(iter(values.values())).device)
    for name, view in unpack(packed, values).items():
        view[: len(values[name])] = values[name]
    return packed


def unpack(packed: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """What packed rows, int64 [n, words], hold, by name as in `like`, of dtypes and shapes [n, ...] as there: views."""
    columns, _ = layout(like)
    return {
        name: packed.view(value.dtype)[:, columns[name]].view(len(packed), *value.shape[1:])
        for name, value in like.items()
    }


def layout(values: dict[str, Tensor]) -> tuple[dict[str, slice], int]:
    """Where in a row each of `values` [n, ...] stands, by name, in numbers of its dtype; and the words of a row."""
    columns, end = {}, 0
    for name, value in values.items():
        start = -(-end // value.itemsize)
        columns[name] = slice(start, start + value.shape[1:].numel())
        end = columns[name].stop * value.itemsize
    return columns, -(-end // WORD)


def zeros(rows: int, words: int, device: torch.device) -> Tensor:
    """Zeros, int64 [rows, words], on huge pages where Linux has them to give (transparent_hugepage, madvise).

    The TLB has room for some thousand pages: of 4 KiB, not for a table; of 2 MiB, for gigabytes of it.
    """
    if device.type == "cpu":  # NumPy asks for huge pages (MADV_HUGEPAGE), PyTorch does not
        return torch.from_numpy(np.zeros(rows * words, np.int64)).view(rows, words)
    return torch.zeros(rows, words, dtype=torch.int64, device=device)
