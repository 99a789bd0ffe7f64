"""Numbers of a field: a number becomes a bucket between edges, or a logarithm that multiplies a learned vector."""

import json
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ctrdist.serving.errors import UserError
from ctrdist.serving.vocabulary import FIRST_ROW, UNKNOWN

LOG, QUANTILE = "log", "quantile"


class Numbers:
    """What a numeric field's values become. Stands where `Ids` do for ids.

    Args:
        scale: `quantile` gives each value the row of its bucket; `log` gives sign(x) log(1 + |x|), which multiplies
            the vector of one row.
        edges: ascending values between the buckets, float64; a value belongs to the bucket above an edge it equals.
    """

    def __init__(self, scale: str, edges: np.ndarray | None = None) -> None:
        self.scale = scale
        self.edges = np.empty(0) if edges is None else edges

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
    def load(cls, folder: Path) -> Self:
        """What `save` wrote."""
        content = json.loads((folder / "numeric.json").read_text())
        return cls(content["scale"], np.array(content["edges"], np.float64))


def to_numbers(values: pa.Array | pa.ChunkedArray, column: str = "column") -> np.ndarray:
    """Values as float64, NaN for null. Raises UserError if they are no numbers."""
    type_ = values.type
    if not (pa.types.is_integer(type_) or pa.types.is_floating(type_) or pa.types.is_null(type_)):
        raise UserError(f"column '{column}': of type {type_}; a numeric field needs integers or floats")
    return pc.fill_null(values.cast(pa.float64(), safe=False), float("nan")).to_numpy(zero_copy_only=False)
