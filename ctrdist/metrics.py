"""How good predicted click probabilities are: exact metrics in NumPy, and one mergeable state for validation.

Everywhere: `label` [n] holds 0 or 1, `score` [n] anything that orders rows, `probability` [n] values in [0, 1]; n is
at least 1. A metric that the rows do not define (a class is absent, a score is NaN) is nan, never a guess.
"""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

CLIP = 1e-7
"""Probabilities are clipped to [CLIP, 1 - CLIP] before a logarithm, so one row costs at most 16.1 nats."""

POPULARITY_EDGES = (0, 1, 5, 10, 30, 100, 300)
"""Lower edges of the groups of figure 3 in the CELA paper: 0, 1-4, 5-9, 10-29, 30-99, 100-299, 300+ training rows."""


def _columns(*columns: ArrayLike) -> list[NDArray]:
    arrays = [np.asarray(column) for column in columns]
    assert all(array.shape == arrays[0].shape and array.ndim == 1 for array in arrays), [a.shape for a in arrays]
    assert arrays[0].size > 0
    return arrays


def _midranks(score: NDArray) -> NDArray[np.float64]:
    """Rank of each row, 1 for the lowest score; tied rows share the mean of their ranks."""
    order = np.argsort(score, kind="stable")
    ranks = np.empty(score.size)
    ranks[order] = _tied_ranks(_starts(score[order]), score.size)
    return ranks


def _starts(*keys: NDArray) -> NDArray[np.intp]:
    """First position of every run of equal values in sorted `keys` [n]."""
    changed = np.zeros(keys[0].size - 1, dtype=bool)
    for key in keys:
        changed |= key[1:] != key[:-1]
    return np.concatenate([[0], np.flatnonzero(changed) + 1])


def _tied_ranks(starts: NDArray[np.intp], size: int) -> NDArray[np.float64]:
    """Mean rank (from 1) of each of `size` sorted rows, where a run of ties begins at each of `starts`."""
    lengths = np.diff(starts, append=size)
    return np.repeat(starts + (lengths + 1) / 2, lengths)


def auc(label: ArrayLike, score: ArrayLike) -> float:
    """Area under the ROC curve: the chance that a clicked row outranks another one, ties counting half.

    nan where one class is absent or a score is NaN.
    """
    label, score = _columns(label, score)
    positive = label > 0
    positives = int(positive.sum())
    negatives = label.size - positives
    if positives == 0 or negatives == 0 or np.isnan(score).any():
        return math.nan
    wins = _midranks(score)[positive].sum() - positives * (positives + 1) / 2
    return float(wins / positives / negatives)


def row_losses(label: NDArray, probability: NDArray) -> NDArray[np.float64]:
    """Negative log likelihood of each row in nats, float64 [n]; `log_loss` is their mean."""
    clipped = np.clip(probability.astype(np.float64), CLIP, 1 - CLIP)
    return -np.where(label > 0, np.log(clipped), np.log1p(-clipped))


def log_loss(label: ArrayLike, probability: ArrayLike) -> float:
    """Mean negative log likelihood in nats, of probabilities clipped to [CLIP, 1 - CLIP]."""
    return float(row_losses(*_columns(label, probability)).mean())


def grouped_auc(group: ArrayLike, label: ArrayLike, score: ArrayLike) -> float:
    """Mean AUC over the groups (users) that have both labels, weighted by their rows: GAUC.

    `group` [n] is any sortable key. nan where no group has both labels or a score is NaN. One sort, no loop.
    """
    group, label, score = _columns(group, label, score)
    if np.isnan(score).any():
        return math.nan
    order = np.lexsort((score, group))
    group, score, positive = group[order], score[order], label[order] > 0
    firsts = _starts(group)
    rows = np.diff(firsts, append=group.size)
    ranks = _tied_ranks(_starts(group, score), group.size) - np.repeat(firsts, rows)
    positives = np.add.reduceat(positive.astype(np.int64), firsts)
    wins = np.add.reduceat(np.where(positive, ranks, 0.0), firsts) - positives * (positives + 1) / 2
    pairs = positives * (rows - positives)
    both = pairs > 0
    if not both.any():
        return math.nan
    return float(np.average(wins[both] / pairs[both], weights=rows[both]))


