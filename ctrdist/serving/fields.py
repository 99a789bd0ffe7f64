"""The fields of a row: what they are, and how their values become rows of tables or numbers."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ctrdist.serving.numbers import LOG, QUANTILE, Numbers
from ctrdist.serving.ragged import Column, Ragged, offsets_of
from ctrdist.serving.vocabulary import Ids

USER_ID, ITEM_ID, HISTORY = "user_id", "item_id", "history"
CATEGORICAL, MULTI, NUMERIC = "categorical", "multi", "numeric"


@dataclass(frozen=True)
class Field:
    """One feature of the model.

    Args:
        name: column of the Parquet files it is read from.
        kind: `categorical` (one value, string or integer), `multi` (a list of values, mean-pooled) or `numeric`.
        min_count: values with fewer training rows than this share the unknown row, which is so trained.
        scale: of a number: `quantile` puts it into one of `buckets` of like size, each with a vector of its own;
            `log` multiplies one vector by sign(x) log(1 + |x|). A missing number has a vector of its own.
        buckets: for `quantile`, at most this many.
    """

    name: str
    kind: str = CATEGORICAL
    min_count: int = 1
    scale: str = QUANTILE
    buckets: int = 32

    @property
    def is_value(self) -> bool:
        """Whether an encoded value is a number that multiplies a vector, not the row of one."""
        return self.kind == NUMERIC and self.scale == LOG


def encode_field(values: pa.Array, field: Field, encoder: Ids | Numbers) -> Column:
    """The values of a field as rows of its table, int32, several a row for a `multi` field, or as numbers, float32.

    Raises:
        UserError: the values are of another type than the field's were.
    """
    if field.kind != MULTI:
        return encoder.lookup(values, field.name)
    offsets, flat = list_parts(values)
    return Ragged(encoder.lookup(flat, field.name), offsets)


def list_parts(lists: pa.Array) -> tuple[np.ndarray, pa.Array]:
    """Offsets (int64, from 0) and flat values of a list column; a null list is an empty one."""
    if pa.types.is_null(lists.type):
        lists = lists.cast(pa.list_(pa.null()))
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    return offsets_of(lengths), pc.list_flatten(lists)


def recent_rows(histories: pa.Array, ids: Ids, length: int) -> np.ndarray:
    """The last `length` items of each history as catalog rows, int32 [n, length], oldest first, zeros at the end."""
    offsets, flat = list_parts(histories)
    ends = offsets[1:, None]
    starts = np.maximum(offsets[:-1, None], ends - length)
    at = starts + np.arange(length)
    inside = at < ends
    rows = ids.lookup(flat, HISTORY)
    out = np.zeros(at.shape, np.int32)
    out[inside] = rows[at[inside]]
    return out


def load_encoders(folder: Path, ids: type[Ids] = Ids, numbers: type[Numbers] = Numbers) -> dict[str, Ids | Numbers]:
    """The encoder of each field, from its sub-folder of that name; what `ids` have is memory-mapped."""
    return {
        path.name: (numbers if (path / "numeric.json").exists() else ids).load(path)
        for path in sorted(folder.iterdir())
        if path.is_dir()
    }
