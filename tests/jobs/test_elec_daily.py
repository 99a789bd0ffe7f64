"""The daily job of ELEC, whole, on a small world and a tiny language model."""

import datetime as dt
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import roc_auc_score

from ctrdist.backbones import BackboneConfigs, dcnv2
from ctrdist.datasets.synthetic import SyntheticConfig, prepare
from ctrdist.errors import UserError
from ctrdist.export import Release, load_click_model
from ctrdist.interaction_text import TextConfig
from ctrdist.language.encode import EncodeConfig, Encoder
from ctrdist.log import log_columns
from ctrdist.schema import Schema
from ctrdist.storage import State
from ctrdist.tasks.click import ClickConfig
from ctrdist.tasks.distill import DistillConfig
from ctrdist.tasks.m_llm import MLLMConfig, ModifiedLanguageModel
from jobs import elec_daily as JOB
from raycluster.stages.elec import GAIN, FrozenLanguageModelConfig

FIRST, SECOND = dt.date(2024, 1, 4), dt.date(2024, 1, 5)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Seven days, and two bad rows on the second one."""
    out = tmp_path_factory.mktemp("elec") / "data"
    prepare(SyntheticConfig(users=60, items=90, days=7, rows_per_day=300), out)
    day = out / "interactions" / "dt=2024-01-02"
    table = pq.read_table(next(day.glob("*.parquet"))).slice(0, 4)
    columns = {name: table[name].to_pylist() for name in table.column_names}
    columns["label"][0] = 2
    columns["item_id"][2] = "never heard of"
    pq.write_table(pa.table(columns, schema=table.schema), day / "bad.parquet")
    return out


@pytest.fixture(scope="module")
def options(data, tiny_lm):
    return JOB.ElecOptions(
        data=str(data), state=str(data.parent / "state"), date=FIRST, train_days=4, test_days=1, workers=1,
        lm=FrozenLanguageModelConfig(name=str(tiny_lm)), max_bad_fraction=0.01,
        ctr=ClickConfig(backbone="dcnv2", epochs=1, batch_size=256, dim=8,
                        networks=BackboneConfigs(dcnv2=dcnv2.Config(hidden=(16,), dropout=0.0))),
        m_llm=MLLMConfig(hidden=(16, 8), epochs=1, batch_size=256),
        encode=EncodeConfig(max_length=32, shard_items=16, precision="float32"),
    )  # fmt: skip


def report_of(options, date: dt.date) -> dict:
    return json.loads((Path(options.state) / "releases" / str(date) / "report.json").read_text())


@pytest.fixture(scope="module")
def first_day(ray_cluster, options) -> dict:
    JOB.run(options)
    return report_of(options, FIRST)


def test_the_report_compares_all_four_on_the_same_rows(first_day, options):
    assert list(first_day["models"]) == ["backbone", "m_llm", "gain", "vanilla", "best"]
    for model in first_day["models"].values():
        for metric in ("auc", "log_loss", "gauc", "auc_cold", "log_loss_cold", "calibration_error"):
            assert 0 < model[metric] < 3
    assert list(first_day["stages"]) == ["encode", "m_llm", "represent", "distill", "backbone", "evaluate"]
    assert all(stage["seconds"] > 0 and stage["rows"] > 0 for stage in first_day["stages"].values())
    scored = pq.read_table(State(options.state).local(f"runs/{FIRST}/evaluate") / "predictions.parquet")
    assert scored.num_rows == first_day["rows"]["test"] == 300
    for model in ("backbone", "m_llm", "gain", "vanilla"):
        assert first_day["models"][model]["auc"] == pytest.approx(roc_auc_score(scored["label"], scored[model]))
    assert len({first_day["models"][model]["auc"] for model in first_day["models"]}) == 5
    assert {"auc", "auc_p", "cold"} <= set(first_day["gain"])


def test_representations_stand_beside_the_log_row_by_row(first_day, options, data):
    state = State(options.state)
    model = ModifiedLanguageModel.load(state.local(f"runs/{FIRST}/m_llm"))
    table = np.load(state.local(f"runs/{FIRST}/encode") / "text_table.npy")
    ids = ["", "", *sorted(pq.read_table(data / "items")["item_id"].to_pylist())]
    for path in sorted((data / "interactions").rglob("*.parquet")):
        name = f"runs/{FIRST}/represent.rows/{path.parent.name}/{path.name}"
        if path.parent.name > "dt=2024-01-05":
            assert state.find(name) is None
            continue
        mirror = pq.ParquetFile(state.local(name) / path.name).read()
        rows = pq.ParquetFile(path).read()
        assert mirror.num_rows == rows.num_rows and mirror.schema.field("vector").type == pa.list_(pa.float16(), 8)
        for number in range(0, rows.num_rows, 37):
            item, past = rows["item_id"][number].as_py(), rows["history"][number].as_py()[-20:]
            if item not in ids or rows["label"][number].as_py() > 1:
                assert mirror["vector"][number].as_py() == [0.0] * 8
                continue
            behaviours = [table[ids.index(i)].astype(np.float32) for i in past] or [np.zeros(16, np.float32)]
            states = np.concatenate([table[ids.index(item)].astype(np.float32), np.mean(behaviours, 0)])
            with torch.no_grad():
                expected = model.transform(model.norm(torch.from_numpy(states)[None]))
                chance = torch.sigmoid(model.logits(expected)).item()
            np.testing.assert_allclose(mirror["vector"][number].as_py(), expected[0], rtol=2e-3, atol=2e-3)
            assert mirror["probability"][number].as_py() == pytest.approx(chance, abs=1e-5)


def test_only_the_vanilla_network_is_released_and_registered(first_day, options, data):
    import mlflow

    state = State(options.state)
    release = state.find(f"releases/{FIRST}")
    assert {name.split("/")[0] for name in release.files} == {
        "schema.yaml", "vocabulary", "catalog", "elec", "release.json", "serving"
    }  # fmt: skip
    assert {name for name in release.files if name.startswith("elec/")} == {"elec/model.safetensors", "elec/model.json"}
    schema = Schema.load(data / "schema.yaml")
    vanilla, backbone = (
        load_click_model(state.local(f"runs/{FIRST}/{name}"), schema) for name in ("distill", "backbone")
    )
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (vanilla, backbone)]
    assert shapes[0] == shapes[1] and not vanilla.vector_dim
    assert load_click_model(state.local(f"runs/{FIRST}/distill") / GAIN, schema).vector_dim == 8
    descriptions = [
        (state.local(f"runs/{FIRST}/{name}") / "model.json").read_text() for name in ("distill", "backbone")
    ]
    assert descriptions[0] == descriptions[1]

    mlflow.set_tracking_uri(f"sqlite:///{options.state}/mlflow.db")
    served = mlflow.pyfunc.load_model("models:/elec/1")
    scored = pq.read_table(state.local(f"runs/{FIRST}/evaluate") / "predictions.parquet")
    rows = pq.read_table(data / "interactions" / "dt=2024-01-05", columns=log_columns(schema), partitioning=None)
    names = [column.name for column in served.metadata.get_input_schema()]
    found = served.predict(rows.to_pandas()[names])["probability"].to_numpy()
    np.testing.assert_allclose(np.sort(found), np.sort(scored["vanilla"].to_numpy()), atol=1e-5)


def test_a_run_cut_off_goes_on_and_ends_alike(first_day, options, capsys):
    state = State(options.state)
    kept = state.find(f"runs/{FIRST}/represent.rows/dt=2024-01-02/bad.parquet").folder
    for name in ("runs/{}/represent.rows/dt=2024-01-01/part-00000.parquet", "runs/{}/represent", "runs/{}/evaluate",
                 "releases/{}"):  # fmt: skip
        assert state.find(name.format(FIRST)), state.names(f"runs/{FIRST}/represent.rows/dt=2024-01-01")
        state.remove(name.format(FIRST))
    JOB.run(options)
    out = capsys.readouterr().out
    for stage in ("encode", "m_llm", "backbone", "distill"):
        assert f"{stage:10} done before" in out
    assert state.find(f"runs/{FIRST}/represent.rows/dt=2024-01-02/bad.parquet").folder == kept
    assert state.find(f"runs/{FIRST}/represent.rows/dt=2024-01-01/part-00000.parquet")
    assert report_of(options, FIRST)["models"] == first_day["models"]


def test_the_next_day_may_read_interactions_each_text_once(first_day, in_one_process, options, data):
    other = replace(options, date=SECOND, text_granularity="interaction", text=TextConfig(leave_out=("user_id",)))
    JOB.run(other)
    state, report = State(options.state), report_of(options, SECOND)
    # Other texts mean other states: their layers, the pair, and the backbone beside it learn the whole window.
    assert {report["stages"][stage]["rows"] for stage in ("m_llm", "distill", "backbone")} == {300 * 3 + 2}
    schema, items = Schema.load(data / "schema.yaml"), pq.read_table(data / "items").to_pylist()
    said = {item["item_id"]: item for item in items}

    def text(row: dict) -> str:
        item, fields = said[row["item_id"]], [f.name for f in schema.row_fields + schema.item if f.name != "user_id"]
        parts = [f"{name} is {row.get(name, item.get(name))}." for name in fields]
        return " ".join([*parts, f"{item['title']}.", item["text"]])

    rows = [
        row for day in range(2, 7) for row in pq.read_table(data / "interactions" / f"dt=2024-01-0{day}").to_pylist()
    ]
    rows = [row for row in rows if row["item_id"] in said and row["label"] <= 1]
    expected = {text(row) for row in rows}
    made = state.find(f"runs/{SECOND}/encode").facts
    assert made["encoded"] == made["items"] == made["texts_encoded"] == len(expected) < len(rows) and not made["copied"]
    texts = pa.ipc.open_file(str(state.local(made["texts"]) / "texts.arrow")).read_all()["text"]
    assert sorted(texts.to_pylist()) == sorted(expected)

    # A row's state is that of its own text.
    folder, source = state.local(f"runs/{SECOND}/m_llm"), other.source()
    model = ModifiedLanguageModel.load(folder)
    path = next((data / "interactions" / "dt=2024-01-03").glob("*.parquet"))
    mirror = state.local(f"runs/{SECOND}/represent.rows/{path.parent.name}/{path.name}") / path.name
    vectors = pq.ParquetFile(mirror).read()["vector"].to_pylist()[:9]
    own = pq.ParquetFile(path).read().to_pylist()[:9]
    states = Encoder(source.load(), other.encode).encode(source.tokenizer(32)([text(row) for row in own]))
    with torch.no_grad():
        expected = model.transform(model.norm(torch.from_numpy(states.astype(np.float32))))
    np.testing.assert_allclose(vectors, expected, rtol=5e-3, atol=5e-3)
    assert Release(state.local(f"releases/{SECOND}")).model.vector_dim == 0


@pytest.mark.parametrize("granularity", ["item", "interaction"])
def test_later_days_go_on_from_the_day_before_and_read_no_more_than_they_use(
    granularity, in_one_process, options, data, tmp_path
):
    """With learning rates of nothing, a day that goes on from the day before ends with that day's weights."""
    still = {"lr": 1e-30, "table_lr": 1e-30, "weight_decay": 0.0}
    first = replace(options, state=str(tmp_path), text_granularity=granularity)
    second = replace(first, date=SECOND, train_days=2, ctr=replace(options.ctr, **still),
                     m_llm=replace(options.m_llm, lr=0.0))  # fmt: skip
    third = replace(second, date=dt.date(2024, 1, 6), train_days=6)
    for one in (first, second, third):
        JOB.run(one)
    state, schema = State(str(tmp_path)), Schema.load(data / "schema.yaml")

    def mirrored(date: dt.date, day: str) -> np.ndarray | None:
        names = state.names(f"runs/{date}/represent.rows/dt={day}")
        tables = [pq.ParquetFile(next(state.local(name).glob("*.parquet"))).read() for name in names]
        return np.concatenate([np.array(t["vector"].to_pylist()) for t in tables]) if names else None

    for before, one in ((first, second), (second, third)):
        report, earlier = report_of(one, one.date), report_of(one, before.date)
        assert {report["stages"][name]["rows"] for name in ("m_llm", "backbone", "distill")} == {300}
        folders = [state.local(f"runs/{each.date}/m_llm") for each in (before, one)]
        weights = [ModifiedLanguageModel.load(folder).state_dict() for folder in folders]
        assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
        for name in ("backbone", "distill", f"distill/{GAIN}"):
            stage, _, folder = name.partition("/")
            old, new = (
                load_click_model(state.local(f"runs/{each.date}/{stage}") / folder, schema) for each in (before, one)
            )
            for key, value in old.backbone.state_dict().items():
                torch.testing.assert_close(new.backbone.state_dict()[key], value)
            for field, table in old.tables.items():
                assert new.tables[field].rows >= table.rows
                torch.testing.assert_close(new.tables[field].weight[: table.rows], table.weight)
        # What was encoded is there, and a day that both have read is represented alike.
        facts = state.find(f"runs/{one.date}/encode").facts
        assert facts["copied"] > 0 and (facts["encoded"] == 0) == (granularity == "item")
        both = mirrored(before.date, str(one.date)), mirrored(one.date, str(one.date))
        np.testing.assert_array_equal(*both)
        assert both[0].any() and report["models"] != earlier["models"]
    # The third day's window goes back to the first, for the counts of items alone: nothing is made of these rows.
    read = state.find(f"runs/{third.date}/read").facts["rows_by_day"]
    assert {"2024-01-01", "2024-01-02", "2024-01-03"} <= set(read)
    days = [day for day in sorted(read) if mirrored(third.date, day) is not None]
    assert days == ["2024-01-05", "2024-01-06", "2024-01-07"]
    assert state.find(f"runs/{third.date}/represent").facts["rows"] == sum(read[day] for day in days) == 900
    if granularity == "interaction":
        assert 0 < state.find(f"runs/{third.date}/encode").facts["items"] <= 900


