import random
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctrdist.errors import UserError
from ctrdist.items import (
    Catalog,
    ItemTexts,
    Ragged,
    build_catalog,
    grow_catalog_ids,
    grow_item_vocabularies,
    item_batches,
    most_popular,
    read_items,
    with_items_that_left,
)
from ctrdist.schema import Field, Schema
from ctrdist.vocabulary import UNKNOWN, Vocabulary

SCHEMA = Schema(
    user=(),
    item=(Field("item_id", min_count=3), Field("studio"), Field("genres", "multi", 2)),
    text=("{title}.", "{genres}"),
)
ROWS = [
    {"item_id": "é", "studio": "A", "genres": ["war", "été"], "title": "One"},
    {"item_id": "b", "studio": None, "genres": None, "title": None},
    {"item_id": "a", "studio": "B", "genres": [], "title": "Three"},
    {"item_id": "d", "studio": "A", "genres": ["war", None, "drama"], "title": "Four"},
    {"item_id": "c", "studio": "C", "genres": ["noir", "war", "war"], "title": "Fünf"},
]
TRAINED = {"é": 4, "b": 1, "a": 2, "d": 3, "c": 0}
TYPES = pa.schema(
    {"item_id": pa.string(), "studio": pa.string(), "genres": pa.list_(pa.string()), "title": pa.string()}
)


def table(rows) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=TYPES)


def write(folder, *parts: pa.Table) -> str:
    (folder / "items").mkdir(exist_ok=True)
    for number, part in enumerate(parts):
        pq.write_table(part, folder / "items" / f"part-{number}.parquet")
    return str(folder)


def expected_rows(counts: Counter, min_count: int) -> dict:
    """Vocabulary rows of one day's values: those with enough training rows, in the order of their bytes."""
    return {value: 2 + n for n, value in enumerate(sorted((v for v in counts if counts[v] >= min_count), key=_bytes))}


def _bytes(value):
    return value.encode()


def catalog_of(rows, trained, ids=None, vocabularies=None):
    items = table(rows)
    ids = grow_catalog_ids(items, ids or Vocabulary())
    at = ids.lookup(items["item_id"])
    counts = np.zeros(ids.size, np.int64)
    counts[at] = [trained.get(row["item_id"], 0) for row in rows]
    vocabularies = grow_item_vocabularies(items, at, counts, SCHEMA, vocabularies or {})
    return build_catalog(items, ids, SCHEMA, vocabularies), vocabularies


def bag(ragged: Ragged, row: int) -> list[int]:
    return ragged.values[ragged.offsets[row] : ragged.offsets[row + 1]].tolist()


def check_against_dicts(catalog: Catalog, catalog_rows: dict, rows: list, fields: dict) -> None:
    assert catalog.ids.lookup(pa.array(list(catalog_rows))).tolist() == list(catalog_rows.values())
    assert catalog.items.tolist() == sorted(catalog_rows[row["item_id"]] for row in rows)
    for row in rows:
        at = catalog_rows[row["item_id"]]
        for name in ("item_id", "studio"):
            assert catalog.fields[name][at] == fields[name].get(row[name], UNKNOWN), (row, name)
        assert bag(catalog.fields["genres"], at) == [fields["genres"].get(v, UNKNOWN) for v in row["genres"] or []]


def field_counts(rows, trained) -> dict[str, Counter]:
    counts = {name: Counter() for name in ("item_id", "studio", "genres")}
    for row in rows:
        for name in counts:
            for value in (row[name] or []) if name == "genres" else [row[name]]:
                if value is not None and trained.get(row["item_id"]):
                    counts[name][value] += trained[row["item_id"]]
    return counts


def test_ragged_take_against_lists():
    draw = random.Random(0)
    lists = [[draw.randrange(9) for _ in range(draw.randrange(4))] for _ in range(20)]
    offsets = np.cumsum([0] + [len(part) for part in lists]).astype(np.int64)
    ragged = Ragged(np.array(sum(lists, []), np.int32), offsets)
    for rows in ([], [3], [19, 0, 0, 7], list(range(20)), [n for n in range(20) if not lists[n]]):
        taken = ragged.take(np.array(rows, np.int64))
        assert [bag(taken, n) for n in range(len(rows))] == [lists[row] for row in rows]
        assert taken.offsets.dtype == np.int64 and taken.offsets[0] == 0
        assert taken.values.dtype == np.int32 and len(taken.values) == taken.offsets[-1]


