"""What is served scores as the trained model does: by the look-ups and networks of both, on the same raw rows."""

import json
import logging
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from ctrdist import served
from ctrdist.backbones import NAMES
from ctrdist.errors import UserError
from ctrdist.export import DensePart, Release, export_dense, save_click_model
from ctrdist.fields import save_encoders
from ctrdist.items import Catalog, build_catalog, grow_catalog_ids
from ctrdist.numeric import Numeric
from ctrdist.schema import Field, Schema
from ctrdist.served import write_served
from ctrdist.serving.graphs import BUILT_FOR, COMPILED, machine, misfit
from ctrdist.serving.model import DESCRIPTION, ServedModel, find_artifact
from ctrdist.serving.ragged import Ragged
from ctrdist.tasks.click import ClickConfig, ClickModel, table_sizes
from ctrdist.text_field import FuseConfig
from ctrdist.text_table import create_text_table, seal_text_table
from ctrdist.vocabulary import Vocabulary, to_keys

SCHEMA = Schema(
    user=(Field("user_id"), Field("age", "numeric"), Field("tags", "multi"), Field("income", "numeric", scale="log")),
    item=(Field("item_id"), Field("genres", "multi"), Field("price", "numeric", scale="log"), Field("year", "numeric")),
    context=(Field("hour"),),
    history_length=4,
)
TEXT = 6
ITEMS = [f"i{n:02}" for n in range(12)]


def vocabulary(values: list) -> Vocabulary:
    keys = to_keys(pa.array(sorted(values)))
    return Vocabulary().grow(keys, np.ones(len(keys), np.int64))


def world(schema: Schema = SCHEMA) -> tuple[dict, Catalog]:
    """Encoders and a catalog: all kinds of fields, two cold items, missing values, bags that are empty."""
    draw = np.random.default_rng(0)
    numbers = {"age": Numeric("quantile", np.array([18.0, 30, 50])), "year": Numeric("quantile", np.array([2000.0]))}
    numbers |= {"income": Numeric("log"), "price": Numeric("log")}
    encoders = numbers | {
        "user_id": vocabulary([f"u{n}" for n in range(5)]), "tags": vocabulary(["x", "y", "z"]),
        "hour": vocabulary(list(range(6))), "item_id": vocabulary(ITEMS[:10]), "genres": vocabulary(["war", "été"]),
    }  # fmt: skip
    genres = [[str(g) for g in draw.choice(["war", "été", "none"], draw.integers(0, 4))] for _ in ITEMS]
    items = pa.table({
        "item_id": ITEMS, "genres": pa.array(genres, pa.list_(pa.string())),
        "price": [None if n % 5 == 3 else float(n) for n in range(12)], "year": [1990 + 2 * n for n in range(12)],
    })  # fmt: skip
    encoders = {field.name: encoders[field.name] for field in schema.row_fields + schema.item}
    return encoders, build_catalog(items, grow_catalog_ids(items, Vocabulary()), schema, encoders)


def rows(count: int = 40, seed: int = 1) -> pa.Table:
    """Raw rows, some of one user and context one after another, with ids that nobody knows and values that lack."""
    draw = np.random.default_rng(seed)
    pick = lambda values: values[draw.integers(len(values))]
    users = [{
        "user_id": pick([None, "nobody", *(f"u{n}" for n in range(5))]), "age": pick([None, 3.0, 18.0, 44.0, np.inf]),
        "tags": pick([None, [], ["x"], ["y", "z", "new"]]), "income": pick([None, 0.0, -5.0, 1e6]),
        "hour": pick([None, 99, 0, 1, 2]), "history": pick([None, [], ["ghost", ITEMS[1]], ITEMS[3:9], ITEMS[10:]]),
    } for _ in range(count)]  # fmt: skip
    repeated = [user for user in users for _ in range(pick([1, 1, 2]))][:count]
    table = {name: [user[name] for user in repeated] for name in users[0]}
    table["item_id"] = [pick([None, "never heard of, and longer than any", *ITEMS]) for _ in repeated]
    types = {"hour": pa.int64(), "tags": pa.list_(pa.string()), "history": pa.list_(pa.string())}
    types |= {"age": pa.float64(), "income": pa.float64()}
    return pa.table({name: pa.array(values, types.get(name, pa.string())) for name, values in table.items()})


