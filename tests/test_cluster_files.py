"""cluster.yaml and deploy/: against Ray's own schema and command line, and every command as far as one machine allows.

No cloud and no Kubernetes is reached. The AWS calls of deploy/aws.sh and the pip calls of the set-up are recorded by
stand-ins on the PATH; the manifests are checked field by field against what KubeRay documents.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.scripts.scripts import start

from ctrdist.config import load_yaml
from jobs.cela_daily import CelaOptions

ROOT = Path(__file__).parents[1]
IMAGE = f"rayproject/ray:{ray.__version__}-py3{sys.version_info.minor}"


@pytest.fixture(scope="module")
def cluster() -> dict:
    """cluster.yaml with Ray's defaults for AWS filled in."""
    return prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text()))


@pytest.fixture(scope="module")
def manifests() -> tuple[dict, dict]:
    """The RayCronJob and the ConfigMap of deploy/rayjob.yaml."""
    job, options = yaml.safe_load_all((ROOT / "deploy" / "rayjob.yaml").read_text())
    return job, options


@pytest.fixture
def recorded(tmp_path):
    """`recorded(script, *names, **answers)`: run it with stand-ins for these programs; the calls of them, in order."""

    def run(script: str, *names: str, answers: str = "") -> list[list[str]]:
        stand_ins, log = tmp_path / "bin", tmp_path / "calls"
        stand_ins.mkdir(exist_ok=True)
        log.write_text("")
        for name in names:
            file = stand_ins / name
            file.write_text(f'#!/bin/bash\nprintf "%s\\0" {name} "$@" >>{log}; echo >>{log}\n{answers}\n')
            file.chmod(0o755)
        env = {"PATH": f"{stand_ins}:/usr/bin:/bin", "HOME": str(tmp_path)}
        done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, cwd=ROOT, timeout=300)
        assert done.returncode == 0, done.stderr
        return [line.strip("\0").split("\0") for line in log.read_text().split("\0\n") if line]

    return run


def ray_start(command: str) -> dict:
    """The options that `ray start` would get, as its own command line reads them."""
    (line,) = [part for part in command.split("&&") if part.strip().startswith("ray start")]
    expanded = re.sub(r"\$RAY_HEAD_IP", "10.0.0.1", line)
    return start.make_context("ray start", shlex.split(expanded)[2:]).params


def test_ray_takes_the_cluster(cluster):
    validate_config(cluster)
    types = cluster["available_node_types"]
    assert types["head"]["resources"]["CPU"] == 0 and types["head"]["max_workers"] == 0
    assert all(types[name]["min_workers"] == 0 < types[name]["max_workers"] for name in ("data", "train", "encode"))
    assert cluster["max_workers"] >= sum(each["max_workers"] for each in types.values())


def test_spot_is_for_what_survives_it(cluster):
    spot = {
        name for name, each in cluster["available_node_types"].items() if "InstanceMarketOptions" in each["node_config"]
    }
    assert spot == {"data", "encode"}
    assert [name for name, each in cluster["available_node_types"].items() if "train" in each["resources"]] == ["train"]


def test_images_are_those_of_our_ray_and_python(cluster):
    read = AutoscalingConfig(cluster, skip_content_hash=True)  # as the autoscaler itself does when it makes a node
    images = {name: read.get_docker_config(name)["image"] for name in cluster["available_node_types"]}
    assert images == {"head": IMAGE, "data": IMAGE, "train": f"{IMAGE}-gpu", "encode": f"{IMAGE}-gpu"}
    assert set(read.get_node_type_configs()) == set(images)
    assert f"FROM {IMAGE}${{VARIANT}}" in (ROOT / "deploy" / "Dockerfile").read_text()


