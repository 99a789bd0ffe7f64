import datetime as dt
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ctrdist.backbones import BackboneConfigs
from ctrdist.backbones.din import Config as DinConfig
from ctrdist.batch import collate
from ctrdist.encode import encode
from ctrdist.epoch import plan_pass, read_chunk
from ctrdist.errors import UserError
from ctrdist.export import DESCRIPTION, SERVES, WEIGHTS, Release, load_click_model, save_click_model
from ctrdist.fields import save_encoders
from ctrdist.group import Group
from ctrdist.log import list_days, list_row_groups
from ctrdist.tasks.click import ClickConfig, ClickModel, table_sizes
from ctrdist.text_field import FuseConfig
from ctrdist.text_table import FACTS, create_text_table, seal_text_table

CONFIG = ClickConfig(backbone="din", dim=4, networks=BackboneConfigs(din=DinConfig(attention=(6,), hidden=(8,))))
TEXT_DIM = 5


def text_table(catalog) -> np.ndarray:
    table = np.random.default_rng(0).normal(size=(catalog.size, TEXT_DIM)).astype(np.float16)
    table[:2] = 0
    return table


def encoded(small_log: Path, small_read) -> pa.Table:
    schema, vocabularies, catalog = small_read
    files = list_days(str(small_log))
    groups = list_row_groups(str(small_log), files, tuple(files), schema)
    return read_chunk(str(small_log), plan_pass(groups)[0], schema, vocabularies, catalog)


def trained(small_log: Path, small_read, fuse: FuseConfig | None) -> ClickModel:
    """A small model after some steps, so that every row and optimizer state is its own."""
    schema, vocabularies, catalog = small_read
    model = ClickModel(schema, table_sizes(vocabularies, schema), CONFIG, TEXT_DIM if fuse else 0, fuse, seed=3)
    if fuse:
        model.text_field.measure(text_table(catalog))
    batch = collate(encoded(small_log, small_read), schema, catalog, text_table(catalog))
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(batch)["loss"].backward()
        optimizer.step()
        for table in model.tables.values():
            table.push(Group(), 50.0)
    return model.eval()


@pytest.fixture(scope="module", params=[None, FuseConfig(hidden=(7,), dropout=0.1, whiten=True)], ids=["id", "fused"])
def model(request, small_log, small_read) -> ClickModel:
    return trained(small_log, small_read, request.param)


@pytest.fixture(scope="module")
def batch(small_log, small_read):
    return collate(encoded(small_log, small_read), small_read[0], small_read[2], text_table(small_read[2]))


@torch.no_grad()
def predict(model, batch) -> list[float]:
    return model.predict(batch).tolist()


@pytest.mark.parametrize("optimizer_state", [True, False])
def test_a_loaded_model_predicts_the_same(model, batch, small_read, tmp_path, optimizer_state):
    save_click_model(model, tmp_path, optimizer_state)
    loaded = load_click_model(tmp_path, small_read[0])
    expected = predict(model, batch)
    assert len(set(expected)) > 20, "the model tells rows apart"
    assert predict(loaded, batch) == expected
    assert not loaded.training
    assert (loaded.config, loaded.fuse, loaded.text_dim) == (model.config, model.fuse, model.text_dim)
    moments = {name: loaded.tables[name].exp_avg_sq for name in model.tables}
    for name, table in model.tables.items():
        assert table.exp_avg_sq.any()
        wanted = table.exp_avg_sq if optimizer_state else torch.zeros_like(table.exp_avg_sq)
        assert torch.equal(moments[name], wanted)


