from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from sklearn.metrics import log_loss
from torch import Tensor

from ctrdist.backbones import NAMES, BackboneConfigs
from ctrdist.backbones.dcnv2 import Config as DCNv2Config
from ctrdist.batch import Batch, Lookup, collate
from ctrdist.embedding import tables_of
from ctrdist.errors import UserError
from ctrdist.group import Group
from ctrdist.items import Catalog, Ragged
from ctrdist.schema import Field, Schema
from ctrdist.tasks.click import ClickConfig, ClickModel
from ctrdist.text_field import FuseConfig, TextField
from ctrdist.vocabulary import Vocabulary

SIZES = {"user_id": 9, "tags": 6, "hour": 5, "item_id": 12, "genres": 7}
SCHEMA = Schema(
    user=(Field("user_id"), Field("tags", "multi")),
    item=(Field("item_id"), Field("genres", "multi")),
    context=(Field("hour"),),
    history_length=4,
)
D, TEXT = 4, 6
NETWORKS = BackboneConfigs()
STACKED = replace(NETWORKS, dcnv2=DCNv2Config(structure="stacked"))


def bags(draws: np.random.Generator, count: int, rows: int) -> Ragged:
    lengths = draws.integers(0, 4, count)
    return Ragged(draws.integers(2, rows, lengths.sum()).astype(np.int32), np.append(0, lengths.cumsum()))


def world(rows: int = 30, schema: Schema = SCHEMA) -> tuple[Batch, Catalog]:
    """A batch of a log of 12 items with text vectors, and the items."""
    draws = np.random.default_rng(0)
    genres = bags(draws, 12, SIZES["genres"])
    item_id = np.arange(12, dtype=np.int32)
    item_id[[1, 5]] = 1
    genres = Ragged(genres.values[genres.offsets[1] :], np.append(0, genres.offsets[1:] - genres.offsets[1]))
    catalog = Catalog(Vocabulary(), np.arange(12) > 1, {"item_id": item_id, "genres": genres})
    tags = bags(draws, rows, SIZES["tags"])
    lengths = draws.integers(0, 5, rows)
    history = np.where(np.arange(4) < lengths[:, None], draws.integers(2, 12, (rows, 4)), 0)
    columns = {
        "label": pa.array(np.arange(rows) % 3 == 0).cast(pa.float32()),
        "item": pa.array(draws.integers(2, 12, rows).astype(np.int32)),
        "filler": pa.array(np.zeros(rows, bool)),
        "user_id": pa.array(draws.integers(1, SIZES["user_id"], rows).astype(np.int32)),
        "tags": pa.LargeListArray.from_arrays(tags.offsets, tags.values),
        "hour": pa.array(draws.integers(1, SIZES["hour"], rows).astype(np.int32)),
        "history": pa.FixedSizeListArray.from_arrays(history.astype(np.int32).ravel(), 4),
    }
    text = draws.normal(size=(12, TEXT)).astype(np.float32)
    text[0] = 0
    return collate(pa.table(columns), schema, catalog, text), catalog


def model_of(name: str, text_dim: int = 0, seed: int = 0, networks: BackboneConfigs = NETWORKS) -> ClickModel:
    config = ClickConfig(backbone=name, dim=D, networks=networks)
    model = ClickModel(SCHEMA, SIZES, config, text_dim, FuseConfig(scale=1.0), seed=seed)
    with torch.no_grad():
        for table in tables_of(model):
            table.weight *= 100
    return model.eval()


def without_text(name: str, stacked: bool, width: int) -> dict[str, list[list[int]]]:
    """Of the fused model's parameters that see the text field, by name: what stays without it, along each dimension."""
    fields, behaviour = 6 * D, 3 * D
    x0 = [*range(5 * D), *range(fields, fields + 2 * D)]
    if name == "din":
        pairs = [part * behaviour + i for part in range(4) for i in range(2 * D)]
        return {"attention.0.weight": [pairs], "mlp.layers.0.weight": [x0]}
    assert name == "dcnv2"
    kept = {"mlp.layers.0.weight": [x0]}
    for layer in range(2):
        kept |= {f"cross.{layer}.weight": [x0, x0], f"cross.{layer}.bias": [x0]}
    return kept if stacked else kept | {"output.weight": [[*x0, *range(fields + behaviour, width)]]}


