import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


ADAPTERS = "movielens-1m movielens movietweetings amazon-2018 amazon-2023 bookcrossing goodreads mind".split()
PUBLIC = ("--source", "--item-text", "--out", "--protocol", "--positive-threshold", "--core", "--split", "--history")


def prepare(*arguments):
    command = [sys.executable, str(REPOSITORY / "jobs" / "prepare.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=REPOSITORY)


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


def test_check_tells_good_from_bad_by_its_exit_status(tmp_path, small_log):
    done = prepare("check", "--data", small_log, "--json", tmp_path / "check.json")
    assert done.returncode == 1 and not done.stderr
    assert done.stdout.splitlines()[-1].startswith("5 of 44 rows are bad")
    assert json.loads((tmp_path / "check.json").read_text())["faults"]["label not 0 or 1"]["count"] == 1

    good = Path(shutil.copytree(small_log, tmp_path / "good"))
    shutil.rmtree(good / "interactions" / "dt=2024-01-04")
    done = prepare("check", "--data", good)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "nothing is wrong in 32 rows"


def test_a_long_check_says_how_far_it_is(capsys):
    progress = runpy.run_path(str(REPOSITORY / "jobs" / "prepare.py"))["Progress"]()
    progress.pace.least = 0
    progress(1_000, 4_000)
    progress(4_000, 4_000)
    said = capsys.readouterr()
    assert said.err == "1,000 of 4,000 rows, about 0.0 s left\n" and not said.out


def test_check_of_nothing(tmp_path):
    done = prepare("check", "--data", tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ") and "schema.yaml: no such file" in done.stderr
