"""Vectors of encoded values, from tables that lie on disk."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ctrdist.serving.ragged import Column, Ragged
from ctrdist.serving.vocabulary import FIRST_ROW, UNKNOWN


def mapped(path: Path) -> Tensor:
    """A `.npy` file as a tensor, memory-mapped: processes of a machine share its pages, read as they are needed."""
    return torch.from_numpy(np.load(path, mmap_mode="c"))  # copied where written to, which nobody does


def gathered(table: Tensor, values: Column) -> Tensor:
    """The vector of each of n rows [n, width]: of its value, or the mean of those of its values (zeros without any),
    or its number times the vector that all numbers have (NaN: the unknown vector).

    Args:
        table: [rows, width].
        values: int32 [n], a `Ragged` of n bags, or float32 [n].
    """
    if isinstance(values, Ragged):
        return bag_mean(table.index_select(0, rows_of(values.values)), rows_of(values.offsets))
    if values.dtype.kind == "f":
        known = ~np.isnan(values)
        factors = torch.from_numpy(np.where(known, values, 1).astype(np.float32))
        return table[torch.from_numpy(np.where(known, FIRST_ROW, UNKNOWN))] * factors.unsqueeze(1)
    return table.index_select(0, rows_of(values))


def rows_of(values: np.ndarray) -> Tensor:
    """Rows as PyTorch takes them: a copy, since NumPy's may be read-only."""
    return torch.from_numpy(np.array(values, order="C"))


def bag_mean(values: Tensor, offsets: Tensor) -> Tensor:
    """The mean of each bag of rows of `values` [n, dim], [m, dim]; zeros for an empty bag."""
    counts = offsets.diff()
    bags = torch.repeat_interleave(torch.arange(len(counts), device=values.device), counts, output_size=len(values))
    sums = values.new_zeros(len(counts), values.shape[1]).index_add(0, bags, values)
    return sums / counts.clamp(min=1).unsqueeze(1).to(values.dtype)
