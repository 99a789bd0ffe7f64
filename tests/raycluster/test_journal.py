import json
import threading
import time

import pytest

from raycluster import journal
from raycluster.journal import Journal


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(journal, "FIRST_DELAY", 0.01)
    monkeypatch.setattr(journal, "BATCH", 3)


class Taker:
    """Takes records, but for as long as it is away."""

    def __init__(self, away=False):
        self.away, self.taken, self.tries = away, [], 0

    def __call__(self, records):
        self.tries += 1
        if self.away:
            raise ConnectionError("away")
        self.taken += [record["n"] for record in records]


def append(mine, *numbers):
    for n in numbers:
        mine.append({"n": n})


def test_records_arrive_in_order_and_the_file_goes(tmp_path):
    taker = Taker()
    mine = Journal(tmp_path / "tracking", taker)
    append(mine, *range(10))
    assert mine.path.exists() and mine.flush(10) == 0
    append(mine, 10)
    assert mine.close(10) == 0 and taker.taken == list(range(11))
    assert list((tmp_path / "tracking").iterdir()) == []


def test_a_taker_that_is_away_holds_nobody_up_and_misses_nothing(tmp_path, caplog):
    taker = Taker(away=True)
    mine = Journal(tmp_path, taker)
    began = time.monotonic()
    append(mine, *range(1000))
    assert time.monotonic() - began < 2 and mine.waiting == 1000
    assert mine.flush(0.1) == 1000 and taker.tries > 1
    taker.away = False
    assert mine.flush(10) == 0 and taker.taken == list(range(1000))
    assert caplog.text.count("records wait in") == 1
    assert mine.close(1) == 0


def test_what_a_process_leaves_the_next_one_delivers_first(tmp_path):
    first = Journal(tmp_path, Taker(away=True))
    append(first, 1, 2)
    first.files.mkdir()
    (first.files / "plot.svg").write_text("<svg>")
    assert first.close(0.05) == 2
    with first.path.open("ab") as file:
        file.write(b'{"n": 3')  # it died in the middle of a line
    second = Journal(tmp_path, Taker(away=True))
    append(second, 4)
    assert second.waiting == 3 and second.close(0.05) == 3

    taker = Taker()
    third = Journal(tmp_path, taker)
    append(third, 5)
    assert third.close(10) == 0 and taker.taken == [1, 2, 4, 5]
    assert list(tmp_path.iterdir()) == []


def test_the_file_of_a_living_process_is_its_own(tmp_path):
    held, taker = Journal(tmp_path, Taker(away=True)), Taker()
    append(held, 1)
    other = Journal(tmp_path, taker)
    append(other, 2)
    assert other.close(10) == 0 and taker.taken == [2] and held.path.exists()
    assert [json.loads(line) for line in held.path.open()] == [{"n": 1}]
    held.close(0)


def test_a_taker_that_hangs_is_not_waited_for(tmp_path):
    free = threading.Event()
    mine = Journal(tmp_path, lambda records: free.wait(30))
    append(mine, 1)
    began = time.monotonic()
    assert mine.close(0.1) == 1 and time.monotonic() - began < 5 and mine.path.exists()
    free.set()
