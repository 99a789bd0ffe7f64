"""What a user did before each row of the log, without a loop over rows."""

import numpy as np
import pyarrow as pa


def recent_behaviours(
    user: np.ndarray, timestamp: np.ndarray, include: np.ndarray, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """For every row, the most recent earlier rows of the same user.

    Earlier is strict: rows of one second never see each other, so a log with ties leaks nothing. The log may be in
    any order. Earlier rows that share a second keep their order in the log.

    Args:
        user: [N] any sortable type; integer codes are fastest.
        timestamp: [N] any integer unit.
        include: [N] bool, the rows that count as behaviours: the clicks, or all rows.
        length: keep at most this many, the latest; 0 or more.

    Returns:
        offsets: [N + 1] int64; row n has behaviours `rows[offsets[n]:offsets[n + 1]]`.
        rows: [offsets[-1]] int64, row numbers of the log, oldest first within each row.
    """
    assert length >= 0 and len(user) == len(timestamp) == len(include)
    count = len(user)
    if count == 0:
        return np.zeros(1, np.int64), np.zeros(0, np.int64)
    order = np.lexsort((timestamp, user))
    user, timestamp, include = user[order], timestamp[order], np.asarray(include, bool)[order]
    behaviours = order[include]
    before = np.cumsum(include) - include  # behaviours at earlier sorted positions, of all users

    new_user = np.r_[True, user[1:] != user[:-1]]
    new_time = new_user | np.r_[True, timestamp[1:] != timestamp[:-1]]
    position = np.arange(count)
    stop = before[np.maximum.accumulate(np.where(new_time, position, 0))]
    start = np.maximum(before[np.maximum.accumulate(np.where(new_user, position, 0))], stop - length)

    starts, lengths = np.empty(count, np.int64), np.empty(count, np.int64)
    starts[order], lengths[order] = start, stop - start
    offsets = np.r_[0, np.cumsum(lengths)]
    flat = np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])
    return offsets, behaviours[flat]


def history_column(offsets: np.ndarray, rows: np.ndarray, item_id: pa.Array) -> pa.ListArray:
    """The `history` column of a log from `recent_behaviours`.

    Args:
        offsets: [N + 1] int64; the first may be above 0 where a slice of the rows is taken.
        rows: [R] int64, positions in `item_id`.
        item_id: strings, one for each row (or item) that `rows` points to.

    Returns:
        list<string> [N], item ids, oldest first.
    """
    values = item_id.take(pa.array(rows[offsets[0] : offsets[-1]]))
    return pa.ListArray.from_arrays(pa.array(offsets - offsets[0], pa.int32()), values)
