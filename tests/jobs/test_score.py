"""Batch scoring, whole: resumed after a crash, by a folder; by the registry see `test_train`."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctrdist.errors import UserError
from ctrdist.serving.model import ServedModel
from jobs import score as JOB
from raycluster import cli
from raycluster.model_source import ModelSource

ROOT = Path(__file__).parents[2]
COLUMNS = ["user_id", "item_id", "hour", "tags", "history"]


@pytest.fixture
def options(small_log: Path, small_artifact: Path, tmp_path: Path) -> JOB.ScoreOptions:
    """Three files of the log, one of them in a folder of its own."""
    days = [path for path in sorted((small_log / "interactions").rglob("*.parquet")) if "01-04" not in str(path)]
    for number, path in enumerate(days[:3]):
        target = tmp_path / "in" / ("inner" if number == 2 else "") / f"{number}.parquet"
        target.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pq.ParquetFile(path).read().select(COLUMNS), target)
    return JOB.ScoreOptions(input=str(tmp_path / "in"), output=str(tmp_path / "out"), model=str(small_artifact))


def times(folder: Path) -> dict[str, int]:
    """When each scored file was written."""
    paths = [path for path in folder.rglob("*.parquet") if "_quarantine" not in path.parts]
    paths = [path for path in paths if not path.parent.name.startswith(".")]  # what an actor is just writing
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in paths}


def test_a_run_that_was_cut_off_goes_on(ray_cluster, options, small_artifact, capsys, monkeypatch):
    out, broken = Path(options.output), Path(options.input) / "1.parquet"
    table = pq.read_table(broken)
    pq.write_table(table.set_column(0, "user_id", pa.array([7] * table.num_rows)), broken)

    def dies(_progress, _done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("raycluster.day.Progress.items", dies)
        JOB.run(options)
    first = times(out)
    assert first, "what was done by then is whole"
    wrong = "1.parquet: column 'user_id': ids are integers, but strings before.* 2 of 3 files are scored"
    with pytest.raises(UserError, match=wrong):
        JOB.run(options)
    assert set(times(out)) == {"0.parquet", "inner/2.parquet"} and first.items() <= times(out).items()
    # Mended, but for two rows without an item: these are set aside, and the run says so when all is scored.
    items = pa.array([None, None, *table["item_id"].to_pylist()[2:]], pa.string())
    table = table.set_column(1, "item_id", items)
    pq.write_table(table, broken)
    with pytest.raises(UserError, match=r"2 of \d\d rows have no user or no item: more than --max-bad-fraction 0.01"):
        JOB.run(options)
    written, model = times(out), ServedModel(small_artifact)
    assert set(written) == {"0.parquet", "1.parquet", "inner/2.parquet"} and first.items() <= written.items()
    assert pq.read_table(out / "_quarantine" / "1.parquet")["row"].to_pylist() == [0, 1]
    for name in written:
        rows, found = pq.read_table(Path(options.input) / name), pq.read_table(out / name)
        rows = rows.slice(2) if name == "1.parquet" else rows
        assert found["item_id"].equals(rows["item_id"])
        np.testing.assert_allclose(found["probability"], model.predict(rows), atol=1e-6)
    assert "3 files with" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"input": ""}, "--input is missing"),
        ({"model": ""}, "--model is missing"),
        ({"model": "/no/release"}, "--model /no/release: no such folder"),
        ({"model": "models:/cela@champion"}, "--model models:/cela@champion: give --tracking-uri, or the --state"),
        ({"input": "/no/requests/*.parquet"}, "--input /no/requests/.*: no Parquet files there"),
        ({"keep": ("our",)}, "0.parquet: no column 'our'; did you mean 'hour'"),
        ({"max_bad_fraction": 2.0}, "--max-bad-fraction 2.0: a share from 0 to 1"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_scored(options, changed, said):
    with pytest.raises(UserError, match=said):
        JOB.run(replace(options, **changed))


def test_scored_files_are_not_taken_for_requests(options):
    read, one, shallow = options.input, f"{options.input}/0.parquet", f"{options.input}/*.parquet"
    for where, output in ((read, f"{read}/a"), (read, f"file://{read}/a"), (f"{read}/**", f"{read}/a"), (one, read)):
        with pytest.raises(UserError, match="--output .*: within --input"):
            JOB.run(replace(options, input=where, output=output))
    source = ModelSource(options.model)
    for where in (one, shallow):
        found = JOB.find_jobs(replace(options, input=where, output=f"{read}/a"), source)
        assert [job.target for job in found] == [f"{read}/a/{name}.parquet" for name in (0, 1)[: len(found)]]


def test_help_lists_every_option():
    done = subprocess.run([sys.executable, ROOT / "jobs" / "score.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    for option in ("--input", "--output", "--model", "--state", "--tracking-uri", "--keep", "--max-bad-fraction"):
        assert option in done.stdout


def test_a_user_error_ends_the_job_without_a_trace(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(lambda: JOB.run(cli.parse(JOB.ScoreOptions(), "", [])))
    assert stop.value.code == 1 and "--input is missing" in capsys.readouterr().err
