"""Real servers that tests start: `mlflow server`, PostgreSQL behind it, and an S3 server."""

import contextlib
import logging
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs


@pytest.fixture
def processes() -> Iterator[Callable[..., subprocess.Popen]]:
    """`start(command, ready, **options)`: a process that is waited for until `ready()`, and killed in the end."""
    started: list[subprocess.Popen] = []

    def start(command: list[str], ready: Callable[[], bool], **options: Any) -> subprocess.Popen:
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, **options
        )
        started.append(process)
        end = time.monotonic() + 600
        while not ready():
            assert process.poll() is None and time.monotonic() < end, command
            time.sleep(0.1)
        return process

    yield start
    for process in started:
        kill(process)


def kill(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def free_port() -> int:
    """A free port of those that no system gives to who asks for any one, as Ray's processes do all the time."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as taken:
            taken.bind(("127.0.0.1", port))
            return port


def serve(processes, port: int, backend: str, folder: Path) -> subprocess.Popen:
    """A real `mlflow server`."""

    def ready() -> bool:
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10).status == 200
        except (urllib.error.URLError, OSError):
            return False

    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", backend, "--artifacts-destination", str(folder / "artifacts")]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    return processes(command, ready, env=environment)


@pytest.fixture
def postgres(processes) -> Iterator[tuple[str, Callable[[], subprocess.Popen]]]:
    """The URI of an empty PostgreSQL, and what starts it."""
    if not (shutil.which("initdb") and shutil.which("postgres")):
        pytest.skip("no PostgreSQL here: initdb and postgres are not on the PATH")
    pytest.importorskip("psycopg2", reason="MLflow speaks to PostgreSQL by psycopg2")
    folder, port = Path(tempfile.mkdtemp(prefix="ctrdist-postgres-")), free_port()
    who = {}
    if os.getuid() == 0:  # which PostgreSQL refuses
        user = next(name for name in ("postgres", "nobody") if name in {entry.pw_name for entry in pwd.getpwall()})
        shutil.chown(folder, user)
        who = {"user": user}
    subprocess.run(
        ["initdb", "-D", folder / "data", "-U", "ctr", "-A", "trust", "--no-sync", "--locale=C", "-E", "UTF8"],
        check=True, capture_output=True, cwd=folder, **who,
    )  # fmt: skip

    def ready() -> bool:
        import psycopg2

        try:
            psycopg2.connect(host="127.0.0.1", port=port, user="ctr", dbname="postgres").close()
        except psycopg2.OperationalError:
            return False
        return True

    def start() -> subprocess.Popen:
        command = ["postgres", "-D", str(folder / "data"), "-F", "-h", "127.0.0.1", "-p", str(port), "-k", ""]
        return processes(command, ready, cwd=folder, **who)

    yield f"postgresql+psycopg2://ctr@127.0.0.1:{port}/postgres", start
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def serve_s3(address: str = "127.0.0.1", host: str = "") -> Iterator[str]:
    """URI of a bucket of an S3 server in this process, which pyarrow reaches by HTTP as it would Amazon's.

    Args:
        address: to listen at.
        host: by which others reach it; `address` if not given.
    """
    server = pytest.importorskip("moto.server", reason="moto, of the extra dev, is not installed")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = server.ThreadedMotoServer(ip_address=address, port=0, verbose=False)
    running.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "anybody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "anything")
        patch.setenv("AWS_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host or address}:{running.get_host_and_port()[1]}")
        files, _ = fs.FileSystem.from_uri("s3://bucket?allow_bucket_creation=true")
        files.create_dir("bucket")
        yield "s3://bucket"
    running.stop()


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """URI of a bucket of an S3 server."""
    with serve_s3() as uri:
        yield uri
