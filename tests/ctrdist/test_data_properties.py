"""What must hold of any log: draws by hypothesis, against brute force."""

import datetime as dt
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctrdist.datasets.canonical import SECONDS_A_DAY
from ctrdist.history import recent_behaviours
from ctrdist.items import build_catalog, grow_catalog_ids
from ctrdist.log import list_days, list_row_groups
from ctrdist.scan import Scan, scan_row_group
from ctrdist.schema import Field, Schema
from ctrdist.vocabulary import Vocabulary, sum_counts, to_keys

# No zero bytes: fixed-width strings cannot end in one.
TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=6)
IDS = st.one_of(st.lists(TEXTS, min_size=1), st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1))


def counted(ids: list) -> tuple[np.ndarray, np.ndarray]:
    keys = to_keys(pa.array(ids))
    return sum_counts(keys, np.ones(len(keys)))


@given(IDS)
def test_encode_then_decode_is_the_identity(ids):
    vocabulary = Vocabulary().grow(*counted(ids))
    decoded = vocabulary.decode(vocabulary.lookup(pa.array(ids))).tolist()
    assert [key.decode() if isinstance(key, bytes) else key for key in decoded] == ids


@given(IDS, st.lists(st.integers(0, 5), min_size=1), st.integers(1, 4))
def test_grown_day_by_day_is_built_at_once_up_to_row_order(ids, days, least):
    ids = ids * 3
    day_of = [days[n % len(days)] for n in range(len(ids))]
    grown = Vocabulary()
    for day in range(6):
        before, today = grown, [i for i, d in zip(ids, day_of, strict=True) if d == day]
        if today:
            grown = grown.grow(*counted(today), least)
            np.testing.assert_array_equal(grown.lookup_keys(before.keys), before.rows)
    at_once = Vocabulary().grow(*counted(ids), least)
    assert sorted(grown.keys.tolist()) == sorted(at_once.keys.tolist())
    assert sorted(grown.rows.tolist()) == sorted(at_once.rows.tolist()) == list(range(2, grown.size))
    pending = [dict(zip(v.pending.tolist(), v.pending_counts.tolist(), strict=True)) for v in (grown, at_once)]
    assert pending[0] == pending[1]


@given(
    st.lists(st.lists(st.integers(0, 9), max_size=6), min_size=1, max_size=12),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 5),
)
def test_expiry_frees_what_is_old_and_gives_no_row_again_that_a_kept_release_names(days, least, age, keep):
    """Day by day against a dictionary of id -> (row, count, last day); the last `keep` days' vocabularies are kept."""
    vocabulary, known, releases = Vocabulary(), {}, []
    for day, ids in enumerate(days, start=100):
        before, oldest = vocabulary, min((d for d, _ in releases), default=-1)
        keys, counts = counted(ids) if ids else (np.empty(0, np.int64), np.empty(0, np.int64))
        vocabulary = vocabulary.grow(keys, counts, least, day=day, reuse_until=oldest).expire(day - age, day)
        for i in ids:
            row, count, _ = known.get(i, (None, 0, 0))
            known[i] = (row, count + 1, day)
        for i, (row, count, last) in list(known.items()):
            if row is None and count >= least:
                known[i] = (int(vocabulary.lookup_keys(np.array([i]))[0]), count, last)
            if last < day - age:
                del known[i]
        rows = {i: row for i, (row, _, _) in known.items() if row is not None}
        assert dict(zip(vocabulary.keys.tolist(), vocabulary.rows.tolist(), strict=True)) == rows
        pending = {i: count for i, (row, count, _) in known.items() if row is None}
        assert dict(zip(vocabulary.pending.tolist(), vocabulary.pending_counts.tolist(), strict=True)) == pending
        assert sorted([*rows.values(), *vocabulary.free.tolist()]) == list(range(2, vocabulary.size))
        for _, kept in releases:
            names = dict(zip(kept.rows.tolist(), kept.keys.tolist(), strict=True))
            assert all(names.get(row, i) == i for i, row in rows.items())
        was = dict(zip(before.rows.tolist(), before.keys.tolist(), strict=True))
        anew = {row for i, row in rows.items() if row < before.size and was.get(row) != i}
        assert set(vocabulary.rows_with_new_ids(before).tolist()) == anew
        releases = [*releases, (day, vocabulary)][-keep:]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 6), st.booleans()), max_size=40), st.integers(0, 5))
