"""A day of a pipeline: its window of the log, its place in the state, and its stages, each done once."""

import datetime as dt
import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from ctrdist.config import to_dict
from ctrdist.errors import UserError
from ctrdist.gate import GateConfig
from ctrdist.log import SPLIT_WINDOW, Part, RowGroup, Window, choose_window, file_facts, list_days, list_row_groups
from ctrdist.pace import Pace
from ctrdist.report import console_table
from ctrdist.schema import Schema
from ctrdist.storage import Manifest, State, fingerprint, masked
from raycluster import cluster, planning
from raycluster.code_version import code_version
from raycluster.tracking import MetricsTail, Tracker


@dataclass(frozen=True)
class DayOptions:
    """What every daily job asks. A subclass sets `job` to its file's name: the state of another job is refused.

    Args:
        data: the prepared log, a folder or URI.
        state: folder or URI that vocabularies, models, the text table and releases live in.
        date: last day of the training window; the newest day of the log less test-days if not given.
        train_days: calendar days in the window.
        valid_days: the last of them, for validation; not trained on in this run.
        test_days: days after the window to test on.
        split: `days` takes training, validation and test from the calendar; `column` takes them from the log's own
            column `split`, always from scratch: the options above then have no say, and the release is named `split`.
        from_scratch: train on the whole window even if the state has an earlier day to start from.
        expire_days: ids that were not seen for more days than this lose their row; those seen within the window, and
            items of today's `items/`, never do. 0 keeps every id; more needs `keep_releases`.
        keep_releases: releases to keep; older ones, and runs that no release refers to, are removed in the end. 0
            keeps all. Rows of expired ids are given to new ones only once no release refers to them.
        seed: decides every draw.
        workers: training processes; 0 takes as many as the cluster has room for.
        max_bad_fraction: largest share of bad rows that the job goes on with.
        tracking_uri: MLflow's server or database; SQLite in the state if not given.
        experiment: name of the MLflow experiment.
        model_name: name of the registered model.
        compile_release: compile what is released for processors like this machine's, if it has a C++ compiler; others
            serve the exported graph, at about half the speed.
        promote: let the gate decide whether the new version becomes champion; without it, it stays challenger.
        gate: what the new version may lose to the champion.
        plan: how the cluster's resources are shared out, and what to wait for on one that grows by itself.
        config: YAML file of options; `ctr.yaml` in the working folder is read if it is there.
    """

    data: str = ""
    state: str = ""
    date: dt.date | None = None
    train_days: int = 60
    valid_days: int = 1
    test_days: int = 1
    split: Literal["days", "column"] = "days"
    from_scratch: bool = False
    expire_days: int = 0
    keep_releases: int = 0
    seed: int = 0
    workers: int = 0
    max_bad_fraction: float = 0.01
    tracking_uri: str | None = None
    experiment: str = "cela"
    model_name: str = "cela"
    compile_release: bool = True
    promote: bool = True
    gate: GateConfig = field(default_factory=GateConfig)
    plan: planning.PlanConfig = field(default_factory=planning.PlanConfig)
    config: str | None = None

    job = ""
    served_stage = ""
    """Name of the stage that ends in the model that is served."""

    @property
    def split_name(self) -> str:
        """What a run over the log's own splits is named by; "" for a day's run."""
        return "split" if self.split == "column" else ""

    def batch_sizes(self) -> dict[str, int]:
        """Rows of a global batch, by option: what the number of workers must divide."""
        return {}

    def encoding(self) -> tuple[int, float]:
        """Processes that encode texts at most, 0 for what there is room for; and the share of a GPU of each."""
        return 0, 1.0

    def shown(self) -> dict:
        """All options, as they may be seen: without a password in `tracking_uri`."""
        return to_dict(replace(self, tracking_uri=self.tracking_uri and masked(self.tracking_uri)))

    def result(self) -> dict:
        """The options that change the result."""
        outside = ("data", "state", "date", "workers", "tracking_uri", "experiment", "config", "max_bad_fraction")
        outside += ("keep_releases", "model_name", "compile_release", "promote", "gate", "plan")
        return {name: value for name, value in to_dict(self).items() if name not in outside}