@pytest.mark.parametrize(
    ("name", "networks"), [("din", NETWORKS), ("dcnv2", NETWORKS), ("dcnv2", STACKED)], ids=["din", "dcnv2", "stacked"]
)
def test_a_fused_model_without_its_text_field_is_the_id_model(name: str, networks: BackboneConfigs):
    fused, plain = model_of(name, TEXT, 0, networks), model_of(name, 0, 1, networks)
    batch, _ = world()
    with_text = fused.predict(batch)
    with torch.no_grad():
        fused.text_field.norm.weight.zero_()
        fused.text_field.norm.bias.zero_()
    kept = without_text(name, networks is STACKED, fused.backbone.width)
    state = {key: value for key, value in fused.state_dict().items() if not key.startswith("text_field.")}
    for key, indices in kept.items():
        value = state[f"backbone.{key}"]
        for dimension, index in zip(range(value.ndim - len(indices), value.ndim), indices, strict=True):
            value = value.index_select(dimension, torch.tensor(index))
        state[f"backbone.{key}"] = value
    plain.load_state_dict(state)
    expected = plain.logits(replace(batch, text=None))[0]
    torch.testing.assert_close(fused.logits(batch)[0], expected, rtol=1e-5, atol=1e-6)
    assert expected.std() > 1e-3 and (with_text - torch.sigmoid(expected)).abs().max() > 1e-3


@pytest.mark.parametrize("on", ["target", "behaviours"])
def test_text_on_one_side_only_is_text_of_zeros_on_the_other(on: str):
    both = model_of("din", TEXT)
    config = replace(both.fuse, on=on)
    one = ClickModel(SCHEMA, SIZES, both.config, TEXT, config).eval()
    one.load_state_dict(both.state_dict())
    batch, _ = world()
    inputs, full = one.inputs(batch), both.inputs(batch)
    seen, blank = (inputs.fields[:, 5], inputs.history[:, :, 2]) if on == "target" else (
        inputs.history[:, :, 2], inputs.fields[:, 5]
    )  # fmt: skip
    assert torch.equal(blank, torch.zeros_like(blank)) and seen.abs().max() > 0.1
    assert torch.equal(seen, full.fields[:, 5] if on == "target" else full.history[:, :, 2])
    assert torch.equal(inputs.fields[:, :5], full.fields[:, :5])
    assert torch.equal(inputs.history[:, :, :2], full.history[:, :, :2])


def test_a_frozen_projection_keeps_its_matrices_and_trains_its_scale():
    model = ClickModel(SCHEMA, SIZES, ClickConfig(dim=D), TEXT, FuseConfig(frozen=True))
    trained = {id(p) for group in model.parameter_groups() for p in group["params"]}
    assert not trained & {id(p) for p in model.text_field.mlp.parameters()}
    assert trained == {id(p) for p in model.parameters()} - {id(p) for p in model.text_field.mlp.parameters()}


def by_hand(model: ClickModel, name: str, ids: list[int]) -> Tensor:
    rows = [model.tables[name].weight[i] for i in ids]
    return torch.stack(rows).mean(0) if rows else torch.zeros(D)


def test_inputs_are_table_rows_joined_by_hand():
    model, (batch, catalog) = model_of("din", TEXT), world()
    inputs = model.inputs(batch)
    assert inputs.fields.shape == (30, 6, D) and inputs.history.shape == (30, 4, 3, D) and inputs.target == (3, 4, 5)
    text = model.text_field(batch.text)

    def item(row: int) -> Tensor:
        genres, at = catalog.fields["genres"], batch.items.tolist().index(row)
        bag = genres.values[genres.offsets[row] : genres.offsets[row + 1]].tolist()
        return torch.stack(
            [by_hand(model, "item_id", [catalog.fields["item_id"][row]]), by_hand(model, "genres", bag), text[at]]
        )

    users, tags, hours = (batch.row_fields[name] for name in ("user_id", "tags", "hour"))
    for b in range(30):
        bag = tags.rows[tags.index[tags.offsets[b] : tags.offsets[b + 1]]].tolist()
        row = [by_hand(model, "user_id", [users.rows[users.index[b]]]), by_hand(model, "tags", bag)]
        row.append(by_hand(model, "hour", [hours.rows[hours.index[b]]]))
        expected = torch.cat([torch.stack(row), item(int(batch.items[batch.target[b]]))])
        torch.testing.assert_close(inputs.fields[b], expected)
        for t in range(4):
            behaviour = int(batch.items[batch.history[b, t]])
            assert inputs.mask[b, t].item() == (behaviour != 0)
            if behaviour:
                torch.testing.assert_close(inputs.history[b, t], item(behaviour))
    assert 0 < inputs.mask.sum() < 120