def made(folder: Path, name: str, text: bool, schema: Schema = SCHEMA, fuse: FuseConfig | None = None, **config):
    """A release of a random network and its artifact, `folder / "serving"`, and what made them."""
    encoders, catalog = world(schema)
    fuse = (fuse or FuseConfig(hidden=(7,), scale=1.0, whiten=True)) if text else None
    options = ClickConfig(backbone=name, dim=4, **config)
    model = ClickModel(schema, table_sizes(encoders, schema), options, TEXT if text else 0, fuse, seed=3)
    with torch.no_grad():
        for table in model.tables.values():
            table.weight *= 60
    model.eval()
    schema.save(folder / "schema.yaml")
    save_encoders(encoders, folder / "vocabulary")
    catalog.save(folder / "catalog")
    vectors = create_text_table(folder, catalog.size, TEXT, "float16")
    vectors[2:] = np.random.default_rng(2).normal(size=(catalog.size - 2, TEXT))
    if text:
        model.text_field.measure(vectors)
    seal_text_table(folder, vectors, np.ones(catalog.size, np.uint64), "lm", catalog.ids.fingerprint())
    (folder / "model").mkdir()
    (folder / "release.json").write_text('{"serves": "model", "text_model": "lm"}')
    save_click_model(model, folder / "model", optimizer_state=False)
    write_served(folder / "serving", model, schema, encoders, catalog, vectors)
    return model, encoders, catalog


@pytest.fixture(scope="module")
def din(tmp_path_factory) -> Path:
    """A release of a DIN with text."""
    folder = tmp_path_factory.mktemp("din")
    made(folder, "din", text=True)
    return folder


@pytest.fixture
def graphs_in_memory(monkeypatch) -> None:
    """Only a request's graph is exported, and none is written: each network's is for rows in `tasks/test_distill`."""
    kept = {}

    def export(model: ClickModel, history_length: int, one_user: bool = False) -> torch.nn.Module:
        return export_dense(model, history_length, True).module() if one_user else DensePart(model)

    monkeypatch.setattr("ctrdist.served.export_dense", export)
    monkeypatch.setattr("torch.export.save", lambda graph, path: kept.update({path.name: graph}))
    monkeypatch.setattr("ctrdist.serving.model.load_graph", lambda _folder, name: kept[f"{name}.pt2"])


VARIANTS = [(name, True, {}) for name in NAMES] + [("dnn", False, {"widths": ("genres=3", "age=2")})]


@pytest.mark.parametrize(("name", "text", "config"), VARIANTS, ids=[f"{n}-{t}" for n, t, _ in VARIANTS])
def test_what_is_served_scores_as_the_release_does(
    name: str, text: bool, config: dict, tmp_path: Path, graphs_in_memory
):
    made(tmp_path, name, text, **config)
    release, model, asked = Release(tmp_path), ServedModel(tmp_path), rows()
    expected = release.predict(asked)
    assert expected.std() > 1e-3 and len(set(expected.tolist())) > 15
    np.testing.assert_allclose(model.predict(asked), expected, atol=1e-6, rtol=0)
    assert model.predict(asked).dtype == np.float32
    # As requests: one user and context, shown every item, in a table and by ids alone.
    user = asked.slice(7, 1).drop_columns("item_id")
    items = pa.array([*ITEMS, "ghost", None] * 2)
    table = pa.concat_tables([user] * len(items)).append_column("item_id", items)
    expected = release.predict(table)
    np.testing.assert_allclose(model.predict(table), expected, atol=1e-6, rtol=0)
    np.testing.assert_allclose(model.predict_request(user, items), expected, atol=1e-6, rtol=0)
    np.testing.assert_allclose(model.predict(table.slice(3, 1)), expected[3:4], atol=1e-6, rtol=0)


@pytest.mark.parametrize("on", ["target", "behaviours"])
def test_text_on_one_side_only(on: str, tmp_path: Path, graphs_in_memory):
    made(tmp_path, "dnn", True, fuse=FuseConfig(hidden=(), scale=1.0, on=on))
    np.testing.assert_allclose(ServedModel(tmp_path).predict(rows()), Release(tmp_path).predict(rows()), atol=1e-6)


def test_a_log_without_histories_or_fields_of_its_own(tmp_path: Path):
    schema = Schema(user=(), item=SCHEMA.item)
    made(tmp_path, "dnn", True, schema)
    model = ServedModel(tmp_path)
    assert model.columns == ["item_id"] and model.optional == []
    asked = rows().select(["item_id"])
    np.testing.assert_allclose(model.predict(asked), Release(tmp_path).predict(asked), atol=1e-6)


def test_what_a_release_knows_of_rows(din: Path):
    asked = rows().slice(0, 3)
    asked = asked.drop_columns(["user_id", "item_id"])
    asked = asked.append_column("user_id", pa.array(["u0", "nobody", "u1"]))
    asked = asked.append_column("item_id", pa.array([ITEMS[0], ITEMS[0], "ghost"]))
    users, items = ServedModel(din).known(asked)
    assert users.tolist() == [True, False, True] and items.tolist() == [True, True, False]


