"""The registry over days: the gate at the end of each, and what `jobs/release.py` does."""

import datetime as dt
import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctrdist import served
from ctrdist.backbones import BackboneConfigs, dnn
from ctrdist.errors import UserError
from ctrdist.gate import GateConfig
from ctrdist.serving import graphs
from ctrdist.serving.model import ServedModel
from ctrdist.storage import State
from ctrdist.tasks.click import ClickConfig
from jobs import release as RELEASE
from jobs import train as JOB
from raycluster import cli
from raycluster.mlflow_server import Server
from raycluster.versions import SERVED_SINCE, Unfit, Versions
from tests.servers import free_port, serve

FIRST = dt.date(2024, 1, 4)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Eight days of 25 users and 20 items, whose ids say most of what there is to know of a click."""
    out, draw = tmp_path_factory.mktemp("release") / "data", np.random.default_rng(0)
    (out / "items").mkdir(parents=True)
    (out / "schema.yaml").write_text("user: {user_id: categorical}\nitem: {item_id: categorical}\n")
    pq.write_table(pa.table({"item_id": [f"i{n}" for n in range(20)]}), out / "items" / "items.parquet")
    users, items = draw.normal(0, 1.5, 25), draw.normal(0, 1.5, 20)
    for day in range(8):
        u, i = draw.integers(0, 25, 800), draw.integers(0, 20, 800)
        label = draw.random(800) < 1 / (1 + np.exp(-users[u] - items[i]))
        midnight = int(dt.datetime(2024, 1, 1 + day, tzinfo=dt.UTC).timestamp())
        table = pa.table({"user_id": [f"u{n}" for n in u], "item_id": [f"i{n}" for n in i],
                          "label": label.astype(np.float32), "timestamp": midnight + np.arange(800)})  # fmt: skip
        folder = out / "interactions" / f"dt=2024-01-0{day + 1}"
        folder.mkdir(parents=True)
        pq.write_table(table, folder / "part-0.parquet")
    return out


@pytest.fixture(scope="module")
def options(data):
    return JOB.TrainOptions(
        data=str(data), state=str(data.parent / "state"), date=FIRST, train_days=4, workers=1, keep_releases=2,
        model_name="clicks", gate=GateConfig(resamples=100, calibration_error=0.2),
        ctr=ClickConfig(backbone="dnn", epochs=4, batch_size=256, dim=8, lr=0.01, table_lr=0.1,
                        networks=BackboneConfigs(dnn=dnn.Config(hidden=(16,), dropout=0.0))),
    )  # fmt: skip


@pytest.fixture(scope="module")
def versions(options) -> Versions:
    return Versions(Server.of(None, options.state), "clicks")


def report_of(options, day: int) -> dict:
    return json.loads((Path(options.state) / "releases" / f"2024-01-0{day}" / "report.json").read_text())


def runs_of(versions: Versions) -> list:
    client = versions.server.client
    return client.search_runs([client.get_experiment_by_name("train").experiment_id])


def release(options, *arguments: str) -> None:
    where = ["--state", options.state]
    where += ["--data", options.data] if arguments[0] in ("compare", "promote") else []
    RELEASE.run(cli.parse_command(RELEASE.COMMANDS, "", [*arguments, *where]))


def test_versions_over_days(registered_here, options, versions, capsys, monkeypatch):
    # The first whole release that beats the click rate.
    JOB.run(options)
    assert versions.aliases() == {"challenger": "1", "champion": "1"} and versions.champions() == ["1"]
    gate = report_of(options, 4)["gate"]
    assert gate["promoted"] and gate["against"] == "click rate" and gate["rows"] == 800 and gate["users"] == 25
    assert gate["challenger"]["auc"] == pytest.approx(report_of(options, 4)["models"]["dnn"]["auc"])
    assert State(options.state).find("releases/2024-01-04").facts["gate"] == gate
    out = capsys.readouterr().out
    assert "clicks version 1 against the constant click rate: 800 test rows of 25 users" in out
    assert "clicks version 1 is champion" in out
    day = next(run for run in runs_of(versions) if run.info.run_name == "2024-01-04")
    assert {"code", "schema", "data", "cluster"} <= set(day.data.tags) and day.data.params["ctr.backbone"] == "dnn"
    assert (day.data.tags["version"], day.data.tags["promoted"]) == ("1", "True")
    assert day.data.metrics["cost.train.seconds"] > 0 and "cost.train.cpu_seconds" in day.data.metrics
    assert day.info.status == "FINISHED"

    # One that was hardly trained is refused.
    untrained = replace(options.ctr, epochs=1, lr=1e-7, table_lr=1e-7)
    JOB.run(replace(options, date=dt.date(2024, 1, 5), from_scratch=True, ctr=untrained))
    assert versions.aliases() == {"challenger": "2", "champion": "1"}
    gate = report_of(options, 5)["gate"]
    assert not gate["promoted"] and gate["champion_version"] == "1" and "significantly worse" in gate["reasons"][0]
    assert gate["champion"]["auc"] > gate["challenger"]["auc"] + 0.1
    assert "clicks version 2 does not take over: AUC" in capsys.readouterr().out

    # A better one is promoted, however often the job is killed on the way; the day is complete only then.
    third = replace(options, date=dt.date(2024, 1, 6), from_scratch=True, ctr=replace(options.ctr, epochs=6))
    tag = Versions._tag

    def all_but_the_last(self, number: str, key: str, value: str) -> None:
        return tag(self, number, key, value if key != SERVED_SINCE else 1 / 0)

    def compile_graph(_program, folder: Path, name: str) -> None:
        """Bytes that are others each time, as a compiler's are."""
        (folder / f"{name}.compiled.pt2").write_bytes(os.urandom(8))
        (folder / "compiled.json").write_text(json.dumps(graphs.machine() | {"torch": "another"}))

    monkeypatch.setattr(served, "compiler", lambda: "a compiler")
    monkeypatch.setattr(served, "compile_graph", compile_graph)
    for step, champion in (("challenge", "1"), ("promote", "1"), ("_tag", "3")):
        with monkeypatch.context() as patch:
            patch.setattr(Versions, step, all_but_the_last if step == "_tag" else lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                JOB.run(third)
        assert "registered" not in State(options.state).find("releases/2024-01-06").facts, step
        assert versions.aliases()["champion"] == champion
    JOB.run(third)
    assert [version.number for version in versions.all()] == ["3", "2", "1"]
    assert versions.aliases() == {"challenger": "3", "champion": "3"} and versions.champions() == ["1", "3"]
    assert report_of(options, 6)["gate"]["champion_version"] == "1"
    # The champion before had left the state (--keep-releases 2): the registry's copy was scored, and went again.
    assert State(options.state).names("releases") == ["releases/2024-01-05", "releases/2024-01-06"]
    assert not State(options.state).names("gate")
    capsys.readouterr()
    JOB.run(third)
    assert "is complete" in capsys.readouterr().out and versions.champions() == ["1", "3"]


def test_a_day_without_the_gate(registered_here, options, versions):
    JOB.run(replace(options, date=dt.date(2024, 1, 7), promote=False))
    assert versions.aliases() == {"challenger": "4", "champion": "3"}
    assert report_of(options, 7)["gate"]["reasons"] == ["the gate was not asked (--no-promote)"]
    assert "auc" in versions.get("4").tags


def test_a_version_that_scores_otherwise_after_reload_is_no_challenger(
    registered_here, options, versions, tmp_path, monkeypatch
):
    """The registry's copy against the release it was made from: one probability is off by a thousandth."""

    class Other(ServedModel):
        def predict_frame(self, frame) -> np.ndarray:
            scores = super().predict_frame(frame)
            scores[-1] += 1e-3 if len(frame) > 5 else 0  # the sample's, and not the example's
            return scores

    own = replace(options, state=str(tmp_path / "state"))
    with monkeypatch.context() as patch:
        patch.setattr("raycluster.registry.ServedModel", Other)
        JOB.run(own)
    found = Versions(Server.of(None, own.state), "clicks")
    (reason,) = (gate := report_of(own, 4)["gate"])["reasons"]
    assert "its scores are up to 0.001 off those of the release that it was made from" in reason
    assert not gate["promoted"] and found.aliases() == {} and [v.number for v in found.all()] == ["1"]


def test_list_and_compare(registered_here, options, versions, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    release(options, "list")
    rows = [line for line in capsys.readouterr().out.splitlines() if "2024-01-0" in line]
    assert len(rows) == 4 and "challenger" in rows[0] and "champion since" in rows[1]
    assert f"{float(versions.get('2').tags['auc']):.4f}" in rows[2]

    release(options, "compare", "3", "2")
    out = capsys.readouterr().out
    assert "test rows of 2024-01-07" in out and "the gate does not let clicks version 2 pass" in out
    before = versions.get("2").tags
    release(options, "compare", "2", "3", "--date", "2024-01-05")
    out = capsys.readouterr().out
    assert "test rows of 2024-01-06" in out and "lets clicks version 3 pass" in out
    assert versions.get("2").tags == before, "comparing changes nothing"


def test_promote_and_roll_back(registered_here, options, versions, capsys):
    with pytest.raises(UserError, match="the gate refuses clicks version 2; --force"):
        release(options, "promote", "2")
    assert "older than the champion" in capsys.readouterr().out
    release(options, "promote", "2", "--force")
    assert versions.champions() == ["1", "3", "2"]
    release(options, "rollback")
    assert versions.aliases()["champion"] == "3"
    release(options, "promote", "4")
    assert versions.champions() == ["1", "3", "4"]
    release(options, "rollback")
    release(options, "rollback")
    assert (
        versions.champions() == ["1"]
        and "version 1 is champion again, in place of version 3" in capsys.readouterr().out
    )
    with pytest.raises(UserError, match="no champion to go back to: version 1 is the first"):
        release(options, "rollback")
    with pytest.raises(UserError, match="has no version 9 .* its versions: 4, 3, 2, 1"):
        release(options, "promote", "9")


def test_what_is_broken_cannot_be_champion(registered_here, options, versions):
    source = versions.server.client.get_model_version("clicks", "3").source
    (folder,) = Path(options.state).glob(f"mlflow-artifacts/**/{source.split('/')[-1]}/artifacts")
    weights = next(folder.rglob("items.npy"))
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-4] + bytes(4))
    with pytest.raises(UserError, match="version 3 .* is broken: files are missing, or have other bytes"):
        release(options, "promote", "3", "--force")
    weights.unlink()
    with pytest.raises(UserError, match="version 3 .* is broken"):
        release(options, "promote", "3")
    assert versions.aliases()["champion"] == "1"
    weights.write_bytes(whole)
    release(options, "promote", "3")
    assert versions.aliases()["champion"] == "3"


