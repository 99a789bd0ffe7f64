import datetime as dt
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctrdist.log import RowGroup
from ctrdist.numeric import Numeric
from ctrdist.schema import Field, Schema
from ctrdist.users import latest_values, read_users, user_fields
from ctrdist.vocabulary import UNKNOWN, Vocabulary, to_keys

SCHEMA = Schema(
    user=(Field("user_id"), Field("city"), Field("tags", "multi"), Field("income", "numeric", scale="log")),
    item=(Field("item_id"),),
    context=(Field("hour"),),
)


def vocabulary(*values: str) -> Vocabulary:
    return Vocabulary().grow(to_keys(pa.array(values)), np.ones(len(values), np.int64))


ENCODERS = {
    "user_id": vocabulary("a", "b", "c", "d"), "city": vocabulary("x", "y"), "tags": vocabulary("p", "q"),
    "income": Numeric("log"),
}  # fmt: skip


@pytest.mark.parametrize("at_once", [1, 2**20])
def test_the_last_row_of_each_user_tells(tmp_path, at_once, monkeypatch):
    monkeypatch.setattr("ctrdist.users.AT_ONCE", at_once)
    draw, log, pieces = np.random.default_rng(0), [], []
    for number in range(6):
        rows = [
            {
                "user_id": draw.choice([None, "a", "b", "c", "stranger"]), "timestamp": int(draw.integers(0, 4)),
                "city": draw.choice([None, "x", "y", "z"]), "income": draw.choice([None, 1.0, -3.0]),
                "tags": [None, [], ["p"], ["q", "r"], ["r", "p", "q"]][draw.integers(5)],
            }
            for _ in range(draw.integers(0, 9))
        ]  # fmt: skip
        types = pa.schema({"user_id": pa.string(), "timestamp": pa.int64(), "city": pa.string(),
                           "income": pa.float64(), "tags": pa.list_(pa.string()), "hour": pa.int64()})  # fmt: skip
        columns = {name: [row.get(name) for row in rows] for name in types.names}
        pq.write_table(pa.table(columns, schema=types), tmp_path / f"{number}.parquet")
        group = RowGroup(dt.date(2024, 1, 1), str(tmp_path / f"{number}.parquet"), 0, len(rows))
        pieces.append(read_users(str(tmp_path), group, number, SCHEMA, ENCODERS))
        log += rows
    found = latest_values([pieces[n] for n in (3, 0, 5, 1, 4, 2)], SCHEMA, ENCODERS["user_id"].size)
    last = {}
    for row in log:  # in the order of the log: a later row of the same second takes over
        if row["user_id"] not in last or row["timestamp"] >= last[row["user_id"]]["timestamp"]:
            last[row["user_id"]] = row
    assert set(last) == {None, "a", "b", "c", "stranger"}
    tags = [found["tags"].values[i:j].tolist() for i, j in pairwise(found["tags"].offsets)]
    for number, user in enumerate((None, None, "a", "b", "c", None)):
        row = last[user] if user else {"city": None, "income": None, "tags": None}
        assert found["city"][number] == {"x": 2, "y": 3}.get(row["city"], UNKNOWN)
        assert tags[number] == [{"p": 2, "q": 3}.get(tag, UNKNOWN) for tag in row["tags"] or []]
        expected = np.nan if row["income"] is None else np.sign(row["income"]) * np.log1p(abs(row["income"]))
        np.testing.assert_allclose(found["income"][number], expected, rtol=1e-6)
    assert found["city"].dtype == np.int32 and found["income"].dtype == np.float32


def test_without_ids_nothing_is_told_of_users():
    assert user_fields(Schema(user=(Field("city"),), item=SCHEMA.item)) == ()
    assert user_fields(Schema(user=(Field("user_id"),), item=SCHEMA.item)) == ()
    assert [field.name for field in user_fields(SCHEMA)] == ["city", "tags", "income"]
    assert latest_values([], SCHEMA, 3) == {}
