from pathlib import Path

from ctrdist.storage import State
from raycluster.retention import prune


def make(state: State, name: str, **facts: str) -> None:
    with state.create(name, "x", facts) as folder:
        (folder / "file").write_text(name)


def test_old_releases_go_with_the_runs_that_nothing_names(tmp_path: Path):
    state = State(str(tmp_path))
    for day in ("2024-01-01", "2024-01-02", "2024-01-03"):
        for stage in ("read", "id", "dap"):
            make(state, f"runs/{day}/{stage}")
        make(state, f"releases/{day}", id=f"runs/{day}/id", read=f"runs/{day}/read", dap="runs/2024-01-01/dap")
        (tmp_path / "releases" / day).mkdir()
        (tmp_path / "releases" / day / "report.html").write_text("a report")
    make(state, "runs/2024-01-04/id")  # under way
    make(state, "runs/2023-12-31/id")  # of an earlier date, under way too
    make(state, "releases/split", id="runs/split/id")
    make(state, "runs/split/id")
    (tmp_path / "runs" / "2024-01-01" / "encode.shards-x" / "half").mkdir(parents=True)

    assert prune(state, 0) == [] and prune(state, 3) == []
    assert prune(state, 2) == ["releases/2024-01-01"]
    assert state.names("releases") == ["releases/2024-01-02", "releases/2024-01-03", "releases/split"]
    assert state.names("runs/2024-01-01") == ["runs/2024-01-01/dap"]
    assert (state.local("runs/2024-01-01/dap") / "file").exists()
    assert prune(state, 1) == ["releases/2024-01-02"]
    assert state.names("runs/2024-01-02") == []
    assert len(state.names("runs/2024-01-03")) == 3
    for name in ("runs/2024-01-04/id", "runs/2023-12-31/id", "runs/split/id", "releases/split"):
        assert state.find(name), name
    assert (tmp_path / "releases" / "2024-01-01" / "report.html").exists()
    assert not [path for path in (tmp_path / "runs" / "2024-01-02").iterdir()]


def test_the_release_of_an_earlier_date_outlives_its_own_run(tmp_path: Path):
    state = State(str(tmp_path))
    for day in ("2024-01-01", "2024-01-05", "2024-01-06"):
        make(state, f"runs/{day}/id")
        make(state, f"releases/{day}", id=f"runs/{day}/id")
        (tmp_path / "releases" / day).mkdir()
    assert prune(state, 1, "2024-01-01") == ["releases/2024-01-05"]
    assert state.find("releases/2024-01-01") and state.find("runs/2024-01-01/id") and state.find("runs/2024-01-06/id")
    assert not state.names("runs/2024-01-05")
