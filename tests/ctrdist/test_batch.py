import random

import numpy as np
import pyarrow as pa
import pytest
import torch

from ctrdist.batch import Batch, Lookup, collate
from ctrdist.encode import encode, fillers
from ctrdist.epoch import plan_pass, read_chunk
from ctrdist.items import Catalog, Ragged
from ctrdist.log import list_days, list_row_groups
from ctrdist.schema import Field, Schema
from ctrdist.vocabulary import Vocabulary, to_keys


def values(lookup: Lookup) -> list:
    """What was asked for: one row, or one list of rows, for each thing."""
    flat = lookup.rows[lookup.index].tolist()
    if lookup.offsets is None:
        return flat
    offsets = lookup.offsets.tolist()
    return [flat[start:stop] for start, stop in zip(offsets[:-1], offsets[1:], strict=True)]


@pytest.fixture(scope="module")
def encoded(small_log, small_read) -> pa.Table:
    schema, vocabularies, catalog = small_read
    files = list_days(str(small_log))
    groups = list_row_groups(str(small_log), files, tuple(files), schema)
    chunks = plan_pass(groups)
    return pa.concat_tables(read_chunk(str(small_log), c, schema, vocabularies, catalog) for c in chunks)


def text_table(catalog: Catalog) -> np.ndarray:
    table = np.random.default_rng(0).normal(size=(catalog.size, 5)).astype(np.float16)
    table[0] = 0
    return table


def check(batch: Batch, rows: list[dict], schema: Schema, catalog: Catalog, text: np.ndarray | None) -> None:
    """Compare every row of a batch with the encoded rows that it comes from."""
    assert len(batch) == len(rows)
    assert batch.label.tolist() == [row["label"] for row in rows]
    items = batch.items.tolist()
    named = [row["item"] for row in rows] + [n for row in rows for n in row.get("history", [])]
    assert items == list(dict.fromkeys([0, *named])), "each once, padding first"
    assert [items[n] for n in batch.target.tolist()] == [row["item"] for row in rows]
    assert [[items[n] for n in past] for past in batch.history.tolist()] == [row.get("history", []) for row in rows]
    for field in schema.row_fields:
        lookup = batch.row_fields[field.name]
        assert values(lookup) == [row[field.name] for row in rows]
        assert len(lookup.rows) == len(set(lookup.rows.tolist())), "distinct"
    for field in schema.item:
        column = catalog.fields[field.name]
        if isinstance(column, Ragged):
            wanted = [column.values[column.offsets[n] : column.offsets[n + 1]].tolist() for n in items]
        else:
            wanted = [int(column[n]) for n in items]
        assert values(batch.item_fields[field.name]) == wanted
    if text is None:
        assert batch.text is None
    else:
        assert batch.text.dtype == torch.float32
        assert batch.text.tolist() == [text[n].astype(np.float32).tolist() for n in items]
        assert not batch.text[batch.history[batch.items[batch.history] == 0]].any(), "padding has no text"


def test_lookup_of_values_and_bags():
    draw = random.Random(0)
    flat = np.array([draw.randrange(6) for _ in range(20)], np.int32)
    lookup = Lookup.of(flat)
    assert lookup.rows.tolist() == list(dict.fromkeys(flat.tolist())) and lookup.offsets is None
    assert values(lookup) == flat.tolist()
    assert lookup.rows.dtype == lookup.index.dtype == torch.int64
    bags = [[], [3, 3, 1], [], [7], [1, 7, 7, 2], []]
    offsets = np.cumsum([0] + [len(part) for part in bags]).astype(np.int64)
    lookup = Lookup.of(Ragged(np.array(sum(bags, []), np.int32), offsets))
    assert lookup.rows.tolist() == [3, 1, 7, 2] and values(lookup) == bags
    assert values(Lookup.of(np.array([], np.int32))) == []
    assert values(Lookup.of(Ragged(np.array([], np.int32), np.zeros(4, np.int64)))) == [[], [], []]


@pytest.mark.parametrize("with_text", [False, True])
def test_collate_against_the_rows(encoded, small_read, with_text):
    schema, _, catalog = small_read
    text = text_table(catalog) if with_text else None
    rows = encoded.to_pylist()
    assert len(rows) == 39 and any(0 in row["history"] for row in rows) and any(row["tags"] for row in rows)
    check(collate(encoded, schema, catalog, text), rows, schema, catalog, text)
    for start, size in ((5, 16), (38, 1)):
        part = encoded.slice(start, size)
        check(collate(part, schema, catalog, text), rows[start : start + size], schema, catalog, text)


def test_chunks_and_order_of_columns_do_not_matter(encoded, small_read):
    schema, _, catalog = small_read
    pieces = pa.concat_tables([encoded.slice(30), encoded.slice(0, 0), encoded.slice(3, 7)])
    pieces = pieces.select(sorted(pieces.column_names, reverse=True))
    rows = encoded.to_pylist()
    check(collate(pieces, schema, catalog), rows[30:] + rows[3:10], schema, catalog, None)


def test_fillers_are_dropped_wherever_they_stand(encoded, small_read):
    schema, _, catalog = small_read
    mixed = pa.concat_tables([fillers(schema, 2), encoded.slice(0, 4), fillers(schema, 1), encoded.slice(9, 3)])
    rows = encoded.to_pylist()
    check(collate(mixed, schema, catalog, text_table(catalog)), rows[:4] + rows[9:12], schema, catalog,
          text_table(catalog))  # fmt: skip


@pytest.mark.parametrize("count", [0, 3])
def test_a_batch_of_nothing(encoded, small_read, count):
    schema, _, catalog = small_read
    table = fillers(schema, count) if count else encoded.slice(0, 0)
    batch = collate(table, schema, catalog, text_table(catalog))
    assert len(batch) == 0 and batch.items.tolist() == [0]
    assert batch.history.shape == (0, 3) and batch.target.shape == (0,) and batch.text.tolist() == [[0.0] * 5]
    check(batch, [], schema, catalog, text_table(catalog))


def test_without_histories():
    schema = Schema(user=(Field("user_id"),), item=(Field("item_id"),))
    ids = Vocabulary().grow(to_keys(pa.array(["a", "b"])), np.ones(2, np.int64))
    catalog = Catalog(ids, np.array([False, False, True, True]), {"item_id": np.array([0, 1, 3, 2], np.int32)})
    table = pa.table({"user_id": ["u", "u", "v"], "item_id": ["b", "zz", "b"], "label": [1, 0, 1]})
    batch = collate(encode(table, schema, {"user_id": ids}, catalog), schema, catalog)
    assert batch.history.shape == (3, 0) and batch.items.tolist() == [0, 3, 1]
    assert batch.target.tolist() == [1, 2, 1]
    assert values(batch.item_fields["item_id"]) == [0, 2, 1] and values(batch.row_fields["user_id"]) == [1, 1, 1]


def test_to_moves_every_tensor(encoded, small_read):
    schema, _, catalog = small_read
    moved = collate(encoded, schema, catalog, text_table(catalog)).to("meta")

    def tensors(part):
        if isinstance(part, torch.Tensor):
            return [part]
        parts = part.values() if isinstance(part, dict) else vars(part).values() if part is not None else ()
        return [tensor for inner in parts for tensor in tensors(inner)]

    found = tensors(moved)
    assert len(found) == 5 + 2 * 6 + 2 and all(tensor.is_meta for tensor in found)
    assert collate(encoded, schema, catalog).to("cpu").text is None
