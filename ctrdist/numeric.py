"""Numeric fields: where the edges of their buckets come from."""

import numpy as np

from ctrdist.serving.numbers import QUANTILE, Numbers, to_numbers
from ctrdist.serving.vocabulary import FIRST_ROW

__all__ = ["SAMPLE", "Numeric", "Sample", "add_samples", "quantile_edges", "sample_values", "to_numbers"]

SAMPLE = 65_536
"""Values that quantiles are estimated from: their rank is off by half a percent at most, nearly always."""

Sample = tuple[np.ndarray, np.ndarray]
"""Keys drawn evenly from [0, 1), and values; both [n] float64."""


class Numeric(Numbers):
    """What a numeric field's values become, and where its edges come from. Stands where a `Vocabulary` does for ids."""

    @property
    def size(self) -> int:
        """Rows of a table for this field, padding and unknown included."""
        return FIRST_ROW + 1 + len(self.edges)

    def fit(self, sample: Sample, buckets: int) -> "Numeric":
        """With edges at the quantiles of a sample; as it is where it has edges already, so that rows never move."""
        values = sample[1]
        if self.scale != QUANTILE or len(self.edges) or not len(values):
            return self
        return Numeric(self.scale, quantile_edges(values, buckets))


def quantile_edges(values: np.ndarray, buckets: int) -> np.ndarray:
    """Edges that cut values into at most `buckets` parts of like size, none of them empty.

    A value that fills a part alone, such as the zeros of a count, gets a part of its own, so that the others are told
    apart all the same.
    """
    distinct, counts = np.unique(values, return_counts=True)
    heavy = counts * buckets >= len(values)
    rest = values[~np.isin(values, distinct[heavy])]
    own = np.concatenate([distinct[heavy], distinct[1:][heavy[:-1]]])  # from the value to the next one above
    edges = np.union1d(own, _quantiles(rest, buckets - 2 * int(heavy.sum())))
    edges = edges[edges > distinct[0]]
    if len(edges) >= buckets:
        edges = np.unique(_quantiles(values, buckets))
        edges = edges[edges > distinct[0]]
    return edges


def _quantiles(values: np.ndarray, parts: int) -> np.ndarray:
    if parts < 2 or not len(values):
        return np.empty(0)
    return np.quantile(values, np.arange(1, parts) / parts, method="inverted_cdf")


def sample_values(values: np.ndarray, seed: int) -> Sample:
    """An even sample of the finite values of one piece of the log; `seed` is a number of that piece."""
    values = values[np.isfinite(values)]
    return _smallest(np.random.default_rng(seed).random(len(values)), values)


def add_samples(a: Sample, b: Sample) -> Sample:
    """An even sample of what two even samples were drawn from, in whatever order they come."""
    return _smallest(np.concatenate([a[0], b[0]]), np.concatenate([a[1], b[1]]))


def _smallest(keys: np.ndarray, values: np.ndarray) -> Sample:
    """The SAMPLE smallest keys, ascending: keys are even draws, so which values stay says nothing of them."""
    order = np.argsort(keys, kind="stable")[:SAMPLE]
    return keys[order], values[order]
