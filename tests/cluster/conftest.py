"""A real Ray cluster on this machine: a head that runs nothing, and three nodes, one with an address of its own.

What they need is asked for by name (`make test-cluster`): where it is missing they fail.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._private.state import available_resources_per_node
from ray.cluster_utils import Cluster

from tests.servers import serve_s3

ROOT = Path(__file__).parents[2]
CPUS = 2
NODE = {"num_cpus": CPUS, "object_store_memory": 200_000_000}
HERE, THERE = "10.77.0.1", "10.77.0.2"
"""Addresses of this machine and of the namespace, at the two ends of a virtual cable."""


@pytest.fixture(scope="session")
def namespace() -> Iterator[str]:
    """Name of a network namespace with the address `THERE`, for which this machine is `HERE`."""
    name, link = f"ctrdist{os.getpid()}", f"ctr{os.getpid()}"
    hosts = Path(f"/etc/netns/{name}/hosts")

    def ip(*arguments: str) -> None:
        done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
        assert not done.returncode, f"no network namespace here: ip {' '.join(arguments)}: {done.stderr.strip()}"

    assert shutil.which("ip") and not os.geteuid(), "network namespaces take root, and iproute2"
    taken = subprocess.run(["ip", "-o", "addr", "show", "to", HERE], capture_output=True, text=True).stdout
    assert not taken, f"{HERE} is taken, by another run or one that was killed (`ip link del` it): {taken}"
    ip("netns", "add", name)
    try:
        ip("link", "add", link, "type", "veth", "peer", "name", "ctrdist", "netns", name)
        ip("addr", "add", f"{HERE}/24", "dev", link)
        ip("link", "set", link, "up")
        for command in (f"addr add {THERE}/24 dev ctrdist", "link set ctrdist up", "link set lo up",
                        f"route add default via {HERE}"):  # fmt: skip
            ip("-n", name, *command.split())
        hosts.parent.mkdir(parents=True, exist_ok=True)  # `ip netns exec` puts it in the place of /etc/hosts
        hosts.write_text(f"127.0.0.1 localhost\n{THERE} {socket.gethostname()}\n")
        yield name
    finally:
        subprocess.run(["ip", "link", "del", link], capture_output=True)
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
        shutil.rmtree(hosts.parent, ignore_errors=True)


@pytest.fixture(scope="session")
def bucket(namespace: str) -> Iterator[str]:
    """URI of a bucket of an S3 server, which every node reaches by HTTP as it would Amazon's."""
    with serve_s3("0.0.0.0", HERE) as uri:
        yield uri


class Nodes:
    """A head without CPUs and three nodes beside it, of which the last one is in a network namespace."""

    def __init__(self, namespace: str) -> None:
        head = {"num_cpus": 0, "include_dashboard": False, "node_ip_address": HERE}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.address = self.cluster.address
        self.local, self.exchanged = [self.add() for _ in range(2)], False
        self.apart = subprocess.Popen(
            ["ip", "netns", "exec", namespace, str(Path(sys.executable).with_name("ray")), "start", "--block",
             f"--address={self.address}", f"--node-ip-address={THERE}", f"--num-cpus={CPUS}", "--disable-usage-stats",
             f"--object-store-memory={NODE['object_store_memory']}"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            ray.init(address=self.address, logging_level="ERROR", log_to_driver=False)
            self.wait(3)
        except BaseException:
            self.close()
            raise

    def add(self) -> Any:
        """One more node on this machine's own address."""
        return self.cluster.add_node(**NODE, node_ip_address=HERE)

    def lose(self, node: Any) -> None:
        """Kill a node without a word."""
        self.cluster.remove_node(node, allow_graceful=False)

    def exchange_one(self, line: str) -> None:
        """For `run`: when the first epoch is over a node is lost and, five seconds later, another joins; once."""
        if not self.exchanged and "epoch 1: validation AUC" in line:
            self.exchanged = True
            self.lose(self.local[0])
            time.sleep(5)
            self.add()

    def wait(self, count: int) -> None:
        """Until so many nodes can work."""
        deadline = time.monotonic() + 60
        while len(self.ids()) != count:
            assert time.monotonic() < deadline, f"{self.ids()} after a minute"
            time.sleep(0.2)

    @staticmethod
    def ids() -> dict[str, str]:
        """Address of each node that can work, by its id."""
        nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        return {node["NodeID"]: node["NodeManagerAddress"] for node in nodes}

    def close(self) -> None:
        """End all nodes."""
        ray.shutdown()
        try:
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(self.apart.pid, signal.SIGTERM)
                self.apart.wait(30)
        finally:
            self.cluster.shutdown()

    def run(
        self, script: str, options: dict[str, Any], seen: Callable[[str], None] | None = None, timeout: float = 900
    ) -> tuple[str, dict[str, set[str]]]:
        """Run a job of `jobs/` on the cluster.

        Args:
            options: by name, without the dashes.
            seen: called with each line that it prints.

        Returns:
            What it printed, and by stage the ids of the nodes with a CPU and more in use while it lasted: a training
            worker has 1.5, a task that reads half of one.
        """
        command = [sys.executable, *script.split(), *(f"--{name}={value}" for name, value in options.items())]
        env = os.environ | {"RAY_ADDRESS": self.address}
        job = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        said, busy, stage = [], defaultdict(set), "start"
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(0.1):
                for node, left in available_resources_per_node().items():
                    if node in self.ids() and CPUS - left.get("CPU", 0.0) >= 1.0:
                        busy[stage].add(node)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        killer = threading.Timer(timeout, job.kill)
        killer.start()
        try:
            for line in job.stdout:
                said.append(line)
                if begun := re.match(r"\d\d:\d\d:\d\d  (\w+) +\.\.\.$", line):
                    stage = begun[1]
                if seen:
                    seen(line)
            code = job.wait()
        finally:
            job.kill()
            killer.cancel()
            ended.set()
            watcher.join()
        out = "".join(said)
        print(out)
        assert code == 0, out
        return out, dict(busy)


@pytest.fixture
def nodes(namespace: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    """Three nodes, anew for each test."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    made = Nodes(namespace)
    yield made
    made.close()
