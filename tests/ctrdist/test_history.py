import numpy as np
import pyarrow as pa
import pytest

from ctrdist.history import history_column, recent_behaviours


def brute_force(user, timestamp, include, length):
    """The definition, one row at a time."""
    expected = []
    for row in range(len(user)):
        earlier = [
            other
            for other in range(len(user))
            if user[other] == user[row] and timestamp[other] < timestamp[row] and include[other]
        ]
        earlier.sort(key=lambda other: (timestamp[other], other))
        expected.append(earlier[max(len(earlier) - length, 0) :])
    return expected


@pytest.mark.parametrize("length", [0, 1, 3, 100])
@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_brute_force_on_shuffled_logs_with_ties(seed, length):
    rng = np.random.default_rng(seed)
    user, timestamp = rng.integers(7, size=200), rng.integers(40, size=200)
    include = rng.random(200) < 0.5
    offsets, rows = recent_behaviours(user, timestamp, include, length)
    found = [rows[a:b].tolist() for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
    assert found == brute_force(user, timestamp, include, length)
    assert offsets.dtype == rows.dtype == np.int64


def test_rows_of_one_second_never_see_each_other():
    offsets, rows = recent_behaviours(np.zeros(4, int), np.array([5, 5, 5, 6]), np.ones(4, bool), 10)
    assert offsets.tolist() == [0, 0, 0, 0, 3]
    assert rows.tolist() == [0, 1, 2]


def test_empty_log():
    offsets, rows = recent_behaviours(np.zeros(0, int), np.zeros(0, int), np.zeros(0, bool), 10)
    assert offsets.tolist() == [0] and len(rows) == 0


def test_history_column_takes_a_slice_of_rows():
    item_id = pa.array(["a", "b", "c"])
    offsets, rows = recent_behaviours(np.zeros(3, int), np.arange(3), np.ones(3, bool), 2)
    assert history_column(offsets, rows, item_id).to_pylist() == [[], ["a"], ["a", "b"]]
    assert history_column(offsets[1:], rows, item_id).to_pylist() == [["a"], ["a", "b"]]
