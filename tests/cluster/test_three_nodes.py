"""Jobs on three nodes, one of them behind another address; a node is lost while they train, and another joins."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from ray._private.state import actors

from ctrdist.datasets.synthetic import SyntheticConfig, prepare
from ctrdist.storage import State, filesystem
from tests.cluster.conftest import THERE

pytestmark = pytest.mark.cluster
DATE = "2024-01-04"
DAY = {"date": DATE, "train-days": 4, "test-days": 2}
SPREAD = {
    # A node has room for one such process besides its tasks: training and encoding are spread over all.
    "workers": 3, "plan.worker-cpus": 1.5, "plan.reader-gib": 0.1, "lm.pooling": "mean",
}  # fmt: skip
JOBS = {
    "cela": {"ctr.batch-size": 255, "ctr.epochs": 3, "pretrain.epochs": 1, "pretrain.batch-size": 30,
             "pretrain.max-length": 16, "align.epochs": 1, "align.batch-size": 30, "align.max-length": 16,
             "encode.max-length": 16, "encode.shard-items": 16},
    "elec": {"ctr.batch-size": 255, "ctr.epochs": 3, "m-llm.batch-size": 255, "m-llm.epochs": 3,
             "encode.max-length": 16, "encode.shard-items": 16},
    "clickprompt": {"ctr.batch-size": 255, "ctr.epochs": 3, "pretrain.epochs": 1, "pretrain.batch-size": 255,
                    "finetune.epochs": 1, "finetune.batch-size": 255, "text.max-length": 24},
}  # fmt: skip
TRAINED = {"cela": ["id", "dap", "roma", "mf2"], "elec": ["m_llm", "distill", "backbone"],
           "clickprompt": ["pretrain", "without_plm", "backbone", "with_plm"]}  # fmt: skip
"""The stages that train: each has a worker on every node."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("nodes") / "data"
    prepare(SyntheticConfig(users=60, items=90, days=7, rows_per_day=400), out)
    return out


def report_of(state: str) -> dict:
    files, root = filesystem(state)
    with files.open_input_stream(f"{root}/releases/{DATE}/report.json") as stream:
        return json.loads(stream.read())


@pytest.mark.parametrize("job", list(JOBS))
def test_a_day_ends_well_though_a_node_is_lost_and_another_joins(job, nodes, data, tiny_lm, bucket, tmp_path):
    """ELEC's state is on object storage, the others' in a folder that all nodes share."""
    state = f"{bucket}/{job}" if job == "elec" else str(tmp_path / "state")
    options = {"data": data, "state": state, "lm.name": tiny_lm} | DAY | SPREAD | JOBS[job]
    if job == "elec":
        options["tracking-uri"] = f"sqlite:///{tmp_path}/mlflow.db"
    out, busy = nodes.run(f"jobs/{job}_daily.py", options, nodes.exchange_one)
    assert "train    3 at once, 1.5 CPUs each" in out and "a training worker died; going on from step" in out
    apart = [node for node, address in nodes.ids().items() if address == THERE]
    for stage in TRAINED[job]:
        assert len(busy[stage]) >= 3 and busy[stage] & set(apart), (stage, busy)
    tested = sum(pq.read_table(data / "interactions" / f"dt=2024-01-{day:02}").num_rows for day in (5, 6))
    scored = pq.read_table(State(state, tmp_path / "cache").local(f"runs/{DATE}/evaluate") / "predictions.parquet")
    assert scored.num_rows == tested == report_of(state)["rows"]["test"], "every row was scored once"
    assert nodes.exchanged and State(state).find(f"releases/{DATE}") is not None


def test_a_sweep_spreads_its_trials_and_ends_well_though_a_node_is_lost(nodes, data, tiny_lm, tmp_path):
    state = str(tmp_path / "state")
    options = {"data": data, "state": state, "lm.name": tiny_lm} | DAY | {
        "lm.pooling": "mean", "workers": 1, "plan.worker-cpus": 1, "plan.reader-gib": 0.1,
    } | JOBS["cela"]  # fmt: skip
    sweep = {"sweep.trials": 4, "sweep.finalists": 1, "sweep.seeds": 1, "sweep.at-once": 3, "space": "tau2"}
    homes = set()

    def seen(line: str) -> None:
        if not nodes.exchanged:  # nodes that work are lost: the head alone must hold what trials share
            shared = ("Turns", "_AutoscalingCoordinatorActor")
            known = [actor for actor in actors().values() if actor["State"] == "ALIVE"]
            homes.update(a["Address"]["NodeID"] for a in known if a["ActorClassName"] in shared)
        nodes.exchange_one(line)

    out, _ = nodes.run("jobs/sweep.py cela", options | sweep, seen)
    assert len(homes) == 1 and not homes & set(nodes.ids())
    assert nodes.exchanged and "4 trials, 3 at a time" in out and "failed:" not in out
    trials = [State(state).find(name).facts for name in State(state).names("sweeps/cela-2024-01-04/trials")]
    assert len(trials) == 4 + 1 and {trial["status"] for trial in trials} <= {"done", "stopped"}
    assert (Path(state) / "sweeps" / "cela-2024-01-04" / "best.yaml").exists()
