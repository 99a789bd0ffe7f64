"""Numeric fields: a number becomes a bucket between quantiles, or a logarithm that multiplies a learned vector."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ctrdist.errors import UserError
from ctrdist.vocabulary import FIRST_ROW, UNKNOWN

SAMPLE = 65_536
"""Values that quantiles are estimated from: their rank is off by half a percent at most, nearly always."""

Sample = tuple[np.ndarray, np.ndarray]
"""Keys drawn evenly from [0, 1), and values; both [n] float64."""

LOG, QUANTILE = "log", "quantile"


class Numeric:
    """What a numeric field's values become. Stands where a `Vocabulary` does for ids.

    Args:
        scale: `quantile` gives each value the row of its bucket; `log` gives sign(x) log(1 + |x|), which multiplies
            the vector of one row.
        edges: ascending values between the buckets, float64; a value belongs to the bucket above an edge it equals.
    """

    def __init__(self, scale: str, edges: np.ndarray | None = None) -> None:
        self.scale = scale
        self.edges = np.empty(0) if edges is None else edges

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

    def lookup(self, values: pa.Array | pa.ChunkedArray, column: str = "column") -> np.ndarray:
        """Rows, int32, of numbers; or for scale `log` logarithms, float32.

        A null, NaN or infinite value is UNKNOWN, or NaN.

        Raises:
            UserError: the values are no numbers.
        """
        numbers = to_numbers(values, column)
        known = np.isfinite(numbers)
        if self.scale == LOG:
            out = np.full(len(numbers), np.nan, np.float32)
            out[known] = np.sign(numbers[known]) * np.log1p(np.abs(numbers[known]))
            return out
        rows = FIRST_ROW + np.searchsorted(self.edges, numbers, side="right")
        return np.where(known, rows, UNKNOWN).astype(np.int32)

    def save(self, folder: Path) -> None:
        """Write `numeric.json` to `folder`, which is made."""
        folder.mkdir(parents=True, exist_ok=True)
        content = {"scale": self.scale, "edges": self.edges.tolist()}
        (folder / "numeric.json").write_text(json.dumps(content))

    @classmethod
    def load(cls, folder: Path) -> "Numeric":
        """What `save` wrote."""
        content = json.loads((folder / "numeric.json").read_text())
        return cls(content["scale"], np.array(content["edges"], np.float64))


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


def to_numbers(values: pa.Array | pa.ChunkedArray, column: str = "column") -> np.ndarray:
    """Values as float64, NaN for null. Raises UserError if they are no numbers."""
    type_ = values.type
    if not (pa.types.is_integer(type_) or pa.types.is_floating(type_) or pa.types.is_null(type_)):
        raise UserError(f"column '{column}': of type {type_}; a numeric field needs integers or floats")
    return pc.fill_null(values.cast(pa.float64(), safe=False), float("nan")).to_numpy(zero_copy_only=False)


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