def test_histories_of_logs_with_ties(rows, length):
    user, time, include = (np.array(column) for column in zip(*rows, strict=True)) if rows else (np.zeros(0),) * 3
    offsets, found = recent_behaviours(user, time, include, length)
    for n, (who, when, _) in enumerate(rows):
        earlier = [m for m, (u, t, good) in enumerate(rows) if u == who and t < when and good]
        expected = sorted(earlier, key=lambda m: (rows[m][1], m))[max(0, len(earlier) - length) :] if length else []
        assert found[offsets[n] : offsets[n + 1]].tolist() == expected


FAULTS = {
    "null user_id": ("user_id", lambda draw: None),
    "null item_id": ("item_id", lambda draw: None),
    "item not in items/": ("item_id", lambda draw: f"x{draw.integers(1000)}"),
    "label not 0 or 1": ("label", lambda draw: [None, 2.0, -1.0, 0.5, float("nan"), float("inf")][draw.integers(6)]),
    "timestamp outside its day": (
        "timestamp",
        lambda draw: [None, -1, 86_400 * 20_000 - 1, 86_400 * 20_001, 2**62][draw.integers(5)],
    ),
}


def test_ten_thousand_bad_rows_are_all_set_aside_and_no_good_one(tmp_path):
    draw, count, start = np.random.default_rng(0), 30_000, 20_000 * SECONDS_A_DAY
    rows = {
        "user_id": [f"u{n}" for n in draw.integers(0, 500, count)],
        "item_id": [f"i{n}" for n in draw.integers(0, 90, count)],
        "label": draw.integers(0, 2, count).astype(float).tolist(),
        "timestamp": (start + draw.integers(0, SECONDS_A_DAY, count)).tolist(),
        "serial": list(range(count)),
    }
    names, reasons = list(FAULTS), {}
    for row in draw.permutation(count)[:10_000]:
        chosen = draw.choice(len(FAULTS), size=draw.integers(1, 3), replace=False)
        for column, value in (FAULTS[names[k]] for k in sorted(chosen, reverse=True)):
            rows[column][row] = value(draw)
        first = min(chosen)
        reasons[int(row)] = names[first]
    folder = tmp_path / "interactions" / "dt=2024-10-04"
    folder.mkdir(parents=True)
    assert dt.date(1970, 1, 1) + dt.timedelta(days=20_000) == dt.date(2024, 10, 4)
    types = pa.schema([("user_id", pa.string()), ("item_id", pa.string()), ("label", pa.float64()),
                       ("timestamp", pa.int64()), ("serial", pa.int64())])  # fmt: skip
    pq.write_table(pa.table(rows, schema=types), folder / "part-0.parquet", row_group_size=7_000)

    # `serial` is read along as a context field, so that quarantined rows can be told apart.
    schema = Schema(user=(Field("user_id"),), item=(Field("item_id"),), context=(Field("serial"),))
    items = pa.table({"item_id": [f"i{n}" for n in range(90)]})
    catalog = build_catalog(items, grow_catalog_ids(items, Vocabulary()), schema, {"item_id": Vocabulary()})
    files, scan = list_days(str(tmp_path)), Scan()
    for group in list_row_groups(str(tmp_path), files, tuple(files), schema):
        scan.add(scan_row_group(str(tmp_path), group, schema, catalog, tmp_path / "bad"))
    bad = pa.concat_tables(pq.read_table(path) for path in sorted(Path(tmp_path / "bad").iterdir())).to_pylist()
    assert {row["serial"]: row["reason"] for row in bad} == reasons and len(bad) == 10_000
    assert all(row["row"] == row["serial"] for row in bad)
    assert scan.faults == Counter(reasons.values()) and sum(scan.rows.values()) == 20_000
    good = set(scan.ids["serial"][0].tolist())
    assert good == set(range(count)) - reasons.keys()


@pytest.mark.parametrize("text", ["a\0", "\0", "ab\0\0"])
def test_an_id_that_ends_in_a_zero_byte_is_the_one_without(text):
    """Fixed-width bytes cannot tell them apart; no real id does so."""
    vocabulary = Vocabulary().grow(*counted([text]))
    assert vocabulary.lookup(pa.array([text.rstrip("\0")])).tolist() == [2]