def test_without_text_no_stage_of_the_language_model_runs(in_one_process, options, tmp_path):
    alone = replace(options, state=str(tmp_path), distill=DistillConfig(without_text=True))
    JOB.run(alone)
    report, state = report_of(alone, FIRST), State(str(tmp_path))
    assert list(report["stages"]) == ["distill", "backbone", "evaluate"]
    assert list(report["models"]) == ["backbone", "gain", "vanilla", "best"]
    assert not any("encode" in name for name in state.names(f"runs/{FIRST}"))
    schema = Schema.load(Path(options.data) / "schema.yaml")
    folder = state.local(f"runs/{FIRST}/distill")
    assert not load_click_model(folder / GAIN, schema).vector_dim and not load_click_model(folder, schema).vector_dim
    with pytest.raises(UserError, match="text.leave_out: 'publisher_': did you mean 'publisher'"):
        JOB.run(replace(options, state=str(tmp_path / "other"), text=TextConfig(leave_out=("publisher_",))))


@pytest.mark.parametrize("granularity", ["item", "interaction"])
def test_a_run_killed_in_every_stage_ends_as_one_that_was_not(
    granularity, in_one_process, killed_in_turn, options, tmp_path
):
    whole, killed = (replace(options, state=str(tmp_path / name), text_granularity=granularity) for name in "ab")
    outputs = ("read", "encode.texts", "encode", "m_llm", "represent.rows/dt=2024-01-03/part-00000.parquet",
               "represent", "distill", "backbone", "evaluate")  # fmt: skip
    JOB.run(whole)
    killed_in_turn(JOB.run, killed, [*(f"runs/{FIRST}/{output}" for output in outputs), f"releases/{FIRST}"])
    assert report_of(killed, FIRST)["models"] == report_of(whole, FIRST)["models"]
    for output in ("encode", "m_llm", "distill", "backbone"):
        files = [State(one.state).find(f"runs/{FIRST}/{output}").files for one in (whole, killed)]
        assert files[0] == files[1], output  # with their checksums


