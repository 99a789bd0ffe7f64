"""Waiting for nodes, with a clock and a cluster of our own in place of Ray's."""

from types import SimpleNamespace

import pytest

from raycluster import autoscaler
from raycluster.autoscaler import wait_for

WANTED = [{"CPU": 1}] * 16 + [{"GPU": 1, "train": 1}] * 2
DATA, TRAIN = {"CPU": 16}, {"CPU": 8, "GPU": 2, "train": 2}


class Growing:
    """A cluster whose autoscaler brings `nodes`, each so many seconds after it was first asked. It looks every 15
    seconds at what is asked, which somebody else takes back every 20, as Ray Data's coordinator does."""

    def __init__(self, nodes: list[tuple[float, dict[str, int]]]) -> None:
        self.nodes, self.now, self.asked_at, self.requests, self.wanted = nodes, 100.0, None, [], []

    def request(self, bundles: list[dict]) -> None:
        self.requests.append(bundles)
        self.wanted = bundles

    def alive(self) -> list[dict]:
        """What `ray.nodes` says: a head without CPUs, a node that has died, and what has come."""
        come = [node for after, node in self.nodes if self.asked_at is not None and self.now - 100 >= after]
        dead = {"Alive": False, "Resources": {"CPU": 64, "GPU": 8, "train": 8}}
        return [dead, *({"Alive": True, "Resources": resources} for resources in [{"memory": 1.0}, *come])]

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.now % 15 == 0:
            self.asked_at = self.now if self.wanted else None
        if self.now % 20 == 0:
            self.wanted = []


@pytest.fixture
def growing(monkeypatch):
    """`growing(nodes)`: a `Growing` in place of Ray."""

    def put(*nodes: tuple[float, dict[str, int]]) -> Growing:
        made = Growing(list(nodes))
        monkeypatch.setattr("ray.nodes", made.alive)
        monkeypatch.setattr("ray.autoscaler.sdk.request_resources", made.request)
        monkeypatch.setattr(autoscaler, "time", SimpleNamespace(monotonic=lambda: made.now, sleep=made.sleep))
        return made

    return put


def test_an_idle_cluster_is_asked_once_and_waited_for(growing, capsys):
    cluster = growing((60, DATA), (200, TRAIN))
    assert wait_for(WANTED, 600) == ""
    assert cluster.now - 100 == 200
    *asked, last = cluster.requests
    assert len(asked) == 40 and all(one == WANTED for one in asked), "asked as long as it waits"
    assert last == [], "and the request is taken back"
    assert capsys.readouterr().out == (
        "waiting at most 10.0 minutes for 16 CPU, 2 GPU, 2 train\nwaiting at most 9.0 minutes for 2 GPU, 2 train\n"
    )


def test_after_the_time_it_says_what_has_not_come(growing):
    cluster = growing((60, DATA), (700, TRAIN))
    assert wait_for(WANTED, 600) == "2 GPU, 2 train"
    assert cluster.now - 100 == 600 and cluster.requests[-1] == []


def test_places_are_counted_on_each_node(growing):
    """Three nodes of 2 CPUs have 6, and places for three workers of 1.5, not for four; 0.1 goes 20 times into 2."""
    cluster = growing(*[(0, {"CPU": 2})] * 3)
    cluster.asked_at = 0
    assert wait_for([{"CPU": 1.5}] * 3, 0) == ""
    assert wait_for([{"CPU": 1.5}] * 5, 0) == "3 CPU"
    assert wait_for([{"CPU": 0.1}] * 60, 0) == "" and wait_for([{"CPU": 0.1}] * 61, 0) == "0.1 CPU"


def test_without_time_to_wait_nothing_is_left_asked(growing):
    cluster = growing((60, DATA))
    assert wait_for(WANTED, 0) == "16 CPU, 2 GPU, 2 train"
    assert cluster.requests == [WANTED, []] and cluster.now == 100


def test_nothing_is_asked_where_all_is_there(growing, capsys):
    cluster = growing((0, DATA))
    cluster.asked_at = 0
    assert wait_for([{"CPU": 1}] * 16, 600) == wait_for([], 600) == ""
    assert not cluster.requests and not capsys.readouterr().out


def test_a_request_does_not_outlive_who_waits(growing, monkeypatch):
    cluster = growing((60, DATA))

    def interrupted(_seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(autoscaler.time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        wait_for(WANTED, 600)
    assert cluster.requests == [WANTED, []]
