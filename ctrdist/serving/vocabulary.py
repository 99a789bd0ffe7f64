"""Ids and the rows of what is known of them. Row 0 is padding and row 1 is unknown, everywhere."""

from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ctrdist.serving.errors import UserError

PADDING = 0
UNKNOWN = 1
FIRST_ROW = 2
LONGEST_ID = 256
"""Bytes."""


class Ids:
    """The rows of one kind of id.

    Ids and their rows are two arrays sorted by id, so a look-up is a binary search and the arrays can be
    memory-mapped or shared between processes.

    Args:
        keys: ids with a row, ascending, as `to_keys` gives them.
        rows: the row of each, int32.
    """

    ARRAYS: tuple[str, ...] = ("keys", "rows")

    def __init__(self, keys: np.ndarray, rows: np.ndarray) -> None:
        self.keys, self.rows = keys, rows

    def lookup(self, values: pa.Array | pa.ChunkedArray, column: str = "column") -> np.ndarray:
        """Rows of `values`, int32 of the same length; UNKNOWN for null and for ids without a row.

        Raises:
            UserError: the ids are integers and the vocabulary's are strings, or the other way round.
        """
        if isinstance(values, pa.ChunkedArray):
            values = values.combine_chunks()
        if pa.types.is_null(values.type):
            return np.full(len(values), UNKNOWN, np.int32)
        _require_ids(values.type, column)
        encoded = values if pa.types.is_dictionary(values.type) else values.dictionary_encode()
        found = self.lookup_keys(to_keys(encoded.dictionary, column), column)
        indices = encoded.indices
        if indices.null_count:
            indices, found = pc.fill_null(indices.cast(pa.int64()), len(found)), np.append(found, np.int32(UNKNOWN))
        return found[indices.to_numpy(zero_copy_only=False)]

    def lookup_keys(self, keys: np.ndarray, column: str = "column") -> np.ndarray:
        """`lookup` for keys as `to_keys` gives them."""
        at, known = self._find(keys, column)
        found = np.full(len(keys), UNKNOWN, np.int32)
        found[known] = self.rows[at[known]]
        return found

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Where each of `keys`, all of which have a row, stands in `self.keys`."""
        at, known = self._find(keys, "column")
        assert known.all()
        return at

    def _find(self, keys: np.ndarray, column: str) -> tuple[np.ndarray, np.ndarray]:
        """Where each of `keys` stands in `self.keys`, and whether it does."""
        if len(self.keys) == 0 or len(keys) == 0:
            return np.zeros(len(keys), np.int64), np.zeros(len(keys), bool)
        require_same_kind(self.keys, keys, column)
        asked = keys.astype(self.keys.dtype)  # of another width, NumPy would first copy all of `self.keys` to it
        at = np.minimum(np.searchsorted(self.keys, asked), len(self.keys) - 1)
        return at, self.keys[at] == keys

    def save(self, folder: Path) -> None:
        """Write one `.npy` file an array to `folder`, which is made."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in self.ARRAYS:
            np.save(folder / f"{name}.npy", getattr(self, name), allow_pickle=False)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Memory-map what `save` wrote."""
        return cls(*(np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in cls.ARRAYS))


def to_keys(values: pa.Array, column: str = "column") -> np.ndarray:
    """Ids as a NumPy array that sorts: int64 for integers, fixed-width UTF-8 bytes (`S`) for strings. No nulls.

    Raises:
        UserError: `values` are neither integers nor strings, or one is longer than `LONGEST_ID`.
    """
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if pa.types.is_integer(values.type) or pa.types.is_boolean(values.type):
        return values.cast(pa.int64(), safe=False).to_numpy(zero_copy_only=False)  # 64-bit hashes wrap, distinct still
    _require_ids(values.type, column)
    values = values.cast(pa.large_binary())
    if len(values) == 0:
        return np.empty(0, "S1")
    offsets = np.frombuffer(values.buffers()[1], np.int64)[values.offset : values.offset + len(values) + 1]
    lengths = np.diff(offsets)
    width = max(1, int(lengths.max()))
    if width > LONGEST_ID:
        shown = values[int(lengths.argmax())].as_py()[:40].decode(errors="replace")
        raise UserError(
            f"column '{column}': an id of {width:,} bytes, beginning with {shown!r}; at most {LONGEST_ID}: correct it, "
            "or give such things shorter ids, since all take the room of the longest"
        )
    content = np.frombuffer(values.buffers()[2] or b"", np.uint8)[offsets[0] : offsets[-1]]
    matrix = np.zeros((len(values), width), np.uint8)
    matrix[np.repeat(np.arange(len(values)), lengths), _ranges(lengths)] = content
    return matrix.view(f"S{width}").ravel()


def _require_ids(type_: pa.DataType, column: str) -> None:
    type_ = type_.value_type if pa.types.is_dictionary(type_) else type_
    kinds = (pa.types.is_integer, pa.types.is_boolean, pa.types.is_string, pa.types.is_large_string)
    if not any(is_kind(type_) for is_kind in kinds):
        raise UserError(f"column '{column}': ids of type {type_}; expected strings or integers")


def _ranges(lengths: np.ndarray) -> np.ndarray:
    """0..n-1 for each n of `lengths`, joined."""
    starts = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum())) - np.repeat(starts, lengths)


def require_same_kind(before: np.ndarray, keys: np.ndarray, column: str) -> None:
    if before.dtype.kind != keys.dtype.kind:
        names = {"S": "strings", "i": "integers"}
        raise UserError(
            f"column '{column}': ids are {names[keys.dtype.kind]}, but {names[before.dtype.kind]} before; "
            "keep one type for a column, or start a new state folder"
        )
