from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score
from torch import Tensor

from ctrdist.backbones import NAMES, BackboneConfigs
from ctrdist.backbones.dcnv2 import Config as DCNv2Config
from ctrdist.backbones.din import Config as DINConfig
from ctrdist.batch import Batch, join_items
from ctrdist.embedding import EmbeddingTable, tables_of
from ctrdist.errors import UserError
from ctrdist.export import DESCRIPTION, WEIGHTS, export_dense, load_click_model, save_click_model
from ctrdist.group import Group
from ctrdist.loop import LoopConfig, fit
from ctrdist.schema import Field, Schema
from ctrdist.sharded import ShardedTable, row_bytes
from ctrdist.tasks.click import ClickConfig, ClickModel
from ctrdist.tasks.distill import Distillation, DistillConfig

SCHEMA = Schema(user=(Field("user_id"),), item=(Field("item_id"), Field("genre")), history_length=3)
SIZES = {"user_id": 12, "item_id": 10, "genre": 5}
VECTOR = 6
DRY = BackboneConfigs(din=DINConfig(dropout=0.0), dcnv2=DCNv2Config(dropout=0.0))
Plain = partial(DistillConfig, vector_dropout=0.0)
NOTHING = Plain(score="none", mse_weight=0.0)


def batch_of(rows: int, seed: int = 0) -> Batch:
    draws, items = np.random.default_rng(seed), np.random.default_rng(9)
    history = np.where(np.arange(3) < draws.integers(0, 4, (rows, 1)), draws.integers(2, 10, (rows, 3)), 0)
    fields = {"item_id": np.arange(10, dtype=np.int32), "genre": np.append(0, items.integers(1, 5, 9)).astype(np.int32)}
    users = {"user_id": draws.integers(1, 12, rows).astype(np.int32)}
    batch = join_items(draws.random(rows) < 0.4, users, draws.integers(2, 10, rows), history, fields)
    return replace(batch, vector=torch.from_numpy(draws.normal(size=(rows, VECTOR)).astype(np.float32)))


def pair(backbone: str = "din", config: DistillConfig | None = None, seed: int = 0, **options: Any) -> Distillation:
    options = {"dim": 4, "lr": 0.01, "table_lr": 0.02, "unknown_share": 0.0, "networks": DRY} | options
    config = config or Plain()
    return Distillation.build(SCHEMA, SIZES, ClickConfig(backbone=backbone, **options), config, VECTOR, seed)


def gradients(task: Distillation) -> dict[str, Tensor]:
    """Of every parameter, and of the rows that the tables have looked up."""
    found = {name: p.grad for name, p in task.named_parameters()}
    for model, network in (("vanilla", task.vanilla), ("gain", task.gain)):
        for name, table in network.tables.items() if network.tables is not None else ():
            for number, (_, leaf) in enumerate(table._pending):
                found[f"{model}.tables.{name}.{number}"] = leaf.grad
    return found


