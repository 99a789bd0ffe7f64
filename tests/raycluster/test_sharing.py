"""Trials that share stages: one makes an output while the others wait, and what a trial tells reaches the driver."""

import asyncio
import threading
import time
from collections import defaultdict
from pathlib import Path

from ctrdist.storage import Manifest, State
from raycluster.planning import Plan
from raycluster.sharing import SharedDay, TrialTracker, Turns


def test_one_trial_at_a_time_makes_an_output():
    async def trials() -> list[str]:
        turns, order = Turns(), []

        async def make(trial: str, output: str, seconds: float) -> None:
            await turns.take(output, trial)
            order.append(f"{trial} begins {output}")
            await asyncio.sleep(seconds)
            order.append(f"{trial} ends {output}")
            await turns.give_back(trial, output)

        await asyncio.wait_for(asyncio.gather(make("a", "x", 0.05), make("b", "x", 0.0), make("c", "y", 0.0)), 5)
        return order

    order = asyncio.run(trials())
    assert order.index("a ends x") < order.index("b begins x")
    assert order.index("c ends y") < order.index("a ends x")


def test_a_trial_that_died_holds_nothing():
    async def trials() -> None:
        turns = Turns()
        await turns.take("x", "a")
        await turns.take("y", "a")
        await turns.take("x", "a")  # tried again, it may go on with what it held
        waiting = asyncio.ensure_future(turns.take("x", "b"))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        await turns.give_back("c")
        assert not waiting.done()
        await turns.give_back("a")
        await asyncio.wait_for(waiting, 5)
        assert turns.held == {"x": "b"}

    asyncio.run(trials())


def test_a_trial_that_died_while_it_waited_gets_nothing_once_it_is_given_up():
    async def trials() -> None:
        turns = Turns()
        await turns.take("x", "a")
        ghost = asyncio.ensure_future(turns.take("x", "b"))  # a call of a process that has died is not cancelled
        await asyncio.sleep(0.01)
        await turns.end("b")
        await turns.end("a")
        await asyncio.wait_for(ghost, 5)
        await asyncio.wait_for(turns.take("x", "c"), 5)
        assert turns.held == {"x": "c"}

    asyncio.run(trials())


def test_trials_that_want_a_stage_at_once_make_it_once_and_others_side_by_side(tmp_path: Path):
    """Four trials, two of each set of values, all at the same stage at the same time."""
    state, made, together = State(tmp_path), [], threading.Barrier(2, timeout=10)
    locks: dict[str, threading.Lock] = defaultdict(threading.Lock)

    def make(name: str, inputs: str, _metrics: str) -> Manifest:
        made.append(name)
        together.wait()  # those of other values are under way meanwhile
        time.sleep(0.1)
        with state.create(name, inputs, {"rows": 1}):
            pass
        return state.find(name)

    def trial(inputs: str, found: list[Manifest]) -> None:
        tracker = TrialTracker("mf2", lambda _: None, lambda _: None)
        day = SharedDay(None, None, {}, None, state, None, plan=Plan(1, 0, 1.0, 1), tracker=tracker,
                        folder="sweeps/s/stages", turn=lambda output: locks[output])  # fmt: skip
        found.append(day.stage("dap", inputs, make))

    found: list[Manifest] = []
    trials = [threading.Thread(target=trial, args=(inputs, found)) for inputs in ("a", "a", "b", "b")]
    for one in trials:
        one.start()
    for one in trials:
        one.join()
    assert sorted(made) == ["sweeps/s/stages/dap-a", "sweeps/s/stages/dap-b"]
    assert sorted(manifest.name for manifest in found) == sorted(2 * made)


def test_what_is_said_is_heard_once():
    async def talk() -> list:
        turns = Turns()
        await turns.say("a", "dap ...")
        await turns.say("b", "id ...")
        return [await turns.listen(), await turns.listen()]

    assert asyncio.run(talk()) == [[("a", "dap ..."), ("b", "id ...")], []]


def test_only_the_served_model_is_reported():
    reported, said = [], []
    tracker = TrialTracker("mf2", reported.append, said.append)
    with tracker.run("id", "", tags={}) as run:
        tracker.log_records(run, [{"step": 1, "valid_auc": 0.6}])
    with tracker.run("mf2", "", tags={}) as run:
        tracker.log_records(run, [{"step": 1, "loss": 0.7}, {"step": 2, "valid_auc": 0.8}])
        tracker.log_metrics(run, {"rows": 3})
    assert reported == [{"step": 2, "valid_auc": 0.8}]
    assert said[0] == "id ..." and said[2] == "mf2 ..." and len(said) == 4


def test_a_long_stage_says_now_and_then_how_far_it_is():
    said = []
    tracker = TrialTracker("mf2", lambda _: None, said.append, every=0.0)
    tracker.log_records("dap", [{"step": n, "steps": 40, "loss": 1 / n} for n in (1, 2)])
    assert said == ["dap step 2 of 40, loss 0.5000"]
    tracker.every = 60.0
    tracker.log_records("dap", [{"step": 3, "steps": 40, "loss": 0.1}])
    assert len(said) == 1
