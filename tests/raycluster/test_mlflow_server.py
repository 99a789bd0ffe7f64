"""What is logged while MLflow fails, hangs, goes away and comes back: nothing is lost, and nothing is there twice."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import BAD_REQUEST
from sqlalchemy import exc

from ctrdist.errors import UserError
from raycluster import journal, mlflow_server
from raycluster.mlflow_server import Server, refused
from raycluster.tracking import Tracker
from tests.servers import free_port, kill, serve


class Flaky:
    """A client half of whose calls fail: before anything was done, or after it, when only the answer is lost."""

    def __init__(self, client: Any) -> None:
        self.client, self.draw, self.failures = client, np.random.default_rng(0), 0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            when = self.draw.choice(["before", "after", "never", "never"])
            self.failures += when != "never"
            if when == "before":
                raise ConnectionError("no answer")
            done = getattr(self.client, name)(*arguments, **options)
            if when == "after":
                raise ConnectionError("the answer is lost")
            return done

        return call


def log_a_day(
    tracker: Tracker, folder: Path, first: int, steps: int, between: Callable[[], None] = lambda: None
) -> None:
    """A day with a stage: `steps` of its loss from `first` on; `between` is called in the middle."""
    with tracker.run("2024-01-04", params={"lr": first, "ctr": {"dim": 8}}, tags={"date": "2024-01-04"}) as day:
        tracker.set_tags(day, {"code": "abc"})
        with tracker.run("train", day, tags={"inputs": "x"}) as stage:
            for step in range(first, first + steps):
                tracker.log_metrics(stage, {"loss": 1 / (1 + step)}, step)
                if step == first + steps // 2:
                    between()
        tracker.log_artifacts(day, folder)


def check_the_day(client: Any, steps: int) -> None:
    """The day is there once, with all of its steps once."""
    found = client.search_runs([client.get_experiment_by_name("daily").experiment_id])
    assert sorted(run.info.run_name for run in found) == ["2024-01-04", "train"]
    stage, day = sorted(found, key=lambda run: run.info.run_name, reverse=True)
    assert stage.data.tags["mlflow.parentRunId"] == day.info.run_id
    assert {run.info.status for run in found} == {"FINISHED"}
    assert day.data.params == {"lr": "0", "ctr.dim": "8"} and day.data.tags["code"] == "abc"
    history = client.get_metric_history(stage.info.run_id, "loss")
    assert sorted((m.step, m.value) for m in history) == [(step, 1 / (1 + step)) for step in range(steps)]
    assert [file.path for file in client.list_artifacts(day.info.run_id)] == ["report.json"]


@pytest.fixture
def report(tmp_path: Path) -> Path:
    folder = tmp_path / "report"
    folder.mkdir()
    (folder / "report.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def database(tmp_path_factory) -> Path:
    """MLflow's database, empty: making one takes seconds."""
    folder = tmp_path_factory.mktemp("database")
    Server.of(None, folder).client.search_experiments()
    return folder / "mlflow.db"


def test_calls_that_fail_before_or_after_are_made_good(tmp_path, report, database, monkeypatch):
    monkeypatch.setattr(journal, "FIRST_DELAY", 0.001)
    monkeypatch.setattr(journal, "LONGEST_DELAY", 0.002)
    monkeypatch.setattr(journal, "BATCH", 20)
    state = tmp_path / "state"
    state.mkdir()
    shutil.copy(database, state / "mlflow.db")
    tracker = Tracker.open(None, state, "daily")
    real = tracker.client
    tracker.server._client = Flaky(real)
    log_a_day(tracker, report, 0, 60)
    log_a_day(tracker, report, 60, 60)
    shutil.rmtree(report)  # the journal has a copy
    assert tracker.close(300) == 0 and tracker.server.client.failures > 10
    check_the_day(real, 120)
    assert not list((state / "tracking").iterdir())


def test_what_the_server_refuses_is_left_out_with_a_warning(tmp_path, database, caplog):
    shutil.copy(database, tmp_path / "mlflow.db")
    tracker = Tracker.open(None, tmp_path, "daily")
    run = tracker.start_run("day")
    tracker.log_metrics(run, {"no\nname": 1.0})
    tracker.log_metrics(run, {"auc": 0.7})
    assert tracker.client.get_run(tracker.id_of(run)).data.metrics == {"auc": 0.7}
    assert "MLflow refuses" in caplog.text and tracker.close() == 0


