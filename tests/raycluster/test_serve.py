"""Serving by Ray Serve: what a request becomes, and a champion that changes under load without a request dropped."""

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import mlflow
import numpy as np
import pyarrow as pa
import pytest

from ctrdist.errors import UserError
from raycluster.model_source import ModelSource, find_model

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
    table = serve.Loaded(VERSION, Echo()).table(REQUEST)
    assert table.to_pylist() == [
        {"user_id": "u", "hour": 3, "item_id": f"i{n}", "history": ["i9", "i8"]} for n in (1, 2, 3)
    ]  # fmt: skip
    without = {name: part for name, part in REQUEST.items() if name != "history"}
    empty = serve.Loaded(VERSION, Echo()).table(without)
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
        serve.Loaded(VERSION, Echo()).table(REQUEST | change)


def test_requests_of_like_columns_are_scored_in_one_go_and_one_that_is_wrong_alone():
    loaded = serve.Loaded(VERSION, Echo())
    requests = [REQUEST | {"candidates": [f"i{10 * n}", f"i{10 * n + 1}"][: 1 + n % 2]} for n in range(4)]
    requests.insert(2, REQUEST | {"context": {"hour": "x"}})
    found = loaded.score([loaded.table(request) for request in requests])
    assert [str(scores) if isinstance(scores, Exception) else scores.tolist() for scores in found] == [
        [0.0], [10.0, 11.0], "column 'hour': not a number", [20.0], [30.0, 31.0]
    ]  # fmt: skip
    assert [table.num_rows for table in loaded.model.seen] == [6, 3]
    loaded.model.seen.clear()
    # Where requests are alike and one of them is to blame, the others are answered.
    both = loaded.score([loaded.table(requests[0]), loaded.table(REQUEST | {"candidates": ["none"]})])
    assert both[0].tolist() == [0.0] and isinstance(both[1], ValueError) and not isinstance(both[1], UserError)


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


def test_a_new_champion_takes_over_under_load_and_no_request_fails(ray_cluster, registry):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve.start("models:/cela@champion", registry.tracking_uri, port=port, poll_seconds=0.3, load=Constant)
    answers: list[tuple[float, int, dict]] = []
    over = threading.Event()

    def client() -> None:
        while not over.is_set():
            answers.append((time.monotonic(), *ask(port, REQUEST)))

    def versions() -> set[str]:
        return {body["version"] for _, _, body in answers if "version" in body}

    def until(condition) -> None:
        end = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < end, answers[-1]
            time.sleep(0.05)

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


def test_what_is_not_there_is_said(registry, tmp_path):
    for model in ("models:/cela@best", "models:/cela/9", "models:/cella@champion"):
        with pytest.raises(UserError, match=f"--model {model}: "):
            find_model(model, registry.tracking_uri, "")
    with pytest.raises(UserError, match="name the folder of a release"):
        find_model(str(tmp_path), None, "")
    assert find_model("models:/cela/3", registry.tracking_uri, "").version == "3"