def test_catalog_against_dicts(tmp_path):
    catalog, vocabularies = catalog_of(ROWS, TRAINED)
    counts = field_counts(ROWS, TRAINED)
    fields = {f.name: expected_rows(counts[f.name], f.min_count) for f in SCHEMA.item}
    assert set(fields["item_id"]) == {"é", "d"} and set(fields["genres"]) == {"war", "été", "drama"}
    assert set(fields["studio"]) == {"A", "B"}, "C belongs to an item without training rows"
    catalog_rows = {"a": 2, "b": 3, "c": 4, "d": 5, "é": 6}
    check_against_dicts(catalog, catalog_rows, ROWS, fields)
    assert catalog.size == 7 and catalog.present.tolist() == [False, False] + [True] * 5
    assert [catalog.fields[name][0] for name in ("item_id", "studio")] == [0, 0]
    assert [catalog.fields[name][1] for name in ("item_id", "studio")] == [1, 1]
    assert bag(catalog.fields["genres"], 0) == bag(catalog.fields["genres"], 1) == []
    assert {name: v.size for name, v in vocabularies.items()} == {n: 2 + len(rows) for n, rows in fields.items()}

    catalog.save(tmp_path / "catalog")
    loaded = Catalog.load(tmp_path / "catalog", SCHEMA)
    check_against_dicts(loaded, catalog_rows, ROWS, fields)
    assert loaded.present.tolist() == catalog.present.tolist()


def test_the_next_day_keeps_rows_and_remembers_who_left():
    first, vocabularies = catalog_of(ROWS, TRAINED)
    later = [row for row in ROWS if row["item_id"] not in ("d", "a")] + [
        {"item_id": "aa", "studio": "C", "genres": ["été"], "title": "New"}
    ]
    trained = {"b": 2, "aa": 1, "c": 5}
    second, _ = catalog_of(later, trained, first.ids, vocabularies)
    catalog_rows = {"a": 2, "b": 3, "c": 4, "d": 5, "é": 6, "aa": 7}
    before, after = field_counts(ROWS, TRAINED), field_counts(later, trained)
    fields = {}
    for field in SCHEMA.item:
        rows = expected_rows(before[field.name], field.min_count)
        total = before[field.name] + after[field.name]
        new = {v for v in total if total[v] >= field.min_count and v not in rows}
        fields[field.name] = rows | {v: 2 + len(rows) + n for n, v in enumerate(sorted(new, key=_bytes))}
    assert fields["item_id"] == {"d": 2, "é": 3, "b": 4, "c": 5}, "b has 1 + 2 rows by now"
    check_against_dicts(second, catalog_rows, later, fields)
    assert not second.present[[2, 5]].any()
    assert second.fields["studio"][[2, 5]].tolist() == [UNKNOWN, UNKNOWN]


def test_a_catalog_without_any_bag_value_can_be_loaded(tmp_path):
    rows = [row | {"genres": None} for row in ROWS]
    catalog, _ = catalog_of(rows, TRAINED)
    catalog.save(tmp_path)
    assert Catalog.load(tmp_path, SCHEMA).fields["genres"].take(np.array([2, 6])).offsets.tolist() == [0, 0, 0]


def test_read_items_joins_files_and_leaves_out_other_columns(tmp_path):
    whole = table(ROWS).append_column("secret", pa.array(range(5)))
    items = read_items(write(tmp_path, whole.slice(0, 2), whole.slice(2)), SCHEMA)
    assert items.column_names == ["item_id", "studio", "genres", "title"]
    assert items.to_pylist() == ROWS


def test_faults_of_items_name_file_column_and_value(tmp_path):
    def fails(*parts, match):
        with pytest.raises(UserError, match=match):
            read_items(write(tmp_path, *parts), SCHEMA)

    with pytest.raises(UserError, match="items: no Parquet files"):
        read_items(str(tmp_path), SCHEMA)
    good = table(ROWS)
    null = table([ROWS[0] | {"item_id": None}, ROWS[1]])
    fails(good, null, match=r"part-1\.parquet: column 'item_id': 1 of 2 ids are null")
    fails(good, good.slice(3, 2), match=r"items: column 'item_id': 2 ids stand in more than one row, '[cd]' for one")
    fails(good, good.drop_columns("studio").slice(0, 0), match=r"part-1\.parquet: no column 'studio'")
    fails(good.rename_columns(["item_id", "studio", "genre", "title"]), match="'genres'; did you mean 'genre'")
    (tmp_path / "items" / "part-0.parquet").write_text("words")
    with pytest.raises(UserError, match=r"part-0\.parquet: not a readable Parquet file"):
        read_items(str(tmp_path), SCHEMA)


