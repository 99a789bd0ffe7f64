import json
import logging
import subprocess
import sys
import time

import pytest
from pyarrow import fs

from ctrdist.errors import UserError
from ctrdist.storage import State, filesystem
from raycluster import mlflow_server, tracking
from raycluster.tracking import MetricsTail, Tracker
from raycluster.trainer import Recorder


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def tracker(state):
    return Tracker.open(None, state, "daily")


def stored(tracker, run_id):
    """A run as MLflow has it."""
    return tracker.client.get_run(tracker.id_of(run_id))


def history(tracker, run_id, name):
    return [(m.step, m.value) for m in tracker.client.get_metric_history(tracker.id_of(run_id), name)]


def append(path, *records):
    with open(path, "a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def test_open_again_finds_the_experiment(tracker, state):
    again = Tracker.open(None, state, "daily")
    assert again.server.experiment("daily") == tracker.server.experiment("daily")
    assert (state / "mlflow.db").exists()


def test_runs_nest_and_hold_params_metrics_and_artifacts(tracker, state, tmp_path):
    run = tracker.start_run("2013-09-30", params={"ctr": {"lr": 0.001}, "seed": 1}, tags={"release": "r1"})
    child = tracker.start_run("mf2", parent_run_id=run)
    tracker.log_metrics(child, {"auc": 0.71, "auc_cold": None, "loss": float("nan")}, step=3)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "report.json").write_text("{}")
    tracker.log_artifacts(run, tmp_path)
    tracker.end_run(child, "FINISHED")
    found = stored(tracker, run)
    assert found.data.params == {"ctr.lr": "0.001", "seed": "1"}
    assert found.data.tags["release"] == "r1" and found.info.status == "RUNNING"
    assert (state / "mlflow-artifacts" / found.info.run_id / "artifacts" / "deep" / "report.json").exists()
    found = stored(tracker, child)
    assert found.data.tags["mlflow.parentRunId"] == tracker.id_of(run) and found.info.status == "FINISHED"
    assert history(tracker, child, "auc") == [(3, 0.71)] and set(found.data.metrics) == {"auc", "loss"}


def test_a_run_goes_on_by_name_parent_and_tags(tracker):
    def id_of(*about, **more):
        with tracker.run(*about, **more) as run:
            return tracker.id_of(run)

    first, second = id_of("found"), tracker.start_run("other")
    child = id_of("found", second, tags={"fingerprint": "a"})
    assert child != first and id_of("found") == first
    assert id_of("found", second, tags={"fingerprint": "a"}) == child
    assert id_of("found", second, tags={"fingerprint": "b"}) not in (first, child)
    assert id_of("it's not there") not in (first, child)
    assert tracker.id_of(tracker.start_run("found")) != first, "started, not gone on"


def test_a_crashed_stage_goes_on_in_its_run(tracker):
    with pytest.raises(RuntimeError), tracker.run("stage", params={"lr": 1}) as run:
        raise RuntimeError("crash")
    assert stored(tracker, run).info.status == "FAILED"
    with tracker.run("stage", params={"lr": 2, "new": 3}) as again:
        assert stored(tracker, run).info.status == "RUNNING"
    found = stored(tracker, run)
    assert tracker.id_of(again) == found.info.run_id and found.info.status == "FINISHED"
    assert found.data.params == {"lr": "1", "new": "3"}
    with pytest.raises(KeyboardInterrupt), tracker.run("stopped") as run:
        raise KeyboardInterrupt
    assert stored(tracker, run).info.status == "KILLED"


def test_many_and_long_params_are_stored(tracker):
    long = "x" * 7000
    params = {"big": {f"p{n}": n for n in range(150)}, "long": long + "a", "list": [1, "b"], "none": None, "empty": {}}
    found = stored(tracker, tracker.start_run("params", params=params)).data.params
    assert len(found) == 154 and found["big.p149"] == "149"
    assert found["list"] == '[1, "b"]' and found["none"] == "None" and found["empty"] == "{}"
    assert len(found["long"]) == tracking.PARAM_VALUE_LIMIT
    assert found["long"] != tracking.flatten({"long": long + "b"})["long"]


