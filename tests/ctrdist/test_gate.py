from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from ctrdist.errors import UserError
from ctrdist.gate import GateConfig, Scores, decide

CONFIG = GateConfig(resamples=200)


@pytest.fixture(scope="module")
def world():
    """Test rows of 200 users whose true click probability is known."""
    draw, n = np.random.default_rng(0), 6000
    user = draw.integers(0, 200, n)
    logit = -0.5 + draw.normal(0, 1.5, n)
    label = (draw.random(n) < sigmoid(logit)).astype(np.float32)
    return user, label, logit, draw.normal(0, 1, n)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def of(world, noise: float) -> Scores:
    """A model as good as its noise is small, and about calibrated for any."""
    return Scores(sigmoid((world[2] + noise * world[3]) / (1 + 0.2 * noise**2)))


def judge(world, challenger, champion, config=CONFIG, click_rate=0.4):
    return decide(world[0], world[1], challenger, champion, click_rate, config, seed=3)


def test_a_worse_model_is_refused_with_its_numbers(world):
    better, worse = of(world, 0.5), of(world, 1.0)
    found = judge(world, worse, better)
    assert not found["promoted"] and found["against"] == "champion"
    assert [reason.split(" ")[0] for reason in found["reasons"]] == ["AUC", "log"]
    for side, model in (("challenger", worse), ("champion", better)):
        assert found[side]["auc"] == pytest.approx(roc_auc_score(world[1], model.probability))
        assert found[side]["log_loss"] == pytest.approx(log_loss(world[1], model.probability))
        assert found[side]["calibration_ratio"] == pytest.approx(model.probability.mean() / world[1].mean())
    assert found["auc"]["value"] < 0 < found["log_loss"]["value"]
    assert found["rows"] == 6000 and found["users"] == 200
    assert found == judge(world, worse, better), "by seed"


def test_a_better_one_takes_over_and_so_does_a_tie(world):
    assert judge(world, of(world, 0.5), of(world, 1.0))["promoted"]
    tie = judge(world, of(world, 0.5), of(world, 0.5))
    assert tie["promoted"] and tie["reasons"] == [] and tie["auc"]["value"] == 0
    rounding = Scores(of(world, 0.5).probability - 1e-8)
    assert judge(world, rounding, of(world, 0.5))["promoted"], "a loss that is sure and nothing"
    little = judge(world, of(world, 0.52), of(world, 0.5), replace(CONFIG, significance=0.02))
    few, other = tuple(column[:200] for column in world), tuple([*world[:3], np.roll(world[3], 1)])
    unsure = decide(few[0], few[1], of(tuple(column[:200] for column in other), 0.8), of(few, 0.5), 0.4, CONFIG)
    assert unsure["auc"]["value"] < 0 and not any("worse" in reason for reason in unsure["reasons"])
    assert not little["promoted"], "surely worse, if by little, on many"


def test_the_first_must_beat_the_click_rate(world):
    good = judge(world, of(world, 0.5), None, click_rate=0.41)
    assert good["promoted"] and good["against"] == "click rate" and "champion" not in good
    assert good["constant"]["log_loss"] == pytest.approx(log_loss(world[1], np.full(6000, 0.41)))
    constant = judge(world, Scores(np.full(6000, 0.41)), None, click_rate=0.41)
    assert not constant["promoted"] and "does not significantly beat" in constant["reasons"][0]
    lost = Scores(sigmoid(3 * world[3] - 0.5))
    assert not judge(world, lost, None)["promoted"]


def test_calibration_is_bounded_unless_the_champion_is_as_far_off(world):
    good = of(world, 0.5)
    high = Scores(good.probability**0.5)
    found = judge(world, high, None)
    assert any("--gate.calibration-ratio 1.25" in reason for reason in found["reasons"])
    assert any("--gate.calibration-error 0.05" in reason for reason in found["reasons"])
    low = Scores(good.probability * 0.7)
    assert any("times the click rate" in reason for reason in judge(world, low, high)["reasons"]) is False
    assert any("times the click rate" in reason for reason in judge(world, low, good)["reasons"])
    assert judge(world, high, high)["promoted"]
    few = tuple(column[200:300] for column in world)
    true = decide(few[0], few[1], Scores(sigmoid(few[2])), None, 0.4, CONFIG)
    assert true["challenger"]["calibration_error"] > 0.05 and true["promoted"], "of the rows, which are few"


def test_coverage_may_drop_by_a_little(world):
    good = of(world, 0.5).probability
    champion = Scores(good, known_users=0.8, known_items=1.0)
    assert judge(world, Scores(good, 0.76, 0.96), champion)["promoted"]
    found = judge(world, Scores(good, 0.7, 0.5), champion)
    assert not found["promoted"] and len(found["reasons"]) == 2
    assert "knows 50.0% of the test items, the champion 100.0%" in found["reasons"][1]


def test_scores_that_are_not_finite_are_no_scores(world):
    good, broken = of(world, 0.5), of(world, 0.5).probability.copy()
    broken[:3] = np.nan
    found = judge(world, Scores(broken), good)
    assert found["reasons"] == ["3 of its 6,000 scores are not finite"] and not found["promoted"]
    found = judge(world, good, Scores(broken))
    assert found["promoted"] and found["against"] == "click rate", "a champion that gives no scores defends nothing"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"significance": 0.0}, "--gate.significance 0.0"),
        ({"resamples": 10}, "--gate.resamples 10: at least 40"),
        ({"calibration_ratio": 0.9}, "--gate.calibration-ratio 0.9: at least 1"),
        ({"coverage_drop": 2.0}, "--gate.coverage-drop 2.0: 0 to 1"),
    ],
)
def test_bounds_out_of_range_are_refused(change, match):
    with pytest.raises(UserError, match=match):
        replace(CONFIG, **change).check()
