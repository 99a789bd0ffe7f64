"""Ray's own autoscaler, given the groups of cluster.yaml: it brings the nodes that a plan waits for.

Nodes are processes on this machine that claim what an instance would have (Ray's provider for such tests); no cloud is
reached, and nothing is set up on them.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import yaml
from ray.autoscaler._private.fake_multi_node import node_provider as fake
from ray.autoscaler._private.util import prepare_config
from ray.util import get_node_ip_address

from raycluster.autoscaler import alive_nodes
from raycluster.planning import PlanConfig, make_plan
from tests.servers import free_port

pytestmark = pytest.mark.cluster
ROOT, RAY = Path(__file__).parents[2], Path(sys.executable).with_name("ray")
HAS = {"head": {"CPU": 0}, "data": {"CPU": 16}, "train": {"CPU": 48, "GPU": 4}, "encode": {"CPU": 8, "GPU": 1}}
"""What the groups' instances have; Ray asks AWS for it."""
MEMORY = 80_000_000


def fake_config(address: str) -> dict:
    """cluster.yaml with instances that are processes here, for the head at an address."""
    config = prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text()))
    groups = config["available_node_types"]
    for name, group in groups.items():
        group["resources"] |= HAS[name] | {"object_store_memory": MEMORY}
        group["node_config"] = {}
    groups[fake.FAKE_HEAD_NODE_TYPE] = groups.pop(config["head_node_type"])
    provider = {
        "type": "external", "module": f"{fake.__name__}.FakeMultiNodeProvider", "gcs_address": address,
        "head_node_id": fake.FAKE_HEAD_NODE_ID, "launch_multiple": True, "use_node_id_as_ip": True,
        "disable_node_updaters": True, "disable_launch_config_check": True,
    }  # fmt: skip
    return config | {"head_node_type": fake.FAKE_HEAD_NODE_TYPE, "provider": provider}


@pytest.fixture
def idle(processes, tmp_path, monkeypatch) -> Iterator[None]:
    """A connection to an idle cluster: a head that runs nothing, and the autoscaler."""
    port = free_port()
    address = f"{get_node_ip_address()}:{port}"
    (tmp_path / "config.json").write_text(json.dumps(fake_config(address)))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    env = os.environ | {
        "RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_CLOUD_INSTANCE_ID": fake.FAKE_HEAD_NODE_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": fake.FAKE_HEAD_NODE_ID,
    }  # fmt: skip
    command = [
        RAY, "start", "--head", "--block", f"--port={port}", "--num-cpus=0",
        f"--autoscaling-config={tmp_path}/config.json", "--include-dashboard=false", "--disable-usage-stats",
        f"--object-store-memory={MEMORY}",
    ]  # fmt: skip

    def ready() -> bool:
        return not subprocess.run([RAY, "status", f"--address={address}"], capture_output=True).returncode

    processes(command, ready, env=env)  # nodes are of its group, and killed with it
    ray.init(address=address, logging_level="ERROR", log_to_driver=False)
    yield
    ray.shutdown()


def test_an_idle_cluster_grows_to_what_a_plan_waits_for(idle, capsys):
    plan = make_plan(config=PlanConfig(cpus=64, gpus=4, train_on="train", wait_minutes=3))
    assert (plan.workers, plan.gpus, plan.worker_cpus, plan.threads) == (4, 1, 1.0, 12)
    said = capsys.readouterr().out
    assert said.startswith("waiting at most 3.0 minutes for 64 CPU, 4 GPU, 4 train\n") and "warning" not in said
    found = Counter((node.get("CPU", 0), node.get("GPU", 0), node.get("train", 0)) for node in alive_nodes())
    assert found == {(0, 0, 0): 1, (16, 0, 0): 1, (48, 4, 4): 1}, "the head, one of `data` and one of `train`"