def test_mistyped_item_fields_are_named():
    schema = Schema(user=(), item=(Field("item_id"), Field("studio", "multi")))
    ids = grow_catalog_ids(table(ROWS), Vocabulary())
    with pytest.raises(UserError, match="'studio': string, but a multi field needs a list"):
        build_catalog(table(ROWS), ids, schema, {"item_id": Vocabulary(), "studio": Vocabulary()})
    schema = Schema(user=(), item=(Field("item_id"), Field("genres")))
    with pytest.raises(UserError, match="'genres': ids of type list"):
        build_catalog(table(ROWS), ids, schema, {"item_id": Vocabulary(), "genres": Vocabulary()})


def test_integer_item_ids():
    items = pa.table({"item_id": pa.array([30, 4, 200], pa.int32())})
    ids = grow_catalog_ids(items, Vocabulary())
    assert ids.lookup(pa.array([4, 30, 200, 5])).tolist() == [2, 3, 4, UNKNOWN]


def test_item_texts(tmp_path):
    items = table(ROWS)
    ids = grow_catalog_ids(table([{"item_id": "bb"}]), Vocabulary())  # has left items/ since
    ids = grow_catalog_ids(items, ids)
    ItemTexts.write(tmp_path / "texts.arrow", items, ids, SCHEMA)
    texts = ItemTexts(tmp_path / "texts.arrow")
    by_id = {"a": "Three.", "b": "", "c": "Fünf. noir, war, war", "d": "Four. war, drama", "é": "One. war, été"}
    expected = ["", "", "", *(by_id[name] for name in ("a", "b", "c", "d", "é"))]
    assert len(texts) == 8 and texts.take(np.arange(8)) == expected
    assert texts.take(np.array([7, 3, 3])) == ["One. war, été", "Three.", "Three."]
    assert texts.lengths(np.arange(8)).tolist() == [len(text.encode()) for text in expected]
    assert texts.take(np.array([], np.int64)) == []


def test_item_texts_stay_on_disk(tmp_path):
    count = 70_000
    items = pa.table({"item_id": pa.array(range(count)), "title": [f"a title of number {n}" for n in range(count)]})
    schema = Schema(user=(), item=(Field("item_id"),), text=("{title}",))
    ids = grow_catalog_ids(items, Vocabulary())
    ItemTexts.write(tmp_path / "texts.arrow", items, ids, schema)
    before = pa.total_allocated_bytes()
    texts = ItemTexts(tmp_path / "texts.arrow")
    assert pa.total_allocated_bytes() - before < 100_000
    assert texts.take(np.array([2, count + 1])) == ["a title of number 0", f"a title of number {count - 1}"]


def test_item_batches_cover_every_item_once_an_epoch():
    items = np.array([2, 3, 5, 8, 13, 21, 34])

    def epoch(seed, number):
        batches = list(item_batches(items, 3, seed, number))
        assert [len(batch) for batch in batches] == [3, 3, 1]
        flat = np.concatenate(batches).tolist()
        assert sorted(flat) == items.tolist()
        return flat

    assert epoch(0, 0) == epoch(0, 0)
    orders = {tuple(epoch(seed, number)) for seed in range(3) for number in range(3)}
    assert len(orders) > 6 and tuple(items.tolist()) not in {tuple(epoch(0, 0))}
    assert list(item_batches(items[:0], 3, 0, 0)) == []


def test_columns_of_types_that_do_not_go_together_are_named(tmp_path):
    for name, year in (("a", [1999]), ("b", ["1999"])):
        (tmp_path / "items").mkdir(exist_ok=True)
        pq.write_table(pa.table({"item_id": [name], "year": year}), tmp_path / "items" / f"{name}.parquet")
    schema = Schema((Field("user_id"),), (Field("item_id"), Field("year")))
    with pytest.raises(UserError, match="items: .*year.*; give the column one type in all files"):
        read_items(str(tmp_path), schema)


def test_items_that_left_stay_for_as_long_as_the_window():
    def ids(day, known, *names):
        return grow_catalog_ids(pa.table({"item_id": pa.array(names)}), known, day=day)

    known = ids(3, ids(2, ids(1, Vocabulary(), "a", "b", "c"), "b", "c"), "c")
    before = pa.table({"item_id": ["a", "b", "c"], "title": ["A", "B", "C, as it was"]})
    today = pa.table({"item_id": ["c", "d"], "title": ["C", "D"]})
    found = with_items_that_left(today, before, known, since=2)
    assert found.to_pylist() == [{"item_id": i, "title": i.upper()} for i in "cdb"]


def test_most_popular_items():
    counts = np.array([0, 0, 5, 1, 9, 5, 2])
    items = np.array([6, 2, 3, 4, 5])
    assert most_popular(items, counts, 1.0).tolist() == items.tolist()
    assert most_popular(items, counts, 0.6).tolist() == [2, 4, 5]
    assert most_popular(items, counts, 0.4).tolist() == [2, 4]
    assert most_popular(items, counts, 0.01).tolist() == [4]