def test_no_port_is_open(cluster):
    for each in cluster["available_node_types"].values():
        assert each["node_config"]["SecurityGroupIds"] == ["sg-FILL-IN"], "else Ray opens SSH to the world"
    assert "ssm start-session" in cluster["auth"]["ssh_proxy_command"] and cluster["auth"]["ssh_proxy_use_node_id"]
    assert "RAY_AUTH_MODE=token" in " ".join(cluster["docker"]["run_options"])
    assert cluster["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    assert ray_start(cluster["head_start_ray_commands"][-1])["dashboard_host"] == "127.0.0.1"


def test_ray_start_takes_its_options(cluster):
    head = ray_start(cluster["head_start_ray_commands"][-1])
    assert head["head"] and head["object_spilling_directory"] == "/scratch"
    assert head["autoscaling_config"] == "~/ray_bootstrap_config.yaml"
    worker = ray_start(cluster["worker_start_ray_commands"][-1])
    assert worker["address"] == f"10.0.0.1:{head['port']}" and worker["object_spilling_directory"] == "/scratch"


def test_every_command_is_bash(cluster):
    for name, commands in cluster.items():
        for command in commands if name.endswith("commands") else []:
            done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
            assert done.returncode == 0, (command, done.stderr)


def test_what_is_mounted_is_here(cluster):
    made = {"~/.ray/auth_token", "ctr.yaml"}
    assert all((ROOT / file).exists() for file in cluster["file_mounts"].values() if file not in made)


@pytest.mark.parametrize("gpu", [False, True])
def test_set_up_installs_the_project_from_the_lock(cluster, recorded, tmp_path, gpu):
    mounted = tmp_path / "mounted"
    for remote, local in cluster["file_mounts"].items():
        if remote.startswith("/mnt/ctrdist/") and local != "ctr.yaml":
            target = mounted / Path(remote).relative_to("/mnt/ctrdist")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(ROOT / local, target) if (ROOT / local).is_dir() else shutil.copy(ROOT / local, target)
    script = " && ".join(f"({command})" for command in cluster["head_setup_commands"])
    script = f"set -e; {script}".replace("/mnt/ctrdist", str(mounted))
    calls = recorded(script, "pip", *(["nvidia-smi"] if gpu else []))
    lock = str(tmp_path / "ctrdist" / "requirements.lock")
    small = [
        "pip",
        "install",
        "--no-deps",
        "--constraint",
        lock,
        "--index-url",
        "https://download.pytorch.org/whl/cpu",
        "torch",
    ]
    whole = ["pip", "install", "--constraint", "requirements.lock", ".[offline]"]
    assert calls == [*([] if gpu else [small]), whole, ["pip", "install", "--constraint", "requirements.lock", "boto3"]]
    assert Path(lock).exists() and (tmp_path / "ctrdist" / "jobs" / "cela_daily.py").exists()


ACCOUNT = """
made=$HOME/account; mkdir -p $made
has() { [ -e $made/$1 ]; }
case "$2" in
  head-bucket) has bucket || exit 1;;
  create-bucket) touch $made/bucket;;
  get-caller-identity) echo 123;;
  get-role) has role-$4 || exit 1;;
  create-role) has role-$4 && exit 1; touch $made/role-$4;;
  create-service-linked-role) touch $made/role-AWSServiceRoleForEC2Spot;;
  get-instance-profile) has profile-$4 || exit 1; has inside-$4 && echo $4 || echo None;;
  create-instance-profile) touch $made/profile-$4;;
  add-role-to-instance-profile) has inside-$4 && exit 1; touch $made/inside-$4;;
  describe-security-groups) case "$*" in
    *--filters*) has group && echo sg-1 || echo None;;
    *) has rule && echo sg-1;; esac;;
  create-security-group) touch $made/group;;
  authorize-security-group-ingress) has rule && exit 1; touch $made/rule;;
esac
if [ "$2" = "CUT" ] && ! has cut; then touch $made/cut; exit 255; fi
exit 0
"""
"""A stand-in for the parts of AWS that are set up; CUT is the call after which the first try ends."""
PIECES = {"bucket", "role-AWSServiceRoleForEC2Spot", "group", "rule"} | {
    f"{kind}-ctrdist-{role}" for kind in ("role", "profile", "inside") for role in ("head", "worker")
}


def test_an_account_is_set_up_once(recorded, tmp_path):
    calls = recorded("test $(bash deploy/aws.sh shop eu-west-1) = sg-1", "aws", answers=ACCOUNT)
    assert {path.name for path in (tmp_path / "account").iterdir()} == PIECES
    (rule,) = [call for call in calls if call[2] == "authorize-security-group-ingress"]
    assert rule[3:] == ["--group-id", "sg-1", "--protocol", "-1", "--source-group", "sg-1"], "nobody from outside"
    for call in calls:
        if call[2] == "put-role-policy":
            policy = yaml.safe_load(call[call.index("--policy-document") + 1])
            assert policy["Version"] == "2012-10-17" and all(s["Effect"] == "Allow" for s in policy["Statement"])
            for statement in policy["Statement"]:
                reads = statement["Action"] == "ec2:Describe*"
                assert statement["Resource"] != "*" or reads or "Condition" in statement, "what is not this cluster's"
    again = [call[2] for call in recorded("bash deploy/aws.sh shop eu-west-1", "aws", answers=ACCOUNT)]
    assert not [name for name in again if name.startswith(("create", "authorize", "add-role"))]


@pytest.mark.parametrize(
    "cut",
    ["create-bucket", "create-role", "create-instance-profile", "add-role-to-instance-profile",
     "create-service-linked-role", "create-security-group"],
)  # fmt: skip
def test_setting_up_an_account_goes_on_after_it_was_cut_off(cut, recorded, tmp_path):
    script = "bash deploy/aws.sh shop eu-west-1 && exit 1; bash deploy/aws.sh shop eu-west-1"
    recorded(script, "aws", answers=ACCOUNT.replace("CUT", cut))
    assert {path.name for path in (tmp_path / "account").iterdir()} == PIECES | {"cut"}


def test_the_nightly_manifest(manifests):
    job, options = manifests
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayCronJob")
    assert len(job["spec"]["schedule"].split()) == 5
    template = job["spec"]["jobTemplate"]
    spec = template["rayClusterSpec"]
    assert template["shutdownAfterJobFinishes"] and spec["authOptions"] == {"mode": "token"}
    assert spec["rayVersion"] == ray.__version__ and spec["enableInTreeAutoscaling"]
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    assert set(groups) == {"data", "train", "encode"}
    for group in groups.values():
        assert group["minReplicas"] == 0 < group["maxReplicas"]
    for group in (spec["headGroupSpec"], *groups.values()):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["workingDir"] == "/home/ray/ctrdist", "where the image has jobs/"
        assert {"memory"} <= set(container["resources"]["limits"]), "Ray's memory is the container's limit"
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        assert pod["restartPolicy"] == "Never"
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"


def test_only_spot_groups_tolerate_spot_nodes(manifests):
    groups = manifests[0]["spec"]["jobTemplate"]["rayClusterSpec"]["workerGroupSpecs"]
    pods = {g["groupName"]: g["template"]["spec"] for g in groups}
    keys = {name: {t["key"] for t in pod["tolerations"]} for name, pod in pods.items()}
    clouds = {"karpenter.sh/capacity-type", "cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority"}
    assert keys == {"data": clouds, "train": {"nvidia.com/gpu"}, "encode": clouds | {"nvidia.com/gpu"}}
    for name in ("data", "encode"):
        wanted = pods[name]["affinity"]["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
        assert {each["preference"]["matchExpressions"][0]["key"] for each in wanted} == clouds
    (term,) = pods["train"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][
        "nodeSelectorTerms"
    ]
    assert {each["key"] for each in term["matchExpressions"]} == clouds
    assert {each["operator"] for each in term["matchExpressions"]} == {"NotIn"}, "which a node without the label passes"
    gpus = {
        g["groupName"]: g["template"]["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu")
        for g in groups
    }
    assert gpus == {"data": None, "train": "4", "encode": "1"}


def test_ray_start_takes_the_manifests_parameters(manifests):
    spec = manifests[0]["spec"]["jobTemplate"]["rayClusterSpec"]
    read = {}
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        line = " ".join(f"--{name}={value}" for name, value in group["rayStartParams"].items())
        read[group.get("groupName", "head")] = start.make_context("ray start", shlex.split(line)).params
    assert read["head"]["num_cpus"] == 0
    assert yaml.safe_load(read["train"]["resources"]) == {"train": 4}
    assert {params["object_spilling_directory"] for params in read.values()} == {"/scratch"}


def test_the_manifests_options_are_the_jobs(manifests, tmp_path):
    job, options = manifests
    command = shlex.split(job["spec"]["jobTemplate"]["entrypoint"])
    assert command[0] == "python" and (ROOT / command[1]).exists()
    (tmp_path / "ctr.yaml").write_text(options["data"]["ctr.yaml"])
    read = load_yaml(CelaOptions(), tmp_path / "ctr.yaml")
    assert read.data.startswith("s3://") and read.plan.train_on == "train" and read.plan.gpus == 4
    assert os.path.basename(command[-1]) in options["data"]
