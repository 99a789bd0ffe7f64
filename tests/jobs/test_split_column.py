"""The daily job over the parts that a log brings itself."""

import datetime as dt
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from ctrdist.datasets.protocol import Protocol, Raw, write
from ctrdist.errors import UserError
from ctrdist.export import Release, load_click_model
from ctrdist.schema import Field
from ctrdist.storage import State
from ctrdist.tasks.align import AlignConfig
from ctrdist.tasks.click import ClickConfig
from ctrdist.tasks.pretrain import PretrainConfig
from ctrdist.text_field import FuseConfig
from ctrdist.text_training import LanguageModelConfig
from jobs import cela_daily as JOB


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A log without time, in parts by file order."""
    draw, rows = np.random.default_rng(0), 900
    log = {"user_id": [f"u{n}" for n in draw.integers(0, 40, rows)], "rating": draw.integers(0, 11, rows),
           "item_id": [f"i{n}" for n in draw.integers(0, 30, rows)]}  # fmt: skip
    items = {"item_id": [f"i{n}" for n in range(30)], "year": [str(1990 + n % 7) for n in range(30)],
             "text": [f"red book {n}" for n in range(30)]}  # fmt: skip
    raw = Raw(pa.table(log), pa.table(items), item=(Field("item_id"), Field("year")), text=("{text}",))
    out = tmp_path_factory.mktemp("split") / "data"
    write(raw, Protocol(positive=6, split="file"), out)
    return out


@pytest.fixture(scope="module")
def options(data, tiny_lm):
    return JOB.CelaOptions(
        data=str(data), state=str(data.parent / "state"), split="column", workers=1,
        lm=LanguageModelConfig(name=str(tiny_lm), pooling="mean", precision="float32"),
        ctr=ClickConfig(backbone="dcnv2", epochs=1, batch_size=256, dim=8), fuse=FuseConfig(source="id"),
        pretrain=PretrainConfig(epochs=0), align=AlignConfig(epochs=0),
    )  # fmt: skip


@pytest.fixture(scope="module")
def report(ray_cluster, options) -> dict:
    JOB.run(options)
    return json.loads((Path(options.state) / "releases" / "split" / "report.json").read_text())


def test_a_run_over_the_logs_own_splits(report, options, data, capsys):
    assert report["date"] == "split" and Path(report["release"]).name == "split"
    assert {name: report["rows"][name] for name in ("train", "valid", "test")} == {
        "train": 720, "valid": 90, "test": 90
    }  # fmt: skip
    output = State(options.state).find("runs/split/evaluate")
    scored = pq.read_table(State(options.state).local(output.name) / "predictions.parquet")
    test = ds.dataset(data / "interactions").to_table(filter=ds.field("split") == "test")
    assert sorted(scored["user_id"].to_pylist()) == sorted(test["user_id"].to_pylist())
    JOB.run(options)
    assert "split is complete" in capsys.readouterr().out


def test_without_text_the_items_embeddings_take_its_place(report, options):
    folder = State(options.state).local("releases/split")
    release, table = Release(folder), np.load(folder / "text_table.npy")
    own = load_click_model(folder / "id", release.schema)
    assert own.item_names == ["item_id", "year"]
    for position, name in enumerate(own.item_names):
        weight = own.tables[name].weight.numpy()[release.catalog.fields[name]]
        found = table[:, position * 8 : (position + 1) * 8]
        scale = np.sqrt((weight[1:] ** 2).mean())
        present = np.flatnonzero(release.catalog.present)
        np.testing.assert_allclose(found[present], (weight / scale)[present], rtol=1e-4, atol=1e-6)
    assert {"id", "cela"} <= set(report["models"]) and "roma" not in report["stages"]


def test_without_text_no_stage_reads_any(options):
    with pytest.raises(UserError, match="--fuse.source id reads no text"):
        JOB.run(replace(options, align=AlignConfig(epochs=1)))


def test_a_date_and_the_column_exclude_each_other(options):
    with pytest.raises(UserError, match="--date 1970-01-01: --split column takes no date"):
        JOB.run(replace(options, date=dt.date(1970, 1, 1)))