def test_requests_one_after_another_are_told_apart(din: Path):
    model, release = ServedModel(din), Release(din)
    users = rows(30, seed=5).drop_columns("item_id")
    items = pa.array(ITEMS * 2)
    parts = [pa.concat_tables([users.slice(n, 1)] * 24).append_column("item_id", items) for n in range(0, 30, 4)]
    together = pa.concat_tables(parts)
    calls = []
    model.of_request = lambda *inputs, graph=model.of_request: calls.append(len(inputs[1])) or graph(*inputs)
    np.testing.assert_allclose(model.predict(together), release.predict(together), atol=1e-6)
    assert sum(calls) == 24 * 8 and len(calls) <= 8


def test_users_begin_where_anything_but_the_item_changes(din: Path):
    model, asked = ServedModel(din), rows(60, seed=9)
    encoded = model.encode(asked)

    def said(n: int) -> list:
        parts = [column[n : n + 1] for column in encoded.fields.values()]
        return [repr(part.values.tolist() if isinstance(part, Ragged) else part.tolist()) for part in parts] + [
            encoded.history[n].tolist()
        ]

    expected = [n for n in range(60) if n == 0 or said(n) != said(n - 1)]
    assert encoded.users().tolist() == expected and 20 < len(expected) < 60


def test_what_may_be_left_out(din: Path, tmp_path: Path):
    model, asked = ServedModel(din), rows()
    assert model.optional == ["history"]
    without = asked.set_column(asked.column_names.index("history"), "history", pa.array([[]] * 40, pa.list_(pa.null())))
    assert model.predict(asked.drop_columns("history")).tolist() == model.predict(without).tolist()
    for name in ("user_id", "age", "tags", "income", "hour", "item_id"):
        with pytest.raises(UserError, match=f"no column '{name}'; needed: user_id, age, tags, income, hour, item_id"):
            model.predict(asked.drop_columns(name))
    # A release that knows its users' fields.
    network, encoders, catalog = made(tmp_path, "fm", text=False)
    count = encoders["user_id"].size
    known = {"age": np.full(count, 1, np.int32), "income": np.full(count, np.nan, np.float32)}
    known["age"][2:] = 2 + np.arange(count - 2) % 3
    known["income"][2:] = np.arange(count - 2) - 1
    known["tags"] = Ragged(np.array([2, 3, 4, 4], np.int32), np.array([0, 0, 0, 1, 3, 4, 4, 4]))
    write_served(tmp_path / "more", network, SCHEMA, encoders, catalog, None, known)
    model = ServedModel(tmp_path / "more")
    assert model.optional == ["age", "tags", "income", "history"]
    bare = model.predict(asked.drop_columns(["age", "tags", "income", "history"]))
    users = [2 + int(user[1]) if user and user[0] == "u" else 1 for user in asked["user_id"].to_pylist()]
    tags = [[], [], ["x"], ["y", "z"], ["z"], [], []]
    ages, names = [None, None, 1.0, 20.0, 40.0, 1.0, 20.0], list(asked.column_names)
    income = [None if user < 2 else float(np.sign(user - 3) * np.expm1(abs(user - 3))) for user in users]
    full = asked
    for name, values in (
        ("age", [ages[user] for user in users]), ("tags", [tags[user] for user in users]), ("income", income),
        ("history", [[]] * 40),
    ):  # fmt: skip
        full = full.set_column(names.index(name), name, pa.array(values, asked[name].type))
    np.testing.assert_allclose(bare, Release(tmp_path).predict(full), atol=1e-6)
    assert len(set(bare.tolist())) > 15


def test_a_frame_and_a_type_that_does_not_fit(din: Path):
    model, asked = ServedModel(din), rows()
    frame = asked.to_pandas()
    assert frame["hour"].dtype == np.float64, "pandas makes floats of integers beside a null"
    np.testing.assert_allclose(model.predict_frame(frame), model.predict(asked), atol=1e-6)
    categories = frame.astype({"item_id": "category"}).assign(other=1)
    np.testing.assert_allclose(model.predict_frame(categories), model.predict(asked), atol=1e-6)
    assert model.predict_frame(frame.head(0).astype({"user_id": "string", "item_id": "string"})).shape == (0,)
    with pytest.raises(UserError, match="column 'item_id': ids are integers, but strings before"):
        model.predict_frame(frame.assign(item_id=7))
    nothing = pd.DataFrame(
        [{"user_id": None, "item_id": None, "age": None, "tags": None, "income": None, "hour": None}]
    )
    assert np.isfinite(model.predict_frame(nothing)).all()


def test_no_pickle_and_nothing_of_training_is_in_it(din: Path):
    folder = find_artifact(din)
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"items.npy", "tables/user_id.npy", "rows.pt2", "request.pt2", "serving.json"} < names
    assert not any("pending" in name or "text_table" in name or "safetensors" in name for name in names)
    assert np.load(folder / "items.npy").shape == (14, 5, 4)
    for name in ("rows.pt2", "request.pt2"):
        with zipfile.ZipFile(folder / name) as archive:
            pickled = [one for one in archive.namelist() if archive.read(one)[:2] in (b"\x80\x02", b"PK")]
        assert not pickled
    for path in folder.rglob("*.npy"):
        np.load(path, allow_pickle=False)


