"""Ray Tune around the stages: trials some at a time, ASHA between them, one that dies tried again.

A trial's process is a Tune function that runs a day's stages, each of which starts workers of its own. What it reports
is the validation AUC of the served model after each epoch; what becomes of that is the driver's business (`Watch`).
"""

import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol

import ray
from ray import cloudpickle, tune
from ray.data._internal.cluster_autoscaler import get_or_create_autoscaling_coordinator
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ctrdist.storage import Manifest
from ctrdist.trials import Trial
from raycluster import cluster
from raycluster.day import Day, DayOptions, say
from raycluster.planning import TRIAL_CPUS, Plan
from raycluster.sharing import TrialTracker, Turns, shared_day

EPOCH, AUC = "epoch", "valid_auc"
"""What a trial reports after each epoch of the stage that ends in the served model."""

SETTINGS = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # it would stop at Ctrl-C and return as if all were well
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # it would write files of its own beside ours
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths begin elsewhere there
    "RAY_AIR_NEW_OUTPUT": "0",  # that one is never silent
}
"""What Ray Tune is told by the environment."""


@dataclass(frozen=True)
class Work:
    """What every trial's process gets.

    Args:
        train: the stages up to the served model, given day and options.
        options: of each trial, by its name.
        day: that they share, without test days.
        folder: of the state, for all their stages.
        plan: of one trial.
        turns: the `Turns` actor.
    """

    train: Callable[[Day, Any], Any]
    options: dict[str, DayOptions]
    day: Day
    folder: str
    plan: Plan
    turns: Any


class Follower(Protocol):
    """Who is told how the trials go, in the driver's process."""

    def started(self, trial: Trial) -> None:
        """A trial begins, or begins again."""

    def went_on(self, trial: Trial, epoch: int) -> None:
        """It has an AUC of one more epoch in its curve."""

    def ended(self, trial: Trial) -> None:
        """It is over, and says how."""


def run_trials(
    work: Work, trials: list[Trial], scheduler: TrialScheduler, at_once: int, retries: int, follower: Follower
):
    """Train `trials`, so many at once; each has ended when this returns.

    Args:
        retries: how often a trial whose process died is tried again.
    """
    os.environ |= SETTINGS
    # The jobs are no package that every node has.
    cloudpickle.register_pickle_by_value(sys.modules[work.train.__module__])
    state, notes = work.day.state, f"{work.folder}.tune"
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(run_trial, work=work), {"CPU": TRIAL_CPUS}),
        param_space={"trial": tune.grid_search([trial.name for trial in trials])},
        tune_config=tune.TuneConfig(scheduler=scheduler, max_concurrent_trials=at_once),
        run_config=tune.RunConfig(
            name=str(time.time_ns()),
            storage_path=state.path(notes),
            failure_config=tune.FailureConfig(max_failures=retries),
            callbacks=[Watch({trial.name: trial for trial in trials}, work, follower)],
            verbose=0,
        ),
    )
    try:
        tuner.fit()
    finally:
        state.clear(notes)
    assert all(trial.status != "waiting" for trial in trials), [t.name for t in trials if t.status == "waiting"]


def asha(grace: int, reduction: int, epochs: int, past: list[Trial]) -> ASHAScheduler:
    """ASHA on the validation AUC, told how trials went that an earlier try of the sweep has ended.

    Args:
        grace: epochs that every trial gets.
        reduction: of the trials that come to a rung, the best 1 / `reduction` go on.
        epochs: of the longest trial.
    """
    scheduler = ASHAScheduler(
        EPOCH, AUC, "max", max_t=max(epochs, grace), grace_period=grace, reduction_factor=reduction,
        stop_last_trials=False,
    )  # fmt: skip
    for trial in past:
        known = SimpleNamespace(trial_id=trial.name)
        scheduler.on_trial_add(None, known)
        for epoch, auc in sorted(trial.curve.items()):
            last = {EPOCH: epoch, AUC: auc}
            scheduler.on_trial_result(None, known, last)
        scheduler.on_trial_complete(None, known, last)
    return scheduler


def in_full() -> FIFOScheduler:
    """No trial is stopped early."""
    return FIFOScheduler()


