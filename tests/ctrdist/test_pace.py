"""When progress is said."""

from itertools import pairwise

from ctrdist.pace import Pace


def test_lines_come_ever_more_seldom_but_never_later_than_the_most():
    pace = Pace()
    said = [second for second in range(8 * 3600) if pace.due(pace.began + second)]
    assert said[:7] == [10, 20, 30, 45, 68, 102, 153]
    assert max(after - before for before, after in pairwise(said)) == 600
    assert len(said) < 65, "eight hours"


def test_it_starts_at_the_present(monkeypatch):
    monkeypatch.setattr("time.time", lambda: 1000.0)
    pace = Pace(least=5.0)
    assert not pace.due(1004.9) and pace.due(1005.0) and not pace.due(1005.1)
