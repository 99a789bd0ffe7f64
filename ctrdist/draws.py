"""Draws by a hash of what they are for: no order, batch or worker changes them."""

import numpy as np
import torch
from torch import Tensor


def mix(value: Tensor) -> Tensor:
    """splitmix64 of int64 values, whose products wrap around."""
    value = value + -0x61C8864680B583EB
    value = (value ^ _shift(value, 30)) * -0x40A7B892E31B1A47
    value = (value ^ _shift(value, 27)) * -0x6B2FB644ECCEEE15
    return value ^ _shift(value, 31)


def uniform(value: Tensor) -> Tensor:
    """int64 bits, as `mix` gives them -> float64 in [0, 1)."""
    return _shift(value, 11).double() * 2.0**-53


def held_out(items: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Which items to validate on, about `share` of them, bool [items], drawn from (seed, catalog row).

    Args:
        items: [items] int64, catalog rows. Another set of items leaves each item's own draw as it is.
        share: 0 to 1.
        seed: of the run.
    """
    rows = torch.from_numpy(np.asarray(items, np.int64))
    return (uniform(mix(mix(torch.full_like(rows, seed)) + rows)) < share).numpy()


def _shift(value: Tensor, bits: int) -> Tensor:
    """Logical shift to the right: torch's own repeats the sign."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)
