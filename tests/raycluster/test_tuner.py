"""Ray Tune around stages: what trials share, how they are stopped, how they die, and how a sweep goes on.

The stages are small functions; that Ray Train runs in a trial is the business of the job's test.
"""

import contextlib
import io
import json
import os
import shutil
import signal
from dataclasses import dataclass, field, replace
from pathlib import Path

import mlflow
import pytest
import yaml

from ctrdist.errors import UserError
from ctrdist.storage import State, fingerprint
from ctrdist.tasks.click import ClickConfig
from ctrdist.trials import Trial
from raycluster import tuner
from raycluster.day import Day, DayOptions
from raycluster.sweep import Method, Sweep, SweepOptions, sweep


@dataclass(frozen=True)
class Part:
    quality: float = 0.5


@dataclass(frozen=True)
class CheapOptions(DayOptions):
    ctr: ClickConfig = field(default_factory=lambda: ClickConfig(epochs=3))
    part: Part = field(default_factory=Part)

    job = "cheap"
    served_stage = "served"

    def check(self) -> None:
        """Nothing to check."""


def log(day: Day, line: str) -> None:
    with open(f"{day.state.uri}/made.txt", "a") as stream:
        stream.write(f"{line}\n")


def made(state: Path) -> list[str]:
    return sorted((state / "made.txt").read_text().split())


def cheap(day: Day, options: CheapOptions) -> None:
    """A shared stage, and one whose AUC is as good as `quality`; which also says how it is to go wrong."""

    def shared(name: str, inputs: str, _metrics: str):
        log(day, f"shared-{options.seed}")
        with day.state.create(name, inputs, {"rows": 1}):
            pass

    def served(name: str, inputs: str, metrics: str):
        quality = options.part.quality
        log(day, f"served-{quality}-{options.seed}")
        curve = [[epoch, quality + 0.01 * epoch + 0.001 * options.seed] for epoch in (1, 2, 3)]
        if quality == 0.1:
            os._exit(1)
        if quality == 0.6 and not Path(f"{day.state.uri}/died").exists():
            Path(f"{day.state.uri}/died").touch()
            os._exit(1)
        with open(metrics, "a") as stream:
            for epoch, auc in curve:
                stream.write(
                    json.dumps({"step": 10 * epoch, "epoch": float(epoch), "valid_auc": auc, "time": 1.0}) + "\n"
                )
                stream.flush()
        with day.state.create(name, inputs, {"rows": 1, "valid_auc": curve}):
            pass

    day.stage("shared", fingerprint(options.seed), shared)
    day.stage("served", fingerprint(options.seed, options.part.quality), served)


METHOD = Method("cheap", cheap, {"q": "part.quality=choice(0.1,0.4,0.6)"})
SWEEP = SweepOptions(name="s", trials=9, finalists=1, seeds=1, retries=1, reduction=2)


@pytest.fixture(scope="module")
def options(small_log, tmp_path_factory) -> CheapOptions:
    """Options over a copy of the log whose test day cannot be read."""
    data = tmp_path_factory.mktemp("tuner") / "data"
    shutil.copytree(small_log, data)
    for file in (data / "interactions" / "dt=2024-01-05").glob("*.parquet"):
        file.write_bytes(b"not to be opened")
    return CheapOptions(data=str(data), state=str(data.parent / "state"), train_days=4)


@pytest.fixture(scope="module")
def swept(ray_cluster, options) -> str:
    """What a sweep printed that was cut off by Ctrl-C in its second trial and run again."""
    started, out = Sweep.started, io.StringIO()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a training leaves a handler of Ray Train's behind

    def started_and_cut_off(self: Sweep, trial: Trial) -> None:
        started(self, trial)
        if trial.number == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sweep, "started", started_and_cut_off)
        with pytest.raises(KeyboardInterrupt):
            sweep(METHOD, options, replace(SWEEP, at_once=1))
    with contextlib.redirect_stdout(out):
        sweep(METHOD, options, replace(SWEEP, at_once=2))
    return out.getvalue()


def client(options: CheapOptions) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(f"sqlite:///{options.state}/mlflow.db")


def runs(options: CheapOptions) -> dict:
    experiment = client(options).get_experiment_by_name("cela").experiment_id
    return {run.info.run_name: run for run in client(options).search_runs([experiment])}


