import gc
import math
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ctrdist.backbones import BackboneConfigs
from ctrdist.backbones.dcnv2 import Config as DCNv2Config
from ctrdist.backbones.din import Config as DINConfig
from ctrdist.batch import Batch, Lookup, collate
from ctrdist.checkpoint import Progress, load_checkpoint
from ctrdist.embedding import EmbeddingTable
from ctrdist.errors import UserError
from ctrdist.export import WEIGHTS, load_click_model, save_click_model
from ctrdist.group import Group
from ctrdist.items import Catalog
from ctrdist.loop import LoopConfig, fit, make_optimizer, prefetch, update
from ctrdist.optim import RowAdam
from ctrdist.schema import Field, Schema
from ctrdist.sharded import is_collective
from ctrdist.storage import State
from ctrdist.tasks import Task
from ctrdist.tasks.click import ClickConfig, ClickModel
from ctrdist.text_field import FuseConfig
from ctrdist.vocabulary import Vocabulary

SCHEMA = Schema(user=(Field("user_id"),), item=(Field("item_id"), Field("genre")), history_length=3)
SIZES = {"user_id": 12, "item_id": 10, "genre": 5}
BATCH, STEPS = 12, 5
DRY = BackboneConfigs(din=DINConfig(dropout=0.0), dcnv2=DCNv2Config(dropout=0.0))


def log_of(rows: int, seed: int) -> pa.Table:
    draws = np.random.default_rng(seed)
    user, item = draws.integers(1, 12, rows), draws.integers(2, 10, rows)
    history = np.where(np.arange(3) < draws.integers(0, 4, (rows, 1)), draws.integers(2, 10, (rows, 3)), 0)
    return pa.table(
        {
            "label": pa.array((user + item + draws.integers(0, 2, rows)) % 3 == 0).cast(pa.float32()),
            "item": pa.array(item.astype(np.int32)),
            "filler": pa.array(np.zeros(rows, bool)),
            "user_id": pa.array(user.astype(np.int32)),
            "history": pa.FixedSizeListArray.from_arrays(history.astype(np.int32).ravel(), 3),
        }
    )


def batch_of(table: pa.Table) -> Batch:
    draws = np.random.default_rng(9)
    genre = np.append(0, draws.integers(1, 5, 9)).astype(np.int32)
    catalog = Catalog(Vocabulary(), np.arange(10) > 1, {"item_id": np.arange(10, dtype=np.int32), "genre": genre})
    return collate(table, SCHEMA, catalog, draws.normal(size=(10, 4)).astype(np.float32))


