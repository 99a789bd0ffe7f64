"""How sure a difference between two models is: the paired bootstrap by user, on the rows that both scored.

Rows of one user depend on each other, so users are drawn, with replacement, and a user's rows come along as often as
the user was drawn. Both models are measured on the same draws. A draw is a weight a user: log loss needs sums by user
only, and for AUC the rows are sorted once, after which each draw costs a pass over them.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ctrdist.metrics import auc, log_loss, row_losses


class Difference(NamedTuple):
    """A metric of the second model less that of the first.

    Args:
        value: on the rows themselves; nan where the metric is not defined.
        low: of its 95% interval, by the percentiles of the draws.
        high: of the same.
        not_above: share of draws, and one more, in which it is 0 or less: small where it is surely above 0.
        not_below: share of draws, and one more, in which it is 0 or more: small where it is surely below 0.
    """

    value: float
    low: float
    high: float
    not_above: float
    not_below: float


class Drawn(NamedTuple):
    """What a paired bootstrap found.

    Args:
        auc: difference in AUC.
        log_loss: difference in log loss, nats.
    """

    auc: Difference
    log_loss: Difference


def paired_by_user(
    user: NDArray, label: NDArray, first: NDArray, second: NDArray, resamples: int = 1000, seed: int = 0
) -> Drawn:
    """Compare two models on the same rows.

    Args:
        user: integers [n] from 0, the user of each row.
        label: [n] 0 or 1.
        first: [n] finite probabilities of one model.
        second: of the other.
        resamples: how often users are drawn.
        seed: decides the draws.
    """
    users = int(user.max()) + 1
    rows = np.bincount(user, minlength=users)
    losses = np.bincount(user, row_losses(label, second) - row_losses(label, first), users)
    curves = WeightedAuc(user, label, first), WeightedAuc(user, label, second)
    draw = np.random.default_rng(seed)
    found = np.empty((resamples, 2))
    for number in range(resamples):
        weights = np.bincount(draw.integers(0, users, users), minlength=users)
        found[number] = curves[1](weights) - curves[0](weights), weights @ losses / (weights @ rows)
    values = auc(label, second) - auc(label, first), log_loss(label, second) - log_loss(label, first)
    return Drawn(*(_difference(value, found[:, column]) for column, value in enumerate(values)))


def _difference(value: float, drawn: NDArray[np.float64]) -> Difference:
    drawn = drawn[np.isfinite(drawn)]  # in a draw without one of the classes AUC is not defined
    if np.isnan(value) or not drawn.size:
        return Difference(value, np.nan, np.nan, 1.0, 1.0)
    low, high = np.percentile(drawn, (2.5, 97.5))
    above, below = (float((np.count_nonzero(side) + 1) / (drawn.size + 1)) for side in (drawn <= 0, drawn >= 0))
    return Difference(float(value), float(low), float(high), above, below)


class WeightedAuc:
    """AUC of one model's scores under any weights of the users; the rows are sorted once.

    Args:
        user: integers [n], the user of each row.
        label: [n] 0 or 1.
        score: [n] finite.
    """

    def __init__(self, user: NDArray, label: NDArray, score: NDArray) -> None:
        positive = label > 0
        negatives = score[~positive]
        order = np.argsort(negatives, kind="stable")
        self._negative, self._positive = user[~positive][order], user[positive]
        self._below = np.searchsorted(negatives[order], score[positive], "left")
        self._up_to = np.searchsorted(negatives[order], score[positive], "right")

    def __call__(self, weights: NDArray[np.int64]) -> float:
        """AUC where every row counts as often as its user's weight [users] says; nan where a class has no weight."""
        outranked = np.concatenate([[0], np.cumsum(weights[self._negative])])
        mine = weights[self._positive]
        pairs = mine.sum() * outranked[-1]
        return float(mine @ (outranked[self._below] + outranked[self._up_to]) / (2 * pairs)) if pairs else np.nan
