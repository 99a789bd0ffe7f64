"""The walls of the house: imports go one way, jobs -> raycluster -> ctrdist."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {"ctrdist": {"ray", "mlflow", "raycluster", "jobs"}, "raycluster": {"jobs"}}


def imported(path: Path) -> set[str]:
    """The top-level packages that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_go_one_way(package):
    files = list((ROOT / package).rglob("*.py"))
    assert len(files) > 5
    for path in files:
        assert not imported(path) & FORBIDDEN[package], path


def test_only_raycluster_and_jobs_know_ray():
    assert "ray" in imported(ROOT / "raycluster" / "ingest.py")
    for folder in ("ctrdist", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            assert "ray" not in imported(path), path


def test_what_reads_the_log_starts_without_torch():
    code = "import sys, raycluster.ingest; print({'torch', 'ray.train', 'transformers', 'mlflow'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_what_is_served_needs_nothing_else_of_the_project():
    allowed = set(sys.stdlib_module_names) | {"torch", "numpy", "pandas", "pyarrow"}
    for path in (ROOT / "ctrdist" / "serving").rglob("*.py"):
        assert imported(path) - allowed <= {"ctrdist"}, path
        inner = [n.module for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom) and n.module]
        assert all(name.startswith("ctrdist.serving.") for name in inner if name.startswith("ctrdist")), path
