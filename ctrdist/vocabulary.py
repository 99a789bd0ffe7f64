"""id -> row maps whose rows never move. Row 0 is padding and row 1 is unknown, everywhere."""

import hashlib

import numpy as np

from ctrdist.serving.vocabulary import FIRST_ROW, LONGEST_ID, PADDING, UNKNOWN, Ids, require_same_kind, to_keys

__all__ = [
    "FIRST_ROW", "LONGEST_ID", "PADDING", "UNKNOWN", "Counts", "Vocabulary", "add_counts", "sum_counts", "to_keys",
]  # fmt: skip

Counts = tuple[np.ndarray, np.ndarray]


class Vocabulary(Ids):
    """The rows of one kind of id, as they grow. Ids seen fewer than `min_count` times so far are remembered with
    their counts and get a row once they reach it. Days are whole numbers, such as `date.toordinal()`.

    Args:
        keys: ids with a row, ascending, as `to_keys` gives them.
        rows: the row of each, int32.
        seen: the day each was last seen, int32.
        pending: ids without a row as yet, ascending.
        pending_counts: how often each was seen, int64.
        pending_seen: the day each was last seen, int32.
        free: rows whose ids have expired, ascending, int32.
        freed: the day each expired, int32.
    """

    ARRAYS = ("keys", "rows", "seen", "pending", "pending_counts", "pending_seen", "free", "freed")

    def __init__(
        self,
        keys: np.ndarray | None = None,
        rows: np.ndarray | None = None,
        seen: np.ndarray | None = None,
        pending: np.ndarray | None = None,
        pending_counts: np.ndarray | None = None,
        pending_seen: np.ndarray | None = None,
        free: np.ndarray | None = None,
        freed: np.ndarray | None = None,
    ) -> None:
        def or_empty(array: np.ndarray | None, dtype: type | str = np.int32) -> np.ndarray:
            return np.empty(0, dtype) if array is None else array

        super().__init__(or_empty(keys, "S1"), or_empty(rows))
        self.seen = or_empty(seen)
        self.pending, self.pending_counts = or_empty(pending, "S1"), or_empty(pending_counts, np.int64)
        self.pending_seen, self.free, self.freed = or_empty(pending_seen), or_empty(free), or_empty(freed)

    @property
    def size(self) -> int:
        """Rows of a table for this vocabulary, with padding, unknown and the rows of expired ids."""
        return FIRST_ROW + len(self.keys) + len(self.free)

    def fingerprint(self) -> str:
        """Sixteen hex digits that change with any id's row, and with the number of rows."""
        digest = hashlib.sha256(f"{self.size} {self.keys.dtype.str}".encode())
        for array in (self.keys, self.rows):
            digest.update(np.ascontiguousarray(array).view(np.uint8))
        return digest.hexdigest()[:16]

    def grow(
        self,
        keys: np.ndarray,
        counts: np.ndarray,
        min_count: int = 1,
        column: str = "column",
        day: int = 0,
        reuse_until: int = -1,
    ) -> "Vocabulary":
        """A vocabulary with the same rows and new ones, in the order of the ids, for ids that now reach `min_count`.

        New ids take the rows of ids that expired by day `reuse_until`, then new rows at the end.

        Args:
            keys: distinct ids, as `to_keys` gives them, seen on `day`.
            counts: how often each occurs in the rows added, int64. An id may be seen without a row (0).
        """
        at, known = self._find(keys, column)
        seen = np.array(self.seen)
        seen[at[known]] = np.maximum(seen[at[known]], day)
        new = ~known & (counts > 0)
        keys, counts = keys[new], counts[new]
        days = _join_keys(self.pending_seen, np.full(len(keys), day, np.int32), column)
        joined = _join_keys(self.pending, keys, column)
        keys, inverse = np.unique(joined, return_inverse=True)
        totals = np.zeros(len(keys), np.int64)
        np.add.at(totals, inverse, np.concatenate([self.pending_counts, counts]))
        last = np.zeros(len(keys), np.int32)
        np.maximum.at(last, inverse, days)
        enough = totals >= min_count
        added = keys[enough]
        again = np.flatnonzero(self.freed <= reuse_until)[: len(added)]
        end = np.arange(self.size, self.size + len(added) - len(again), dtype=np.int32)
        all_keys = _join_keys(self.keys, added, column)
        order = np.argsort(all_keys, kind="stable")
        return Vocabulary(
            all_keys[order],
            np.concatenate([self.rows, self.free[again], end])[order],
            np.concatenate([seen, last[enough]])[order],
            keys[~enough],
            totals[~enough],
            last[~enough],
            np.delete(self.free, again),
            np.delete(self.freed, again),
        )

    def expire(self, before: int, day: int) -> "Vocabulary":
        """A vocabulary without the ids last seen before day `before`; their rows are free from `day` on."""
        old, forgotten = self.seen < before, self.pending_seen < before
        free = np.concatenate([self.free, self.rows[old]])
        freed = np.concatenate([self.freed, np.full(int(old.sum()), day, np.int32)])
        order = np.argsort(free)
        return Vocabulary(
            self.keys[~old],
            self.rows[~old],
            self.seen[~old],
            self.pending[~forgotten],
            self.pending_counts[~forgotten],
            self.pending_seen[~forgotten],
            free[order],
            freed[order],
        )

    def rows_with_new_ids(self, before: "Vocabulary") -> np.ndarray:
        """Rows that `before` has too, but for another id or none: what a table learnt in them is of no use, int32."""
        there = self.rows < before.size
        return self.rows[there][before.lookup_keys(self.keys[there]) != self.rows[there]]

    def decode(self, rows: np.ndarray) -> np.ndarray:
        """The ids of `rows`, each of which has one, as `to_keys` gives them."""
        order = np.argsort(self.rows)
        return self.keys[order[np.searchsorted(self.rows, rows, sorter=order)]]


def sum_counts(keys: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct keys, sorted, and the sum of each one's counts (int64)."""
    distinct, inverse = np.unique(keys, return_inverse=True)
    return distinct, np.bincount(inverse, weights=counts, minlength=len(distinct)).astype(np.int64)


def add_counts(a: Counts, b: Counts, column: str = "column") -> Counts:
    """The sum of two counts of keys: distinct keys, sorted, and how often each occurs.

    Raises:
        UserError: one has integers and the other strings.
    """
    return sum_counts(_join_keys(a[0], b[0], column), np.concatenate([a[1], b[1]]))


def _join_keys(a: np.ndarray, b: np.ndarray, column: str) -> np.ndarray:
    if not len(a) or not len(b):
        return b if len(b) else a  # no keys have no type
    require_same_kind(a, b, column)
    return np.concatenate([a, b])