def test_an_artifact_says_what_it_is(din: Path, tmp_path: Path):
    model, encoders, catalog = made(tmp_path, "fm", text=False)
    identity = ServedModel(tmp_path).identity
    with torch.no_grad():
        next(iter(model.backbone.parameters())).add_(1e-4)
    write_served(tmp_path / "other", model, SCHEMA, encoders, catalog)
    assert ServedModel(tmp_path / "other").identity != identity
    about = json.loads((tmp_path / "other" / DESCRIPTION).read_text())
    (tmp_path / "other" / DESCRIPTION).write_text(json.dumps(about | {"format": 0}))
    with pytest.raises(UserError, match="an artifact of version 0, this code reads"):
        ServedModel(tmp_path / "other")
    with pytest.raises(UserError, match="no serving.json there"):
        ServedModel(tmp_path / "nowhere")


COMPILES = served.compiler()
"""As this machine has it, before tests leave it out."""


@pytest.mark.skipif(not COMPILES, reason="no C++ compiler here, or none that knows this processor")
def test_a_compiled_graph_serves_where_it_fits(tmp_path: Path, monkeypatch, caplog):
    monkeypatch.setattr("ctrdist.served.compiler", lambda: COMPILES)
    made(tmp_path, "fm", text=False)
    folder, asked = find_artifact(tmp_path), rows(1).drop_columns("item_id")
    items, calls = pa.array(ITEMS * 3), []
    expected = Release(tmp_path).predict(pa.concat_tables([asked] * 36).append_column("item_id", items))
    load = torch._inductor.aoti_load_package
    monkeypatch.setattr("torch._inductor.aoti_load_package", lambda path: calls.append(path) or load(path))
    for count in (36, 1, 2):
        found = ServedModel(folder).predict_request(asked, items.slice(0, count))
        np.testing.assert_allclose(found, expected[:count], atol=1e-6)
    assert len(calls) == 3
    built_for = json.loads((folder / BUILT_FOR).read_text())
    (folder / BUILT_FOR).write_text(json.dumps(built_for | {"instructions": [*built_for["instructions"], "avx9"]}))
    with caplog.at_level(logging.WARNING):
        other = ServedModel(folder)
    assert "for a processor with avx9. The exported graph serves" in caplog.text and len(calls) == 3
    np.testing.assert_allclose(other.predict_request(asked, items), expected, atol=1e-6)
    (folder / BUILT_FOR).write_text(json.dumps(built_for))
    (folder / COMPILED.format("request")).write_bytes(b"no archive")
    with caplog.at_level(logging.WARNING):
        other = ServedModel(folder)
    assert "compiled but does not load" in caplog.text and len(calls) == 4
    np.testing.assert_allclose(other.predict_request(asked, items), expected, atol=1e-6)


@pytest.mark.skipif(not COMPILES, reason="no C++ compiler here, or none that knows this processor")
@pytest.mark.parametrize("name", ["din", "dcnv2"])
def test_a_compiled_network_scores_as_the_exported_one(tmp_path: Path, monkeypatch, name: str):
    """With a history that all rows share, or crosses of all fields, and CELA's text among them."""
    monkeypatch.setattr("ctrdist.served.compiler", lambda: COMPILES)
    made(tmp_path, name, text=True)
    asked = rows(1).drop_columns("item_id")
    items = pa.array(ITEMS * 3)
    expected = Release(tmp_path).predict(pa.concat_tables([asked] * 36).append_column("item_id", items))
    folder = find_artifact(tmp_path)
    assert (folder / COMPILED.format("request")).exists()
    np.testing.assert_allclose(ServedModel(folder).predict_request(asked, items), expected, atol=1e-6)
    assert np.ptp(expected) > 1e-3


def test_a_release_does_without_a_compiler_that_fails(tmp_path: Path, monkeypatch, caplog):
    def fails(_program, package_path: str, **_options) -> None:
        Path(package_path).write_text("half")
        raise RuntimeError("no such header\nand more")

    monkeypatch.setattr("torch._inductor.aoti_compile_and_package", fails)
    with caplog.at_level(logging.WARNING):
        served.compile_graph(None, tmp_path, "request")
    assert caplog.messages == ["the release is not compiled, and served at about half the speed: no such header"]
    assert list(tmp_path.iterdir()) == []


def test_what_a_machine_misses():
    here = machine()
    assert misfit(here) == "" and misfit(here | {"instructions": here["instructions"][1:]}) == ""
    assert misfit(here | {"torch": "1.0"}) == f"for torch 1.0, this is {torch.__version__}"