def test_a_download_that_is_lost_on_the_way_is_tried_again(versions, monkeypatch, caplog):
    """Twice nothing comes; the third time it does. What never comes is told without the server's password."""
    import mlflow

    real, tries = mlflow.artifacts.download_artifacts, []

    def lossy(**asked) -> str:
        tries.append(asked)
        if len(tries) < 3:
            raise mlflow.MlflowException("could not read https://user:secret@host/items.npy: connection reset")
        return real(**asked)

    monkeypatch.setattr("raycluster.versions.time", SimpleNamespace(sleep=lambda _seconds: None))
    monkeypatch.setattr(mlflow.artifacts, "download_artifacts", lossy)
    versions.require_whole("3")
    assert len(tries) == 3 and caplog.text.count("connection reset; trying again") == 2
    assert "secret" not in caplog.text
    monkeypatch.setattr("raycluster.versions.DOWNLOADS", 1)
    tries.clear()
    with pytest.raises(Unfit, match=r"could not read https://\*\*\*@host/items.npy") as told:
        versions.require_whole("3")
    assert "secret" not in str(told.value)


def test_the_champions_fit_a_tag_of_any_database(versions, monkeypatch):
    monkeypatch.setattr("raycluster.versions.MOST_CHARACTERS", 20)
    before = versions.champions()
    versions._keep(["100", "101", "102", "103"])
    kept = versions.server.client.get_registered_model("clicks").tags["champions"]
    assert kept == '["102", "103"]' and len(kept) <= 20
    versions._keep(before)
    assert versions.champions() == before


