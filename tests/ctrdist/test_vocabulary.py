import random
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from ctrdist.errors import UserError
from ctrdist.fields import load_encoders, save_encoders
from ctrdist.vocabulary import (
    FIRST_ROW,
    UNKNOWN,
    Vocabulary,
    add_counts,
    sum_counts,
    to_keys,
)

STRINGS = ["", "a", "aa", "ab", "b", "é", "zzz", "東京", "a b", "long " * 20]


def vocabulary_of(values, type_=None) -> tuple[Vocabulary, dict]:
    """A vocabulary, and rows as they ought to be: in the order of the ids (of their UTF-8 bytes)."""
    order = sorted(values, key=lambda v: v.encode() if isinstance(v, str) else v)
    vocabulary = Vocabulary().grow(to_keys(pa.array(values, type_)), np.ones(len(values), np.int64))
    return vocabulary, {value: FIRST_ROW + row for row, value in enumerate(order)}


@pytest.mark.parametrize("type_", [pa.string(), pa.large_string()])
def test_strings_against_a_dict(type_):
    vocabulary, rows = vocabulary_of(STRINGS)
    queries = [*STRINGS, "aaa", "A", None, "東", "long", None, "", "a"]
    expected = [rows.get(query, UNKNOWN) for query in queries]
    found = vocabulary.lookup(pa.array(queries, type_))
    assert found.dtype == np.int32 and found.tolist() == expected
    assert vocabulary.size == FIRST_ROW + len(STRINGS)


@pytest.mark.parametrize("type_", [pa.int8(), pa.int32(), pa.int64(), pa.uint16()])
def test_integers_against_a_dict(type_):
    vocabulary, rows = vocabulary_of([5, 0, 100, 7, 3])
    queries = [0, 7, None, 8, 100, 5, 1]
    assert vocabulary.lookup(pa.array(queries, type_)).tolist() == [rows.get(query, UNKNOWN) for query in queries]


def test_hashes_of_64_bits_keep_apart():
    values = [2**64 - 1, 2**63, 2**63 - 1, 0]
    vocabulary, _ = vocabulary_of(values, pa.uint64())
    found = vocabulary.lookup(pa.array([*values, 17], pa.uint64())).tolist()
    assert sorted(found[:4]) == [2, 3, 4, 5] and found[4] == UNKNOWN


def test_dictionary_chunked_and_sliced_arrays():
    vocabulary, rows = vocabulary_of(STRINGS)
    queries = [random.Random(1).choice([*STRINGS, "no", None]) for _ in range(50)]
    expected = [rows.get(query, UNKNOWN) for query in queries]
    whole = pa.array(queries)
    chunks = pa.chunked_array([whole.slice(0, 20), whole.slice(20, 0), whole.slice(20)])
    for values in (
        whole.dictionary_encode(),
        chunks,
        pa.chunked_array([whole.slice(0, 9).dictionary_encode(), whole.slice(9).dictionary_encode()]),
    ):
        assert vocabulary.lookup(values).tolist() == expected
    assert vocabulary.lookup(whole.slice(7, 30)).tolist() == expected[7:37]
    assert vocabulary.lookup(whole.dictionary_encode().slice(7, 30)).tolist() == expected[7:37]
    assert vocabulary.lookup(whole.slice(0, 0)).tolist() == []
    assert vocabulary.lookup(pa.chunked_array([], pa.string())).tolist() == []
    assert to_keys(whole.drop_null().slice(3, 5)).tolist() == [v.encode() for v in whole.drop_null().to_pylist()[3:8]]


def test_a_full_dictionary_of_small_indices_and_a_null():
    names = [f"{n:03d}" for n in range(128)]
    vocabulary, rows = vocabulary_of(names)
    values = pa.DictionaryArray.from_arrays(pa.array([127, None, 0], pa.int8()), pa.array(names))
    assert vocabulary.lookup(values).tolist() == [rows["127"], UNKNOWN, rows["000"]]


def test_columns_without_any_value_have_no_type():
    vocabulary, _ = vocabulary_of(["a"])
    assert vocabulary.lookup(pa.array([None, None])).tolist() == [UNKNOWN, UNKNOWN]
    assert vocabulary.lookup(pa.chunked_array([pa.array([], pa.null())])).tolist() == []


