"""A registered model, without the code and the packages that train, in a server of MLflow's own."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import mlflow
import numpy as np
import pyarrow.parquet as pq
import pytest

from ctrdist.serving.model import ServedModel
from raycluster.registry import pyfunc_parts, serving_code
from tests.servers import free_port

BLOCK = """
import sys
FORBIDDEN = ("ray", "transformers", "safetensors", "peft", "tyro", "raycluster", "jobs")

class Blocked:
    def find_spec(self, name, path=None, target=None):
        inner = name.split(".")
        if inner[0] in FORBIDDEN or inner[0] == "ctrdist" and inner[1:2] not in ([], ["serving"]):
            raise ImportError(f"{name} is not needed to serve")

sys.meta_path.insert(0, Blocked())
"""


@pytest.fixture(scope="module")
def model(small_artifact: Path, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("registered") / "model"
    with serving_code() as code:
        mlflow.pyfunc.save_model(str(path), **pyfunc_parts(small_artifact, code))
    return path


@pytest.fixture(scope="module")
def frame(small_log: Path):
    rows = pq.ParquetFile(small_log / "interactions" / "dt=2024-01-05" / "part-0.parquet").read()
    frame = rows.select(["user_id", "item_id", "hour", "tags", "history"]).to_pandas().dropna().reset_index(drop=True)
    frame.loc[0, "item_id"] = "never heard of"
    return frame


def test_what_goes_with_a_model(model: Path):
    code = {path.relative_to(model / "code").as_posix() for path in (model / "code").rglob("*.py")}
    assert code > {"ctrdist/__init__.py", "ctrdist/serving/model.py"}
    assert all(name.startswith("ctrdist/serving/") for name in code - {"ctrdist/__init__.py"})
    assert not list(model.rglob("*.pkl")) and not list(model.rglob("*.safetensors"))
    wanted = {line.split("==")[0] for line in (model / "requirements.txt").read_text().split()}
    assert wanted == {"mlflow", "torch", "pyarrow", "pandas", "numpy"}


def test_mlflow_serves_the_same_numbers_without_what_trains(model: Path, small_artifact: Path, frame, tmp_path: Path):
    expected = ServedModel(small_artifact).predict_frame(frame)
    found = mlflow.pyfunc.load_model(str(model)).predict(frame)["probability"]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    (tmp_path / "sitecustomize.py").write_text(BLOCK)
    port = str(free_port())
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", str(model), "--env-manager", "local"]
    environment = os.environ | {
        "PYTHONPATH": str(tmp_path),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [*command, "-p", port, "-w", "1"], cwd=tmp_path, env=environment, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
    try:
        asked = json.dumps({"dataframe_split": json.loads(frame.to_json(orient="split"))}).encode()
        answer = ask(f"http://127.0.0.1:{port}/invocations", asked, server)
        assert answer is not None, (tmp_path / "log").read_text()[-3000:]
        served = [row["probability"] for row in answer["predictions"]]
        np.testing.assert_allclose(served, expected, atol=1e-6)
    finally:
        os.killpg(server.pid, 9)
        server.wait()


def ask(url: str, content: bytes, server: subprocess.Popen) -> dict | None:
    """The answer of a server, once it is there; None if it dies or takes too long."""
    end = time.monotonic() + 600
    while time.monotonic() < end and server.poll() is None:
        request = urllib.request.Request(url, content, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as stream:
                return json.loads(stream.read())
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from None
        except OSError:
            time.sleep(0.3)
    return None
