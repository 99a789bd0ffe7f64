import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


ADAPTERS = "movielens-1m movielens movietweetings amazon-2018 amazon-2023 bookcrossing goodreads mind".split()
PUBLIC = ("--source", "--item-text", "--out", "--protocol", "--positive-threshold", "--core", "--split", "--history")


def prepare(*arguments):
    command = [sys.executable, str(REPOSITORY / "jobs" / "prepare.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=REPOSITORY)


@pytest.mark.parametrize(
    ("command", "options"),
    [
        *((name, PUBLIC) for name in ADAPTERS),
        ("synthetic", ("--out", "--users", "--rows-per-day", "--start", "--seed", "--strength")),
    ],
)
def test_help_lists_every_option(command, options):
    done = prepare(command, "--help")
    assert done.returncode == 0
    assert all(option in done.stdout for option in options)


def test_synthetic_writes_a_dataset_and_refuses_to_write_it_twice(tmp_path):
    arguments = ("synthetic", "--out", tmp_path / "data", "--users", 50, "--items", 40, "--days", 3)
    done = prepare(*arguments, "--rows-per-day", 200)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "data" / "schema.yaml").exists()
    assert "600" in done.stdout and "best possible AUC" in done.stdout

    done = prepare(*arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and "holds a dataset already" in done.stderr
    assert "Traceback" not in done.stderr


def test_movietweetings(tmp_path):
    (tmp_path / "movies.dat").write_text("0000007::Up (2009)::Animation\n")
    (tmp_path / "ratings.dat").write_text("1::0000007::9::100\n")
    done = prepare("movietweetings", "--source", tmp_path, "--out", tmp_path / "data", "--history", "all")
    assert done.returncode == 0, done.stderr
    assert "100.0%" in done.stdout and "best possible AUC" not in done.stdout

    done = prepare("movietweetings", "--source", tmp_path / "absent", "--out", tmp_path / "other")
    assert done.returncode == 1
    assert "movies.dat: no such file" in done.stderr
    assert "Traceback" not in done.stderr