@pytest.mark.parametrize("name", NAMES)
def test_the_vanilla_network_is_the_plain_backbone(name: str, tmp_path: Path):
    task, plain = pair(name), ClickModel(SCHEMA, SIZES, pair(name).vanilla.config)
    for folder, model in (("vanilla", task.vanilla), ("plain", plain)):
        (tmp_path / folder).mkdir()
        save_click_model(model, tmp_path / folder, optimizer_state=False)
    for file in (WEIGHTS, DESCRIPTION):
        assert (tmp_path / "vanilla" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()
    assert repr(task.vanilla) == repr(plain)
    batch = batch_of(20)
    assert torch.equal(task.eval().predict(batch), plain.eval().predict(replace(batch, vector=None)))


def described(program: torch.export.ExportedProgram) -> tuple[list, list, str]:
    """Its nodes, with the shapes and types of what they compute; names, shapes and bytes of its weights; its inputs."""
    nodes = [(n.op, n.name, str(n.target), n.args, n.kwargs, n.meta.get("val")) for n in program.graph.nodes]
    weights = [(name, value.shape, value.dtype, value.nbytes) for name, value in program.state_dict.items()]
    return [list(map(str, node)) for node in nodes], weights, str(program.graph_signature)


@pytest.mark.parametrize("name", NAMES)
def test_the_vanilla_networks_exported_graph_is_the_plain_backbones(name: str):
    task, batch = pair(name, seed=3).eval(), batch_of(5)
    plain = ClickModel(SCHEMA, SIZES, task.vanilla.config).eval()
    with torch.no_grad():  # what it has learnt, and from whom, is no part of a graph
        for weight in task.vanilla.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    vanilla, alone = (export_dense(model, batch.history.shape[1]) for model in (task.vanilla, plain))
    assert described(vanilla) == described(alone)
    assert len(vanilla.state_dict) == len(task.vanilla.backbone.state_dict())
    other = batch_of(9, seed=2)
    with torch.no_grad():
        torch.testing.assert_close(vanilla.module()(*task.vanilla.look_up(other)), task.vanilla.predict(other))


def test_the_gain_networks_exported_graph_reads_the_vector():
    task, batch = pair("dcnv2").eval(), batch_of(5)
    gain, vanilla = (described(export_dense(model, batch.history.shape[1])) for model in (task.gain, task.vanilla))
    assert "join.weight" in [name for name, *_ in gain[1]] and "vector" in [node[1] for node in gain[0]]
    assert "vector" not in str(vanilla) and "join" not in str(vanilla)


@pytest.mark.parametrize("share", [False, True])
def test_tables_of_both_networks_are_to_fit_into_memory(share: bool, monkeypatch):
    monkeypatch.setattr("ctrdist.tasks.click.current_group", lambda: SimpleNamespace(size=2))
    plain = ClickModel(SCHEMA, SIZES, ClickConfig(backbone="dcnv2", dim=4))
    needed = sum(SIZES.values()) * row_bytes(4, plain.tables["user_id"].optimizer) / 2**30

    def kinds(memory: float) -> set[type]:
        task = pair("dcnv2", Plain(share_embeddings=share), table_memory_gib=memory)
        return {type(table) for table in tables_of(task)}

    assert kinds(needed * 2.001) == {EmbeddingTable}
    assert kinds(needed * 1.001) == {EmbeddingTable if share else ShardedTable}
    assert kinds(needed * 0.999) == {ShardedTable}


@pytest.mark.parametrize("name", NAMES)
def test_gain_networks_read_the_vector_and_have_parameters_of_their_own(name: str):
    task, batch = pair(name).eval(), batch_of(20)
    other = replace(batch, vector=batch.vector.flip(0))
    # At first the vector has no weight: the gain network is its collaborative module.
    torch.testing.assert_close(task.gain.predict(batch), task.gain.predict(other))
    with torch.no_grad():
        task.gain.join.weight[:, -VECTOR:] += 0.3
    assert (task.gain.predict(batch) - task.gain.predict(other)).abs().max() > 1e-3
    assert torch.equal(task.vanilla.predict(batch), task.vanilla.predict(other))
    own, its = task.vanilla.state_dict(), task.gain.state_dict()
    assert {name: value.shape for name, value in own.items()} == {
        name: value.shape for name, value in its.items() if not name.startswith("join.")
    }
    matrices = [key for key, value in own.items() if value.ndim > 1 and value.any()]
    assert matrices and not any(torch.equal(own[key], its[key]) for key in matrices if "exp_avg" not in key)


def perturbed(config: DistillConfig, backbone: str = "din") -> Distillation:
    """A pair whose networks say something and disagree."""
    task = pair(backbone, config)
    with torch.no_grad():
        for number, parameter in enumerate(task.parameters()):
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        for table in tables_of(task):
            table.weight *= 30
    return task


@pytest.mark.parametrize("share", [False, True])
def test_the_loss_is_the_sum_of_equation_5(share: bool):
    config = Plain(clid_weight=0.7, mse_weight=0.3, share_embeddings=share)
    task, batch = perturbed(config).eval(), batch_of(30)
    with torch.no_grad():
        found = {name: value.item() for name, value in task(batch).items()}
        gain = task.whole_gain()
        inputs = (task.vanilla.inputs(batch), gain.inputs(batch))
        own, its = task.vanilla.represent(batch, inputs[0])[0], gain.represent(batch, inputs[1])[0]
        p_v, p_g = task.vanilla.predict(batch).double().numpy(), gain.predict(batch).double().numpy()
    assert found["vanilla"] == pytest.approx(log_loss(batch.label, p_v), rel=1e-5)
    assert found["gain"] == pytest.approx(log_loss(batch.label, p_g), rel=1e-5)
    assert found["score"] == pytest.approx(-(p_g / p_g.sum() * np.log(p_v / p_v.sum())).sum(), rel=1e-5)
    assert found["representation"] == pytest.approx((own - its).square().sum(1).mean().item(), rel=1e-5)
    assert found["loss"] == pytest.approx(
        found["vanilla"] + found["gain"] + 0.7 * found["score"] + 0.3 * found["representation"], rel=1e-6
    )
    assert abs(p_v - p_g).max() > 0.05


@pytest.mark.parametrize("score", ["clid", "softmax", "pointwise"])
def test_distillation_moves_the_vanilla_network_alone(score: str):
    batch = batch_of(30)
    tasks = [perturbed(config) for config in (Plain(score=score), NOTHING)]
    for task in tasks:
        task(batch)["loss"].backward()
    taught, alone = map(gradients, tasks)
    assert taught.keys() == alone.keys() and all(value is not None for value in taught.values())
    for name, gradient in taught.items():
        if name.startswith("gain."):
            torch.testing.assert_close(gradient, alone[name], rtol=0, atol=0, msg=name)
    moved = [n for n, g in taught.items() if n.startswith("vanilla.") and not torch.allclose(g, alone[n], atol=1e-5)]
    assert {n for n in taught if n.startswith("vanilla.tables.")} <= set(moved)
    assert {"vanilla.backbone.mlp.layers.0.weight", "vanilla.backbone.output.weight"} <= set(moved)
    # The head reads what the distance is of: only the scores move it.
    head = pair("din", Plain(score="none"))
    head(batch)["loss"].backward()
    plain = pair("din", NOTHING)
    plain(batch)["loss"].backward()
    assert torch.equal(head.vanilla.backbone.output.weight.grad, plain.vanilla.backbone.output.weight.grad)


def train_batches(rank: int, size: int, first: int) -> Iterator[Batch]:
    """A worker's parts of `whole_batches`; the last one of an epoch is the first worker's alone."""
    for step, rows in enumerate(whole_batches(first), first):
        yield rows if size == 1 else part(rows, rank, step % 5 == 4)


def part(batch: Batch, rank: int, last: bool) -> Batch:
    """A worker's half of a global batch; of the last one of an epoch the first worker has all rows."""
    mine = slice(0, len(batch)) if last else slice(6 * rank, 6 * rank + 6)
    if last and rank:
        return batch.empty()
    users = batch.row_fields["user_id"]
    lookup = type(users).of(users.rows[users.index[mine]].numpy().astype(np.int32))
    return replace(
        batch, label=batch.label[mine], row_fields={"user_id": lookup}, target=batch.target[mine],
        history=batch.history[mine], vector=batch.vector[mine],
    )  # fmt: skip


LOOP = LoopConfig(5, epochs=2, schedule="linear", precision="float64")
CASES = {
    "own": Plain(mse_weight=0.5),
    "shared": Plain(mse_weight=0.5, share_embeddings=True),
    "softmax": Plain(score="softmax", clid_mean=True),
}


def trained(group: Group, names: list[str]) -> dict[str, dict[str, Tensor]]:
    out = {}
    for name in names:
        task = pair("dcnv2", CASES[name])
        fit(task, partial(train_batches, group.rank, group.size), LOOP, group=group)
        out[name] = task.state_dict()
    return out


def whole_batches(first: int) -> Iterator[Batch]:
    """Four global batches of 12 rows and one of 6 an epoch, two epochs."""
    for step in range(first, 10):
        yield batch_of(12 if step % 5 < 4 else 6, seed=step % 5)


def test_two_workers_end_with_the_weights_of_one(two_workers):
    names = list(CASES)
    alone, (first, second) = trained(Group(), names), two_workers(trained, names)
    for name in names:
        start = pair("dcnv2", CASES[name]).double().state_dict()
        for key, value in alone[name].items():
            assert torch.equal(first[name][key], second[name][key]), (name, key)
            torch.testing.assert_close(first[name][key], value, rtol=1e-9, atol=1e-11, msg=f"{name} {key}")
        assert sum(not torch.equal(value, start[key]) for key, value in alone[name].items()) > 10


def test_a_run_goes_on_from_a_checkpoint_and_ends_alike(tmp_path: Path):
    for name, config in CASES.items():
        whole, cut, rest = (pair("dcnv2", config) for _ in range(3))
        fit(whole, whole_batches, LOOP)

        def stop(write, progress, folder: Path = tmp_path / name) -> None:
            if progress.step == 7:  # in the midst of the second epoch
                folder.mkdir()
                write(folder)
                raise InterruptedError

        with pytest.raises(InterruptedError):
            fit(cut, whole_batches, replace(LOOP, checkpoint_seconds=0.0), checkpoint=stop)
        fit(rest, whole_batches, LOOP, resume=tmp_path / name)
        for key, value in whole.state_dict().items():
            assert torch.equal(rest.state_dict()[key], value), (name, key)


def test_without_distillation_the_vanilla_network_is_trained_as_it_would_be_alone():
    options = {"unknown_share": 0.3, "networks": BackboneConfigs()}  # with draws
    task = pair("din", NOTHING, **options)
    plain = ClickModel(SCHEMA, SIZES, task.vanilla.config)
    loop = replace(LOOP, precision="float32")
    fit(task, whole_batches, loop)
    fit(plain, whole_batches, loop)
    for key, value in plain.state_dict().items():
        assert torch.equal(task.vanilla.state_dict()[key], value), key
    taught = pair("din", Plain(), **options)
    fit(taught, whole_batches, loop)
    assert not torch.equal(taught.vanilla.backbone.output.weight, plain.backbone.output.weight)


def test_some_rows_vectors_are_hidden_in_training_only():
    task, batch = pair("din", DistillConfig(vector_dropout=0.25)), batch_of(2000)
    torch.manual_seed(0)
    shown = task.hide_vectors(batch).vector
    hidden = (shown == 0).all(1)
    assert 0.2 < hidden.float().mean() < 0.3 and torch.equal(shown[~hidden], batch.vector[~hidden])
    assert task.eval().hide_vectors(batch) is batch
    with pytest.raises(UserError, match="distill.vector_dropout: 1.0 is not a share"):
        DistillConfig(vector_dropout=1.0)


def test_shared_embeddings_are_one_set_of_tables_that_both_train(tmp_path: Path):
    config = Plain(share_embeddings=True)
    task, batch = pair("din", config), batch_of(30)
    assert len(tables_of(task)) == len(SIZES) and len(tables_of(pair())) == 2 * len(SIZES)
    task(batch)["gain"].backward()
    assert all(leaf.grad is not None and leaf.grad.any() for t in tables_of(task) for _, leaf in t._pending)
    fit(task, whole_batches, replace(LOOP, precision="float32"))
    gain = task.whole_gain()
    save_click_model(gain, tmp_path)
    loaded, batch = load_click_model(tmp_path, SCHEMA), batch_of(30)
    assert loaded.vector_dim == VECTOR and torch.equal(loaded.predict(batch), gain.predict(batch))
    again = Distillation(load_click_model(tmp_path, SCHEMA), loaded, config)
    assert len(tables_of(again)) == len(SIZES)


def test_a_perfect_teacher_helps_a_network_that_lacks_a_feature():
    """Clicks hang weakly on user, item, and what only the teacher's vector says: its scores are less noisy."""
    draws = np.random.default_rng(0)
    taste, quality = draws.normal(size=12), draws.normal(size=10)

    def rows(count: int, seed: int) -> tuple[Batch, np.ndarray]:
        batch = batch_of(count, seed)
        users = batch.row_fields["user_id"].rows[batch.row_fields["user_id"].index].numpy()
        unseen = np.random.default_rng(seed + 100).normal(size=count)
        known = taste[users] + quality[batch.items[batch.target].numpy()]
        truth = (known + unseen) / 2
        vector = np.zeros((count, VECTOR), np.float32)
        vector[:, 0] = truth
        clicks = np.random.default_rng(seed + 200).random(count) < 1 / (1 + np.exp(-truth))
        return replace(batch, vector=torch.from_numpy(vector), label=torch.from_numpy(clicks).float()), known

    test, known = rows(4000, 50)
    preferred = known > np.median(known)
    loop = LoopConfig(8, epochs=10, schedule="linear")
    found = {}
    for score in ("none", "clid", "pointwise"):
        task = pair("dnn", Plain(score=score, clid_weight=1.0, mse_weight=0.0), table_lr=1e-3)
        fit(task, lambda first: (rows(64, step % 8)[0] for step in range(first, 80)), loop)
        found[score] = roc_auc_score(preferred, task.predict(test).detach())
        assert roc_auc_score(test.label, task.gain.predict(test).detach()) > 0.66
    assert found["clid"] > found["none"] + 0.015 and found["pointwise"] > found["none"] + 0.015, found


@pytest.mark.parametrize("name", ["clid_weight", "mse_weight"])
def test_weights_under_zero_are_refused(name: str):
    with pytest.raises(UserError, match=f"distill.{name}: -1 is under 0"):
        DistillConfig(**{name: -1})