def test_the_text_field_starts_at_its_scale():
    field = TextField(TEXT, 64, FuseConfig(scale=0.25)).eval()
    assert field(torch.randn(10, TEXT)).square().mean().sqrt().item() == pytest.approx(0.25, rel=1e-3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text_dim", [0, TEXT])
def test_the_loss_is_the_log_loss_of_what_it_predicts(name: str, text_dim: int):
    model, (batch, _) = model_of(name, text_dim), world()
    with torch.no_grad():
        for table in tables_of(model):
            table.weight /= 32  # a factorization machine's sums would round to certainty
    out, probability = model(batch), model.predict(batch).detach()
    assert probability.dtype == torch.float32 and ((probability > 0) & (probability < 1)).all()
    expected = log_loss(batch.label.numpy(), probability.double().numpy())
    click = out.get("click", out["loss"])
    assert click.item() == pytest.approx(expected, rel=1e-5)
    auxiliary = [value.item() for key, value in out.items() if key not in ("loss", "click")]
    assert out["loss"].item() == pytest.approx(click.item() + sum(auxiliary), rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_learns_its_batch(name: str):
    model, (batch, _) = model_of(name, TEXT), world()
    model.train()
    optimizer = torch.optim.AdamW(model.parameter_groups())
    before = model(batch)["loss"].item()
    tables = {key: table.weight.clone() for key, table in model.tables.items()}
    text_field = [p.detach().clone() for p in model.text_field.parameters()]
    for table in tables_of(model):
        table._pending.clear()
    for _ in range(80):
        optimizer.zero_grad()
        model(batch)["loss"].backward()
        optimizer.step()
        for table in tables_of(model):
            table.push(Group())
    assert model.eval()(batch)["loss"].item() < 0.6 * before
    for key, table in model.tables.items():
        assert not torch.equal(table.weight, tables[key]) and not table.weight[0].any(), key
    assert all(not torch.equal(p, old) for p, old in zip(model.text_field.parameters(), text_field, strict=True))


def test_item_embeddings_are_the_item_side_without_text():
    model, (_, catalog) = model_of("din", TEXT), world()
    items = np.array([2, 5, 9, 2])
    genres = catalog.fields["genres"]
    asked = {
        "item_id": Lookup.of(catalog.fields["item_id"][items]),
        "genres": Lookup.of(genres.take(items)),
    }
    found = model.item_embeddings(asked)
    assert found.shape == (4, 2 * D) and not found.requires_grad
    for row, vector in zip(items, found, strict=True):
        bag = genres.values[genres.offsets[row] : genres.offsets[row + 1]].tolist()
        expected = torch.cat(
            [by_hand(model, "item_id", [catalog.fields["item_id"][row]]), by_hand(model, "genres", bag)]
        )
        torch.testing.assert_close(vector, expected)
    assert all(not table._pending for table in tables_of(model))


@pytest.mark.parametrize("name", NAMES)
def test_growing_keeps_the_predictions_of_known_ids(name: str):
    model, (batch, _) = model_of(name), world()
    batch = replace(batch, text=None)
    with torch.no_grad():
        before = model.predict(batch)
        model.grow({key: size + 5 for key, size in SIZES.items()})
        assert torch.equal(model.predict(batch), before)
    assert {key: table.rows for key, table in model.tables.items()} == {key: size + 5 for key, size in SIZES.items()}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text_dim", [0, TEXT])
def test_a_log_without_histories(name: str, text_dim: int):
    schema = replace(SCHEMA, history_length=0)
    batch, _ = world(schema=schema)
    model = ClickModel(schema, SIZES, ClickConfig(backbone=name, dim=D), text_dim)
    assert batch.history.shape == (30, 0)
    out = model(batch if text_dim else replace(batch, text=None))["loss"]
    out.backward()
    assert out.isfinite()


@pytest.mark.parametrize("name", NAMES)
def test_no_rows_at_all(name: str):
    model = model_of(name, TEXT)
    batch, _ = world(rows=0)
    out = model(batch)
    out["loss"].backward()
    assert len(batch) == 0 and out["loss"].item() == 0 and model.predict(batch).shape == (0,)
    assert not any(p.grad.any() for p in model.parameters())


def test_seed_and_parameter_groups():
    first, again, other = (model_of("din", TEXT, seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    names = [f"tables.field_{key}.weight" for key in SIZES]
    assert not any(torch.equal(first[name], other[name]) for name in names)
    tables = [first[name][1:5] for name in names]
    assert not any(torch.equal(a, b) for i, a in enumerate(tables) for b in tables[:i])
    model = ClickModel(SCHEMA, SIZES, ClickConfig(lr=0.5, weight_decay=0.25, table_lr=0.125, table_decay=0.0625))
    groups = model.parameter_groups()
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in model.parameters()}
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(0.5, 0.25), (0.5, 0.0)]
    assert {(t.optimizer.lr, t.optimizer.weight_decay) for t in tables_of(model)} == {(0.125, 0.0625)}


@pytest.mark.parametrize(("backbone", "lr", "table_lr"), [("din", 1e-3, 3e-3), ("autoint", 3e-3, 1e-2)])
def test_a_network_has_learning_rates_of_its_own(backbone, lr, table_lr):
    model = ClickModel(SCHEMA, SIZES, ClickConfig(backbone=backbone))
    assert {g["lr"] for g in model.parameter_groups()} == {lr}
    assert {t.optimizer.lr for t in tables_of(model)} == {table_lr}


def test_a_share_of_items_is_shown_as_unknown_in_training_only():
    model = ClickModel(SCHEMA, SIZES, ClickConfig(unknown_share=0.5))
    table, count = model.tables["item_id"], 2000
    lookup = Lookup(torch.tensor([0, 2]), torch.tensor([0] + [1] * count))
    torch.manual_seed(0)
    shown = model.train().item_vectors("item_id", lookup)
    unknown = (shown[1:] == table.weight[1]).all(1)
    assert 0.45 < unknown.float().mean() < 0.55 and not shown[0].any()
    assert torch.equal(shown[1:][~unknown], table.weight[2].expand(int((~unknown).sum()), -1))
    model.eval()
    assert torch.equal(model.item_vectors("item_id", lookup)[1:], table.weight[2].expand(count, -1))


WIDTHS = ("user_id=7", "item_id=2", "genres=4")


def test_fields_may_have_widths_of_their_own():
    batch, _ = world()
    model = ClickModel(SCHEMA, SIZES, ClickConfig(backbone="din", dim=D, widths=WIDTHS)).eval()
    assert {name: table.dim for name, table in model.tables.items()} == {
        "user_id": 7, "tags": D, "hour": D, "item_id": 2, "genres": 4,
    }  # fmt: skip
    assert set(model.projections.names) == {"user_id", "item_id"}
    inputs = model.inputs(batch)
    lookup = batch.row_fields["user_id"]
    users = model.tables["user_id"].weight[lookup.rows[lookup.index]]
    torch.testing.assert_close(inputs.fields[:, 0], users @ model.projections["user_id"].weight.T)
    items = model.item_embeddings(batch.item_fields)
    assert items.shape == (len(batch.items), 2 * D)
    torch.testing.assert_close(inputs.fields[:, 3:].flatten(1), items[batch.target])
    assert not items[0].any(), "padding stays zero"
    for table in model.tables.values():
        table._pending.clear()
    model.train()
    model(batch)["loss"].backward()
    for name in model.projections:
        assert model.projections[name].weight.grad.any()
    before = {name: table.weight.clone() for name, table in model.tables.items()}
    for name, table in model.tables.items():
        table.push(Group())
        assert not torch.equal(table.weight, before[name])


def test_without_widths_of_their_own_nothing_is_projected():
    plain = ClickModel(SCHEMA, SIZES, ClickConfig(backbone="din", dim=D))
    same = ClickModel(SCHEMA, SIZES, ClickConfig(backbone="din", dim=D, widths=("tags=4",)))
    assert plain.state_dict().keys() == same.state_dict().keys()
    assert all(torch.equal(value, same.state_dict()[name]) for name, value in plain.state_dict().items())


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("user=8", "ctr.widths: 'user=8': did you mean 'user_id'"),
        ("user_id", "ctr.widths: 'user_id': known"),
        ("user_id=", "'' is not a width; expected such as user_id=8"),
        ("user_id=0", "'0' is not a width"),
        ("user_id=-4", "'-4' is not a width"),
    ],
)
def test_widths_that_make_no_sense(text: str, match: str):
    with pytest.raises(UserError, match=match):
        ClickModel(SCHEMA, SIZES, ClickConfig(widths=(text,)))