def test_rows_never_move_over_many_days():
    draw, vocabulary, rows = random.Random(3), Vocabulary(), {}
    for _ in range(12):
        day = [draw.choice("aäbc") * draw.randrange(1, 6) + str(draw.randrange(60)) for _ in range(30)]
        distinct = list(dict.fromkeys(day))
        for value in sorted((v for v in distinct if v not in rows), key=str.encode):
            rows[value] = FIRST_ROW + len(rows)
        vocabulary = vocabulary.grow(to_keys(pa.array(distinct)), np.ones(len(distinct), np.int64))
        assert vocabulary.lookup(pa.array(list(rows))).tolist() == list(rows.values())
        assert vocabulary.size == FIRST_ROW + len(rows)
        in_order = [key.decode() for key in vocabulary.decode(np.arange(FIRST_ROW, vocabulary.size)).tolist()]
        assert in_order == sorted(rows, key=rows.get)


@pytest.mark.parametrize("integers", [False, True])
def test_min_count_is_of_all_days_so_far(integers):
    draw, vocabulary, totals, rows = random.Random(5), Vocabulary(), Counter(), {}
    for _ in range(10):
        names = [draw.randrange(40) for _ in range(25)]
        day = Counter(names if integers else [f"v{name}" for name in names])
        totals += day
        for value in sorted(v for v, n in totals.items() if n >= 4 and v not in rows):
            rows[value] = FIRST_ROW + len(rows)
        values, counts = list(day), np.array(list(day.values()))
        vocabulary = vocabulary.grow(to_keys(pa.array(values)), counts, min_count=4)
        assert vocabulary.lookup(pa.array(list(totals))).tolist() == [rows.get(v, UNKNOWN) for v in totals]
        pending = dict(zip(vocabulary.pending.tolist(), vocabulary.pending_counts.tolist(), strict=True))
        expected = {(v if integers else v.encode()): n for v, n in totals.items() if v not in rows}
        assert pending == expected
    assert rows and len(rows) < len(totals)


@pytest.mark.parametrize(("first", "then"), [(["a"], [1]), ([1], ["a"])])
def test_mixed_types_are_refused(first, then):
    one = np.ones(1, np.int64)
    vocabulary, _ = vocabulary_of(first)
    with pytest.raises(UserError, match="column 'user_id': ids are .*, but .* before"):
        vocabulary.lookup(pa.array(then), "user_id")
    with pytest.raises(UserError, match="'user_id'"):
        vocabulary.grow(to_keys(pa.array(then)), one, column="user_id")
    rare = Vocabulary().grow(to_keys(pa.array(first)), one, min_count=2)
    with pytest.raises(UserError, match="'user_id'"):
        rare.grow(to_keys(pa.array(then)), one, min_count=2, column="user_id")
    with pytest.raises(UserError, match="'user_id'"):
        add_counts((to_keys(pa.array(first)), one), (to_keys(pa.array(then)), one), "user_id")


def test_a_day_without_values_changes_nothing():
    vocabulary = Vocabulary().grow(to_keys(pa.array([4, 9, 9])), np.array([1, 1, 5]), min_count=2)
    for empty in (pa.array([], pa.string()), pa.array([], pa.int64())):
        after = vocabulary.grow(to_keys(empty), np.empty(0, np.int64), min_count=2)
        assert after.lookup(pa.array([9, 4])).tolist() == [2, UNKNOWN]
        assert after.pending.tolist() == [4]


@pytest.mark.parametrize("values", [pa.array([1.5]), pa.array([[1]]), pa.array([b"x"])])
def test_other_types_are_refused(values):
    with pytest.raises(UserError, match="column 'price': .* expected strings or integers"):
        to_keys(values, "price")


def test_sum_counts_and_add_counts_against_a_counter():
    draw = random.Random(2)
    parts = [[(draw.randrange(9), draw.randrange(1, 5)) for _ in range(20)] for _ in range(2)]
    total = Counter()
    for part in parts:
        for key, count in part:
            total[key] += count
    summed = [sum_counts(np.array([k for k, _ in p]), np.array([c for _, c in p])) for p in parts]
    keys, counts = add_counts(*summed)
    assert keys.tolist() == sorted(total)
    assert dict(zip(keys.tolist(), counts.tolist(), strict=True)) == total
    assert counts.dtype == np.int64


