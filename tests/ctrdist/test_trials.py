"""How trials went: their order, their spread, and what is left of them."""

import json
import statistics

import pytest

from ctrdist.space import Dimension
from ctrdist.trials import Trial, at_the_edge, rank

SPACE = [Dimension("a.rate", "loguniform", (0.01, 10.0)), Dimension("a.kind", "choice", ("x", "y"))]


def trial(number: int, auc: float | None, status: str = "done", repeat: int = 0) -> Trial:
    values = {"a.rate": 0.1 * (number + 1), "a.kind": "x"}
    curve = {} if auc is None else {1: auc - 0.1, 2: auc}
    return Trial(number, values, repeat, repeat, status, curve, auc)


def test_the_best_come_first_by_their_other_seeds_and_then_by_the_search():
    trials = [trial(0, 0.70), trial(1, 0.75), trial(2, 0.74), trial(3, 0.9, "stopped"), trial(4, None, "failed")]
    assert [s.trial.number for s in rank(trials)] == [1, 2, 0, 3]
    trials += [trial(1, 0.71, repeat=1), trial(1, 0.72, repeat=2), trial(2, 0.73, repeat=1), trial(2, 0.74, repeat=2)]
    trials += [trial(2, None, "failed", repeat=3)]
    standings = rank(trials)
    assert [s.trial.number for s in standings] == [2, 1, 0, 3]
    assert standings[0].mean == pytest.approx(0.735) and standings[0].repeats == [0.73, 0.74]
    assert standings[0].spread == pytest.approx(statistics.stdev([0.73, 0.74]))
    assert standings[2].spread is None and standings[2].mean == 0.70


def test_the_auc_is_that_of_the_weights_that_are_kept():
    one, best = (Trial(0, {}, 0, curve={1: 0.6, 2: 0.8, 3: 0.7}) for _ in range(2))
    one.end("done", keeps_best=False)
    best.end("done", keeps_best=True)
    assert (one.auc, best.auc) == (0.7, 0.8) and one.ended


def test_a_trial_without_an_auc_has_failed():
    none, nan = Trial(0, {}, 0), Trial(1, {}, 0, curve={1: float("nan")})
    for one in (none, nan):
        one.end("done", keeps_best=False)
        assert one.status == "failed" and "one label" in one.error and not one.ended
    assert rank([none, nan]) == []


def test_a_trial_is_kept_as_json():
    one = trial(3, 0.8, "stopped", repeat=1)
    assert Trial.of(json.loads(json.dumps(one.facts()))) == one
    assert one.name == "trial 3 seed 1" and trial(3, 0.8).name == "trial 3"


def test_the_best_at_an_edge_is_told():
    warnings = at_the_edge(SPACE, {"a.rate": 9.8, "a.kind": "y"})
    assert len(warnings) == 1
    assert warnings[0].startswith("a.rate 9.8 lies at the upper edge of its range (a.rate=loguniform(0.01,10.0))")
    assert at_the_edge(SPACE, {"a.rate": 1.0, "a.kind": "x"}) == []