def journal(options: CheapOptions) -> dict[float, str]:
    """How the trials of the search ended, by their value."""
    state = State(options.state)
    facts = [state.find(name).facts for name in state.names("sweeps/s/trials")]
    return {f["values"]["part.quality"]: f["status"] for f in facts if not f["repeat"]}


def test_a_killed_sweep_goes_on_and_stages_are_made_once(swept, options):
    counts = made(Path(options.state))
    assert counts.count("shared-0") == counts.count("shared-1") == 1 and counts.count("served-0.5-0") == 1
    assert "trial 0    done before, validation AUC 0.5300" in swept and "3 trials, 2 at a time" in swept


def test_asha_stops_what_is_worse_and_knows_of_the_trials_before(swept, options):
    assert journal(options) == {0.5: "done", 0.6: "done", 0.4: "stopped", 0.1: "failed"}
    counts = made(Path(options.state))
    assert "other seeds each" in swept and counts.count("served-0.6-1") == 1 and "served-0.4-1" not in counts


def test_the_options_own_values_are_compared_over_the_same_seeds(swept, options):
    assert made(Path(options.state)).count("served-0.5-1") == 1 and ", 0: trained with 1 other seeds" in swept


def test_a_trial_that_dies_is_tried_again_and_then_marked(swept, options):
    assert swept.count("died, and is tried again") == 2  # 0.6 once, 0.1 before it is given up
    found = {run.data.params["part.quality"]: run.info.status for name, run in runs(options).items() if "trial" in name}
    assert found == {"0.5": "FINISHED", "0.6": "FINISHED", "0.4": "KILLED", "0.1": "FAILED"}
    assert "failed:" in swept


def test_every_trial_is_a_child_run_with_its_epochs(swept, options):
    found = runs(options)
    parent = found["sweep s"]
    assert parent.info.status == "FINISHED" and parent.data.metrics["best.valid_auc"] == pytest.approx(0.631)
    children = [run for run in found.values() if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == 4 + 2 and len(found) == 7
    history = client(options).get_metric_history(found["trial 0"].info.run_id, "valid_auc")
    assert {point.step: point.value for point in history} == pytest.approx({1: 0.51, 2: 0.52, 3: 0.53})
    assert found["trial 0"].data.metrics["auc"] == pytest.approx(0.53)


def test_the_sweeps_run_says_what_it_ran_on_and_what_that_cost(swept, options):
    found = runs(options)
    parent = found["sweep s"].data
    assert {"code", "schema", "data", "cluster"} <= set(parent.tags) and json.loads(parent.tags["cluster"])["CPU"] == 2
    shared = parent.metrics["cost.shared.seconds"]
    assert shared > 0
    # The killed try's trial is counted, as it ended in its journal.
    own = sum(run.data.metrics["seconds"] for name, run in found.items() if "trial" in name)
    assert parent.metrics["cost.trials.seconds"] == pytest.approx(own) and own > shared


def test_the_best_is_written_down_and_nothing_else_stays(swept, options):
    folder = Path(options.state) / "sweeps" / "s"
    best = yaml.safe_load((folder / "best.yaml").read_text())
    assert best["part"] == {"quality": 0.6} and best["data"] == options.data and "from_scratch" not in best
    assert "upper edge of its range" in swept and "0.6300" in swept and "0.6310" in swept
    assert (folder / "sweep.html").stat().st_size > 10**6
    assert not list(folder.glob("stages*"))


def test_what_the_options_are_to_blame_for_is_not_tried_again(monkeypatch):
    def wrong(*_: object) -> None:
        raise UserError("the loss is nan")

    reported = []
    monkeypatch.setattr(tuner.tune, "report", reported.append)
    monkeypatch.setattr(tuner.cluster, "connect", lambda: None)
    monkeypatch.setattr(tuner, "train_trial", wrong)
    work = tuner.Work(cheap, {"trial 0": CheapOptions()}, None, "", None, None)
    tuner.run_trial({"trial": "trial 0"}, work)
    (report,) = reported
    assert report["error"] == "the loss is nan" and report["epoch"] == 0
    monkeypatch.setattr(tuner, "train_trial", lambda *_: os.stat("/no/such/file"))
    with pytest.raises(FileNotFoundError):
        tuner.run_trial({"trial": "trial 0"}, work)