def train_batches(rank: int, size: int, first: int) -> Iterator[Batch]:
    """An epoch is five global batches; the last has five rows, all of them the first worker's."""
    for step in range(first, 2 * STEPS):
        epoch, at = divmod(step, STEPS)
        rows = log_of(4 * BATCH + 5, seed=epoch).slice(at * BATCH, BATCH)
        yield batch_of(rows.slice(rank * (BATCH // size), BATCH // size))


def valid_batches(rank: int, size: int) -> Iterator[Batch]:
    """Forty rows, 25 of them the first worker's; a third one has none."""
    rows = log_of(40, seed=7)
    rows = rows if size == 1 else [rows.slice(0, 25), rows.slice(25), rows.slice(40)][rank]
    return (batch_of(rows.slice(start, 10)) for start in range(0, rows.num_rows, 10))


def click_model(
    backbone: str, text: int = 4, networks: BackboneConfigs = DRY, seed: int = 0, **options: Any
) -> ClickModel:
    options = {"dim": 4, "lr": 0.01, "table_lr": 0.02, "unknown_share": 0.0} | options
    config = ClickConfig(backbone=backbone, networks=networks, **options)
    dropout = 0.0 if networks is DRY else 0.2
    return ClickModel(SCHEMA, SIZES, config, text, FuseConfig(dropout=dropout, scale=1.0, whiten=True), seed=seed)


LOOP = LoopConfig(STEPS, epochs=2, schedule="linear", warmup=0.2, clip_norm=0.5, precision="float64", log_seconds=1e9)


def whole_weights(task: ClickModel) -> dict[str, Tensor]:
    """The weights, with those of spread tables gathered and without the state of the tables' optimizer."""
    weights = {name: value for name, value in task.state_dict().items() if not name.startswith("tables.")}
    return weights | {name: table.fetch(torch.arange(SIZES[name])) for name, table in task.tables.items()}


def trained(group: Group, backbones: list[str], options: dict[str, Any]) -> list[dict[str, Any]]:
    out = []
    for backbone in backbones:
        task, records = click_model(backbone, **options), []
        share = group.rank, group.size
        progress = fit(task, partial(train_batches, *share), LOOP, group=group, valid=partial(valid_batches, *share),
                       record=records.append)  # fmt: skip
        assert not task.training and all(not table._pending for table in task.tables.values())
        out.append({"weights": whole_weights(task), "aucs": progress.valid_auc, "losses": progress.losses,
                    "best": progress.best_epoch, "records": len(records), "steps": progress.step})  # fmt: skip
    return out


def test_gradients_are_clipped_to_a_norm():
    def step(clip_norm: float) -> Tensor:
        weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
        loss = (weight * torch.tensor([3.0, 0.0, 4.0])).sum()
        update(loss, torch.optim.SGD([weight], 1.0), [], Group(), clip_norm=clip_norm)
        return weight.detach()

    torch.testing.assert_close(step(0.0), torch.tensor([-3.0, 0.0, -4.0], dtype=torch.float64))
    torch.testing.assert_close(step(2.0), torch.tensor([-1.2, 0.0, -1.6], dtype=torch.float64), rtol=1e-5, atol=0)
    torch.testing.assert_close(step(9.0), torch.tensor([-3.0, 0.0, -4.0], dtype=torch.float64))


@pytest.mark.parametrize(
    ("names", "options"),
    [(["din", "dcnv2"], {}), (["din", "dcnv2"], {"table_store": "sharded", "table_optimizer": "adamw"})],
)
def test_two_workers_end_with_the_weights_of_one(two_workers, names: list[str], options: dict[str, Any]):
    one, two = trained(Group(), names, options), two_workers(trained, names, options)
    for name, alone, first, second in zip(names, one, *two, strict=True):
        assert alone["steps"] == first["steps"] == second["steps"] == 10
        assert alone["weights"].keys() == first["weights"].keys()
        start = whole_weights(click_model(name).double())
        for key, value in alone["weights"].items():
            assert torch.equal(first["weights"][key], second["weights"][key]), (name, key)
            torch.testing.assert_close(first["weights"][key], value, rtol=1e-9, atol=1e-11, msg=f"{name} {key}")
            if key not in ("text_field.mean", "text_field.whitening"):  # measured, not trained
                assert not torch.equal(value, start[key]), (name, key)
        for one, other in ((alone, first), (first, second)):
            assert [epoch for epoch, _ in one["aucs"]] == [1, 2] and one["best"] == other["best"]
            np.testing.assert_allclose(one["aucs"], other["aucs"], atol=1e-6)
            np.testing.assert_allclose(one["losses"], other["losses"], rtol=1e-8)
        assert first["records"] == alone["records"] > 0 and second["records"] == 0


class Stop(Exception):
    pass


SPREAD = {"table_store": "sharded", "table_optimizer": "adamw", "table_decay": 0.5}


def part_of_a_run(group: Group, state: str, options: dict[str, Any], stop: int) -> dict[str, Any]:
    """A run from the checkpoint in the state, if there is one, up to step `stop`; at its end the model is saved."""
    state = State(state)
    task = click_model("din", seed=5 if state.find("checkpoint") else 0, **options)
    writers = group if is_collective(task) else Group()

    def checkpoint(write, progress: Progress) -> None:
        if progress.step == stop:
            with state.create("checkpoint", group=writers) as folder:
                write(folder)
            raise Stop

    run = partial(fit, task, partial(train_batches, group.rank, group.size), group=group,
                  valid=partial(valid_batches, group.rank, group.size), checkpoint=checkpoint)  # fmt: skip
    loop = replace(LOOP, checkpoint_seconds=-1.0, patience=2)
    try:
        progress = run(loop, resume=state.local("checkpoint") if state.find("checkpoint") else None)
    except Stop:
        gc.collect()  # DDP's threads must end before the process does
        return {}
    if group.rank == 0 or writers.size > 1:
        with state.create("model", group=writers) as folder:
            save_click_model(task, folder)
    return {"weights": whole_weights(task), "aucs": progress.valid_auc}


@pytest.mark.parametrize("sizes", [(2, 1), (1, 2), (2, 3)])
def test_a_run_goes_on_with_another_number_of_workers(workers, tmp_path: Path, sizes: tuple[int, int]):
    alone, state = part_of_a_run(Group(), str(tmp_path / "alone"), SPREAD, 99), State(tmp_path / "state")
    for size, stop in zip(sizes, (7, 99), strict=True):
        if size == 1:
            found = [part_of_a_run(Group(), state.uri, SPREAD, stop)]
        else:
            found = workers(size, part_of_a_run, state.uri, SPREAD, stop)
        if stop == 7:
            files = set(state.find("checkpoint").files)
            parts = {f"{n}-tables-{r:05d}-of-{size:05d}.safetensors" for n in ("last", "best") for r in range(size)}
            assert files == parts | {"last.safetensors", "best.safetensors", "optimizer.safetensors", "progress.json"}
    for mine in found:
        np.testing.assert_allclose(mine["aucs"], alone["aucs"], atol=1e-6)
        for name, value in alone["weights"].items():
            torch.testing.assert_close(mine["weights"][name], value, rtol=1e-9, atol=1e-11, msg=name)
    # The saved model is whole, whoever wrote it, with the state of the tables' optimizer.
    saved, other = (load_file(State(u).local("model") / WEIGHTS) for u in (state.uri, tmp_path / "alone"))
    assert saved.keys() == other.keys() and "tables.field_user_id.exp_avg_sq" in saved
    for name, value in other.items():
        torch.testing.assert_close(saved[name], value, rtol=1e-7, atol=1e-11, msg=name)
    loaded = load_click_model(state.local("model"), SCHEMA)
    for name, table in loaded.tables.items():
        torch.testing.assert_close(table.weight, alone["weights"][name].float()), name


def test_validation_auc_is_over_all_rows():
    task = click_model("dcnv2", lr=0.1)  # scores far enough apart for the bins of a running AUC
    progress = fit(task, partial(train_batches, 0, 1), replace(LOOP, epochs=1), valid=partial(valid_batches, 0, 1))
    everything = list(valid_batches(0, 1))
    scores = torch.cat([task.predict(batch) for batch in everything]).detach()
    clicked = torch.cat([batch.label for batch in everything]) > 0
    pairs = scores[clicked][:, None] - scores[~clicked]
    exact = ((pairs > 0).double() + (pairs == 0).double() / 2).mean().item()
    assert progress.valid_auc == [[1, pytest.approx(exact, abs=1e-4)]] and progress.best_auc == progress.valid_auc[0][1]


@pytest.mark.parametrize("stop", [1, 3, 5, 7, 10])
@pytest.mark.parametrize(
    ("backbone", "options"),
    [
        ("din", {}),
        ("dcnv2", {"table_optimizer": "adamw", "table_precision": "bfloat16", "widths": ("user_id=3",)}),
        ("dcnv2", {"table_optimizer": "adagrad", "table_store": "sharded"}),
    ],
)
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not(tmp_path: Path, backbone: str, options: dict, stop: int):
    loop = replace(LOOP, precision="float32", checkpoint_seconds=-1.0, seed=5, patience=2)
    start = partial(click_model, backbone, networks=BackboneConfigs(), **options)
    whole, asked = start(), []
    expected = fit(whole, partial(train_batches, 0, 1), loop, valid=partial(valid_batches, 0, 1))

    def checkpoint(write, progress: Progress) -> None:
        if progress.step == stop:
            write(tmp_path)
            raise Stop

    def train(first: int) -> Iterator[Batch]:
        asked.append(first)
        return train_batches(0, 1, first)

    with pytest.raises(Stop):
        fit(start(), train, loop, valid=partial(valid_batches, 0, 1), checkpoint=checkpoint)
    # Everything comes from the checkpoint: neither these weights nor the state of the random numbers matter. But the
    # seed decides how bfloat16 is rounded, and the rows that a spread table keeps in reserve.
    again = start(seed=0 if options else 77)
    torch.manual_seed(123)
    progress = fit(again, train, loop, valid=partial(valid_batches, 0, 1), resume=tmp_path)
    assert asked == ([0, stop] if stop < 10 else [0])
    assert progress.valid_auc == expected.valid_auc and progress.best_epoch == expected.best_epoch
    assert progress.step == 10 and progress.finished
    for key, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def test_dropout_follows_the_seed():
    weights = []
    for seed in (5, 5, 6):
        task = click_model("din", networks=BackboneConfigs())
        torch.manual_seed(seed + len(weights))
        fit(task, partial(train_batches, 0, 1), replace(LOOP, seed=seed))
        weights.append(task.backbone.output.weight.detach())
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


class Line(Task):
    """One weight that every step moves; the loss is scripted, and so are the scores of each validation."""

    def __init__(self, aucs: list[float] | None = None, losses: list[float] | None = None) -> None:
        super().__init__()
        self.weight, self.idle = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.ones(1))
        self.aucs, self.losses, self.seen = aucs, losses, []

    def forward(self, batch: Tensor) -> dict[str, Tensor]:
        value = self.losses[int(batch[0])] if self.losses else 1.0
        pull = (self.weight - self.weight.detach()).sum() * -1
        return {"loss": pull + value, "half": pull.detach() + value / 2}

    def predict(self, batch: Any) -> Tensor:
        self.seen.append(self.weight.item())
        return SCORES[self.aucs[len(self.seen) - 1]]

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": [self.weight], "lr": 0.1, "weight_decay": 0.0}]


class Labels:
    """A batch of which a scripted task needs no more than the labels."""

    label = torch.tensor([0.0, 0.0, 1.0, 1.0])

    def __len__(self) -> int:
        return 4

    def to(self, device: Any) -> "Labels":
        return self


NAN = math.nan
SCORES = {  # of labels 0 0 1 1, by their AUC
    0.25: torch.tensor([0.3, 0.9, 0.2, 0.8]),
    0.5: torch.tensor([0.5, 0.5, 0.5, 0.5]),
    0.75: torch.tensor([0.1, 0.4, 0.3, 0.8]),
    1.0: torch.tensor([0.1, 0.2, 0.7, 0.9]),
    NAN: torch.tensor([NAN, 0.2, 0.7, 0.9]),
}


def steps_from(first: int, count: int = 1000) -> Iterator[Tensor]:
    return (torch.full((8,), float(step)) for step in range(first, count))


@pytest.mark.parametrize(
    ("aucs", "patience", "best", "ended"),
    [
        ([0.5, 1.0, 0.25, 0.75, 1.0, 1.0], 2, 2, 4),
        ([0.5, 0.25, 0.75, 0.5, 0.5, 0.5], 2, 3, 5),
        ([0.5, 0.25, 0.75, 0.5, 0.5, 0.5], 6, 3, 6),
        ([0.5, 0.25, 0.75, 0.5, 0.5, 0.25], 0, 6, 6),
        ([0.25, 0.5, 0.75, 0.75, 0.5, 1.0], 3, 6, 6),
        ([0.75, 0.5, 0.5, 0.5, 0.5, 0.5], 1, 1, 2),
        ([NAN, 0.5, 0.25, NAN, NAN, NAN], 3, 2, 5),
    ],
)
def test_patience_ends_the_run_and_keeps_the_best_epoch(aucs: list, patience: int, best: int, ended: int):
    task = Line(aucs)
    progress = fit(task, steps_from, LoopConfig(3, epochs=6, patience=patience), valid=lambda: iter([Labels()]))
    assert (progress.best_epoch, progress.step, progress.finished) == (best, 3 * ended, True)
    assert progress.best_auc == aucs[best - 1] and len(set(task.seen)) == ended
    np.testing.assert_allclose(progress.valid_auc, [[i + 1, auc] for i, auc in enumerate(aucs[:ended])], atol=1e-4)
    assert task.weight.item() == task.seen[best - 1]


class Judged(Line):
    """Judged by its loss: the mean of a batch's values, or in training a constant."""

    predict = Task.predict

    def forward(self, batch: Tensor) -> dict[str, Tensor]:
        value = self.group.all_reduce(batch.sum()) / max(1, self.group.all_reduce(torch.tensor(float(len(batch)))))
        return super().forward(batch) if self.training else {"loss": value, "other": value + 1}


@pytest.mark.parametrize(
    ("values", "patience", "best", "ended"),
    [
        ([5.0, 1.0, 3.0, 2.0, 1.0, 1.0], 2, 2, 4),
        ([5.0, 1.0, 3.0, 2.0, 0.5, 1.0], 3, 5, 6),
        ([5.0, 1.0, 3.0, 2.0, 1.0, 7.0], 0, 6, 6),
        ([NAN, 1.0, NAN, 2.0, 1.0, 7.0], 2, 2, 4),
    ],
)
def test_a_task_that_predicts_nothing_is_judged_by_its_loss(values: list, patience: int, best: int, ended: int):
    task, weights, left, records = Judged(), [], iter(values), []
    task.group = Group()

    def valid() -> Iterator[Tensor]:
        weights.append(task.weight.item())
        value = next(left)
        return iter([torch.full((3,), value + 1), torch.zeros(0), torch.full((1,), value - 3)])

    progress = fit(task, steps_from, LoopConfig(3, epochs=6, patience=patience), valid=valid, record=records.append)
    assert (progress.best_epoch, progress.step, progress.finished) == (best, 3 * ended, True)
    assert progress.best_loss == values[best - 1] and task.weight.item() == weights[best - 1]
    np.testing.assert_allclose(progress.valid_loss, [[i + 1, value] for i, value in enumerate(values[:ended])])
    assert [r["valid_loss"] for r in records if "valid_loss" in r] == pytest.approx(values[:ended], nan_ok=True)
    assert math.isnan(progress.best_auc) and not progress.valid_auc


def shared_loss(group: Group) -> list[list[float]]:
    task = Judged()
    task.group = Group()
    parts = [[torch.tensor([4.0, 1.0]), torch.tensor([7.0])], [torch.tensor([1.0]), torch.zeros(0)]]
    mine = parts[group.rank] if group.size > 1 else [torch.cat(both) for both in zip(*parts, strict=True)]
    return fit(task, steps_from, LoopConfig(2, epochs=2), group=group, valid=lambda: iter(mine)).valid_loss


def test_the_validation_loss_is_over_all_rows_of_all_workers(two_workers):
    expected = [[1, 13 / 4], [2, 13 / 4]]
    assert shared_loss(Group()) == expected and two_workers(shared_loss) == [expected, expected]


def test_without_validation_the_last_weights_are_kept():
    task = Line()
    progress = fit(task, steps_from, LoopConfig(3, epochs=2))
    assert progress.step == 6 and math.isnan(progress.best_auc) and progress.valid_auc == []
    # Adam under a constant gradient moves by the learning rate a step.
    assert task.weight.item() == pytest.approx(0.6, rel=1e-4)


def test_the_learning_rate_follows_the_schedule():
    task, weights = Line(), []
    forward = task.forward
    task.forward = lambda batch: (weights.append(task.weight.item()), forward(batch))[1]
    fit(task, steps_from, LoopConfig(8, schedule="cosine", warmup=0.5))
    moves = np.diff([*weights, task.weight.item()]) / 0.1
    warm, wave = [0.25, 0.5, 0.75, 1.0], [0.5 * (1 + math.cos(math.pi * k / 4)) for k in (1, 2, 3, 4)]
    np.testing.assert_allclose(moves, warm + wave, atol=1e-4)


@pytest.mark.parametrize("value", [NAN, math.inf])
def test_a_loss_that_is_no_number_ends_the_run(value: float):
    with pytest.raises(UserError, match=f"the loss is {value} at step 3; lower the learning rate .*--ctr.lr"):
        fit(Line(losses=[1.0, 1.0, value, 1.0]), steps_from, LoopConfig(4, log_seconds=-1.0))
    with pytest.raises(UserError, match="lower the learning rate"):
        fit(Line(losses=[1.0, value, 1.0, 1.0]), steps_from, LoopConfig(4), checkpoint=lambda *_: pytest.fail("saved"))


def test_parameters_that_no_group_names_are_frozen():
    task = Line()
    assert task.idle.requires_grad
    fit(task, steps_from, LoopConfig(2))
    assert not task.idle.requires_grad and task.idle.item() == 1 and task.weight.requires_grad


class OnlyTable(Task):
    def __init__(self) -> None:
        super().__init__()
        self.table = EmbeddingTable(5, 2, RowAdam(lr=0.1))

    def forward(self, batch: Tensor) -> dict[str, Tensor]:
        return {"loss": self.table(Lookup.of(np.array([2, 3]))).sum()}

    def parameter_groups(self) -> list[dict[str, Any]]:
        return []


def test_a_task_with_nothing_but_a_table(tmp_path: Path):
    task = OnlyTable()
    before = task.table.weight.clone()
    fit(task, steps_from, LoopConfig(3, clip_norm=1.0), checkpoint=lambda write, progress: write(tmp_path))
    torch.testing.assert_close(task.table.weight[2:4], before[2:4] - 0.3, rtol=1e-4, atol=1e-5)
    assert torch.equal(task.table.weight[[0, 1, 4]], before[[0, 1, 4]])
    other = OnlyTable()
    load_checkpoint(tmp_path, other, make_optimizer(other))
    assert torch.equal(other.table.weight, task.table.weight) and torch.equal(other.table.steps, task.table.steps)


def test_records():
    losses, records = [4.0, 2.0, 3.0, 1.0, 6.0, 2.0], []
    task = Line([0.5, 0.75], losses)
    fit(task, steps_from, LoopConfig(3, epochs=2, log_seconds=-1.0), valid=lambda: iter([Labels()]),
        record=records.append)  # fmt: skip
    steps = [r for r in records if "loss" in r]
    assert [(r["step"], r["loss"], r["half"]) for r in steps] == [(i + 1, x, x / 2) for i, x in enumerate(losses)]
    assert [r["epoch"] for r in steps] == pytest.approx([(i + 1) / 3 for i in range(6)])
    assert {r["steps"] for r in records} == {6}
    assert all(r["rows_per_second"] > 0 and 0 <= r["data_wait"] <= 1 for r in steps)
    found = [(r["step"], pytest.approx(r["valid_auc"], abs=1e-4)) for r in records if "valid_auc" in r]
    assert found == [(3, 0.5), (6, 0.75)]


def test_a_record_is_the_mean_since_the_last_one():
    records: list[dict[str, float]] = []
    progress = fit(Line(losses=[4.0, 2.0, 3.0, 1.0, 6.0, 2.0]), steps_from, LoopConfig(3, epochs=2, log_seconds=1e9),
                   record=records.append)  # fmt: skip
    assert [(r["step"], r["loss"]) for r in records] == [(3, 3.0), (6, 3.0)] and progress.losses == [[3, 3.0], [6, 3.0]]


class Clock:
    """The loop's time, which only what a test says lets pass; batches are made where they are taken."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("ctrdist.loop.time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr("ctrdist.loop.prefetch", lambda batches: batches)


def test_a_slow_source_shows_as_waiting_but_for_its_start(monkeypatch):
    clock = Clock(monkeypatch)

    class Slow(Line):
        def forward(self, batch: Tensor) -> dict[str, Tensor]:
            clock.now += 0.01
            return super().forward(batch)

    def slow(first: int) -> Iterator[Tensor]:
        clock.now += 0.5
        for number, batch in enumerate(steps_from(first)):
            clock.now += 0.03 if number else 0
            yield batch

    records: list[dict[str, float]] = []
    progress = fit(Slow(), slow, LoopConfig(8, log_seconds=1e9), record=records.append)
    waited, seconds = 7 * 0.03, 7 * 0.03 + 8 * 0.01
    assert progress.waited == pytest.approx(waited) and progress.seconds == pytest.approx(seconds)
    assert records[0]["data_wait"] == pytest.approx(waited / seconds)
    rows = sum(len(batch) for batch in islice(steps_from(0), 8))
    assert records[0]["rows_per_second"] == pytest.approx(rows / seconds)


def threads_end(before: set[threading.Thread]) -> bool:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if not any(thread.name == "prefetch" for thread in set(threading.enumerate()) - before):
            return True
        time.sleep(0.02)
    return False


def test_prefetch_keeps_the_order_and_stays_a_few_ahead():
    made: list[int] = []

    def source() -> Iterator[int]:
        for number in range(50):
            made.append(number)
            yield number

    before, batches = set(threading.enumerate()), prefetch(source(), depth=3)
    assert [next(batches), next(batches)] == [0, 1]
    deadline = time.monotonic() + 60
    while len(made) < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    assert made == list(range(6))  # two taken, three ready, one in hand
    assert list(batches) == list(range(2, 50)) and threads_end(before)


def test_prefetch_passes_an_error_on_after_what_came_before():
    def source() -> Iterator[int]:
        yield from (1, 2)
        raise UserError("the disk is full")

    got, before = [], set(threading.enumerate())
    with pytest.raises(UserError, match="the disk is full"):
        for batch in prefetch(source()):
            got.append(batch)
    assert got == [1, 2] and threads_end(before)
    assert list(prefetch(iter([]))) == []


def test_the_thread_ends_when_nobody_wants_more():
    before = set(threading.enumerate())
    batches = prefetch(iter(range(10**9)))
    assert list(islice(batches, 2)) == [0, 1] and set(threading.enumerate()) - before
    batches.close()
    assert threads_end(before)
    fit(Line([0.5, 0.25, 0.25]), lambda first: steps_from(first, 10**9), LoopConfig(2, epochs=3, patience=1),
        valid=lambda: iter([Labels()]))  # fmt: skip
    assert threads_end(before)


def test_an_error_of_the_data_reaches_the_caller():
    def broken(first: int) -> Iterator[Tensor]:
        yield from islice(steps_from(first), 2)
        raise UserError("part-3.parquet: not a readable Parquet file")

    with pytest.raises(UserError, match="part-3.parquet"):
        fit(Line(), broken, LoopConfig(5))
