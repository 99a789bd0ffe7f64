"""The daily job, whole, on a small world and a tiny language model."""

import datetime as dt
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import load_file

from ctrdist.backbones import BackboneConfigs, dcnv2
from ctrdist.datasets.synthetic import SyntheticConfig, prepare
from ctrdist.errors import UserError
from ctrdist.fields import load_encoders
from ctrdist.language.encode import EncodeConfig
from ctrdist.log import log_columns
from ctrdist.schema import Schema
from ctrdist.storage import State
from ctrdist.tasks.align import AlignConfig
from ctrdist.tasks.click import ClickConfig
from ctrdist.tasks.pretrain import PretrainConfig
from ctrdist.text_field import FuseConfig
from ctrdist.text_training import LanguageModelConfig
from jobs import cela_daily as JOB
from raycluster.stages import language

FIRST, SECOND = dt.date(2024, 1, 4), dt.date(2024, 1, 5)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Seven days, and four bad rows on the second one."""
    out = tmp_path_factory.mktemp("daily") / "data"
    prepare(SyntheticConfig(users=60, items=90, days=7, rows_per_day=400), out)
    day = out / "interactions" / "dt=2024-01-02"
    table = pq.read_table(next(day.glob("*.parquet"))).slice(0, 4)
    columns = {name: table[name].to_pylist() for name in table.column_names}
    columns["label"][0] = 2
    columns["user_id"][1] = None
    columns["timestamp"][2] += 86400
    columns["item_id"][3] = "never heard of"
    pq.write_table(pa.table(columns, schema=table.schema), day / "bad.parquet")
    return out


@pytest.fixture(scope="module")
def options(data, tiny_lm):
    return JOB.CelaOptions(
        data=str(data), state=str(data.parent / "state"), date=FIRST, train_days=4, test_days=2, workers=2,
        lm=LanguageModelConfig(name=str(tiny_lm), pooling="mean", precision="float32"),
        ctr=ClickConfig(unknown_share=0.0, backbone="dcnv2", epochs=2, batch_size=256, dim=8,
                        networks=BackboneConfigs(dcnv2=dcnv2.Config(hidden=(16,), dropout=0.0))),
        pretrain=PretrainConfig(max_length=16), align=AlignConfig(epochs=1, max_length=16, batch_size=32),
        encode=EncodeConfig(max_length=16, shard_items=16, precision="float32"),
        fuse=FuseConfig(dropout=0.0, whiten=True),
    )  # fmt: skip


@pytest.fixture(scope="module")
def first_day(ray_cluster, options) -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("raycluster.stages.evaluate.FEW_ROWS", 0)  # by actors, as many rows are
        JOB.run(options)
    return json.loads((Path(options.state) / "releases" / str(FIRST) / "report.json").read_text())


@pytest.fixture(scope="module")
def second_day(first_day, options, run_here) -> dict:
    aligned_to, real = [], language.item_embeddings

    def item_embeddings(state: State, read: str, model: str) -> torch.Tensor:
        aligned_to.append(model)
        return real(state, read, model)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language, "item_embeddings", item_embeddings)
        run_here(JOB.run, replace(options, date=SECOND, rounds=2, workers=1))
    report = json.loads((Path(options.state) / "releases" / str(SECOND) / "report.json").read_text())
    return report | {"aligned_to": aligned_to}


def rows_of(data: Path, *days: int) -> int:
    return sum(pq.read_table(data / "interactions" / f"dt=2024-01-{day:02}").num_rows for day in days)


def test_the_report_has_what_others_rely_on(first_day, data, options):
    report = first_day
    assert report["date"] == str(FIRST)
    assert report["rows"]["train"] == rows_of(data, 1, 2, 3) - 4
    assert report["rows"]["test"] == rows_of(data, 5, 6)
    assert report["rows"]["quarantined"] == 4
    for model in ("id", "cela", "best"):
        for metric in ("auc", "log_loss", "gauc", "auc_cold"):
            assert 0 < report["models"][model][metric] < 3
    assert list(report["stages"]) == ["id", "dap", "roma", "encode", "mf2", "evaluate"]
    for stage in report["stages"].values():
        assert stage["seconds"] > 0 and stage["rows"] > 0
    assert report["text_table"] == {"items": pq.read_table(data / "items").num_rows, "dim": 16}
    assert Path(report["release"]).name == str(FIRST)
    assert (Path(report["release"]) / "report.html").read_text().startswith("<!doctype html>")


def test_the_fused_model_whitens_by_the_text_table(first_day, options):
    state = State(options.state)
    table = np.load(state.local(f"runs/{FIRST}/encode") / "text_table.npy").astype(np.float64)[2:]
    mean = load_file(state.local(f"runs/{FIRST}/mf2") / "model.safetensors")["text_field.mean"]
    np.testing.assert_allclose(mean, table.mean(0), rtol=1e-4, atol=1e-6)


def test_bad_rows_are_set_aside_with_their_reasons(first_day):
    quarantine = first_day["quarantine"]
    assert set(quarantine["reasons"]) == {
        "null user_id", "item not in items/", "label not 0 or 1", "timestamp outside its day"
    }  # fmt: skip
    kept = pq.read_table(quarantine["folder"])
    assert sorted(kept["reason"].to_pylist()) == sorted(quarantine["reasons"])
    assert {Path(f).name for f in kept["file"].to_pylist()} == {"bad.parquet"}


def test_every_test_row_is_scored_once_and_metrics_are_theirs(first_day, data, options):
    from sklearn.metrics import roc_auc_score

    state = State(options.state)
    scored = pq.read_table(state.local(f"runs/{FIRST}/evaluate") / "predictions.parquet").to_pandas()
    log = pq.read_table(data / "interactions").to_pandas()
    test = log[log["timestamp"] >= dt.datetime(2024, 1, 5, tzinfo=dt.UTC).timestamp()]
    test = test[test["timestamp"] < dt.datetime(2024, 1, 7, tzinfo=dt.UTC).timestamp()]
    assert sorted(zip(scored["user_id"], scored["label"], strict=True)) == sorted(
        zip(test["user_id"], test["label"].astype("float32"), strict=True)
    )
    for model in ("id", "cela"):
        assert roc_auc_score(scored["label"], scored[model]) == pytest.approx(first_day["models"][model]["auc"])
    assert roc_auc_score(test["label"], test["probability"]) == pytest.approx(first_day["models"]["best"]["auc"])


def test_the_text_table_is_the_aligned_model_item_by_item(first_day, options, data):
    from transformers import AutoModel, AutoTokenizer

    state = State(options.state)
    folder = state.local(f"runs/{FIRST}/roma")
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    table = np.load(state.local(f"runs/{FIRST}/encode") / "text_table.npy")
    items = pq.read_table(data / "items").to_pandas().sort_values("item_id")
    assert len(table) == len(items) + 2 and not table[:2].any()
    for row, (title, text) in list(enumerate(zip(items["title"], items["text"], strict=True), start=2))[::7]:
        tokens = tokenizer(f"{title}. {text}", truncation=True, max_length=16, return_tensors="pt")
        expected = model(**tokens).last_hidden_state[0].mean(0).detach().numpy()
        np.testing.assert_allclose(table[row], expected, atol=2e-3)


def test_the_registered_model_scores_a_frame_as_the_evaluation_did(first_day, options, data):
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{options.state}/mlflow.db")
    model = mlflow.pyfunc.load_model("models:/cela/1")
    state = State(options.state)
    scored = pq.read_table(state.local(f"runs/{FIRST}/evaluate") / "predictions.parquet").to_pandas()
    schema = Schema.load(data / "schema.yaml")
    frame = pq.read_table(data / "interactions" / "dt=2024-01-05", columns=log_columns(schema), partitioning=None)
    frame = frame.to_pandas()
    names = [column.name for column in model.metadata.get_input_schema()]
    assert set(names) == {"user_id", "age_band", "device", "item_id", "history"}
    found = model.predict(frame[names])["probability"].to_numpy()
    np.testing.assert_allclose(np.sort(found), np.sort(scored["cela"].to_numpy()[: len(frame)]), atol=1e-5)


def test_mlflow_has_the_day_and_its_stages(first_day, options):
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{options.state}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("cela").experiment_id])
    day = next(run for run in runs if run.info.run_name == str(FIRST))
    children = {r.info.run_name for r in runs if r.data.tags.get("mlflow.parentRunId") == day.info.run_id}
    assert {"id", "dap", "roma", "encode", "mf2", "evaluate"} <= children
    assert day.data.params["ctr.backbone"] == "dcnv2" and day.info.status == "FINISHED"
    stage = next(r for r in runs if r.info.run_name == "id" and r.data.tags["mlflow.parentRunId"] == day.info.run_id)
    assert len(client.get_metric_history(stage.info.run_id, "loss")) >= 2
    assert day.data.metrics["cela.auc"] == pytest.approx(first_day["models"]["cela"]["auc"])
    assert "report.html" in {f.path for f in client.list_artifacts(day.info.run_id)}
    plots = {f.path for f in client.list_artifacts(day.info.run_id, "plots")}
    assert {"plots/calibration.svg", "plots/mf2_loss.svg"} <= plots


def test_a_complete_day_says_so_and_does_nothing(first_day, options, capsys):
    before = sorted(path for path in Path(options.state).rglob("*.json"))
    JOB.run(options)
    assert "is complete" in capsys.readouterr().out
    assert sorted(path for path in Path(options.state).rglob("*.json")) == before


def test_the_next_day_starts_from_the_day_before(second_day, data, options):
    report, state = second_day, State(options.state)
    assert report["rows"]["train"] == rows_of(data, 4)
    assert report["stages"]["dap"]["skipped"] and not report["stages"]["roma"]["skipped"]
    assert list(report["stages"])[-4:] == ["roma_2", "encode_2", "mf2_2", "evaluate"]
    assert report["aligned_to"] == [f"runs/{SECOND}/id", f"runs/{SECOND}/mf2"]
    old, new = (load_encoders(state.local(f"runs/{date}/read") / "vocabulary") for date in (FIRST, SECOND))
    for name in old:
        assert new[name].size >= old[name].size
        np.testing.assert_array_equal(new[name].lookup_keys(old[name].keys), old[name].rows)
    assert new["user_id"].size + new["item_id"].size > old["user_id"].size + old["item_id"].size
    release = state.find(f"releases/{SECOND}")
    assert release.facts["trained_days"] == [f"2024-01-0{day}" for day in (1, 2, 3, 4)]


def test_counts_of_training_rows_are_over_the_whole_window(second_day, data, options):
    folder = State(options.state).local(f"runs/{SECOND}/read")
    counts = np.load(folder / "item_counts.npy")
    log = pa.concat_tables(
        pq.read_table(path, columns=["item_id"], partitioning=None)
        for day in (2, 3, 4)
        for path in (data / "interactions" / f"dt=2024-01-0{day}").glob("part*.parquet")
    )
    expected = log["item_id"].value_counts().to_pylist()
    ids = sorted(pq.read_table(data / "items")["item_id"].to_pylist())
    assert {ids[row - 2]: int(counts[row]) for row in np.flatnonzero(counts)} == {
        entry["values"]: entry["counts"] for entry in expected
    }


def test_a_run_cut_off_goes_on_with_other_workers_and_ends_alike(first_day, options, capsys):
    state = State(options.state)
    for name in (f"releases/{FIRST}", f"runs/{FIRST}/evaluate", f"runs/{FIRST}/mf2"):
        state.remove(name)
    JOB.run(replace(options, workers=1))
    out = capsys.readouterr().out
    for stage in ("id", "dap", "roma", "encode"):
        assert f"{stage:10} done before" in out
    again = json.loads((Path(options.state) / "releases" / str(FIRST) / "report.json").read_text())
    assert again["rows"] == first_day["rows"] and again["models"].keys() == first_day["models"].keys()
    for metric in ("auc", "log_loss", "gauc", "auc_cold"):
        assert again["models"]["id"][metric] == pytest.approx(first_day["models"]["id"][metric], rel=1e-6)
        assert again["models"]["cela"][metric] == pytest.approx(first_day["models"]["cela"][metric], abs=1e-3)


def test_a_run_killed_in_every_stage_ends_as_one_that_was_not(in_one_process, killed_in_turn, options, tmp_path):
    whole, killed = (replace(options, state=str(tmp_path / name), workers=1, rounds=2) for name in "ab")
    outputs = ("read", "id", "dap", "roma", "encode", "mf2", "roma_2", "encode_2", "mf2_2", "evaluate")
    JOB.run(whole)
    killed_in_turn(JOB.run, killed, [*(f"runs/{FIRST}/{output}" for output in outputs), f"releases/{FIRST}"])
    reports = [Path(one.state) / "releases" / str(FIRST) / "report.json" for one in (whole, killed)]
    models = [json.loads(path.read_text())["models"] for path in reports]
    assert models[0] == models[1]
    for output in ("dap", "roma_2", "encode_2", "mf2_2"):
        files = [State(one.state).find(f"runs/{FIRST}/{output}").files for one in (whole, killed)]
        assert files[0] == files[1], output  # with their checksums


def test_a_run_killed_before_it_was_registered_is_finished(first_day, options, capsys):
    state = State(options.state)
    facts = dict(state.find(f"releases/{FIRST}").facts)
    version = facts.pop("registered")
    manifest = Path(options.state) / "releases" / f"{FIRST}.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"facts": facts}))
    (Path(options.state) / "releases" / str(FIRST) / "report.html").unlink()
    JOB.run(options)
    assert f"registered as {version}" in capsys.readouterr().out
    assert (Path(options.state) / "releases" / str(FIRST) / "report.html").exists()
    JOB.run(options)
    assert "is complete" in capsys.readouterr().out


def test_too_many_bad_rows_stop_the_job(ray_cluster, options, tmp_path):
    strict = replace(options, state=str(tmp_path / "state"), max_bad_fraction=0.001)
    with pytest.raises(UserError, match=r"4 of \d,\d{3} rows .* are bad: .*--max-bad-fraction") as error:
        JOB.run(strict)
    folder = str(error.value).split("They lie in ")[1].split(" with")[0]
    assert pq.read_table(folder).num_rows == 4