@pytest.mark.parametrize(("kind", "final"), [
    (exc.DataError, True), (exc.IntegrityError, True), (exc.InterfaceError, False), (exc.OperationalError, False),
])  # fmt: skip
def test_what_a_database_cannot_hold_is_refused_for_good_and_a_lost_connection_is_not(kind, final):
    found = MlflowException(str(kind("INSERT ...", {}, Exception("value too long"))), error_code=BAD_REQUEST)
    assert found.error_code == "BAD_REQUEST" and refused(found) == final
    assert not refused(MlflowException(str(exc.TimeoutError("no connection")), error_code=BAD_REQUEST))


@pytest.mark.parametrize(("status", "final"), [(413, True), (404, True), (401, False), (403, False), (502, False)])
def test_what_a_proxy_never_lets_through_is_refused_for_good(status, final):
    answer = requests.Response()
    answer.status_code = status
    assert refused(requests.HTTPError("too large", response=answer)) == final


def test_a_record_of_a_deleted_experiment_is_left_out_and_holds_up_no_other(tmp_path, database, caplog):
    """Left by a job that ended while the server was down; the experiment is deleted before the next one."""
    shutil.copy(database, tmp_path / "mlflow.db")
    server = Server.of(None, tmp_path)
    server.client.delete_experiment(server.experiment("gone"))
    left, about = journal.Journal(tmp_path / "tracking", lambda records: 1 / 0), {"run": "r", "time": 1}
    left.append(about | {"kind": "open", "experiment": "gone", "name": "day", "parent": None, "tags": {}})
    left.append(about | {"kind": "end", "status": "FINISHED"})
    assert left.close(0.0) == 2
    tracker = Tracker.open(None, tmp_path, "daily")
    assert tracker.id_of(tracker.start_run("day")) and "MLflow refuses" in caplog.text and tracker.close() == 0


def test_an_experiment_that_another_job_makes_meanwhile_is_taken(tmp_path, database, monkeypatch):
    shutil.copy(database, tmp_path / "mlflow.db")
    server = Server.of(None, tmp_path)
    made, look = server.client.create_experiment("daily"), server.client.get_experiment_by_name
    answers = iter([lambda name: None, look])
    monkeypatch.setattr(server.client, "get_experiment_by_name", lambda name: next(answers)(name))
    assert server.experiment("daily") == made


def test_patience_ends_in_an_error_that_says_what_to_do(monkeypatch):
    monkeypatch.setattr(mlflow_server, "PATIENCE", 0.0)
    calls = []

    def action() -> None:
        calls.append(1)
        raise requests.exceptions.ConnectionError("connection refused")

    with pytest.raises(
        UserError, match=r"http://\*\*\*@host .* does not answer: connection refused.*run the job again"
    ):
        Server("http://me:secret@host").patiently(action)
    with pytest.raises(ZeroDivisionError):
        Server("http://host").patiently(lambda: 1 / 0)
    assert len(calls) == 1


def test_a_server_on_sqlite_that_is_down_at_first_and_killed_in_the_middle(
    tmp_path, report, database, processes, caplog
):
    port, state = free_port(), tmp_path / "state"
    uri, backend = f"http://127.0.0.1:{port}", f"sqlite:///{shutil.copy(database, tmp_path / 'server.db')}"
    tracker = Tracker.open(uri, state, "daily")
    assert "is away" in caplog.text
    server = []

    def comes_up() -> None:
        server.append(serve(processes, port, backend, tmp_path))
        assert tracker.journal.flush(300) == 0

    log_a_day(tracker, report, 0, 40, between=comes_up)
    log_a_day(tracker, report, 40, 40, between=lambda: kill(server[0]))
    with pytest.raises(UserError, match=r"does not answer: .*; \d+ records wait in .*tracking"):
        tracker.id_of("any", seconds=0.5)
    assert tracker.close(0.1) > 0

    serve(processes, port, backend, tmp_path)
    again = Tracker.open(uri, state, "daily")
    log_a_day(again, report, 80, 40)
    assert again.close(300) == 0
    check_the_day(again.client, 120)


def test_a_server_whose_postgresql_is_killed_in_the_middle(tmp_path, report, postgres, processes):
    backend, start = postgres
    database, port = start(), free_port()
    serve(processes, port, backend, tmp_path)
    tracker = Tracker.open(f"http://127.0.0.1:{port}", tmp_path / "state", "daily")
    log_a_day(tracker, report, 0, 40)
    assert tracker.journal.flush(300) == 0
    tracker.client.search_registered_models()
    log_a_day(tracker, report, 40, 40, between=lambda: kill(database))
    assert tracker.journal.flush(0.5) > 0
    with pytest.raises(Exception) as caught:
        tracker.client.search_registered_models()
    assert tracker.server.away(caught.value), caught.value
    start()
    assert tracker.close(300) == 0
    check_the_day(tracker.client, 80)
