"""`jobs/serve.py`, whole: a release behind HTTP until a signal comes, one job a cluster."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from ctrdist.errors import UserError
from ctrdist.serving.model import ServedModel
from jobs import serve as JOB
from tests.servers import free_port

ROOT = Path(__file__).parents[2]


def start(*arguments: str) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "jobs" / "serve.py", *arguments]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_a_release_is_served_until_a_signal_comes(ray_cluster, small_artifact, monkeypatch):
    import ray

    pytest.importorskip("starlette", reason="the extra `serve` is not installed")
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    port = free_port()
    job = start("--model", str(small_artifact), "--port", str(port))
    try:
        line = next((line for line in job.stdout if "http://" in line), "")
        assert line == f"{small_artifact} (version folder) at http://127.0.0.1:{port}/\n", job.stderr.read()
        asked = {"user": {"user_id": "u1"}, "context": {"hour": 3, "tags": ["a"]}, "candidates": ["i03", "i00"]}
        request = urllib.request.Request(f"http://127.0.0.1:{port}/", json.dumps(asked).encode())
        with urllib.request.urlopen(request, timeout=60) as answer:
            found = json.loads(answer.read())
        rows = pa.table({"user_id": ["u1"] * 2, "hour": [3] * 2, "tags": [["a"]] * 2, "item_id": ["i03", "i00"]})
        assert found["probabilities"] == pytest.approx(ServedModel(small_artifact).predict(rows).tolist(), abs=1e-6)

        other = start("--model", str(small_artifact), "--port", str(free_port()))
        told = other.communicate(timeout=600)
        assert other.returncode == 1 and "error: this Ray cluster serves already (ctr): stop that first" in told[1]
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.loads(answer.read()) == found, "the first one goes on"
    finally:
        job.send_signal(signal.SIGTERM)
        job.communicate(timeout=600)
    assert job.returncode == 0
    end = time.monotonic() + 60
    with pytest.raises(OSError):  # refused, or cut off by a proxy that is about to end
        while time.monotonic() < end:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).close()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"replicas": 0}, "--replicas 0: 1 or more"),
        ({"batch_requests": 0}, "--batch-requests 0: 1 or more"),
        ({"batch_wait_ms": -1.0}, "--batch-wait-ms takes 0 or more"),
        ({"model": "models:/cela@champion"}, "give --tracking-uri, or the --state"),
        ({"model": "/no/release"}, "--model /no/release: no such folder"),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(changed, said):
    with pytest.raises(UserError, match=said):
        JOB.run(replace(JOB.ServeOptions(model="/tmp"), **changed))


def test_help_lists_every_option():
    done = subprocess.run([sys.executable, ROOT / "jobs" / "serve.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    for option in ("--model", "--state", "--tracking-uri", "--host", "--port", "--replicas", "--threads"):
        assert option in done.stdout
