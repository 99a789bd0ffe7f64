import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctrdist.datasets.canonical import CanonicalWriter
from ctrdist.errors import UserError
from ctrdist.schema import Field, Schema

SCHEMA = Schema(user=(Field("user_id"),), item=(Field("item_id"),), context=(Field("hour"),), history_length=2,
                text=("{text}",))  # fmt: skip


def log(days):
    return pa.table(
        {
            "user_id": [f"u{n}" for n in range(len(days))],
            "item_id": ["a"] * len(days),
            "label": [n % 2 for n in range(len(days))],
            "timestamp": [86_400 * day + n for n, day in enumerate(days)],
            "hour": [3] * len(days),
            "history": [["a"] if n else [] for n in range(len(days))],
        }
    )


def test_rows_of_any_order_go_to_their_day_and_schema_comes_last(tmp_path):
    writer = CanonicalWriter(tmp_path / "data", SCHEMA)
    writer.write_items(pa.table({"item_id": ["a"], "text": ["words"]}))
    writer.write_interactions(log([1, 0, 1]))
    writer.write_interactions(log([1]))
    assert not (tmp_path / "data" / "schema.yaml").exists()
    summary = writer.finish(users=3)

    interactions = tmp_path / "data" / "interactions"
    assert sorted(p.name for p in interactions.iterdir()) == ["dt=1970-01-01", "dt=1970-01-02"]
    assert len(list((interactions / "dt=1970-01-02").iterdir())) == 2
    first = pq.ParquetFile(interactions / "dt=1970-01-02" / "part-00000.parquet").read()
    assert first["user_id"].to_pylist() == ["u0", "u2"]
    assert first.schema.field("label").type == pa.int8()
    assert first.schema.field("hour").type == pa.int64()
    assert first.schema.field("history").type == pa.list_(pa.string())
    assert Schema.load(tmp_path / "data" / "schema.yaml") == SCHEMA
    assert (summary.rows, summary.days, summary.positives) == (4, 2, 1)
    assert (summary.rows_with_history, summary.items, summary.items_with_text) == (2, 1, 1)


def test_half_written_folder_is_cleared(tmp_path):
    writer = CanonicalWriter(tmp_path, SCHEMA)
    writer.write_interactions(log([5]))
    CanonicalWriter(tmp_path, SCHEMA).finish(users=0)
    assert list((tmp_path / "interactions").iterdir()) == []


@pytest.mark.parametrize("name", ["notes.txt", "items/notes.txt", "interactions", "other/part-00000.parquet"])
def test_folder_with_anything_else_is_refused_and_left_alone(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        CanonicalWriter(tmp_path, SCHEMA)
    assert path.read_text() == "mine"


def test_dataset_or_file_is_refused(tmp_path):
    CanonicalWriter(tmp_path / "data", SCHEMA).finish(users=0)
    with pytest.raises(UserError, match="holds a dataset already"):
        CanonicalWriter(tmp_path / "data", SCHEMA)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        CanonicalWriter(tmp_path / "file", SCHEMA)