def calibration(label: ArrayLike, probability: ArrayLike, bins: int = 10) -> list[dict[str, float | int]]:
    """Predicted against observed click rate in `bins` bins of as equal a count as can be, lowest predictions first.

    Each bin is {"predicted": mean probability, "observed": mean label, "rows": count}; fewer rows than bins give one
    bin a row. Rows with equal predictions are dealt in their given order where a bin's edge falls between them.
    """
    label, probability = _columns(label, probability)
    parts = np.array_split(np.argsort(probability, kind="stable"), min(bins, label.size))
    means = [(probability[rows].mean(dtype=np.float64), (label[rows] > 0).mean(), rows.size) for rows in parts]
    return [{"predicted": float(p), "observed": float(o), "rows": n} for p, o, n in means]


def calibration_error(bins: list[dict[str, float | int]]) -> float:
    """Expected calibration error of the bins of `calibration`: the mean of |predicted - observed|, weighted by rows."""
    return float(np.average([abs(b["predicted"] - b["observed"]) for b in bins], weights=[b["rows"] for b in bins]))


def popularity_groups(
    item_train_rows: ArrayLike, label: ArrayLike, scores: dict[str, NDArray], edges: tuple[int, ...] = POPULARITY_EDGES
) -> list[dict]:
    """Test rows grouped by how often their item was in training, with each model's AUC (CELA, figure 3).

    Args:
        item_train_rows: [n] integers, training rows of the item of each test row.
        label: [n] 0 or 1.
        scores: by model name, [n] each.
        edges: lower edges of the groups, ascending; the last group is open, and rows under the first are left out.

    Returns:
        One {"group": "1-4", "rows": n, "positives": n, "auc": {model: x}} a group, empty ones too, where AUC is nan.
    """
    item_train_rows, label = _columns(item_train_rows, label)
    names = [str(low) if low == high - 1 else f"{low}-{high - 1}" for low, high in zip(edges, edges[1:], strict=False)]
    of_row = np.searchsorted(edges, item_train_rows, side="right") - 1
    groups = []
    for number, name in enumerate([*names, f"{edges[-1]}+"]):
        rows = np.flatnonzero(of_row == number)
        aucs = {model: auc(label[rows], np.asarray(s)[rows]) if rows.size else math.nan for model, s in scores.items()}
        groups.append({"group": name, "rows": rows.size, "positives": int((label[rows] > 0).sum()), "auc": aucs})
    return groups


def tail_edge(counts: ArrayLike, share: float = 0.1) -> int:
    """The most rows that a user, or item, of the long tail has: of the `share` of them with the fewest, and of those
    with as few (ClickPrompt, section 4.5).

    Args:
        counts: training rows of each; those without any do not count.
        share: over 0, at most 1.
    """
    counts = np.sort(np.asarray(counts)[np.asarray(counts) > 0])
    return int(counts[math.ceil(share * counts.size) - 1]) if counts.size else 0