def test_tail_follows_a_file_that_appears_late(tracker, tmp_path):
    run, path, seen = tracker.start_run("tail"), tmp_path / "metrics.jsonl", []
    tail = MetricsTail(tracker, run, path, every=0.02, on_record=seen.append)
    time.sleep(0.05)
    append(path, {"step": 1, "loss": 0.5, "time": 1e9, "stage": "id"})
    with open(path, "a") as file:
        file.write('{"step": 2, "lo')
        file.flush()
        deadline = time.monotonic() + 10
        while len(seen) < 1 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert [record["step"] for record in seen] == [1]
        file.write('ss": 0.4}\n')
    append(path, {"step": 3, "loss": 0.3})
    tail.close()
    assert tail.lines == 3
    assert history(tracker, run, "loss") == [(1, 0.5), (2, 0.4), (3, 0.3)]
    assert tracker.client.get_metric_history(tracker.id_of(run), "loss")[0].timestamp == 10**12
    assert [record["step"] for record in seen] == [1, 2, 3]
    assert set(stored(tracker, run).data.metrics) == {"loss"}


def test_tail_resumes_from_a_line_and_passes_a_bad_one(tracker, tmp_path, caplog):
    run, path = tracker.start_run("resumed"), tmp_path / "metrics.jsonl"
    append(path, {"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.4})
    with open(path, "a") as file:
        file.write("not json\n")
    append(path, *({"step": step, "loss": 0.3} for step in range(3, 1500)))
    with MetricsTail(tracker, run, path, lines=2, every=0.02) as tail:
        pass
    assert [step for step, _ in history(tracker, run, "loss")] == list(range(3, 1500))
    assert tail.lines == 1500 and "line 3 is skipped" in caplog.text


def test_tail_reads_a_file_that_began_again(tracker, tmp_path):
    run, path = tracker.start_run("again"), tmp_path / "metrics.jsonl"
    append(path, {"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.4})
    seen = []
    tail = MetricsTail(tracker, run, path, every=0.02, on_record=seen.append)
    deadline = time.monotonic() + 60
    while len(seen) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    path.write_text('{"step": 2, "auc": 0.7}\n')
    tail.close()
    assert history(tracker, run, "auc") == [(2, 0.7)] and tail.lines == 1


@pytest.mark.parametrize("where", ["local", "s3"])
def test_what_a_worker_records_is_followed_while_it_trains(where, request, tracker, tmp_path):
    """On object storage the file is written anew with all of its lines, a later worker's after a dead one's."""
    state = State(tmp_path if where == "local" else request.getfixturevalue("s3"))
    file, run, seen = state.scratch("runs/a/id.metrics.jsonl"), tracker.start_run(f"followed {where}"), []
    first, second = Recorder(file, every=0.0), Recorder(file, every=3600.0)
    with MetricsTail(tracker, run, file, every=0.02, on_record=seen.append):
        for step in range(1, 5):
            first({"step": step, "loss": 1 / step, "valid_auc": 0.5})
            deadline = time.monotonic() + 10
            while len(seen) < step and time.monotonic() < deadline:
                time.sleep(0.01)
            assert len(seen) == step, "each is seen while the next one is not there"
        for step in range(5, 9):
            second({"step": step, "loss": 1 / step})
        second.close()
    assert history(tracker, run, "loss") == [(step, 1 / step) for step in range(1, 9)]
    Recorder(None)({"step": 1})
    Recorder(str(tmp_path / "nowhere" / "file"))({"step": 1})


@pytest.mark.parametrize("uri", ["nonsense://me:secret@x", "sqlite:////proc/none/mlflow.db"])
def test_a_wrong_uri_is_a_quick_user_error(uri, tmp_path):
    began = time.monotonic()
    with pytest.raises(UserError, match="--tracking-uri") as caught:
        Tracker.open(uri, tmp_path, "daily")
    print(caught.value)
    assert time.monotonic() - began < 15
    assert uri.split("//")[0] in str(caught.value) and "secret" not in str(caught.value)


@pytest.mark.parametrize("uri", ["http://user:secret@127.0.0.1:9", "postgresql+psycopg2://user:secret@127.0.0.1:9/x"])
def test_a_server_that_is_away_is_no_reason_to_stop(uri, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(mlflow_server, "FIRST_CONTACT", 2.0)
    began = time.monotonic()
    tracker = Tracker.open(uri, tmp_path, "daily")
    with tracker.run("day", params={"seed": 1}) as run:
        tracker.log_metrics(run, {"auc": 0.7})
    assert tracker.close(0.1) == 4 and time.monotonic() - began < 10
    assert "is away" in caplog.text and "secret" not in caplog.text
    assert len(list((tmp_path / "tracking").glob("*.jsonl"))) == 1


def test_state_on_object_storage_needs_a_uri():
    with pytest.raises(UserError, match="--tracking-uri"):
        Tracker.open(None, "s3://bucket/state", "daily")


def test_what_waits_for_a_state_on_object_storage_is_taken_up_on_another_machine(s3, tmp_path, monkeypatch):
    """The server is down to the end of a job, whose machine then goes with all its files."""
    monkeypatch.setattr(mlflow_server, "FIRST_CONTACT", 2.0)
    monkeypatch.setenv("HOME", str(tmp_path / "one"))
    first = Tracker.open("http://127.0.0.1:9", f"{s3}/state", "daily")
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "report.html").write_text("<p>")
    with first.run("day", params={"seed": 1}) as run:
        first.log_metrics(run, {"auc": 0.7})
        first.log_artifacts(run, tmp_path / "page")
    assert first.close(0.1) == 5
    assert not [path for path in (tmp_path / "one").rglob("*") if path.is_file()], "no later job here has it again"

    monkeypatch.setenv("HOME", str(tmp_path / "two"))
    for _ in range(2):  # the second finds nothing to do
        second = Tracker.open(f"sqlite:///{tmp_path}/mlflow.db", f"{s3}/state", "daily")
        assert second.close() == 0
        (run,) = second.client.search_runs([second.server.experiment("daily")])
        assert run.data.metrics == {"auc": 0.7} and run.info.status == "FINISHED"
        assert [file.path for file in second.client.list_artifacts(run.info.run_id)] == ["report.html"]
        files, root = filesystem(f"{s3}/state/tracking")
        left = files.get_file_info(fs.FileSelector(root, allow_not_found=True, recursive=True))
        assert not [info for info in left if info.is_file]


def test_only_what_is_left_is_handed_over(s3, tmp_path, monkeypatch):
    """Two jobs on one machine while the server is down; then a third that delivers neither but its own."""
    monkeypatch.setattr(mlflow_server, "FIRST_CONTACT", 2.0)
    monkeypatch.setenv("HOME", str(tmp_path))
    files, root = filesystem(f"{s3}/state/tracking")

    def waiting() -> set[str]:
        found = files.get_file_info(fs.FileSelector(root, allow_not_found=True, recursive=True))
        return {info.base_name for info in found if info.is_file}

    first, second = (Tracker.open("http://127.0.0.1:9", f"{s3}/state", "daily") for _ in range(2))
    for tracker in (first, second):
        tracker.start_run("day")
    assert first.close(0.1) == 1 and waiting() == {first.journal.path.name}, "the other one is under way"
    assert second.journal.path.exists()
    third = Tracker.open("http://127.0.0.1:9", f"{s3}/state", "daily")
    third.start_run("day")
    assert third.close(0.1) == 2 and waiting() == {first.journal.path.name, third.journal.path.name}
    second.close(0.1)
    assert len(waiting()) == 3 and not list(second.journal.folder.glob("*.jsonl"))


def test_a_deleted_experiment_is_a_user_error(tracker, state):
    gone = Tracker.open(None, state, "gone")
    gone.client.delete_experiment(gone.server.experiment("gone"))
    with pytest.raises(UserError, match="mlflow experiments restore"):
        Tracker.open(None, state, "gone")


def test_opening_is_silent_and_import_is_lazy(tmp_path):
    code = (
        "import sys, logging; logging.basicConfig(level=logging.INFO); import raycluster.tracking as t\n"
        "assert 'mlflow' not in sys.modules\n"
        f"r = t.Tracker.open(None, {str(tmp_path)!r}, 'daily'); r.end_run(r.start_run('a', params={{'b': 1}}))\n"
        "assert r.close() == 0\n"
        "assert logging.getLogger('mlflow').level == logging.WARNING\n"
        "logging.info('still heard')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and done.stderr.strip().endswith("still heard")
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert logging.root.manager.disable == 0


@pytest.mark.parametrize("uri", ["sqlite:///{}/mlflow.db", "http://127.0.0.1:9"])
def test_object_storage_that_is_away_at_the_end_is_a_warning(uri, tmp_path, caplog, monkeypatch):
    class Away:
        remote = "s3://bucket/state/tracking"

        def settle(self, left) -> None:
            raise OSError("no answer")

    monkeypatch.setattr(mlflow_server, "FIRST_CONTACT", 2.0)
    tracker = Tracker.open(uri.format(tmp_path), tmp_path, "daily")
    tracker.handover = Away()
    tracker.start_run("day")
    left = tracker.close(30.0 if "sqlite" in uri else 0.1)
    assert left == len(list(tracker.journal.folder.glob("*.jsonl"))) == ("http" in uri)
    assert "s3://bucket/state/tracking cannot be written: no answer" in caplog.text
