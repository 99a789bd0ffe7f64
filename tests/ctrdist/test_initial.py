import numpy as np
import pytest

from ctrdist.initial import BLOCK, initial_rows

ROWS = 3 * BLOCK + 7


def test_a_rows_values_do_not_depend_on_what_else_is_asked():
    whole = initial_rows(np.arange(ROWS), 3, seed=5)
    draws = np.random.default_rng(0)
    for asked in (
        [7],
        [0, ROWS - 1],
        [BLOCK, BLOCK - 1, BLOCK, 0],
        draws.permutation(ROWS),
        draws.integers(0, ROWS, 50),
    ):
        assert np.array_equal(initial_rows(np.array(asked), 3, seed=5), whole[asked])
    empty = initial_rows(np.empty(0, np.int64), 3, seed=5)
    assert empty.shape == (0, 3) and empty.dtype == np.float32


def test_values_are_standard_normal_and_all_different():
    values = initial_rows(np.arange(20 * BLOCK), 4, seed=0)[1:]
    assert values.mean() == pytest.approx(0, abs=0.01) and values.std() == pytest.approx(1, abs=0.01)
    assert len(np.unique(values[:, 0])) > 0.999 * len(values), "blocks do not repeat"


def test_padding_is_zero_under_every_seed_and_salt():
    for seed, salt in ((0, 0), (0, 1), (9, 0), (-3, 0)):
        assert not initial_rows(np.array([0]), 4, seed, salt).any()


def test_seed_and_salt_change_every_row():
    rows = np.arange(1, ROWS)
    one, *others = (initial_rows(rows, 2, seed, salt) for seed, salt in ((0, 0), (1, 0), (0, 1), (1, 1), (-1, 0)))
    assert all((one != other).any(1).all() for other in others)
