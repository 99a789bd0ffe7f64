"""Vectors that are there already, by the hash of the text that they were made of."""

import numpy as np

BLOCK = 65536
"""Vectors that are copied at a time."""


class TextVectors:
    """Which of n texts have a vector, and where it lies; equal texts share one.

    Args:
        hashes: uint64 [n], of each text (`ItemTexts.hashes`).
    """

    def __init__(self, hashes: np.ndarray) -> None:
        self.hashes, self._first, self._which = np.unique(hashes, return_index=True, return_inverse=True)
        self._source = np.full(len(self.hashes), -1, np.int32)
        self._row = np.zeros(len(self.hashes), np.int64)
        self._sources: list[np.ndarray] = []

    def add(self, hashes: np.ndarray, vectors: np.ndarray) -> int:
        """Take in vectors [m, dim], mapped from a file, with the hash of each one's text; how many texts gain one.

        A hash of 0 is of no text.
        """
        at = np.searchsorted(self.hashes, hashes).clip(max=max(0, len(self.hashes) - 1))
        ours = np.flatnonzero((self.hashes[at] == hashes) & (hashes != 0)) if len(self.hashes) else np.empty(0, int)
        ours = ours[self._source[at[ours]] < 0]
        self._source[at[ours]], self._row[at[ours]] = len(self._sources), ours
        self._sources.append(vectors)
        return int(np.isin(self._which, at[ours]).sum())

    def lacks(self, hashes: np.ndarray) -> bool:
        """Whether a text without a vector is among those with these hashes, uint64 [m]."""
        return bool(np.isin(self.hashes[self._source < 0], hashes).any())

    @property
    def missing(self) -> np.ndarray:
        """Numbers of the texts without a vector, one for each distinct text, ascending, int64."""
        return np.sort(self._first[self._source < 0])

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self._sources[0].shape[1]

    def fill(self, table: np.ndarray, rows: np.ndarray) -> None:
        """Write the vector of text i, all of which have one, to `table[rows[i]]`."""
        source, row = self._source[self._which], self._row[self._which]
        assert (source >= 0).all(), f"{(source < 0).sum()} texts have no vector"
        order = np.lexsort((row, source))
        starts = np.searchsorted(source[order], np.arange(len(self._sources) + 1))
        for vectors, start, end in zip(self._sources, starts[:-1], starts[1:], strict=True):
            for first in range(start, end, BLOCK):
                at = order[first : min(first + BLOCK, end)]
                table[rows[at]] = vectors[row[at]]
