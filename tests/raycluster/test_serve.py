"""Serving by Ray Serve: what a request becomes, and a champion that changes under load without a request dropped."""

import json
import os
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import mlflow
import numpy as np
import pyarrow as pa
import pytest

from ctrdist.errors import UserError
from ctrdist.serving.model import ServedModel
from raycluster import model_source
from raycluster.model_source import ModelSource, RegistryAway, find_model
from tests import servers
from tests.servers import free_port

pytest.importorskip("starlette", reason="the extra `serve` is not installed")
serve = pytest.importorskip("raycluster.serve", reason="the extra `serve` is not installed")


class Constant:
    """A model that gives every candidate the number that stands in its release, and takes its time to load."""

    columns = ["user_id", "hour", "item_id", "history"]

    def __init__(self, folder: Path) -> None:
        self.value = json.loads((folder / "serving.json").read_text())["value"]
        if self.value < 0:
            raise OSError("a broken release")
        time.sleep(0.5)

    def predict(self, rows: pa.Table) -> np.ndarray:
        """Its number for each row; refuses an hour that is no number."""
        if not pa.types.is_integer(rows["hour"].type):
            raise UserError("column 'hour': not a number")
        return np.full(rows.num_rows, self.value, np.float32)

    def predict_request(self, request: pa.Table, items: pa.Array) -> np.ndarray:
        """The same."""
        return self.predict(serve.Asked(request, items).rows)


class Echo(Constant):
    """A model that scores an item by its id, and keeps what it was given."""

    def __init__(self) -> None:
        self.seen: list[pa.Table] = []

    def predict(self, rows: pa.Table) -> np.ndarray:
        """The number of each item id."""
        self.seen.append(rows)
        if rows["hour"][0].as_py() == "x":
            raise UserError("column 'hour': not a number")
        return np.array([float(item.removeprefix("i")) for item in rows["item_id"].to_pylist()], np.float32)


VERSION = ModelSource("models:/cela/1", "sqlite:///none.db")
REQUEST = {"user": {"user_id": "u"}, "context": {"hour": 3}, "history": ["i9", "i8"], "candidates": ["i1", "i2", "i3"]}


def test_a_request_becomes_a_row_for_each_candidate():
    table = serve.Loaded(VERSION, Echo()).read(REQUEST).rows
    assert table.to_pylist() == [
        {"user_id": "u", "hour": 3, "item_id": f"i{n}", "history": ["i9", "i8"]} for n in (1, 2, 3)
    ]  # fmt: skip
    without = {name: part for name, part in REQUEST.items() if name != "history"}
    empty = serve.Loaded(VERSION, Echo()).read(without).rows
    assert empty["history"].to_pylist() == [[], [], []] and empty.schema == table.schema


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidates": []}, "candidates: expected a list"),
        ({"candidate": ["i1"]}, "candidate: unknown; a request has user, context"),
        ({"context": {}}, "hour: missing"),
        ({"user": None}, "user_id: missing"),
    ],
)
def test_a_request_that_is_wrong_is_told_what_is(change, message):
    with pytest.raises(UserError, match=message):
        serve.Loaded(VERSION, Echo()).read(REQUEST | change)


def test_requests_of_like_columns_are_scored_in_one_go_and_one_that_is_wrong_alone():
    loaded = serve.Loaded(VERSION, Echo())
    requests = [REQUEST | {"candidates": [f"i{10 * n}", f"i{10 * n + 1}"][: 1 + n % 2]} for n in range(4)]
    requests.insert(2, REQUEST | {"context": {"hour": "x"}})
    found = loaded.score([loaded.read(request) for request in requests])
    assert [str(scores) if isinstance(scores, Exception) else scores.tolist() for scores in found] == [
        [0.0], [10.0, 11.0], "column 'hour': not a number", [20.0], [30.0, 31.0]
    ]  # fmt: skip
    assert [table.num_rows for table in loaded.model.seen] == [6, 3]
    loaded.model.seen.clear()
    # Where requests are alike and one of them is to blame, the others are answered.
    both = loaded.score([loaded.read(requests[0]), loaded.read(REQUEST | {"candidates": ["none"]})])
    assert both[0].tolist() == [0.0] and isinstance(both[1], ValueError) and not isinstance(both[1], UserError)
    loaded.model.seen.clear()
    # A request of many candidates is scored by itself.
    many = REQUEST | {"candidates": [f"i{n}" for n in range(20)]}
    found = loaded.score([loaded.read(request) for request in (requests[0], many, requests[1], many)])
    assert [len(scores) for scores in found] == [1, 20, 2, 20] and found[3].tolist() == list(range(20))
    assert sorted(table.num_rows for table in loaded.model.seen) == [3, 20, 20]