def test_a_champion_of_other_code_refuses_and_does_not_end_the_job(registered_here, options, versions, monkeypatch):
    def other(_folder: Path) -> None:
        raise UserError("an artifact of version 9, this code reads 1")

    monkeypatch.setattr("raycluster.gate.ServedModel", other)
    with pytest.raises(UserError, match="the gate refuses clicks version 4"):
        release(options, "promote", "4")
    assert versions.aliases()["champion"] == "3"


def test_the_days_options_are_taken_from_ctr_yaml(options, versions, tmp_path, capsys):
    file = tmp_path / "ctr.yaml"
    file.write_text(f"state: {options.state}\ntrain_days: 4\nctr: {{backbone: dnn}}\ngate: {{resamples: 100}}\n")
    RELEASE.run(cli.parse_command(RELEASE.COMMANDS, "", ["list", "--config", str(file)]))
    assert "clicks at sqlite" in " ".join(capsys.readouterr().out.split())  # a long path wraps
    found = cli.parse_command(RELEASE.COMMANDS, "", ["promote", "3", f"--config={file}"])
    assert found.gate.resamples == 100 and found.version == "3"
    with pytest.raises(UserError, match="--state is missing"):
        RELEASE.run(cli.parse_command(RELEASE.COMMANDS, "", ["list"]))
    with pytest.raises(UserError, match="no release there"):
        RELEASE.run(cli.parse_command(RELEASE.COMMANDS, "", ["list", "--state", str(tmp_path)]))