def test_a_fused_model_from_before_there_was_whitening(small_log, small_read, batch, tmp_path):
    model = trained(small_log, small_read, FuseConfig(hidden=(7,), whiten=False))
    save_click_model(model, tmp_path)
    path = tmp_path / "model.json"
    description = json.loads(path.read_text())
    del description["fuse"]["whiten"]
    path.write_text(json.dumps(description))
    loaded = load_click_model(tmp_path, small_read[0])
    assert loaded.fuse == model.fuse and predict(loaded, batch) == predict(model, batch)
    with pytest.raises(UserError, match="--fuse.whiten: .* has False, not True"):
        load_click_model(tmp_path, small_read[0], fuse=FuseConfig(hidden=(7,), whiten=True))


def test_without_optimizer_state_the_file_is_smaller(model, small_read, tmp_path):
    sizes = []
    for state in (True, False):
        folder = tmp_path / str(state)
        folder.mkdir()
        save_click_model(model, folder, state)
        sizes.append((folder / WEIGHTS).stat().st_size)
    # two moments of each weight and one count a row
    saved = sum(4 * (2 * table.weight.numel() + table.rows) for table in model.tables.values())
    assert sizes[0] - sizes[1] >= saved


def test_another_way_of_training_is_taken(model, small_read, tmp_path):
    save_click_model(model, tmp_path)
    other = replace(CONFIG, lr=9.0, table_lr=7.0, epochs=1, batch_size=2)
    loaded = load_click_model(tmp_path, small_read[0], other)
    assert loaded.config == other and loaded.tables["user_id"].optimizer.lr == 7.0


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"dim": 8}, "--ctr.dim: the model in .* has 4, not 8"),
        ({"backbone": "dcnv2"}, "--ctr.backbone: the model in .* has 'din', not 'dcnv2'"),
        ({"networks": BackboneConfigs()}, "--ctr.networks: .*--from-scratch"),
    ],
)
def test_another_model_is_refused(model, small_read, tmp_path, changed, match):
    save_click_model(model, tmp_path)
    with pytest.raises(UserError, match=match):
        load_click_model(tmp_path, small_read[0], replace(CONFIG, **changed))


