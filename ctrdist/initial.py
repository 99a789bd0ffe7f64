"""What a row of an embedding table starts from: decided by the seed and the row's number, and by nothing else.

Rows are drawn in blocks of consecutive rows, each from a generator of its own, so that a table that grew, or of which a
worker holds some rows only, has the rows of a table that was made at once. A row costs its block, whichever is asked.
"""

import numpy as np

BLOCK = 1024
"""Consecutive rows that one generator draws."""


def initial_rows(rows: np.ndarray, dim: int, seed: int, salt: int = 0) -> np.ndarray:
    """The first values of `rows`, int64 [n] in any order: float32 [n, dim], standard normal; row 0, padding, is zero.

    Args:
        salt: another one gives other values for the same row.
    """
    out = np.empty((len(rows), dim), np.float32)
    order = np.argsort(rows, kind="stable")
    blocks, counts = np.unique(rows // BLOCK, return_counts=True)
    for block, places in zip(blocks, np.split(order, np.cumsum(counts)), strict=False):
        generator = np.random.Generator(np.random.SFC64([seed & (1 << 64) - 1, salt, int(block)]))
        drawn = generator.standard_normal((BLOCK, dim), dtype=np.float32)
        out[places] = drawn[rows[places] - block * BLOCK]
    out[rows == 0] = 0
    return out