def quadrants(
    user_train_rows: ArrayLike,
    item_train_rows: ArrayLike,
    edges: tuple[int, int],
    label: ArrayLike,
    scores: dict[str, NDArray],
) -> list[dict]:
    """Test rows by whether user and item are of the long tail, with each model's AUC and log loss (ClickPrompt, table
    6).

    Args:
        user_train_rows: [n] integers, training rows of the user of each test row.
        item_train_rows: [n] integers, the same of its item.
        edges: `tail_edge` of the users and of the items; who has no more training rows is of the tail.
        label: [n] 0 or 1.
        scores: by model name, [n] each.

    Returns:
        One {"users": "tail" or "head", "items": the same, "rows": n, "positives": n, "auc": {model: x},
        "log_loss": {model: x}} a quadrant.
    """
    user_train_rows, item_train_rows, label = _columns(user_train_rows, item_train_rows, label)
    tails = user_train_rows <= edges[0], item_train_rows <= edges[1]
    out = []
    for users in (True, False):
        for items in (True, False):
            rows = np.flatnonzero((tails[0] == users) & (tails[1] == items))
            own = {model: (label[rows], np.asarray(score)[rows]) for model, score in scores.items()}
            by_model = {
                metric.__name__: {model: metric(*columns) if rows.size else math.nan for model, columns in own.items()}
                for metric in (auc, log_loss)
            }
            names = {"users": "tail" if users else "head", "items": "tail" if items else "head"}
            out.append(names | {"rows": rows.size, "positives": int((label[rows] > 0).sum())} | by_model)
    return json_safe(out)


def paired_auc_difference(label: ArrayLike, score_a: ArrayLike, score_b: ArrayLike) -> tuple[float, float, float]:
    """AUC of `score_b` less AUC of `score_a` on the same rows, with DeLong's test.

    DeLong et al. 1988, by the midranks of Sun and Xu 2014: O(n log n). Rows count as independent; rows of one user
    are not quite, so read a p value near a threshold with care.

    Returns:
        (difference, standard error, two-sided p value). All nan where auc is; the last two are nan where a class
        has fewer than two rows. Two models that order every pair alike differ by 0 with p = 1.
    """
    label, score_a, score_b = _columns(label, score_a, score_b)
    difference = auc(label, score_b) - auc(label, score_a)
    positive = label > 0
    positives, negatives = int(positive.sum()), int((~positive).sum())
    if math.isnan(difference) or min(positives, negatives) < 2:
        return difference, math.nan, math.nan

    def placements(score: NDArray) -> tuple[NDArray, NDArray]:
        """Share of negatives below each positive [P], and share of positives above each negative [N]."""
        ranks = _midranks(score)
        above = (ranks[positive] - _midranks(score[positive])) / negatives
        below = 1 - (ranks[~positive] - _midranks(score[~positive])) / positives
        return above, below

    (above_a, below_a), (above_b, below_b) = placements(score_a), placements(score_b)
    variance = (above_b - above_a).var(ddof=1) / positives + (below_b - below_a).var(ddof=1) / negatives
    error = math.sqrt(variance)
    if error == 0:
        return difference, 0.0, 1.0 if difference == 0 else 0.0
    return difference, error, math.erfc(abs(difference) / error / math.sqrt(2))


def gain(
    item_train_rows: ArrayLike, label: ArrayLike, base: ArrayLike, new: ArrayLike, cold_below: int = 5
) -> dict[str, float | None]:
    """What the model `new` adds to `base`, over all rows and over cold ones, as the report wants it.

    Returns:
        {"auc", "auc_se", "auc_p", "cold", "cold_se", "cold_p"}: `paired_auc_difference`, None for what is not defined.
    """
    item_train_rows, label, base, new = _columns(item_train_rows, label, base, new)
    cold = item_train_rows < cold_below
    overall = paired_auc_difference(label, base, new)
    on_cold = paired_auc_difference(label[cold], base[cold], new[cold]) if cold.any() else (math.nan,) * 3
    names = ("auc", "auc_se", "auc_p", "cold", "cold_se", "cold_p")
    return json_safe(dict(zip(names, (*overall, *on_cold), strict=True)))