@dataclass
class Day:
    """One run of a daily job. Made by `open_day`."""

    options: DayOptions
    schema: Schema
    files: dict[dt.date, list[str]]
    window: Window
    state: State
    previous: Manifest | None
    stages: dict[str, Manifest] = field(default_factory=dict)
    skipped: set[str] = field(default_factory=set)
    plan: planning.Plan | None = None
    tracker: Tracker | None = None
    run_id: str = ""
    memory: cluster.PeakMemory | None = None
    _groups: dict[Part, list[RowGroup]] = field(default_factory=dict)

    @property
    def date(self) -> Part:
        """Last day of the training window; `split` for a run over the log's own splits."""
        return self.options.split_name or self.window.valid[-1]

    @property
    def new_days(self) -> tuple[Part, ...]:
        """Days of the training window that no earlier day of the state has trained on."""
        trained = self.previous.facts["trained_days"] if self.previous else []
        return tuple(day for day in self.window.train if str(day) not in trained)

    @property
    def trained_days(self) -> list[str]:
        """All days that the state has trained on, this run's included."""
        before = self.previous.facts["trained_days"] if self.previous else []
        return sorted({*before, *map(str, self.new_days)})

    @property
    def release(self) -> str:
        """Name of this day's release."""
        return f"releases/{self.date}"

    def name(self, stage: str, inputs: str = "") -> str:
        """Name of the output of a stage that is made from `inputs` (a fingerprint)."""
        return f"runs/{self.date}/{stage}"

    def alone(self, output: str) -> AbstractContextManager:
        """A block that nobody else who may make the same output is in. Of a day there is one run only."""
        return nullcontext()

    def groups(self, days: tuple[Part, ...]) -> list[RowGroup]:
        """The row groups of some days, or splits, of the log, their columns checked."""
        for day in days:
            if day not in self._groups:
                self._groups[day] = list_row_groups(self.options.data, self.files, (day,), self.schema)
        return [group for day in days for group in self._groups[day]]

    @property
    def data_fingerprint(self) -> str:
        """Of the files that are new to the state, or validated or tested on: their names, sizes and times of change."""
        groups = self.groups(self.new_days + self.window.valid + self.window.test)
        return fingerprint(file_facts(self.options.data, [group.path for group in groups]))

    def earlier(self, part: str) -> Manifest | None:
        """What the day that this one starts from calls `part`; None without such a day."""
        return self.state.find(self.previous.facts[part]) if self.previous else None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Ray, the plan and the MLflow run of the day, for as long as the block lasts."""
        self.memory = cluster.PeakMemory()
        self.claim_state()
        self.tracker = Tracker.open(self.options.tracking_uri, self.state.uri, self.options.experiment)
        cluster.connect()
        self.plan = planning.make_plan(
            self.options.workers, self.options.batch_sizes(), *self.options.encoding(), self.options.plan
        )
        for line in self.plan.lines():
            say(f"plan       {line}")
        labels = {"date": str(self.date), "options": fingerprint(self.options.result())}
        about = {
            "code": code_version(),
            "schema": self.schema.fingerprint,
            "data": self.data_fingerprint,
            "cluster": json.dumps(self.plan.cluster),
        }
        try:
            with self.tracker.run(str(self.date), params=self.options.shown(), tags=labels) as self.run_id:
                self.tracker.set_tags(self.run_id, about)
                yield
        finally:
            self.memory.close()
            close_tracker(self.tracker)

    def claim_state(self) -> None:
        """Write into a new state whose it is: this schema's and this job's."""
        if not self.state.find("schema"):
            with self.state.create("schema", self.schema.fingerprint, {"job": self.options.job}) as folder:
                self.schema.save(folder / "schema.yaml")

    def stage(self, stage: str, inputs: str, make: Callable[[str, str, str], Manifest]) -> Manifest:
        """Do a stage, or take its output from an earlier try that had the same inputs.

        Args:
            inputs: fingerprint of everything that the output depends on.
            make: (output's name, inputs, file for metrics) -> the output's manifest; its facts have `rows`.
        """
        name = self.name(stage, inputs)
        with self.alone(name):
            found = self.state.find(name, inputs)
            if found is not None and "seconds" in found.facts:
                say(f"{stage:10} done before: {found.facts['seconds']:.0f} s, {found.facts['rows']:,} rows")
                self.skipped.add(stage)
            else:
                found = self._make(stage, name, inputs, make)
        self.stages[stage] = found
        return found

    def _make(self, stage: str, name: str, inputs: str, make: Callable[[str, str, str], Manifest]) -> Manifest:
        say(f"{stage:10} ...")
        began = time.monotonic()
        labels = {"stage": stage, "inputs": inputs}
        metrics = f"{name}.metrics.jsonl"
        with self.tracker.run(stage, self.run_id, tags=labels) as run_id:
            file = self.state.scratch(metrics)
            with MetricsTail(self.tracker, run_id, file, on_record=Progress(stage)):
                make(name, inputs, file)
            seconds = time.monotonic() - began
            cost = {f"{kind.lower()}_seconds": seconds * self.plan.cluster.get(kind, 0) for kind in ("CPU", "GPU")}
            manifest = self.state.annotate(name, {"seconds": seconds, **cost})
            with suppress(OSError):  # the stage is done
                self.state.scratch(metrics)
            facts = manifest.facts.items()
            self.tracker.log_metrics(run_id, {name: v for name, v in facts if isinstance(v, int | float)})
        say(f"{stage:10} {seconds:.0f} s, {manifest.facts['rows']:,} rows")
        return manifest


def run_day(options: DayOptions, pipeline: Callable[[Day], dict]) -> None:
    """Open the day and, if it is not complete, run the pipeline, which releases it, and print the report it returns.

    Raises:
        UserError: what is wrong with the options, the data or the state.
    """
    day = open_day(options)
    done = day.state.find(day.release)
    if done and "registered" in done.facts:
        say(f"{day.date} is complete: {day.state.path(day.release)}. Nothing to do")
        if done.facts["options"] != options.result():
            say("its options were others than these; to try these, give another --state")
        return
    with day.running():
        report = pipeline(day)
    print(console_table(report), flush=True)


def open_day(options: DayOptions, test: bool = True) -> Day:
    """Check data and state, choose the window, and find the day to start from. Needs no Ray.

    Args:
        test: whether the window has test days; without, nothing of theirs is opened.

    Raises:
        UserError: what is wrong with the options, the data or the state.
    """
    for name in ("data", "state"):
        value = getattr(options, name)
        if not value:
            raise UserError(f"--{name} is missing; give it on the command line or in ctr.yaml")
        cluster.check_path(f"--{name}", value)
    for name in ("expire_days", "keep_releases"):
        if getattr(options, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: 0 or more")
    if options.expire_days and not options.keep_releases:
        raise UserError(
            f"--expire-days {options.expire_days}: no row can be given again while every release is kept; give "
            "--keep-releases too"
        )
    options.gate.check()
    check_model_name(options.model_name)
    data, state = cluster.absolute(options.data), State(cluster.absolute(options.state))
    if "://" not in data and not Path(data).is_dir():
        raise UserError(f"--data {data}: no such folder; make it with jobs/prepare.py")
    schema = Schema.load(f"{data}/schema.yaml")
    files = list_days(data)
    if options.split_name:
        if options.date:
            raise UserError(f"--date {options.date}: --split column takes no date; leave one of them out")
        window = SPLIT_WINDOW
    else:
        window = choose_window(list(files), options.date, options.train_days, options.valid_days, options.test_days)
    if not test:
        window = replace(window, test=())
    known = state.find("schema")
    if known is not None and known.facts.get("job", options.job) != options.job:
        raise UserError(
            f"--state {state.uri}: a state of {known.facts['job']}, whose models do not fit; give another --state"
        )
    if known is not None and known.inputs != schema.fingerprint:
        raise UserError(
            f"--state {state.uri}: written by another schema ({known.inputs}) than {data}/schema.yaml "
            f"({schema.fingerprint}), so its models do not fit; give another --state"
        )
    day = Day(replace(options, data=data, state=state.uri), schema, files, window, state, None)
    if not (options.from_scratch or options.split_name):
        day.previous = latest_release(state, day.date)
    if not day.new_days:
        raise UserError(
            f"--date {day.date}: {day.state.path(day.previous.name)} has trained on every day of the window, "
            f"{window.train[0]} to {window.train[-1]}; --from-scratch trains on them anew"
        )
    day.groups(day.new_days + window.valid + window.test)
    return day


def check_model_name(name: str) -> None:
    """Raise a UserError for a name that MLflow's registry does not take."""
    if not re.fullmatch(r"[^/:.%'\"]+", name):
        raise UserError(f"--model-name {name!r}: a name without / : . % and quotes")


def latest_release(state: State, before: dt.date) -> Manifest | None:
    """The newest release dated before a day."""
    names = [name for name in day_releases(state) if name.rsplit("/", 1)[1] < str(before)]
    return state.find(names[-1]) if names else None


def day_releases(state: State) -> list[str]:
    """Names of the releases that are named by a day, the oldest first."""
    return [name for name in state.names("releases") if name[-1].isdigit()]


def close_tracker(tracker: Tracker) -> None:
    """Let MLflow take what was logged; say what it has not taken."""
    if waiting := tracker.close():
        where = tracker.journal.folder
        say(f"{waiting:,} records wait in {where} for MLflow to answer; the next job on this state sends them")


def say(line: str) -> None:
    """A line on the job's console."""
    print(f"{time.strftime('%H:%M:%S')}  {line}", flush=True)


class Progress:
    """Prints a stage's records, a line now and then (`Pace`): steps, loss, speed, time left."""

    def __init__(self, stage: str, things: str = "items") -> None:
        self.stage, self.things, self.pace = stage, things, Pace()
        self.first_step: float | None = None

    def __call__(self, record: dict) -> None:
        now = record["time"]  # records may come in bunches
        for name, title in (("valid_auc", "validation AUC"), ("valid_loss", "loss of the held-out items")):
            if name in record:
                say(f"{self.stage:10} epoch {record['epoch']:.0f}: {title} {record[name]:.4f}")
                return
        if self.first_step is None:
            self.first_step = record["step"]
            self.pace.began = self.pace.said = now  # it may have waited for nodes
        done = record["step"] - self.first_step
        if not done or not self.pace.due(now):
            return
        left = (record["steps"] - record["step"]) * (now - self.pace.began) / done
        say(
            f"{self.stage:10} step {record['step']:,.0f} of {record['steps']:,.0f}, loss {record['loss']:.4f}, "
            f"{record['rows_per_second']:,.0f} rows/s, at most {left:.0f} s left"
        )

    def items(self, done: int, total: int) -> None:
        """Prints how many things are done, a line now and then."""
        now = time.time()
        if self.pace.due(now):
            left = (total - done) * (now - self.pace.began) / max(1, done)
            speed = f"{done / (now - self.pace.began):,.1f} {self.things}/s"
            say(f"{self.stage:10} {done:,} of {total:,} {self.things}, {speed}, {left:.0f} s left")
