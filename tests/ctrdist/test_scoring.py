"""A file is scored once, whole, by one model; bad rows are set aside."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctrdist.errors import UserError
from ctrdist.scoring import Job, Scored, needed, score_file
from ctrdist.storage import list_parquet, write_whole


class Model:
    """Scores a row by its hour; counts what it is asked."""

    columns, optional = ["user_id", "age", "hour", "item_id", "history"], ["age", "history"]

    def __init__(self, identity: str = "one") -> None:
        self.identity, self.asked = identity, []

    def predict(self, rows: pa.Table) -> np.ndarray:
        self.asked.append(rows.num_rows)
        return rows["hour"].to_numpy().astype(np.float32) / 100


@pytest.fixture
def job(tmp_path: Path) -> Job:
    table = pa.table({
        "user_id": ["a", None, "b", "c", None], "item_id": pa.array([1, 2, None, 4, None]), "hour": [1, 2, 3, 4, 5],
        "history": [[1], [], None, [2, 3], []], "query": ["v", "w", "x", "y", "z"], "other": [0] * 5,
    })  # fmt: skip
    pq.write_table(table, tmp_path / "in.parquet")
    return Job(*(str(tmp_path / name) for name in ("in.parquet", "out/in.parquet", "out/_quarantine/in.parquet")))


def test_a_file_is_scored_in_its_order_and_bad_rows_are_set_aside(job: Job, monkeypatch):
    monkeypatch.setattr("ctrdist.scoring.READ", 2)
    assert score_file(job, Model(), ("query",)) == Scored(rows=2, bad=3, before=False)
    found = pq.read_table(job.target)
    assert found.column_names == ["user_id", "item_id", "query", "probability"]
    assert found["probability"].type == pa.float32() and found["item_id"].type == pa.int64()
    assert found.to_pydict() | {"probability": None} == {
        "user_id": ["a", "c"], "item_id": [1, 4], "query": ["v", "y"], "probability": None
    }  # fmt: skip
    np.testing.assert_allclose(found["probability"], [0.01, 0.04], rtol=1e-6)
    bad = pq.read_table(job.quarantine)
    assert bad["reason"].to_pylist() == ["null user_id", "null item_id", "null user_id"]
    assert bad["row"].to_pylist() == [1, 2, 4] and set(bad["file"].to_pylist()) == {job.source}


def test_what_is_done_is_known_by_model_and_content(job: Job):
    first = Model()
    score_file(job, first)
    assert score_file(job, first) == Scored(rows=2, bad=3, before=True) and first.asked == [2]
    for model, keep in ((Model("two"), ()), (Model("two"), ("query",))):
        assert not score_file(job, model, keep).before
        assert score_file(job, Model("two"), keep).before
    table = pq.read_table(job.source).slice(0, 1)
    pq.write_table(table, job.source)
    assert score_file(job, Model("two"), ("query",)) == Scored(rows=1, bad=0, before=False)
    assert not Path(job.quarantine).exists(), "its bad rows are no more"


def test_a_crash_leaves_nothing_and_an_older_file_stays(job: Job):
    class Dies(Model):
        def predict(self, rows: pa.Table) -> np.ndarray:
            raise RuntimeError("died")

    with pytest.raises(RuntimeError):
        score_file(job, Dies())
    assert list(Path(job.target).parent.iterdir()) == []
    score_file(job, Model())
    with pytest.raises(RuntimeError):
        score_file(job, Dies("another"))
    assert score_file(job, Model()).before


def test_what_is_wrong_with_a_file_is_said(job: Job, tmp_path: Path):
    assert needed(Model(), ("query", "hour")) == ["user_id", "hour", "item_id", "query"]
    with pytest.raises(UserError, match="in.parquet: no column 'quary'; did you mean 'query'"):
        score_file(job, Model(), ("quary",))
    damaged = bytearray(Path(job.source).read_bytes())
    damaged[4 : len(damaged) // 4] = b"?" * (len(damaged) // 4 - 4)
    Path(job.source).write_bytes(damaged)
    with pytest.raises(UserError, match="in.parquet: "):
        score_file(job, Model())
    Path(job.source).unlink()
    with pytest.raises(UserError, match="in.parquet: .*No such file"):
        score_file(job, Model())
    Path(job.source).write_text("no Parquet")
    with pytest.raises(UserError, match="in.parquet: not a readable Parquet file"):
        score_file(job, Model())


def test_files_of_folders_and_patterns(tmp_path: Path):
    for name in ("b/2.parquet", "a/1.parquet", "a/_bad/3.parquet", ".tmp/4.parquet", "a/readme.md", "0.parquet"):
        with write_whole(str(tmp_path / name)) as path:
            path.write_text(name)
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file())[0] == ".tmp/4.parquet"
    shown = lambda where: [Path(path).relative_to(list_parquet(where)[1]).as_posix() for path in list_parquet(where)[2]]
    assert shown(str(tmp_path)) == ["0.parquet", "a/1.parquet", "b/2.parquet"]
    assert shown(f"file://{tmp_path}") == shown(str(tmp_path))
    assert shown(f"{tmp_path}/*/*.parquet") == ["a/1.parquet", "b/2.parquet"]
    assert shown(f"{tmp_path}/a/1.parquet") == ["1.parquet"]
    assert list_parquet(str(tmp_path / "nowhere"))[2] == []