def test_a_file_that_lacks_weights_is_no_model(model, small_read, tmp_path):
    from safetensors.torch import load_file, save_file

    save_click_model(model, tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    name = next(name for name in weights if name.startswith("backbone."))
    save_file({key: value for key, value in weights.items() if key != name}, tmp_path / WEIGHTS)
    with pytest.raises(UserError, match=f"a model of another version .{name}"):
        load_click_model(tmp_path, small_read[0])


# --- a release ---


@pytest.fixture(scope="module")
def release(small_log, small_read, tmp_path_factory) -> tuple[Release, ClickModel]:
    schema, vocabularies, catalog = small_read
    folder = tmp_path_factory.mktemp("release")
    schema.save(folder / "schema.yaml")
    save_encoders(vocabularies, folder / "vocabulary")
    catalog.save(folder / "catalog")
    table = create_text_table(folder, catalog.size, TEXT_DIM, "float16")
    table[:] = text_table(catalog)
    seal_text_table(folder, table, np.ones(catalog.size, np.uint64), "the model", catalog.ids.fingerprint())
    (folder / "cela").mkdir()
    (folder / SERVES).write_text('{"serves": "cela", "text_model": "the model"}')
    model = trained(small_log, small_read, FuseConfig(hidden=(7,)))
    save_click_model(model, folder / "cela", optimizer_state=False)
    assert {path.name for path in (folder / "cela").iterdir()} == {WEIGHTS, DESCRIPTION}
    return Release(folder), model


def test_a_release_refuses_the_text_table_of_another_model_or_catalog(release, tmp_path):
    folder = Path(release[0].text_table.filename).parent
    moved = Path(shutil.copytree(folder, tmp_path / "release"))
    for wrong in ("model", "catalog"):
        facts = json.loads((folder / FACTS).read_text())
        (moved / FACTS).write_text(json.dumps(facts | {wrong: "another"}))
        with pytest.raises(UserError, match=f"text_table.npy: the .*{wrong} another, expected"):
            Release(moved)


def log_rows(small_log: Path) -> pa.Table:
    path = small_log / "interactions" / f"dt={dt.date(2024, 1, 5)}" / "part-0.parquet"
    return pq.ParquetFile(path).read()


def test_a_release_scores_as_the_model_does(release, small_log, small_read):
    served, model = release
    schema, vocabularies, catalog = small_read
    rows = log_rows(small_log)
    expected = predict(
        model, collate(encode(rows, schema, vocabularies, catalog), schema, catalog, text_table(catalog))
    )
    scores = served.predict(rows)
    assert scores.dtype == np.float32 and scores.tolist() == expected and len(set(expected)) > 5
    needed = rows.select(["history", "tags", "item_id", "hour", "user_id"])
    assert served.predict(needed).tolist() == expected
    assert served.predict(rows.slice(3, 4)).tolist() == pytest.approx(expected[3:7], abs=1e-6)
    empty = served.predict(rows.slice(0, 0))
    assert empty.shape == (0,) and empty.dtype == np.float32
    assert sorted(served.columns) == ["history", "hour", "item_id", "tags", "user_id"]


def one(**changed) -> pa.Table:
    row = {"user_id": "u1", "item_id": "i03", "hour": 5, "tags": ["x"], "history": ["i01", "i02"]} | changed
    types = {"hour": pa.int64(), "tags": pa.list_(pa.string()), "history": pa.list_(pa.string())}
    return pa.table({name: pa.array([value], types.get(name, pa.string())) for name, value in row.items()})


def test_unknown_ids_share_the_unknown_row(release):
    served, _ = release
    known = served.predict(one())
    for column in ("user_id", "item_id"):
        new, other, null = (served.predict(one(**{column: value})) for value in ("never seen", "nor this", None))
        assert np.isfinite(new).all() and new == other == null and new != known
    assert served.predict(one(history=["ghost"])) == served.predict(one(history=["phantom"])) != known
    assert served.predict(one(history=[])) == served.predict(one(history=None)) != known
    assert served.predict(one(history=["i05", "i00", "i01", "i02"])) == served.predict(
        one(history=["i00", "i01", "i02"])
    ), "only the last three count"


@pytest.mark.parametrize("column", ["user_id", "item_id", "hour", "tags", "history"])
def test_a_missing_column_is_named(release, column):
    with pytest.raises(UserError, match=f"no column '{column}'; needed: .*user_id"):
        release[0].predict(one().drop_columns(column))


def test_a_column_of_another_type_is_named(release):
    rows = one()
    wrong = rows.set_column(rows.column_names.index("user_id"), "user_id", pa.array([7]))
    with pytest.raises(UserError, match="column 'user_id': ids are integers, but strings before"):
        release[0].predict(wrong)


def test_predict_frame(release, small_log):
    served, _ = release
    rows = log_rows(small_log)
    rows = rows.filter(pa.compute.is_valid(rows["hour"]))
    frame = rows.to_pandas()
    assert served.predict_frame(frame).tolist() == served.predict(rows).tolist()
    shuffled = frame.sample(frac=1, random_state=0)
    by_index = dict(zip(shuffled.index, served.predict_frame(shuffled).tolist(), strict=True))
    assert [by_index[n] for n in frame.index] == pytest.approx(served.predict(rows).tolist(), abs=1e-6)


def test_a_frame_of_a_new_user_without_any_behaviour(release):
    served, _ = release
    expected = served.predict(one(user_id=None, tags=[], history=[])).tolist()
    row = {"user_id": None, "item_id": "i03", "hour": 5, "tags": [], "history": []}
    assert served.predict_frame(pd.DataFrame([row])).tolist() == expected
    nothing = pd.DataFrame([row | {"tags": None, "history": None}])
    assert served.predict_frame(nothing).tolist() == expected
    categories = pd.DataFrame([row]).astype({"item_id": "category"})
    assert served.predict_frame(categories).tolist() == expected