def run_trial(config: dict[str, str], work: Work) -> None:
    """A trial, in a process of its own: the stages up to the served model, of which only the AUC is kept."""
    name = config["trial"]
    cluster.connect()

    @contextmanager
    def turn(output: str) -> Iterator[None]:
        ray.get(work.turns.take.remote(output, name))
        try:
            yield
        finally:
            ray.get(work.turns.give_back.remote(name, output))

    tracker = TrialTracker(
        work.options[name].served_stage,
        lambda record: tune.report({EPOCH: round(record["epoch"]), AUC: record["valid_auc"]}),
        lambda line: ray.get(work.turns.say.remote(name, line)),
    )
    try:
        served = train_trial(work, name, tracker, turn)
    except Exception as error:
        wrong = cluster.user_error(error)
        if wrong is None:
            raise
        tune.report({EPOCH: 0, AUC: math.nan, "error": str(wrong)})  # another try would end alike
        return
    curve = served.facts["valid_auc"]
    tune.report({EPOCH: curve[-1][0], AUC: curve[-1][1], "curve": curve})
    work.day.state.remove(served.name)


def train_trial(
    work: Work, name: str, tracker: TrialTracker, turn: Callable[[str], AbstractContextManager]
) -> Manifest:
    """A trial's stages; returns the output with the served model.

    Args:
        turn: as `SharedDay` takes it.
    """
    options = work.options[name]
    day = shared_day(work.day, options, work.folder, work.plan, tracker, turn)
    work.train(day, options)
    return day.stages[options.served_stage]


class Watch(tune.Callback):
    """Follows the trials in the driver's process: notes how they go, and tells it on.

    Args:
        trials: by name.
    """

    def __init__(self, trials: dict[str, Trial], work: Work, follower: Follower) -> None:
        self.trials, self.work, self.follower = trials, work, follower
        self.began: dict[str, float] = {}
        self.listened = 0.0

    def __reduce__(self) -> tuple:
        # Tune writes down what it runs with; this belongs to its process.
        return tune.Callback, ()

    def on_step_end(self, iteration: int, trials: list, **_: Any) -> None:
        """Prints what trials have to say, every other second."""
        if time.monotonic() - self.listened > 2.0:
            self.listen()

    def listen(self) -> None:
        """Prints what trials have said."""
        self.listened = time.monotonic()
        for name, line in ray.get(self.work.turns.listen.remote()):
            say(f"{name:10} {line}")

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **_: Any) -> None:
        """A trial's process begins."""
        ours = self.trials[trial.config["trial"]]
        self.began.setdefault(ours.name, time.monotonic())
        self.follower.started(ours)

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **_: Any) -> None:
        """A trial has come to the end of an epoch, or to its own."""
        ours = self.trials[trial.config["trial"]]
        self.listen()
        if ours.status != "waiting":  # its process died after its last word, and is tried again for nothing
            return
        if "error" in result:
            ours.error = result["error"]
            self.end(ours, "failed")
        elif "curve" in result:
            ours.curve = {epoch: auc for epoch, auc in result["curve"]}
            self.end(ours, "done")
        else:
            ours.curve[result[EPOCH]] = result[AUC]
            self.follower.went_on(ours, result[EPOCH])

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **_: Any) -> None:
        """A trial has ended, or was stopped by the scheduler."""
        ours = self.trials[trial.config["trial"]]
        if ours.status == "waiting":
            epochs = self.work.options[ours.name].ctr.epochs
            self.end(ours, "done" if epochs in ours.curve else "stopped")

    def on_trial_recover(self, iteration: int, trials: list, trial: Any, **_: Any) -> None:
        """A trial's process died, and is started again."""
        ours = self.trials[trial.config["trial"]]
        ray.get(self.work.turns.give_back.remote(ours.name))
        say(f"{ours.name:10} died, and is tried again: {reason(trial)}")

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **_: Any) -> None:
        """A trial's process died, and is given up."""
        ours = self.trials[trial.config["trial"]]
        if ours.status == "waiting":
            ours.error = reason(trial)
            self.end(ours, "failed")

    def end(self, trial: Trial, status: str) -> None:
        """A trial is over."""
        if trial.name not in self.began:  # its process could not even be started
            self.began[trial.name] = time.monotonic()
            self.follower.started(trial)
        trial.seconds = time.monotonic() - self.began[trial.name]
        trial.end(status, keeps_best=self.work.options[trial.name].ctr.patience > 0)
        ray.get(self.work.turns.end.remote(trial.name))
        self.follower.ended(trial)


def reason(trial: Any) -> str:
    """Why a trial of Tune's died, in a line."""
    with contextlib.suppress(Exception):  # what Tune keeps of an error may be gone with its process
        lines = str(trial.get_pickled_error() or trial.get_error()).strip().splitlines()
        return lines[-1].strip() if lines else "its process died"
    return "its process died"


def new_turns() -> Any:
    """The `Turns` actor of a sweep, which ends with it: on the driver's node, since any other may leave."""
    get_or_create_autoscaling_coordinator()  # Ray Data's, which stays with who asks first: that would be a trial
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(Turns).remote()
