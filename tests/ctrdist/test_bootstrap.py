import numpy as np
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from ctrdist.bootstrap import WeightedAuc, paired_by_user


@pytest.fixture
def rows():
    """Rows of 40 users who differ, scored by a model with many ties and by a better one."""
    draw, n = np.random.default_rng(1), 600
    user = draw.integers(0, 40, n)
    logit = draw.normal(0, 1, 40)[user] + draw.normal(0, 1, n)
    label = (draw.random(n) < 1 / (1 + np.exp(-logit))).astype(np.float32)
    first = np.round(1 / (1 + np.exp(-logit - draw.normal(0, 2, n))), 1).clip(0.05, 0.95)
    return user, label, first, 1 / (1 + np.exp(-logit - draw.normal(0, 1, n)))


def test_weighted_auc_is_that_of_the_rows_written_as_often(rows):
    user, label, first, _ = rows
    weights = np.random.default_rng(2).integers(0, 4, 40)
    many = np.repeat(np.arange(user.size), weights[user])
    found = WeightedAuc(user, label, first)(weights)
    assert found == pytest.approx(roc_auc_score(label[many], first[many]), abs=1e-12)
    clicked = np.zeros(40, int)
    clicked[user[label > 0][0]] = 1
    assert np.isnan(WeightedAuc(user[label > 0], label[label > 0], first[label > 0])(clicked))


def test_the_bootstrap_draws_users_with_all_their_rows(rows):
    user, label, first, second = rows
    found = paired_by_user(user, label, first, second, resamples=50, seed=7)
    draw, expected = np.random.default_rng(7), []
    for _ in range(50):
        many = np.concatenate([np.flatnonzero(user == u) for u in draw.integers(0, 40, 40)])
        aucs = [roc_auc_score(label[many], score[many]) for score in (first, second)]
        losses = [log_loss(label[many], score[many]) for score in (first, second)]
        expected.append((aucs[1] - aucs[0], losses[1] - losses[0]))
    for difference, drawn, metric in zip(found, np.transpose(expected), (roc_auc_score, log_loss), strict=True):
        assert difference.value == pytest.approx(metric(label, second) - metric(label, first), abs=1e-12)
        low, high = np.percentile(drawn, (2.5, 97.5))
        assert (difference.low, difference.high) == (pytest.approx(low, abs=1e-12), pytest.approx(high, abs=1e-12))
        assert difference.not_above == pytest.approx((1 + (drawn <= 0).sum()) / 51)
        assert difference.not_below == pytest.approx((1 + (drawn >= 0).sum()) / 51)


def test_users_who_agree_with_themselves_widen_the_interval():
    """Each user's rows are one row written ten times: the interval is that of the users, not of the rows."""
    draw = np.random.default_rng(3)
    label, first, second = draw.integers(0, 2, 100), draw.random(100), draw.random(100)
    alone = paired_by_user(np.arange(100), label, first, second, 300, seed=1)
    ten = [np.repeat(column, 10) for column in (np.arange(100), label, first, second)]
    together = paired_by_user(*ten, 300, seed=1)
    rows = paired_by_user(np.arange(1000), *ten[1:], 300, seed=1)
    assert together.auc == pytest.approx(alone.auc) and together.log_loss == pytest.approx(alone.log_loss)
    width = [found.log_loss.high - found.log_loss.low for found in (together, rows)]
    assert width[0] > 2 * width[1]


def test_the_same_model_twice_differs_in_nothing(rows):
    user, label, first, _ = rows
    found = paired_by_user(user, label, first, first.copy(), 20)
    assert found.auc == found.log_loss == (0, 0, 0, 1, 1)
    only = paired_by_user(user, np.ones_like(label), first, first, 20)
    assert np.isnan(only.auc.value) and only.auc.not_above == only.auc.not_below == 1
