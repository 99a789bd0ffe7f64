"""Rounding to bfloat16 at random: up or down with the odds by which the value's mean stays what it was.

Rounded to the nearest, a weight of 1 would never move by steps under 2⁻⁹; rounded at random it moves by their sum, give
or take (Gupta et al., 2015, "Deep learning with limited numerical precision"). Whether a value goes up is decided by a
hash of its row, column and the count of roundings, and so does not depend on which worker holds the row.
"""

import torch
from torch import Tensor

_STEP, _SEED, _FIRST, _SECOND = (
    0x1E3779B97F4A7C15,
    0x2545F4914F6CDD1D,
    0x3F58476D1CE4E5B9,
    0x14D049BB133111EB,
)


def round_randomly(values: Tensor, rows: Tensor, seed: int, step: Tensor) -> Tensor:
    """Float32 `values` [n, dim] of `rows`, int64 [n], in bfloat16.

    Args:
        step: int64, 0-dim; another one gives other draws.
    """
    raw = values.view(torch.int32) + random_bits(rows, values.shape[1], seed, step)
    return (raw & -0x10000).view(torch.float32).bfloat16()


def random_bits(rows: Tensor, dim: int, seed: int, step: Tensor) -> Tensor:
    """Numbers from 0 to 2¹⁶ - 1 for each row and column, int32 [n, dim], by a hash like splitmix64's end."""
    bits = rows.unsqueeze(1) * dim + torch.arange(dim, device=rows.device)
    # Products of int64 wrap around; the shift fills in the sign, which the mask takes away.
    bits = bits * _FIRST + (step * _STEP + seed * _SEED % (1 << 62))
    for _ in range(2):
        bits = (bits ^ (bits >> 31 & 0x1FFFFFFFF)) * _SECOND
    return (bits >> 40 & 0xFFFF).int()
