"""What a user gets wrong: one message with the way out, and exit status 1."""

import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctrdist.datasets.synthetic import SyntheticConfig, prepare
from ctrdist.storage import State
from jobs import cela_daily as JOB
from raycluster import cli

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("bad") / "data"
    prepare(SyntheticConfig(users=20, items=30, days=4, rows_per_day=50), out)
    return out


@pytest.fixture
def data(log, tmp_path) -> Path:
    return Path(shutil.copytree(log, tmp_path / "data"))


def fails(capsys, tiny_lm, *arguments: str) -> str:
    """The one line that the job prints before it exits with status 1."""
    with pytest.raises(SystemExit) as stop:
        arguments = ["--lm.name", str(tiny_lm), *arguments]
        cli.main(lambda: JOB.run(cli.parse(JOB.CelaOptions(), "", arguments)))
    assert stop.value.code == 1
    return capsys.readouterr().err


def rewrite(data: Path, change) -> Path:
    path = next((data / "interactions" / "dt=2024-01-02").glob("*.parquet"))
    pq.write_table(change(pq.read_table(path, partitioning=None)), path)
    return path


def test_no_such_folder(capsys, tiny_lm, tmp_path):
    message = fails(capsys, tiny_lm, "--data", str(tmp_path / "nowhere"), "--state", str(tmp_path / "s"))
    assert message == f"error: --data {tmp_path}/nowhere: no such folder; make it with jobs/prepare.py\n"


def test_no_data_option(capsys, tiny_lm):
    assert "--data is missing" in fails(capsys, tiny_lm)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--date", "2030-01-01"], ["--date 2030-01-01: no rows of that day", "2024-01-01 to 2024-01-04"]),
        (["--date", "2024-01-04"], ["no rows after it to test on"]),
        (["--date", "2024-01-01", "--train-days", "3"], ["no rows from", "until the validation days"]),
        (["--train-days", "1"], ["--valid-days 1 leaves nothing of --train-days 1"]),
        (["--ctr.backbone", "dcnv3"], ["--ctr.backbone dcnv3: no such backbone; did you mean 'dcnv2'?"]),
        (["--rounds", "0"], ["--rounds 0: at least 1"]),
        (["--rounds", "2", "--align.every-days", "7"], ["--rounds 2 aligns every day"]),
        (["--lm.name", "/no/such/model"], ["/no/such/model", "no such folder"]),
    ],
)
def test_options_and_dates(capsys, tiny_lm, log, tmp_path, arguments, said):
    message = fails(capsys, tiny_lm, "--data", str(log), "--state", str(tmp_path / "s"), *arguments)
    assert message.startswith("error: ") and message.count("\n") == 1
    for part in said:
        assert part in message


def test_an_unknown_option_names_the_nearest(capsys, tiny_lm):
    assert "--max-bad-fraction" in fails(capsys, tiny_lm, "--max-bad-fracton", "0.1")


def test_a_missing_column(capsys, tiny_lm, data, tmp_path):
    path = rewrite(data, lambda t: t.rename_columns([n.replace("device", "devise") for n in t.column_names]))
    message = fails(capsys, tiny_lm, "--data", str(data), "--state", str(tmp_path / "s"))
    assert f"{path}: no column 'device'; did you mean 'devise'?" in message


def test_a_mistyped_column(capsys, tiny_lm, data, tmp_path):
    path = rewrite(data, lambda t: t.set_column(t.column_names.index("label"), "label", t["label"].cast(pa.string())))
    message = fails(capsys, tiny_lm, "--data", str(data), "--state", str(tmp_path / "s"))
    assert f"{path}: column 'label' is of type string; expected 0 and 1" in message


def test_a_state_of_another_schema(capsys, tiny_lm, data, tmp_path):
    with State(tmp_path / "s").create("schema", "0123456789ab"):
        pass
    message = fails(capsys, tiny_lm, "--data", str(data), "--state", str(tmp_path / "s"))
    assert "written by another schema (0123456789ab)" in message and "give another --state" in message


def test_a_typo_in_the_configuration_file(capsys, tiny_lm, log, tmp_path):
    (tmp_path / "my.yaml").write_text("ctr: {bakbone: din}\n")
    message = fails(capsys, tiny_lm, "--config", str(tmp_path / "my.yaml"))
    assert "my.yaml: ctr: unknown option 'bakbone'; did you mean 'backbone'?" in message


def test_a_submitted_job_refuses_relative_paths(capsys, tiny_lm, monkeypatch):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert "a relative path would lose its files" in fails(capsys, tiny_lm, "--data", "data", "--state", "/s")


def test_the_command_itself(tmp_path):
    run = [sys.executable, str(ROOT / "jobs" / "cela_daily.py")]
    wrong = subprocess.run([*run, "--data", "nowhere", "--state", "s"], cwd=tmp_path, capture_output=True, text=True)
    assert wrong.returncode == 1 and wrong.stderr.startswith("error: --data ")
    assert "Traceback" not in wrong.stderr
    shown = subprocess.run([*run, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert shown.returncode == 0
    for option in ("--data", "--rounds", "--ctr.backbone", "--pretrain.simcse-weight", "--align.temperature",
                   "--encode.max-length", "--fuse.hidden", "--ctr.networks.din.attention"):  # fmt: skip
        assert option in shown.stdout


def test_the_example_configuration_is_valid():
    from ctrdist.config import load_yaml

    options = load_yaml(JOB.CelaOptions(), ROOT / "ctr.example.yaml")
    assert options.data and options.state
