"""A daily job on three nodes of one machine, of which one is lost while it trains and another joins."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from ray.cluster_utils import Cluster

from ctrdist.datasets.synthetic import SyntheticConfig, prepare

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).parents[2]
NODE = {"num_cpus": 2, "object_store_memory": 200_000_000}


@pytest.fixture
def nodes(monkeypatch) -> Cluster:
    """A head without tasks, as in cluster.yaml."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield made
    made.shutdown()


def test_a_day_ends_well_though_a_node_is_lost_and_another_joins(nodes, tiny_lm, tmp_path):
    prepare(SyntheticConfig(users=60, items=90, days=7, rows_per_day=400), tmp_path / "data")
    _, lost, _ = [nodes.add_node(**NODE) for _ in range(3)]
    options = {
        "data": tmp_path / "data", "state": tmp_path / "state", "date": "2024-01-04", "train-days": 4, "test-days": 2,
        # A node has room for one such process besides its tasks: training, scoring and encoding are spread over all.
        "workers": 3, "plan.worker-cpus": 1.5, "plan.reader-gib": 0.1, "ctr.batch-size": 255, "ctr.epochs": 3,
        "pretrain.epochs": 0, "align.epochs": 1, "align.batch-size": 30, "align.max-length": 16,
        "encode.max-length": 16, "encode.shard-items": 16, "lm.name": tiny_lm, "lm.pooling": "mean",
    }  # fmt: skip
    job = subprocess.Popen(
        [sys.executable, "jobs/cela_daily.py", *(f"--{name}={value}" for name, value in options.items())],
        cwd=ROOT, env=os.environ | {"RAY_ADDRESS": nodes.address}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    said = []
    try:
        for line in job.stdout:
            said.append(line)
            if lost and "epoch 0: validation AUC" in line:
                nodes.remove_node(lost, allow_graceful=False)
                lost = None
                time.sleep(5)
                nodes.add_node(**NODE)
        assert job.wait(timeout=60) == 0, "".join(said)
    finally:
        job.kill()
    out = "".join(said)
    assert "train    3 at once, 1.5 CPUs each" in out and "a training worker died; going on from step" in out, out
    report = json.loads((tmp_path / "state" / "releases" / "2024-01-04" / "report.json").read_text())
    tested = sum(pq.read_table(tmp_path / "data" / "interactions" / f"dt=2024-01-{day:02}").num_rows for day in (5, 6))
    assert report["rows"]["test"] == tested, "every row was scored once"
