import json
import math

import numpy as np
import pytest
from sklearn.metrics import log_loss as sklearn_log_loss
from sklearn.metrics import roc_auc_score

from ctrdist import metrics


@pytest.fixture
def rows():
    """Test rows of a made world: scores with ties, two models of which "b" knows more."""
    draw = np.random.default_rng(0)
    n = 4000
    logit = draw.normal(-1, 1, n)
    label = (draw.random(n) < 1 / (1 + np.exp(-logit))).astype(np.int64)
    return {
        "user": draw.integers(0, 300, n),
        "trained": np.floor(draw.exponential(60, n)).astype(np.int64),
        "label": label,
        "a": np.round(1 / (1 + np.exp(-logit - draw.normal(0, 1.5, n))), 2),
        "b": (1 / (1 + np.exp(-logit - draw.normal(0, 1.2, n)))).astype(np.float32),
    }


@pytest.mark.parametrize("model", ["a", "b"])
def test_auc_and_log_loss_equal_sklearn(rows, model):
    expected = roc_auc_score(rows["label"], rows[model])
    assert metrics.auc(rows["label"], rows[model]) == pytest.approx(expected, abs=1e-12)
    clipped = np.clip(rows[model].astype(np.float64), metrics.CLIP, 1 - metrics.CLIP)
    expected = sklearn_log_loss(rows["label"], clipped)
    assert metrics.log_loss(rows["label"], rows[model]) == pytest.approx(expected, abs=1e-12)


def test_what_rows_do_not_define_is_nan():
    assert math.isnan(metrics.auc([1, 1], [0.2, 0.3]))
    assert math.isnan(metrics.auc([0, 1], [0.2, math.nan]))
    assert math.isnan(metrics.grouped_auc([1, 2], [0, 1], [0.2, 0.3]))
    assert metrics.auc([0, 1], [0.5, 0.5]) == 0.5
    assert metrics.log_loss([1], [0.0]) == pytest.approx(-math.log(metrics.CLIP))


@pytest.mark.parametrize("kind", [np.int64, np.str_])
def test_grouped_auc_equals_brute_force(rows, kind):
    total = weight = 0.0
    for user in np.unique(rows["user"]):
        mine = rows["user"] == user
        if 0 < rows["label"][mine].sum() < mine.sum():
            total += mine.sum() * roc_auc_score(rows["label"][mine], rows["a"][mine])
            weight += mine.sum()
    ours = metrics.grouped_auc(rows["user"].astype(kind), rows["label"], rows["a"])
    assert ours == pytest.approx(total / weight, abs=1e-12)


def test_calibration_bins_hold_every_row_once(rows):
    bins = metrics.calibration(rows["label"], rows["b"], bins=7)
    counts = [entry["rows"] for entry in bins]
    assert sum(counts) == 4000 and max(counts) - min(counts) <= 1
    assert np.average([b["observed"] for b in bins], weights=counts) == pytest.approx(rows["label"].mean())
    assert np.average([b["predicted"] for b in bins], weights=counts) == pytest.approx(rows["b"].mean(), rel=1e-5)
    assert [b["predicted"] for b in bins] == sorted(b["predicted"] for b in bins)
    assert len(metrics.calibration([0, 1], [0.1, 0.2])) == 2


def test_calibration_error_is_the_mean_distance_over_the_rows(rows):
    order = np.argsort(rows["b"], kind="stable")
    distance = 0.0
    for part in np.array_split(order, 10):
        distance += abs(rows["b"][part].mean(dtype=np.float64) - rows["label"][part].mean()) * len(part)
    found = metrics.calibration_error(metrics.calibration(rows["label"], rows["b"]))
    assert found == pytest.approx(distance / 4000, abs=1e-12)
    half = metrics.calibration(np.tile([0, 1], 50), np.full(100, 0.5), bins=5)
    assert metrics.calibration_error(half) == 0


def test_popularity_groups_at_their_edges(rows):
    trained = np.array([0, 1, 4, 5, 9, 10, 29, 30, 99, 100, 299, 300, 10**6])
    groups = metrics.popularity_groups(trained, np.ones(13), {"a": np.ones(13)})
    assert [(g["group"], g["rows"]) for g in groups] == [
        ("0", 1), ("1-4", 2), ("5-9", 2), ("10-29", 2), ("30-99", 2), ("100-299", 2), ("300+", 2)
    ]  # fmt: skip
    groups = metrics.popularity_groups(rows["trained"], rows["label"], {"a": rows["a"]})
    inside = (rows["trained"] >= 10) & (rows["trained"] < 30)
    assert groups[3]["auc"]["a"] == pytest.approx(roc_auc_score(rows["label"][inside], rows["a"][inside]))
    assert groups[3]["positives"] == rows["label"][inside].sum()
    assert sum(g["rows"] for g in groups) == 4000


def test_delong_agrees_with_a_bootstrap(rows):
    label, a, b = rows["label"][:1500], rows["a"][:1500], rows["b"][:1500]
    difference, error, p = metrics.paired_auc_difference(label, a, b)
    assert difference == pytest.approx(roc_auc_score(label, b) - roc_auc_score(label, a))
    draw = np.random.default_rng(1)
    samples = draw.integers(0, 1500, (1000, 1500))
    resampled = [metrics.auc(label[s], b[s]) - metrics.auc(label[s], a[s]) for s in samples]
    assert error == pytest.approx(np.std(resampled), rel=0.1)
    assert p == pytest.approx(2 * np.mean(np.array(resampled) < 0), abs=0.03)


