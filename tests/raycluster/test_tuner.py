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

    def shared(name: str, inputs: str, _metrics: str | None):
        log(day, f"shared-{options.seed}")
        with day.state.create(name, inputs, {"rows": 1}):
            pass

    def served(name: str, inputs: str, metrics: str | None):
        quality = options.part.quality
        log(day, f"served-{quality}-{options.seed}")
        curve = [[epoch, quality + 0.01 * epoch + 0.001 * options.seed] for epoch in (1, 2, 3)]
        if quality == 0.1:
            os._exit(1)
        if quality == 0.2:
            raise UserError("the loss is nan")
        if quality == 0.3 and not Path(f"{day.state.uri}/died").exists():
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


METHOD = Method("cheap", cheap, {"q": "part.quality=choice(0.1,0.2,0.3,0.6)"})
SWEEP = SweepOptions(name="s", trials=9, finalists=1, seeds=2, at_once=2, retries=1, grace=3)


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
    """What a sweep printed in which trials died."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        sweep(METHOD, options, SWEEP, ())
    return out.getvalue()


def client(options: CheapOptions) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(f"sqlite:///{options.state}/mlflow.db")


def runs(options: CheapOptions) -> dict:
    experiment = client(options).get_experiment_by_name("cela").experiment_id
    return {run.info.run_name: run for run in client(options).search_runs([experiment])}


def test_stages_are_made_once_for_all_trials(swept, options):
    counts = made(Path(options.state))
    assert counts.count("shared-0") == counts.count("shared-1") == counts.count("shared-2") == 1
    assert counts.count("served-0.5-0") == counts.count("served-0.6-0") == 1


def test_a_trial_that_dies_is_tried_again_and_then_marked(swept, options):
    counts = made(Path(options.state))
    assert counts.count("served-0.1-0") == 2 and counts.count("served-0.3-0") == 2
    assert counts.count("served-0.2-0") == 1  # what the options are to blame for ends alike in every try
    found = {
        run.data.params["part.quality"]: run
        for name, run in runs(options).items()
        if "seed" not in name and name != "sweep s"
    }
    assert {quality: run.info.status for quality, run in found.items()} == {
        "0.5": "FINISHED", "0.6": "FINISHED", "0.3": "FINISHED", "0.1": "FAILED", "0.2": "FAILED"
    }  # fmt: skip
    assert "failed: the loss is nan" in swept and "died, and is tried again" in swept


def test_every_trial_is_a_child_run_with_its_epochs(swept, options):
    found = runs(options)
    parent = found["sweep s"]
    assert parent.info.status == "FINISHED" and parent.data.metrics["best.valid_auc"] == pytest.approx(0.6315)
    children = [run for run in found.values() if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == 5 + 2 and len(found) == 8
    first = found["trial 0"]
    history = client(options).get_metric_history(first.info.run_id, "valid_auc")
    assert {point.step: point.value for point in history} == pytest.approx({1: 0.51, 2: 0.52, 3: 0.53})
    assert first.data.metrics["auc"] == pytest.approx(0.53)


def test_the_best_is_written_down_and_nothing_else_stays(swept, options):
    state = Path(options.state)
    best = yaml.safe_load((state / "sweeps" / "s" / "best.yaml").read_text())
    assert best["part"] == {"quality": 0.6} and best["data"] == options.data and "from_scratch" not in best
    assert "upper edge of its range" in swept and "0.6300" in swept and "0.6315" in swept
    assert (state / "sweeps" / "s" / "sweep.html").stat().st_size > 10**6
    assert {path.name for path in (state / "sweeps" / "s").iterdir() if path.is_dir()} >= {"trials"}
    assert not list((state / "sweeps" / "s").glob("stages*"))


def test_a_sweep_that_is_run_again_takes_what_has_ended(swept, options, capsys):
    before = made(Path(options.state))
    sweep(METHOD, options, replace(SWEEP, retries=0), ())
    after = made(Path(options.state))
    # Those that failed are tried once more; nothing else is.
    assert sorted(set(after) - set(before)) == [] and len(after) == len(before) + 3
    assert after.count("served-0.6-0") == 1 and "done before, validation AUC 0.6300" in capsys.readouterr().out


def test_asha_stops_what_is_worse_and_a_killed_sweep_goes_on(ray_cluster, options, tmp_path, capsys):
    own = replace(options, state=str(tmp_path / "state"), part=Part(0.6))
    short = replace(SWEEP, trials=3, finalists=0, at_once=1, grace=1, reduction=2)
    spaces = ("part.quality=choice(0.6,0.4,0.35)",)
    started = Sweep.started

    def started_and_cut_off(self: Sweep, trial: Trial) -> None:
        started(self, trial)
        if trial.number == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sweep, "started", started_and_cut_off)
        with pytest.raises(KeyboardInterrupt):
            sweep(METHOD, own, short, spaces)
    capsys.readouterr()
    sweep(METHOD, own, short, spaces)
    out = capsys.readouterr().out
    assert "trial 0    done before" in out and "2 trials, 1 at a time" in out
    counts = made(tmp_path / "state")
    assert counts.count("served-0.6-0") == 1 and counts.count("shared-0") == 1
    # ASHA knows how the first trial went: both others are worse after an epoch, and stopped.
    journal = [State(own.state).find(name).facts for name in State(own.state).names("sweeps/s/trials")]
    assert {facts["values"]["part.quality"]: facts["status"] for facts in journal} == {
        0.6: "done", 0.4: "stopped", 0.35: "stopped"
    }  # fmt: skip