def test_options_tried_in_between_leave_a_day_as_it_was(in_one_process, options, tmp_path):
    """Other texts are gathered, and the run dies in their encoding: the first ones are still there for their table."""
    one = replace(options, state=str(tmp_path), text_granularity="interaction")
    other, state, name = (
        replace(one, text=TextConfig(leave_out=("user_id",))),
        State(str(tmp_path)),
        f"runs/{FIRST}/encode",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JOB, "train_m_llm", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            JOB.run(one)
    first = state.find(name).facts["texts"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("raycluster.encoder._encode", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            JOB.run(other)
    assert len([found for found in state.names(f"runs/{FIRST}") if ".texts-" in found]) == 2
    JOB.run(one)
    assert state.find(name).facts["texts"] == first
    assert [found for found in state.names(f"runs/{FIRST}") if ".texts-" in found or ".sides" in found] == [first]


def test_what_makes_no_sense_is_refused_before_anything_is_read(options):
    with pytest.raises(UserError, match="no such backbone; did you mean 'dcnv2'"):
        JOB.run(replace(options, ctr=replace(options.ctr, backbone="dcnv3")))
    with pytest.raises(UserError, match="--m-llm.batch-size 255: does not divide among 2 workers"):
        JOB.run(replace(options, date=SECOND, state=options.state + "-other", workers=2,
                        m_llm=replace(options.m_llm, batch_size=255)))  # fmt: skip