def test_delong_p_values_are_uniform_when_models_are_equally_good():
    draw = np.random.default_rng(2)
    label = (draw.random((400, 300)) < 0.3).astype(int)
    noise = label[:, None] + draw.normal(0, 1, (400, 2, 300))
    p = np.array([metrics.paired_auc_difference(y, *s)[2] for y, s in zip(label, noise, strict=True)])
    assert abs((p < 0.05).mean() - 0.05) < 0.03 and abs(p.mean() - 0.5) < 0.05


def test_delong_of_a_model_with_itself(rows):
    assert metrics.paired_auc_difference(rows["label"], rows["a"], rows["a"] * 2) == (0.0, 0.0, 1.0)
    assert all(map(math.isnan, metrics.paired_auc_difference([1, 1], [1, 2], [2, 1])))


def test_evaluate_is_json_and_names_cold_rows(rows):
    result = metrics.evaluate(rows["user"], rows["trained"], rows["label"], {"id": rows["a"], "cela": rows["b"]})
    cold = rows["trained"] < 5
    assert result["rows"] == {"test": 4000, "cold": cold.sum()}
    assert result["models"]["id"]["auc_cold"] == pytest.approx(roc_auc_score(rows["label"][cold], rows["a"][cold]))
    assert result["models"]["cela"]["log_loss_cold"] == pytest.approx(metrics.log_loss(*(
        rows[k][cold] for k in ("label", "b"))))  # fmt: skip
    gain = metrics.gain(rows["trained"], rows["label"], rows["a"], rows["b"])
    assert gain["auc"] == pytest.approx(result["models"]["cela"]["auc"] - result["models"]["id"]["auc"])
    assert gain["cold_se"] > gain["auc_se"]
    assert json.loads(json.dumps([result, gain], allow_nan=False)) == [result, gain]


def test_evaluate_without_cold_rows_says_none():
    result = metrics.evaluate([1, 1], [7, 7], [0, 1], {"id": np.array([0.1, 0.2])})
    assert result["models"]["id"]["auc"] == 1.0
    assert result["models"]["id"]["auc_cold"] is None and result["groups"][0]["auc"]["id"] is None
    assert metrics.gain([7, 7], [0, 1], [0.1, 0.2], [0.1, 0.2])["cold"] is None


@pytest.mark.parametrize("scale", [0.05, 1.0, 30.0])
def test_streaming_is_close_to_exact_and_merges(scale):
    draw = np.random.default_rng(3)
    logit = draw.normal(-3, 1, 50_000) * scale
    probability = 1 / (1 + np.exp(-logit))
    label = draw.random(50_000) < 1 / (1 + np.exp(-logit / scale))
    workers = [metrics.StreamingMetrics(), metrics.StreamingMetrics()]
    for number, part in enumerate(np.array_split(np.arange(50_000), 9)):
        workers[number % 2].update(label[part], probability[part])
    workers[0].update(np.zeros(0), np.zeros(0))
    workers[0].merge(workers[1].state)
    whole = metrics.StreamingMetrics()
    whole.update(label, probability)
    np.testing.assert_allclose(workers[0].state, whole.state)
    clipped = np.clip(probability, metrics.CLIP, 1 - metrics.CLIP)
    assert abs(whole.auc() - metrics.auc(label, clipped)) < 1e-4
    assert whole.log_loss() == pytest.approx(metrics.log_loss(label, probability))
    assert workers[0].rows == 50_000


def test_streaming_of_nothing_and_of_nan():
    stream = metrics.StreamingMetrics(bins=64)
    assert math.isnan(stream.auc()) and math.isnan(stream.log_loss())
    stream.update([0, 1], [0.0, 1.0])
    assert stream.auc() == 1.0
    stream.update([1], [math.nan])
    assert math.isnan(stream.auc()) and math.isnan(stream.log_loss())


def test_the_tail_is_a_tenth_and_those_with_as_few():
    assert metrics.tail_edge([0, 0, 5, 4, 3, 9, 8, 7, 6, 5, 5, 9]) == 3
    assert metrics.tail_edge([2] * 8 + [1, 3]) == 1
    assert metrics.tail_edge([2] * 9 + [3] * 3) == 2
    assert metrics.tail_edge([0, 0]) == metrics.tail_edge([]) == 0


def test_quadrants_part_the_rows_by_user_and_item(rows):
    draw = np.random.default_rng(1)
    users, items = draw.integers(0, 6, 4000), draw.integers(0, 9, 4000)
    scores = {"a": rows["a"], "b": rows["b"]}
    found = metrics.quadrants(users, items, (2, 1), rows["label"], scores)
    assert [(part["users"], part["items"]) for part in found] == [
        ("tail", "tail"), ("tail", "head"), ("head", "tail"), ("head", "head")
    ]  # fmt: skip
    assert sum(part["rows"] for part in found) == 4000
    mine = (users > 2) & (items <= 1)
    assert found[2]["rows"] == mine.sum() and found[2]["positives"] == rows["label"][mine].sum()
    assert found[2]["auc"]["b"] == pytest.approx(roc_auc_score(rows["label"][mine], rows["b"][mine]))
    assert found[2]["log_loss"]["b"] == pytest.approx(sklearn_log_loss(rows["label"][mine], rows["b"][mine]))
    none = metrics.quadrants(users, items, (9, 9), rows["label"], scores)[3]
    assert none["rows"] == 0 and none["auc"] == none["log_loss"] == {"a": None, "b": None}
