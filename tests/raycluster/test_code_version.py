import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

from raycluster.code_version import code_version

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def anew():
    code_version.cache_clear()
    yield
    code_version.cache_clear()


@pytest.mark.skipif(not shutil.which("git") or not (ROOT / ".git").exists(), reason="no git repository here")
def test_the_commit_is_the_version():
    head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert code_version().removesuffix("-dirty") == head


def test_without_git_it_is_the_package(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert code_version() == version("ctrdist")
