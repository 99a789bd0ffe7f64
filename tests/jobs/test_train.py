"""One model alone, over days."""

import datetime as dt
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from ctrdist.datasets.synthetic import SyntheticConfig, prepare
from ctrdist.errors import UserError
from ctrdist.fields import load_encoders
from ctrdist.storage import State
from ctrdist.tasks.click import ClickConfig
from jobs import score as SCORE
from jobs import train as JOB
from raycluster import cli

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("train") / "data"
    prepare(SyntheticConfig(users=60, items=90, days=7, rows_per_day=400), out)
    return out


@pytest.fixture(scope="module")
def options(data):
    return JOB.TrainOptions(
        data=str(data), state=str(data.parent / "state"), date=dt.date(2024, 1, 4), train_days=4, workers=1,
        backbone="dcnv2", ctr=ClickConfig(epochs=2, batch_size=256, dim=8),
    )  # fmt: skip


def report_of(options, name: str) -> dict:
    return json.loads((Path(options.state) / "releases" / name / "report.json").read_text())


def test_three_days_of_one_model(ray_cluster, options, data, capsys):
    from sklearn.metrics import roc_auc_score

    JOB.run(options)
    report, state = report_of(options, "2024-01-04"), State(options.state)
    assert list(report["models"]) == ["dcnv2", "best"] and list(report["stages"]) == ["train", "evaluate"]
    assert report["gain"] == {} and report["text_table"] is None
    assert len(report["stages"]["train"]["valid_auc"]) == 2
    scored = pq.read_table(state.local("runs/2024-01-04/evaluate") / "predictions.parquet")
    assert scored.num_rows == report["rows"]["test"] == 400
    assert report["models"]["dcnv2"]["auc"] == pytest.approx(roc_auc_score(scored["label"], scored["dcnv2"]))
    out = capsys.readouterr().out
    assert "dcnv2" in out and "gain  overall" not in out

    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{options.state}/mlflow.db")
    model = mlflow.pyfunc.load_model("models:/train/1")
    frame = pq.read_table(data / "interactions" / "dt=2024-01-05", partitioning=None).to_pandas()
    names = [column.name for column in model.metadata.get_input_schema()]
    found = model.predict(frame[names])["probability"].to_numpy()
    np.testing.assert_allclose(np.sort(found), np.sort(scored["dcnv2"].to_numpy()), atol=1e-5)

    days = data / "interactions"
    scores = SCORE.ScoreOptions(
        input=str(days / "dt=2024-01-05"), output=str(data.parent / "scores"), model="models:/train/1",
        state=options.state,
    )  # fmt: skip
    SCORE.run(scores)
    with pytest.raises(UserError, match="--model models:/train@nobody: not in the registry at sqlite.*nobody"):
        SCORE.run(replace(scores, model="models:/train@nobody"))
    written = pq.read_table(scores.output, partitioning=None)
    assert written["user_id"].to_pylist() == frame["user_id"].tolist()
    np.testing.assert_allclose(written["probability"].to_numpy(), found, atol=1e-6)
    # What the log last said of its users is there for requests that bring nothing but ids.
    assert [c.name for c in model.metadata.get_input_schema() if not c.required] == ["age_band", "history"]
    log = pq.read_table(days).sort_by("timestamp").to_pandas()
    latest = frame["user_id"].map(log.groupby("user_id")["age_band"].last())
    full = frame[names].assign(age_band=latest, history=[[]] * len(frame))
    bare = frame[["user_id", "device", "item_id"]]
    np.testing.assert_allclose(model.predict(bare), model.predict(full), atol=1e-6)

    JOB.run(replace(options, date=dt.date(2024, 1, 5)))
    second = report_of(options, "2024-01-05")
    assert second["rows"]["train"] == 400 and second["stages"]["train"]["rows"] == 400

    # A third day, of a window of two: ids expire, and the first day's release goes with its runs.
    JOB.run(replace(options, date=dt.date(2024, 1, 6), train_days=2, expire_days=1, keep_releases=2))
    assert state.names("releases") == ["releases/2024-01-05", "releases/2024-01-06"]
    assert state.names("runs/2024-01-04") == [] and report_of(options, "2024-01-04") == report
    # Seen on the 5th or later: the second run (the 4th, and the 5th to validate) and the third (the 5th and the 6th).
    users = {
        day: set(pq.read_table(data / "interactions" / f"dt=2024-01-0{day}")["user_id"].to_pylist())
        for day in range(1, 7)
    }
    trained = set().union(*(users[day] for day in range(1, 6)))
    stay = users[4] | users[5] | (users[6] & trained)
    old, new = (load_encoders(state.local(f"runs/2024-01-0{day}/read") / "vocabulary") for day in (5, 6))
    assert {key.decode() for key in new["user_id"].keys} == stay
    assert trained - stay and len(new["user_id"].free) == len(trained - stay)
    both = np.isin(old["user_id"].keys, new["user_id"].keys)
    np.testing.assert_array_equal(new["user_id"].lookup_keys(old["user_id"].keys[both]), old["user_id"].rows[both])
    assert not len(new["item_id"].free)  # items of items/ are seen every day


def test_another_jobs_state_is_refused(options, data, tmp_path):
    state = State(str(tmp_path / "state"))
    with state.create("schema", State(options.state).find("schema").inputs, {"job": "cela_daily"}):
        pass
    with pytest.raises(UserError, match="--state .*: a state of cela_daily, whose models do not fit; give another"):
        JOB.run(replace(options, state=state.uri))


def test_no_such_backbone(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(lambda: JOB.run(cli.parse(JOB.TrainOptions(), "", ["--backbone", "dcnv3"])))
    assert stop.value.code == 1 and "no such backbone; did you mean 'dcnv2'" in capsys.readouterr().err


def test_help_lists_every_option():
    done = subprocess.run([sys.executable, ROOT / "jobs" / "train.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    for option in ("--backbone", "--split", "--ctr.patience", "--ctr.networks.din.attention", "--expire-days"):
        assert option in done.stdout
