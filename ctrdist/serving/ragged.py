"""Columns of several values a row, and columns on disk."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Ragged:
    """Rows of several values: row i is `values[offsets[i]:offsets[i+1]]`. int32 values, int64 offsets."""

    values: np.ndarray
    offsets: np.ndarray

    def take(self, rows: np.ndarray) -> "Ragged":
        """The given rows, in their order."""
        starts, lengths = self.offsets[rows], self.offsets[rows + 1] - self.offsets[rows]
        return Ragged(self.values[spans(starts, lengths)], offsets_of(lengths))

    def __getitem__(self, rows: slice) -> "Ragged":
        """Rows one after another."""
        begin, end, _ = rows.indices(len(self.offsets) - 1)
        offsets = self.offsets[begin : end + 1]
        return Ragged(self.values[offsets[0] : offsets[-1]], offsets - offsets[0])


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """Lengths [n] -> where each row begins and the last one ends, int64 [n + 1]."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def spans(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The places of n stretches one after another: starts[0], starts[0] + 1, ..., then starts[1], ..."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)


Column = np.ndarray | Ragged
"""A value for each row, or several."""


def take(column: Column, rows: np.ndarray) -> Column:
    """The given rows of a column, in their order."""
    return column.take(rows) if isinstance(column, Ragged) else column[rows]


def changes(column: Column) -> np.ndarray:
    """Whether each row but the first is another than the one before it, bool [n - 1]; NaN is like NaN."""
    if not isinstance(column, Ragged):
        if column.dtype.kind == "f":
            column = column.view(f"i{column.itemsize}")
        return column[1:] != column[:-1]
    lengths = np.diff(column.offsets)
    out = lengths[1:] != lengths[:-1]
    alike = np.flatnonzero(~out)
    one, other = (column.values[spans(column.offsets[at], lengths[at])] for at in (alike, alike + 1))
    out[np.repeat(alike, lengths[alike])[one != other]] = True
    return out


def save_column(folder: Path, name: str, column: Column) -> None:
    """Write a column as `<name>.npy`, or as `<name>.values.npy` and `<name>.offsets.npy`."""
    if isinstance(column, Ragged):
        np.save(folder / f"{name}.values.npy", column.values)
        np.save(folder / f"{name}.offsets.npy", column.offsets)
    else:
        np.save(folder / f"{name}.npy", column)


def load_column(folder: Path, name: str, several: bool) -> Column:
    """Memory-map what `save_column` wrote.

    Args:
        several: whether a row has several values.
    """
    if not several:
        return np.load(folder / f"{name}.npy", mmap_mode="r")
    return Ragged(*(np.load(folder / f"{name}.{part}.npy", mmap_mode="r") for part in ("values", "offsets")))