@pytest.fixture(scope="module")
def registry(tmp_path_factory) -> mlflow.MlflowClient:
    """Three versions of a model, of which the first is champion and the third cannot be loaded."""
    folder = tmp_path_factory.mktemp("registry")
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.create_experiment("cela", f"file://{folder}/artifacts")
    client.create_registered_model("cela")
    for value in (0.25, 0.75, -1.0):
        run = client.create_run(experiment).info
        (folder / "release").mkdir(exist_ok=True)
        (folder / "release" / "serving.json").write_text(json.dumps({"value": value}))
        client.log_artifacts(run.run_id, str(folder / "release"), "model/artifacts/serving")
        client.create_model_version("cela", f"{run.artifact_uri}/model", run.run_id)
    client.set_registered_model_alias("cela", "champion", "1")
    return client


def ask(port: int, content: object, method: str = "POST") -> tuple[int, dict]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/", json.dumps(content).encode(), method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read() or b"{}")


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_new_champion_takes_over_under_load_and_no_request_fails(ray_cluster, registry):
    port = free_port()
    serve.start("models:/cela@champion", registry.tracking_uri, port=port, poll_seconds=0.3, load=Constant)
    answers: list[tuple[float, int, dict]] = []
    over = threading.Event()

    def client() -> None:
        while not over.is_set():
            answers.append((time.monotonic(), *ask(port, REQUEST)))

    def versions() -> set[str]:
        return {body["version"] for _, _, body in answers if "version" in body}

    clients = [threading.Thread(target=client) for _ in range(4)]
    try:
        for one in clients:
            one.start()
        until(lambda: len(answers) > 20)
        registry.set_registered_model_alias("cela", "champion", "2")
        until(lambda: "2" in versions())
        registry.set_registered_model_alias("cela", "champion", "3")  # broken: the second goes on
        time.sleep(1.0)
        asked = len(answers)
        until(lambda: len(answers) > asked + 20)
        assert ask(port, {"candidates": ["i1"]})[0] == 400
        assert ask(port, REQUEST | {"context": {"hour": "noon"}}) == (400, {"error": "column 'hour': not a number"})
        assert ask(port, None, "GET")[1] == {"model": "models:/cela@champion", "version": "2"}
    finally:
        over.set()
        for one in clients:
            one.join()
        serve.serve.shutdown()
    assert {status for _, status, _ in answers} == {200} and versions() == {"1", "2"}
    scores = {"1": [0.25] * 3, "2": [0.75] * 3}
    assert all(body["probabilities"] == scores[body["version"]] for _, _, body in answers)
    began = sorted(time_ for time_, _, body in answers if body["version"] == "2")[0]
    assert all(body["version"] == "2" for time_, _, body in answers if time_ > began + 5)


def test_a_release_over_http_gives_its_own_scores_and_is_measured(ray_cluster, small_artifact):
    """Whole: a release in a replica, the numbers that it gives without one, unknown ids and no history, and metrics."""
    import ray

    port, items = free_port(), ["i03", "i", "never seen", "i00"]
    serve.start(str(small_artifact), port=port, batch_requests=4)
    try:
        for user, history in (("u1", ["i01", "i02"]), ("nobody", [])):
            request = {"user": {"user_id": user}, "context": {"hour": 3, "tags": ["a"]}, "candidates": items}
            status, body = ask(port, request | ({"history": history} if history else {}))
            rows = {"user_id": user, "hour": 3, "tags": ["a"], "history": history}
            typed = pa.schema([("history", pa.list_(pa.string())), ("tags", pa.list_(pa.string()))])
            table = pa.table({name: [value] * 4 for name, value in rows.items()} | {"item_id": items})
            table = table.set_column(3, "history", table["history"].cast(typed.field("history").type))
            assert (status, body["version"]) == (200, "folder")
            np.testing.assert_allclose(body["probabilities"], ServedModel(small_artifact).predict(table), atol=1e-6)
        assert len({round(p, 6) for p in body["probabilities"]}) > 1
        metrics = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"

        def told() -> bool:
            try:
                text = urllib.request.urlopen(metrics, timeout=10).read().decode()
            except OSError:
                return False
            lines = [line for line in text.splitlines() if line.startswith("ray_ctr_")]
            value = {line.split("{")[0]: float(line.rsplit(" ", 1)[1]) for line in lines if "_bucket" not in line}
            return value.get("ray_ctr_candidates_total") == 8 and value.get("ray_ctr_request_seconds_count") == 2

        until(told)
    finally:
        serve.serve.shutdown()


def test_a_replica_is_ill_when_nothing_follows_the_alias():
    ranker = serve.Ranker.func_or_class
    ranker.check_health(SimpleNamespace(watcher=SimpleNamespace(is_alive=lambda: True)))
    with pytest.raises(RuntimeError, match="the thread that follows the alias has ended"):
        ranker.check_health(SimpleNamespace(watcher=SimpleNamespace(is_alive=lambda: False)))