def evaluate(
    user: ArrayLike,
    item_train_rows: ArrayLike,
    label: ArrayLike,
    probabilities: dict[str, NDArray],
    cold_below: int = 5,
) -> dict:
    """Every metric of the report for models that scored the same test rows.

    Args:
        user: [n] any sortable key.
        item_train_rows: [n] integers, training rows of the item of each test row.
        label: [n] 0 or 1.
        probabilities: by model name, [n] floats in [0, 1].
        cold_below: a row is cold where its item has fewer training rows than this.

    Returns:
        {"rows": {"test", "cold"}, "models": {name: {"auc", "log_loss", "gauc", "auc_cold", "log_loss_cold",
        "calibration", "calibration_error"}}, "groups": as `popularity_groups`}, of plain Python values, None for what
        is not defined.
    """
    user, item_train_rows, label = _columns(user, item_train_rows, label)
    cold = item_train_rows < cold_below
    models = {}
    for name, probability in probabilities.items():
        _, probability = _columns(label, probability)
        models[name] = {
            "auc": auc(label, probability),
            "log_loss": log_loss(label, probability),
            "gauc": grouped_auc(user, label, probability),
            "auc_cold": auc(label[cold], probability[cold]) if cold.any() else math.nan,
            "log_loss_cold": log_loss(label[cold], probability[cold]) if cold.any() else math.nan,
            "calibration": (bins := calibration(label, probability)),
            "calibration_error": calibration_error(bins),
        }
    groups = popularity_groups(item_train_rows, label, probabilities)
    return json_safe({"rows": {"test": label.size, "cold": int(cold.sum())}, "models": models, "groups": groups})


def json_safe(value: object) -> object:
    """`value` (nested dicts and lists) with None for every float that JSON has no word for: nan and infinities."""
    if isinstance(value, dict):
        return {key: json_safe(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class StreamingMetrics:
    """AUC and log loss of a stream of batches, in one flat array that merges by addition.

    `state` is float64 [2 * bins + 2]: counts of label 0 by bin, counts of label 1 by bin, the sum of the rows' log
    losses, and the number of rows. Workers all-reduce it by a sum, in place (`torch.from_numpy(metrics.state)` shares
    its memory), after which every one of them reads the same values. Bins are of equal width in the logit, over the
    range that CLIP leaves; rows of one bin count as tied. With 2**16 bins (1 MiB) a bin is 0.0005 wide and AUC is
    within 1e-4 of exact; log loss is exact. A NaN probability makes both nan, on every worker.
    """

    def __init__(self, bins: int = 2**16):
        self.bins = bins
        self.state = np.zeros(2 * bins + 2)

    def update(self, label: ArrayLike, probability: ArrayLike) -> None:
        """Adds a batch: `label` [n] 0 or 1, `probability` [n] floats in [0, 1]; n may be 0."""
        label, probability = np.asarray(label), np.asarray(probability, dtype=np.float64)
        assert label.shape == probability.shape and label.ndim == 1, (label.shape, probability.shape)
        clipped = np.clip(np.nan_to_num(probability, nan=0.5), CLIP, 1 - CLIP)
        logit = np.log(clipped) - np.log1p(-clipped)
        limit = math.log(1 - CLIP) - math.log(CLIP)
        number = np.clip((logit + limit) * (self.bins / (2 * limit)), 0, self.bins - 1).astype(np.int64)
        self.state[:-2] += np.bincount(number + self.bins * (label > 0), minlength=2 * self.bins)
        self.state[-2] += row_losses(label, probability).sum()
        self.state[-1] += label.size

    def merge(self, state: NDArray[np.float64]) -> None:
        """Adds the state of another stream with as many bins."""
        assert state.shape == self.state.shape, (state.shape, self.state.shape)
        self.state += state

    @property
    def rows(self) -> int:
        """Rows seen so far, merged ones included."""
        return int(self.state[-1])

    def auc(self) -> float:
        """Area under the ROC curve, ties in a bin counting half; nan where a class is absent or a probability NaN."""
        negatives, positives = self.state[:-2].reshape(2, self.bins)
        pairs = negatives.sum() * positives.sum()
        if pairs == 0 or math.isnan(self.state[-2]):
            return math.nan
        below = np.cumsum(negatives) - negatives / 2
        return float((positives * below).sum() / pairs)

    def log_loss(self) -> float:
        """Mean negative log likelihood in nats; nan where no row was seen."""
        return float(self.state[-2] / self.state[-1]) if self.state[-1] else math.nan