@pytest.mark.parametrize("store", ["sqlite", "postgresql"])
def test_versions_on_a_real_server(store, request, registered_here, options, processes, tmp_path, monkeypatch):
    """`mlflow server` over HTTP: days and their gate, rollback, promotion, and a model that is loaded by its alias."""
    import mlflow

    backend, port = f"sqlite:///{tmp_path}/server.db", free_port()
    if store == "postgresql":
        backend, start = request.getfixturevalue("postgres")
        start()
    serve(processes, port, backend, tmp_path)
    uri = f"http://127.0.0.1:{port}"
    own, untrained = replace(options, state=str(tmp_path / "state"), tracking_uri=uri, keep_releases=0), {"lr": 1e-7}
    JOB.run(own)
    for day, ctr in ((5, {"epochs": 1, "table_lr": 1e-7, **untrained}), (6, {"epochs": 6})):
        JOB.run(replace(own, date=dt.date(2024, 1, day), from_scratch=True, ctr=replace(options.ctr, **ctr)))
    versions = Versions(Server(uri), "clicks")
    assert versions.aliases() == {"challenger": "3", "champion": "3"} and versions.champions() == ["1", "3"]
    assert [report_of(own, day)["gate"]["promoted"] for day in (4, 5, 6)] == [True, False, True]
    days = {run.info.run_name: run for run in runs_of(versions)}
    assert {days[f"2024-01-0{day}"].info.status for day in (4, 5, 6)} == {"FINISHED"}

    release(own, "rollback", "--tracking-uri", uri)
    assert versions.aliases()["champion"] == "1"
    release(own, "promote", "3", "--tracking-uri", uri)
    assert versions.aliases()["champion"] == "3"

    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)  # which `set_tracking_uri` sets as well
    monkeypatch.setattr(mlflow.tracking._tracking_service.utils, "_tracking_uri", None)
    mlflow.set_tracking_uri(uri)
    frame = pq.ParquetFile(f"{options.data}/interactions/dt=2024-01-07/part-0.parquet").read().to_pandas()
    columns = ["user_id", "item_id"]
    found = mlflow.pyfunc.load_model("models:/clicks@champion").predict(frame[columns])["probability"]
    scored = pq.read_table(State(own.state).local("runs/2024-01-06/evaluate") / "predictions.parquet")
    np.testing.assert_allclose(np.sort(found), np.sort(scored["dnn"].to_numpy()), atol=1e-6)