def test_a_replica_starts_while_the_registry_is_away_or_its_champion_broken(
    registry, processes, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    registry.set_registered_model_alias("cela", "champion", "2")
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    server = servers.serve(processes, port, registry.tracking_uri, tmp_path)

    def replica() -> serve.Loaded:
        return serve.Ranker.func_or_class("models:/cela@champion", uri, Constant, 1e6).loaded

    assert replica().source.version == "2"
    registry.set_registered_model_alias("cela", "champion", "3")
    assert replica().source.version == "2" and "version 2 serves again: a broken release" in caplog.text
    servers.kill(server)
    loaded = replica()
    assert (loaded.source.version, loaded.model.value) == ("2", 0.75) and "does not answer" in caplog.text
    with pytest.raises(RegistryAway, match=f"the registry at {uri} does not answer"):
        find_model("models:/cela@champion", uri, "")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "new machine"))
    with pytest.raises(RegistryAway):
        replica()


def test_a_machine_keeps_the_versions_that_were_asked_for_last(registry, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(model_source, "KEPT", 2)
    monkeypatch.setattr(model_source, "LOADING", -1.0)
    sources = [find_model(f"models:/cela/{number}", registry.tracking_uri, "") for number in (1, 2, 3)]
    first, second = sources[0].local(), sources[1].local()
    assert sources[0].local() == first, "asked for again: now the second is the oldest"
    with (second / "serving.json").open() as opened:
        third = sources[2].local()
        assert first.exists() and third.exists() and not second.exists()
        assert json.load(opened) == {"value": 0.75}, "who has it open keeps it"
    assert json.loads((sources[1].local() / "serving.json").read_text()) == {"value": 0.75}
    assert third.exists() and not first.exists()
    model_source.remember("models:/cela@champion", sources[1])
    assert first == sources[0].local() and second.exists() and not third.exists()
    assert third == sources[2].local() and first.exists() and second.exists(), "what is remembered stays besides"
    assert not [path for path in tmp_path.rglob("new.*")]


def test_a_version_is_downloaded_once_however_many_ask(registry, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    source, real, times = find_model("models:/cela/1", registry.tracking_uri, ""), ModelSource._download, []

    def slowly(self: ModelSource, folder: Path) -> None:
        times.append(self)
        time.sleep(0.2)
        real(self, folder)

    monkeypatch.setattr(ModelSource, "_download", slowly)
    asked = [threading.Thread(target=source.local) for _ in range(4)]
    for one in asked:
        one.start()
    for one in asked:
        one.join()
    assert times == [source] and (source.local() / "serving.json").exists()


def test_files_that_are_not_those_registered_do_not_stay(registry, tmp_path, monkeypatch):
    """The registry's files are damaged, and then whole again."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    source = find_model("models:/cela/1", registry.tracking_uri, "")
    registry.set_model_version_tag("cela", "1", "artifact", "other")
    with pytest.raises(UserError, match="models:/cela/1 at sqlite.* cannot be fetched: files are missing, or have"):
        source.local()
    registry.delete_model_version_tag("cela", "1", "artifact")
    assert json.loads((source.local() / "serving.json").read_text()) == {"value": 0.25}


def test_files_that_have_gone_since_are_fetched_anew(registry, tmp_path, monkeypatch):
    """Systems clear folders for temporary files of what nobody has read for days."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    source = find_model("models:/cela/1", registry.tracking_uri, "")
    for damage in (Path.unlink, lambda file: file.write_text("{}")):
        damage(source.local() / "serving.json")
        assert json.loads((source.local() / "serving.json").read_text()) == {"value": 0.25}


def test_a_folder_of_another_user_is_not_used(registry, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    source = find_model("models:/cela/1", registry.tracking_uri, "")
    (tmp_path / "theirs").mkdir()
    (tmp_path / f"ctrdist-models-{os.getuid()}").symlink_to(tmp_path / "theirs")
    with pytest.raises(UserError, match="is somebody else's"):
        source.local()


def test_what_is_not_there_is_said(registry, tmp_path):
    for model in ("models:/cela@best", "models:/cela/9", "models:/cella@champion"):
        with pytest.raises(UserError, match=f"--model {model}: "):
            find_model(model, registry.tracking_uri, "")
    with pytest.raises(UserError, match="name the folder of a release"):
        find_model(str(tmp_path), None, "")
    with pytest.raises(UserError, match=f"{tmp_path}/mlflow.db: no registry there, on this machine"):
        find_model("models:/cela@champion", None, str(tmp_path))
    assert not (tmp_path / "mlflow.db").exists(), "looking makes none"
    assert find_model("models:/cela/3", f"{registry.tracking_uri}?timeout=30", "").version == "3"
    with pytest.raises(UserError, match="on object storage, .*: give a server or database with --tracking-uri"):
        find_model("models:/cela@champion", None, "s3://bucket/state")
    assert find_model("models:/cela/3", registry.tracking_uri, "").version == "3"
