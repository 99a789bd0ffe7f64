"""A sweep: a search over a space, its finalists trained again with other seeds, and what is left of it.

Each trial is the daily job's own stages up to the model that is served, from scratch and without the test days, judged
by its validation rows. Stages that a trial's values do not change are made once (`raycluster.sharing`). How a trial
went is kept in the state when it ends, so that a sweep that was killed goes on.
"""

import json
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ray.tune.schedulers import TrialScheduler

from ctrdist.config import to_dict
from ctrdist.errors import UserError
from ctrdist.log import file_facts
from ctrdist.space import Dimension, draw, override, parse_space, value_of
from ctrdist.storage import fingerprint
from ctrdist.sweep_report import BEST, PAGE, best_options, sweep_page, sweep_table
from ctrdist.trials import Trial, at_the_edge, rank, shown
from raycluster import cluster, planning, tuner
from raycluster.code_version import code_version
from raycluster.day import Day, DayOptions, close_tracker, open_day, say
from raycluster.tracking import Tracker


@dataclass(frozen=True)
class SweepOptions:
    """How a sweep searches.

    Args:
        name: of its folder in the state and of its run in MLflow; METHOD-DATE if not given.
        trials: sets of values, the first of which is the options' own.
        finalists: how many of the best are trained again with other seeds, and the options' own values with them, to
            compare with; 0 takes the best of the search as it is.
        seeds: other seeds that each finalist is trained with.
        at_once: trials at a time; 0 takes as many as the cluster has room for.
        grace: epochs that every trial is trained for.
        reduction: of the trials that come to an epoch where they are compared, the best 1 / `reduction` go on; these
            epochs are `grace` times its powers.
        retries: how often a trial whose process died is tried again before it is marked as failed.
        keep_stages: leave the trials' stages in the state when the sweep is complete.
    """

    name: str = ""
    trials: int = 20
    finalists: int = 3
    seeds: int = 3
    at_once: int = 0
    grace: int = 1
    reduction: int = 3
    retries: int = 2
    keep_stages: bool = False

    def check(self) -> None:
        """Raise a UserError for a number out of range."""
        least = {"trials": 1, "finalists": 0, "seeds": 1, "at_once": 0, "grace": 1, "reduction": 2, "retries": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise UserError(f"--sweep.{name.replace('_', '-')} {getattr(self, name)}: {low} or more")
        if not re.fullmatch(r"[\w.-]*", self.name):
            raise UserError(f"--sweep.name {self.name}: names a folder; letters, digits, - . and _ only")


@dataclass(frozen=True)
class Method:
    """What is swept.

    Args:
        name: for people.
        train: the stages of a day up to the served model, given day and options, whose `ctr.epochs` are that model's.
        spaces: the papers' spaces by name; all of them are swept where no space is given.
    """

    name: str
    train: Callable[[Day, Any], Any]
    spaces: dict[str, str]


def sweep(method: Method, base: Any, options: SweepOptions, spaces: tuple[str, ...] = ()) -> None:
    """Search, train the finalists again, and write table, plots and the best options; goes on where it was.

    Args:
        base: the daily job's options; what is in no space stays as they say.
        spaces: as `ctrdist.space.parse_space` takes them.

    Raises:
        UserError: what is wrong with options, spaces, data or state; or no trial could be trained.
    """
    options.check()
    base = replace(base, from_scratch=True)
    space = parse_space(spaces, method.spaces, base, {f.name for f in fields(DayOptions)})
    for dimension in space:
        for value in dimension.ends:
            override(base, {dimension.field: value}).check()
    day = open_day(base, test=False)
    base = day.options
    groups = day.groups(day.window.train + day.window.valid)
    data = fingerprint(day.schema.fingerprint, file_facts(base.data, [g.path for g in groups]), day.window)
    name = options.name or f"{method.name}-{day.date}"
    day.claim_state()
    tracker = Tracker.open(base.tracking_uri, day.state.uri, base.experiment)
    params = base.shown() | {"space": [str(dimension) for dimension in space], "sweep": to_dict(options)}
    try:
        searched = {"space": "; ".join(map(str, space)), "asha": f"{options.grace}, {options.reduction}"}
        check_name(day, name, searched)
        with tracker.run(f"sweep {name}", params=params, tags={"sweep": name, "data": data} | searched) as run_id:
            tracker.set_tags(run_id, {"code": code_version(), "schema": day.schema.fingerprint})
            run = Sweep(method, base, options, space, day, data, name, tracker, run_id, searched)
            try:
                run.search()
                run.repeat()
                run.finish()
            finally:
                run.end_open()
    finally:
        close_tracker(tracker)


def check_name(day: Day, name: str, searched: dict[str, str]) -> None:
    """Raise a UserError if a sweep of this name is complete that searched otherwise: its files would be replaced."""
    known = day.state.find(f"sweeps/{name}/result")
    before = known.facts.get("searched", searched) if known else searched
    if before != searched:
        was = ", ".join(f"{key} {before[key]}" for key in before if before[key] != searched[key])
        raise UserError(f"sweep {name} is complete, with {was}: give this one another name (--sweep.name)")


@dataclass
class Sweep:
    """A sweep under way; follows its trials (`tuner.Follower`).

    Args:
        base: the daily job's options.
        day: that all trials share, without test days.
        data: fingerprint of the rows that are trained on and validated on.
        name: of its folder in the state, under `sweeps/`.
        run_id: its run in MLflow, whose children are the trials'.
        searched: what tells it from other sweeps of the same name.
        trials: those of the search, then those of the finalists.
        runs: the trials' runs in MLflow, by their names.
        blocks: those of them that are open.
    """

    method: Method
    base: Any
    options: SweepOptions
    space: list[Dimension]
    day: Day
    data: str
    name: str
    tracker: Tracker
    run_id: str
    searched: dict[str, str]
    trials: list[Trial] = field(default_factory=list)
    runs: dict[str, str] = field(default_factory=dict)
    blocks: dict[str, AbstractContextManager[str]] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """Its folder in the state."""
        return f"sweeps/{self.name}"

    def options_of(self, trial: Trial) -> Any:
        """The daily job's options as a trial has them."""
        return replace(override(self.base, trial.values), seed=trial.seed)

    def journal(self, trial: Trial) -> str:
        """Name of the output that says how a trial went: one of the same rows and options, whatever its number, that
        was stopped, if it was, by the same rule."""
        rule = "" if trial.repeat else self.searched["asha"]
        return f"{self.folder}/trials/{fingerprint(self.data, self.base.job, self.options_of(trial).result(), rule)}"

    def search(self) -> None:
        """Train the space's draws, and stop early those that are worse than others."""
        own = {dimension.field: value_of(self.base, dimension.field) for dimension in self.space}
        drawn = draw(self.space, self.options.trials, self.base.seed, own)
        say(f"sweep      {self.name}: {len(drawn)} trials over {', '.join(map(str, self.space))}")
        self.trials = self.resumed([Trial(number, values, self.base.seed) for number, values in enumerate(drawn)])
        epochs = max(self.options_of(trial).ctr.epochs for trial in self.trials)
        past = [trial for trial in self.trials if trial.ended]
        self.run(self.trials, tuner.asha(self.options.grace, self.options.reduction, epochs, past))
        if not rank(self.trials):
            reasons = sorted({trial.error for trial in self.trials if trial.error})
            raise UserError(f"no trial of {self.name} came to a validation AUC: {'; '.join(reasons)}")

    def repeat(self) -> None:
        """Train the best, and the options' own values, again with other seeds, each to its end."""
        ranked = [standing.trial for standing in rank(self.trials)]
        finalists = ranked[: self.options.finalists]
        if not finalists:
            return
        finalists += [trial for trial in ranked[self.options.finalists :] if trial.number == 0]
        numbers = ", ".join(str(trial.number) for trial in finalists)
        say(f"sweep      finalists {numbers}: trained with {self.options.seeds} other seeds each")
        again = self.resumed(
            [
                Trial(trial.number, trial.values, self.base.seed + repeat, repeat)
                for repeat in range(1, self.options.seeds + 1)
                for trial in finalists
            ]
        )
        self.trials = self.trials + again
        self.run(again, tuner.in_full())

    def resumed(self, trials: list[Trial]) -> list[Trial]:
        """The trials, as an earlier try of the sweep has left those that ended in it."""
        for number, trial in enumerate(trials):
            known = self.day.state.find(self.journal(trial))
            past = Trial.of(known.facts) if known else trial
            if past.ended and (past.status == "done" or not trial.repeat):
                past = trials[number] = replace(past, number=trial.number, seed=trial.seed, repeat=trial.repeat)
                say(f"{past.name:10} {past.status} before, validation AUC {past.auc:.4f}")
        return trials

    def run(self, trials: list[Trial], scheduler: TrialScheduler) -> None:
        """Train those that have not ended yet, some at a time."""
        waiting = [trial for trial in trials if not trial.ended]
        if not waiting:
            return
        cluster.connect()
        base = self.base
        plan, at_once = planning.plan_trials(
            base.workers, base.batch_sizes(), self.options.at_once, *base.encoding(), base.plan
        )
        at_once = min(at_once, len(waiting))
        self.tracker.set_tags(self.run_id, {"cluster": json.dumps(plan.cluster)})
        say(f"sweep      {len(waiting)} trials, {at_once} at a time, {plan.workers} workers each")
        options, folder = {trial.name: self.options_of(trial) for trial in waiting}, f"{self.folder}/stages"
        work = tuner.Work(self.method.train, options, self.day, folder, plan, tuner.new_turns())
        tuner.run_trials(work, waiting, scheduler, at_once, self.options.retries, self)

    def started(self, trial: Trial) -> None:
        """A trial begins: its run in MLflow does, or goes on."""
        values = ", ".join(f"{name} {shown(value)}" for name, value in trial.values.items())
        say(f"{trial.name:10} {values}")
        if trial.name not in self.runs:
            params, inputs = trial.values | {"seed": trial.seed}, self.journal(trial).rsplit("/", 1)[1]
            labels = {"trial": str(trial.number), "inputs": inputs}
            block = self.blocks[trial.name] = self.tracker.run(trial.name, self.run_id, params, labels)
            self.runs[trial.name] = block.__enter__()

    def went_on(self, trial: Trial, epoch: int) -> None:
        """A trial has come to the end of an epoch."""
        auc = trial.curve[epoch]
        say(f"{trial.name:10} epoch {epoch}: validation AUC {auc:.4f}")
        self.tracker.log_records(self.runs[trial.name], [{"step": epoch, "valid_auc": auc}])

    def ended(self, trial: Trial) -> None:
        """A trial is over: note it where a later try of the sweep finds it."""
        with self.day.state.create(self.journal(trial), self.data, trial.facts()):
            pass
        if trial.auc is not None:
            self.tracker.log_metrics(self.runs[trial.name], {"auc": trial.auc, "epochs": len(trial.curve)})
        self.tracker.log_metrics(self.runs[trial.name], {"seconds": trial.seconds})
        cause = {"done": None, "stopped": KeyboardInterrupt(), "failed": UserError(trial.error)}[trial.status]
        self.blocks.pop(trial.name).__exit__(cause and type(cause), cause, None)
        how = f"validation AUC {trial.auc:.4f}" if trial.auc is not None else trial.error
        over = f"{sum(t.status != 'waiting' for t in self.trials)} of {len(self.trials)} trials"
        say(f"{trial.name:10} {trial.status}: {how}, {trial.seconds:.0f} s; {over} are over")

    def costs(self) -> dict[str, float]:
        """Seconds of the stages that trials have shared, all outputs of each together, and of the trials, which contain
        these: a stage's in the trial that made it, and as waiting in those that needed it meanwhile."""
        out = {"cost.trials.seconds": sum(trial.seconds for trial in self.trials)}
        for name in self.day.state.names(f"{self.folder}/stages"):
            stage, made = name.rsplit("/", 1)[1].rsplit("-", 1)[0], self.day.state.find(name)
            if made and "seconds" in made.facts:
                key = f"cost.{stage}.seconds"
                out[key] = out.get(key, 0.0) + made.facts["seconds"]
        return out

    def end_open(self) -> None:
        """End the runs in MLflow of trials that a sweep which is cut off leaves behind."""
        for block in self.blocks.values():
            block.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)

    def finish(self) -> None:
        """Write what has come of it, print the table, and let go of the stages."""
        standings = rank(self.trials)
        best, state = standings[0], self.day.state
        chosen = override(self.base, best.trial.values)
        table = sweep_table(standings, self.space)
        warnings = at_the_edge(self.space, best.trial.values)
        warnings += [f"{trial.name} failed: {trial.error}" for trial in self.trials if trial.status == "failed"]
        about = f"sweep {self.name}, trial {best.trial.number}: validation AUC {best.mean:.4f}"
        page = sweep_page(f"Sweep {self.name}", table, self.trials, self.space, warnings)
        facts = {
            "searched": self.searched,
            "trial": best.trial.number,
            "values": best.trial.values,
            "auc": best.mean,
            "spread": best.spread,
        }
        with state.create(f"{self.folder}/result", self.data, facts) as folder:
            (folder / BEST).write_text(best_options(chosen, best.trial.values, self.base.job, about))
            (folder / PAGE).write_text(page, encoding="utf-8")
        state.publish(f"{self.folder}/result", (BEST, PAGE), self.folder)
        self.tracker.log_artifacts(self.run_id, state.local(f"{self.folder}/result"))
        self.tracker.log_metrics(self.run_id, {"best.valid_auc": best.mean, "best.spread": best.spread} | self.costs())
        if not self.options.keep_stages:
            state.clear(f"{self.folder}/stages")
        print(f"\n{table}\n", flush=True)
        for warning in warnings:
            say(f"warning    {warning}")
        say(f"best       {state.path(self.folder)}/{BEST}; plots: {PAGE} beside it")
