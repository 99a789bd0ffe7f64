import random
from collections import Counter

import pyarrow as pa

from ctrdist.encode import encode, fillers
from ctrdist.schema import Field, Schema
from tests.ctrdist.test_log import MIDNIGHT, catalog, rows_of, vocabulary


def test_encode_against_a_loop_over_rows():
    draw = random.Random(1)
    schema = Schema(
        (Field("user_id"), Field("likes", "multi")), (Field("item_id"),), (Field("hour"),), history_length=3
    )
    vocabularies = {"user_id": vocabulary("u1", "u2"), "likes": vocabulary(1, 2, 3), "hour": vocabulary("é", "9")}
    items = catalog(("a", "b", "c", "d"), ("old",))
    known = ["a", "b", "c", "d", "old"]
    rows = [
        {
            "user_id": draw.choice(["u1", "u2", "u3"]),
            "likes": draw.choice([None, [draw.choice([1, 2, 3, 4, None]) for _ in range(draw.randrange(4))]]),
            "item_id": draw.choice(known),
            "label": draw.randrange(2),
            "timestamp": MIDNIGHT + n,
            "hour": draw.choice(["é", "9", "", None]),
            "history": draw.choice(
                [None, [], [draw.choice([*known, "ghost", None]) for _ in range(draw.randrange(1, 7))]]
            ),
        }
        for n in range(60)
    ]
    types = pa.schema({
        "user_id": pa.string(), "likes": pa.list_(pa.int64()), "item_id": pa.string(), "label": pa.int8(),
        "timestamp": pa.int64(), "hour": pa.string(), "history": pa.list_(pa.string()),
    })  # fmt: skip
    table = pa.Table.from_pylist(rows, schema=types)
    maps, item_rows = {name: rows_of(v) for name, v in vocabularies.items()}, rows_of(items.ids)
    expected = []
    for row in rows:
        past = [item_rows.get(name, 1) for name in (row["history"] or [])[-3:]]
        expected.append({
            "label": float(row["label"]), "item": item_rows[row["item_id"]], "filler": False,
            "user_id": maps["user_id"].get(row["user_id"], 1),
            "likes": [maps["likes"].get(value, 1) for value in row["likes"] or []],
            "hour": maps["hour"].get(row["hour"], 1),
            "history": past + [0] * (3 - len(past)),
        })  # fmt: skip
    lengths = Counter(len(row["history"] or []) for row in rows)
    assert lengths[0] and lengths[1] and lengths[3] and lengths[5]
    encoded = encode(table, schema, vocabularies, items)
    assert encoded.to_pylist() == expected
    assert encoded.schema.field("label").type == pa.float32()
    assert encoded.schema.field("item").type == pa.int32()
    assert encoded.schema.field("history").type == pa.list_(pa.int32(), 3)

    pieces = pa.concat_tables([table.slice(0, 11), table.slice(11, 0), table.slice(11, 30), table.slice(41)])
    assert encode(pieces, schema, vocabularies, items).to_pylist() == expected
    assert encode(table.slice(17, 20), schema, vocabularies, items).to_pylist() == expected[17:37]
    assert encode(table.slice(0, 0), schema, vocabularies, items).schema == encoded.schema
    kept = encode(table, schema, vocabularies, items, keep=("user_id", "history"))
    assert kept["raw.user_id"].to_pylist() == [row["user_id"] for row in rows]
    assert kept["raw.history"].to_pylist() == [row["history"] for row in rows]
    assert fillers(schema, 2).schema == encoded.schema
    assert fillers(schema, 2).to_pylist() == 2 * [
        {"label": 0.0, "item": 0, "filler": True, "user_id": 1, "likes": [], "hour": 1, "history": [0, 0, 0]}
    ]