def test_save_and_load(tmp_path):
    names = Vocabulary().grow(to_keys(pa.array(["b", "é", "", "rare"])), np.array([3, 4, 5, 1]), min_count=2)
    numbers, _ = vocabulary_of([7, -3])
    save_encoders({"names": names, "numbers": numbers, "empty": Vocabulary()}, tmp_path / "vocabulary")
    loaded = load_encoders(tmp_path / "vocabulary")
    assert list(loaded) == ["empty", "names", "numbers"]
    assert loaded["names"].lookup(pa.array(["é", "b", "", "rare", "x"])).tolist() == [4, 3, 2, 1, 1]
    assert loaded["numbers"].lookup(pa.array([7, -3])).tolist() == [3, 2]
    assert loaded["empty"].lookup(pa.array(["a"])).tolist() == [1]
    assert isinstance(loaded["names"].keys, np.memmap)
    grown = loaded["names"].grow(to_keys(pa.array(["rare"])), np.array([1]), min_count=2)
    assert grown.lookup(pa.array(["rare", "b"])).tolist() == [5, 3]
    assert loaded["empty"].grow(to_keys(pa.array([3])), np.array([1])).lookup(pa.array([3])).tolist() == [2]


def test_new_ids_take_free_rows_first_once_no_release_names_them():
    def grown(vocabulary, day, reuse_until, *ids):
        return vocabulary.grow(to_keys(pa.array(ids)), np.ones(len(ids), np.int64), day=day, reuse_until=reuse_until)

    old = grown(grown(Vocabulary(), 1, -1, "a", "b", "c"), 5, -1, "b").expire(before=3, day=6)
    assert old.lookup(pa.array(["a", "b", "c"])).tolist() == [UNKNOWN, 3, UNKNOWN]
    assert (old.free.tolist(), old.freed.tolist(), old.size) == ([2, 4], [6, 6], 5)
    assert grown(old, 7, 5, "d").lookup(pa.array(["d"])).tolist() == [5]
    new = grown(old, 7, 6, "d", "e", "f")
    assert new.lookup(pa.array(["b", "d", "e", "f"])).tolist() == [3, 2, 4, 5]
    assert new.rows_with_new_ids(old).tolist() == [2, 4] and not len(new.free)
    # An id that comes back is a new one.
    back = grown(old, 7, 6, "c")
    assert back.lookup(pa.array(["c"])).tolist() == [2] and back.rows_with_new_ids(old).tolist() == [2]


def test_an_expired_id_starts_counting_anew():
    one = (to_keys(pa.array(["a"])), np.ones(1, np.int64))
    vocabulary = Vocabulary().grow(*one, 2, day=1).expire(before=2, day=2).grow(*one, 2, day=3)
    assert vocabulary.pending_counts.tolist() == [1] and vocabulary.pending_seen.tolist() == [3]
    assert vocabulary.grow(*one, 2, day=4).lookup(pa.array(["a"])).tolist() == [2]


def test_an_id_may_be_seen_without_a_row():
    vocabulary = Vocabulary().grow(np.array([4]), np.array([1]), day=1)
    vocabulary = vocabulary.grow(np.array([4, 9]), np.array([0, 0]), day=8)
    assert vocabulary.seen.tolist() == [8] and not len(vocabulary.pending)
    assert vocabulary.expire(before=8, day=9).keys.tolist() == [4]


def test_an_id_beyond_all_measure_is_refused():
    assert to_keys(pa.array(["a", "b" * 256])).dtype.itemsize == 256
    with pytest.raises(UserError, match="column 'query': an id of 2,000 bytes, beginning with 'xxx.*at most 256"):
        to_keys(pa.array(["a", "x" * 2000]), "query")


def test_an_id_that_is_longer_than_all_known_ones_is_unknown_at_no_cost_of_the_vocabulary(monkeypatch):
    known, _ = vocabulary_of(["ab", "b"])
    asked = []
    find = np.searchsorted
    monkeypatch.setattr(np, "searchsorted", lambda keys, values: asked.append(values.dtype) or find(keys, values))
    assert known.lookup(pa.array(["ab", "abc", "b" * 40, "a", "b"])).tolist() == [2, 1, 1, 1, 3]
    assert asked == [known.keys.dtype], "the keys need not be copied to another width"
