"""Stages that many trials share: each is named by what it is made from, and made by one while the others wait."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from raycluster.day import Day, DayOptions
from raycluster.planning import Plan


class Turns:
    """An actor that lets one trial at a time make an output, and keeps what trials have to say for the driver."""

    def __init__(self) -> None:
        self.held: dict[str, str] = {}
        self.over: set[str] = set()
        self.freed = asyncio.Condition()
        self.said: list[tuple[str, str]] = []

    async def take(self, output: str, trial: str) -> None:
        """Returns when nobody else makes the output; from then on this trial does, unless it is over."""
        async with self.freed:
            await self.freed.wait_for(lambda: trial in self.over or self.held.get(output, trial) == trial)
            if trial not in self.over:
                self.held[output] = trial

    async def give_back(self, trial: str, output: str = "") -> None:
        """Lets others make the output; without one, all that this trial, whose process has died, held."""
        async with self.freed:
            self.held = {o: t for o, t in self.held.items() if t != trial or output not in ("", o)}
            self.freed.notify_all()

    async def end(self, trial: str) -> None:
        """A trial is over: it gives back all, and what its process, if that died, still waits for is not for it."""
        self.over.add(trial)
        await self.give_back(trial)

    async def say(self, trial: str, line: str) -> None:
        """Keep a line for the driver."""
        self.said.append((trial, line))

    async def listen(self) -> list[tuple[str, str]]:
        """What was said since the last time: trial and line."""
        said, self.said = self.said, []
        return said


class TrialTracker:
    """Takes the place of a day's tracker in a trial, which does not write to MLflow: the driver alone does.

    Args:
        served: the stage that ends in the model that is served.
        report: gets each of that stage's records with a validation AUC.
        say: gets lines about each stage that is made.
        every: seconds between two of them while it trains.
    """

    uri = "the driver"

    def __init__(
        self, served: str, report: Callable[[dict], None], say: Callable[[str], None], every: float = 60.0
    ) -> None:
        self.served, self.report, self.say, self.every = served, report, say, every
        self.said = time.monotonic()

    @contextmanager
    def run(self, stage: str, _parent: str | None = None, tags: dict[str, str] | None = None, **_: Any) -> Iterator:
        """A stage that is made now."""
        began = self.said = time.monotonic()
        self.say(f"{stage} ...")
        yield stage
        self.say(f"{stage} took {time.monotonic() - began:.0f} s")

    def log_records(self, stage: str, records: list[dict]) -> None:
        """Hands on what the served model's validation gave, and says now and then how far a stage is."""
        for record in records:
            if stage == self.served and "valid_auc" in record:
                self.report(record)
        steps = [record for record in records if {"loss", "steps"} <= set(record)]
        if steps and time.monotonic() - self.said > self.every:
            self.said, last = time.monotonic(), steps[-1]
            self.say(f"{stage} step {last['step']:,.0f} of {last['steps']:,.0f}, loss {last['loss']:.4f}")

    def log_metrics(self, *_: Any) -> None:
        """A stage's facts stand in its manifest."""


@dataclass
class SharedDay(Day):
    """A day whose stages lie in one folder for all trials of a sweep, named by the fingerprint of their inputs.

    What a trial's values do not change has the same name in all of them, and is there after the first.

    Args:
        folder: of the state, for the outputs of all stages.
        turn: of an output's name, a block that no other trial is in at the same time.
    """

    folder: str = ""
    turn: Callable[[str], AbstractContextManager] = nullcontext

    def name(self, stage: str, inputs: str = "") -> str:
        """Name of the output of a stage that is made from `inputs`."""
        assert inputs, stage
        return f"{self.folder}/{stage}-{inputs}"

    def alone(self, output: str) -> AbstractContextManager:
        """A block that no other trial that may make the same output is in."""
        return self.turn(output)


def shared_day(
    day: Day,
    options: DayOptions,
    folder: str,
    plan: Plan,
    tracker: TrialTracker,
    turn: Callable[[str], AbstractContextManager] = nullcontext,
) -> SharedDay:
    """A trial's day: that of the sweep, with the trial's options.

    Args:
        day: opened without test days.
    """
    assert not day.window.test and day.previous is None
    return SharedDay(
        options, day.schema, day.files, day.window, day.state, None, plan=plan, tracker=tracker,
        _groups=day._groups, folder=folder, turn=turn,
    )  # fmt: skip
