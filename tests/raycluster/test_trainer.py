"""Ray Train around the loop: any number of workers gives one result, and a death in the middle changes nothing."""

import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from ray.train import TrainingFailedError
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from safetensors.torch import load_file
from torch import Tensor, nn

from ctrdist.errors import UserError
from ctrdist.group import Group
from ctrdist.loop import LoopConfig
from ctrdist.losses import global_mean
from ctrdist.tasks import Task
from raycluster.planning import PlanConfig, make_plan, plan_trials
from raycluster.trainer import Training, _trainer, train


class Rows:
    """Some numbers, as a batch."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def to(self, device) -> "Rows":
        return self


class Regression(Task):
    """Fits y = 3x + 1; dies once at a step, or finds the input wrong, if told to."""

    def __init__(self, marker: str | None = None, wrong: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.group = nn.Linear(1, 1).double(), Group()
        self.marker, self.wrong, self.steps = marker, wrong, 0

    def forward(self, batch: Rows) -> dict[str, Tensor]:
        self.steps += 1
        if self.wrong:
            raise UserError("column 'x': 7 is wrong; take 8")
        if self.marker and self.group.rank == 1 and self.steps == 4 and not Path(self.marker).exists():
            Path(self.marker).touch()
            os._exit(1)
        x = batch.values[:, None]
        error = (self.linear(x) - (3 * x + 1)).square().sum()
        return {"loss": global_mean(error, len(batch), self.group)}

    def parameter_groups(self) -> list[dict]:
        return [{"params": list(self.parameters()), "lr": 0.05, "weight_decay": 0.0}]


def batches(rank: int, workers: int, step: int):
    share = 8 // workers
    for number in range(step, 10):
        rows = torch.linspace(-1, 1, 8, dtype=torch.float64) + 0.1 * number
        rows = rows[: 8 if number % 5 != 4 else 3]
        yield Rows(rows[rank * share : (rank + 1) * share])


def save(task: Task, folder: Path) -> None:
    from safetensors.torch import save_file

    save_file(task.state_dict(), folder / "weights.safetensors")


def training(state: Path, output: str, task) -> Training:
    loop = LoopConfig(steps_per_epoch=5, epochs=2, precision="float64", checkpoint_seconds=0.0)
    return Training(
        state=str(state), output=output, inputs="x", task=task, save=save, loop=loop, batch_size=8, batches=batches,
        facts={"rows": 80},
    )  # fmt: skip


def weights(state: Path, manifest) -> Tensor:
    return torch.cat([v.flatten() for v in load_file(state / manifest.folder / "weights.safetensors").values()])


@pytest.fixture(scope="module")
def state(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("trainer")


def test_one_worker_two_workers_and_a_death_end_alike(ray_cluster, state, capsys):
    plan, interrupt = make_plan(2), signal.getsignal(signal.SIGINT)
    alone = train(training(state, "one", Regression), replace(plan, workers=1))
    both = train(training(state, "two", partial(Regression, str(state / "died"))), plan)
    assert (state / "died").exists() and "a training worker died; going on" in capsys.readouterr().out
    torch.testing.assert_close(weights(state, alone), weights(state, both), rtol=0, atol=1e-12)
    assert both.facts["workers"] == 2 and both.facts["losses"][-1][0] == 10
    assert not list(state.glob("two.checkpoint*")) and not list(state.glob("*.ray"))
    assert signal.getsignal(signal.SIGINT) is interrupt, "Ctrl-C is what it was"


@pytest.mark.parametrize("dashboard", [False, True])
def test_nobody_waits_for_a_dashboard_that_is_not_there(ray_cluster, state, monkeypatch, dashboard):
    if dashboard:
        monkeypatch.setattr("raycluster.trainer.has_dashboard", lambda: True)
    callbacks = _trainer(training(state, "callbacks", Regression), make_plan(1))._create_default_callbacks()
    assert dashboard == any(isinstance(each, PlacementGroupCleanerCallback) for each in callbacks)
    assert len(callbacks) > 3


def test_what_a_worker_finds_wrong_reaches_the_user(ray_cluster, state):
    with pytest.raises(UserError, match="^column 'x': 7 is wrong; take 8$"):
        train(training(state, "wrong", partial(Regression, None, True)), replace(make_plan(2), workers=1))


def test_a_death_after_the_last_checkpoint_is_no_obstacle(ray_cluster, state, capsys):
    run = training(state, "late", Regression)
    alone = replace(make_plan(2), workers=1)
    with pytest.raises(TrainingFailedError, match="the disk is full"):
        train(replace(run, save=full_disk), alone)
    assert run.cursor() == 10
    assert "going on" not in capsys.readouterr().out  # no worker died: another try would end alike
    manifest = train(run, alone)
    assert manifest.facts["rows"] == 160 and len(weights(state, manifest)) == 2


def full_disk(task: Task, folder: Path) -> None:
    raise KeyError("the disk is full")


def test_trainings_at_a_time_share_the_cluster(ray_cluster):
    def shared(*given, **more) -> tuple[int, float, int, int, int]:
        plan, at_once = plan_trials(*given, **more)
        return plan.workers, plan.worker_cpus, plan.threads, plan.readers, at_once

    assert shared() == (1, 0.25, 2, 2, 1)  # two CPUs are room for one
    assert shared(1, {}, at_once=2) == (1, 0.25, 1, 1, 2)
    assert shared(2) == (2, 0.25, 1, 2, 1)
    asked = PlanConfig(worker_cpus=0.5, threads=3, readers=5)  # what is asked for is not shared out
    assert shared(1, {}, at_once=2, config=asked) == (1, 0.5, 3, 5, 2)
    assert plan_trials(1, {}, 2, 4)[0].encoders == 4 and plan_trials(1, {}, 2)[0].encoders == 1
    with pytest.raises(UserError, match="--sweep.at-once 2: 4 workers, and the cluster has 2 CPUs; at most 1"):
        plan_trials(2, {}, at_once=2)
