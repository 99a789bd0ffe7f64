from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctrdist.datasets.protocol import Protocol, Raw, core, sample_negatives, split, write
from ctrdist.errors import UserError
from ctrdist.schema import Field, Schema

PAIRS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=60)


def raw_of(rows: list[tuple], timed: bool = True, items: str = "abc", **columns) -> Raw:
    """Rows of (user, item, rating, time)."""
    user, item, rating, time = zip(*rows, strict=True)
    log = {"user_id": user, "item_id": item, "rating": rating} | ({"timestamp": time} if timed else {}) | columns
    return Raw(log=pa.table(log), items=pa.table({"item_id": list(items)}), item=(Field("item_id"),), text=("{text}",))


def read(out: Path) -> list[dict]:
    return ds.dataset(out / "interactions").to_table().to_pylist()


ROWS = [("u", "a", 5, 30), ("u", "b", 3, 10), ("v", "a", 4, 20), ("v", "zz", 2, 90_000), ("u", "c", 1, 40)]


def test_labels_order_histories_and_days(tmp_path):
    summary = write(raw_of(ROWS), Protocol(positive=4, drop=(1,), history="all"), tmp_path / "out")
    assert [(r["user_id"], r["item_id"], r["label"], r["history"]) for r in read(tmp_path / "out")] == [
        ("u", "b", 0, []), ("v", "a", 1, []), ("u", "a", 1, ["b"]), ("v", "zz", 0, ["a"])
    ]  # fmt: skip
    assert (summary.rows, summary.users, summary.days, summary.positives) == (4, 2, 2, 2)
    assert "split" not in read(tmp_path / "out")[0] and "rating" not in read(tmp_path / "out")[0]


def test_item_texts_join_and_keep_the_datasets_own(tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"item_id": "b", "text": "new"}\n{"item_id": "x", "text": "unused"}\n')
    raw = raw_of(ROWS)
    raw = replace(raw, items=raw.items.append_column("text", pa.array(["own", "old", None])))
    summary = write(raw, Protocol(), tmp_path / "out", tmp_path / "texts.jsonl")
    assert pq.read_table(tmp_path / "out" / "items")["text"].to_pylist() == ["own", "new", None]
    assert summary.items_with_text == summary.free_texts == 2


def test_data_without_time_is_one_day_of_row_numbers_and_no_histories(tmp_path):
    write(raw_of(ROWS * 30_000, timed=False), Protocol(positive=4, split="file", shares=(3, 1, 1)), tmp_path / "out")
    assert [p.name for p in (tmp_path / "out" / "interactions").iterdir()] == ["dt=1970-01-01"]
    table = ds.dataset(tmp_path / "out" / "interactions").to_table().sort_by("timestamp")
    assert table["timestamp"].to_pylist() == list(range(150_000))
    assert Counter(table["split"].to_pylist()) == {"train": 90_000, "valid": 30_000, "test": 30_000}
    assert Schema.load(tmp_path / "out" / "schema.yaml").history_length == 0
    for name in ("day", "time", "last-day"):
        with pytest.raises(UserError, match=f"--split {name}: this dataset has no time; take file or random"):
            write(raw_of(ROWS, timed=False), Protocol(split=name), tmp_path / name)


def test_own_labels_stay_and_nothing_left_is_an_error(tmp_path):
    raw = raw_of(ROWS)
    labelled = raw.log.drop_columns(["rating"]).append_column("label", pa.array([0, 1, 0, 1, 0], pa.int8()))
    write(replace(raw, log=labelled), Protocol(), tmp_path / "out")
    assert [row["label"] for row in read(tmp_path / "out")] == [1, 0, 0, 0, 1]
    with pytest.raises(UserError, match="leaves no row of 5"):
        write(raw, Protocol(core=4), tmp_path / "none")


@given(PAIRS, st.integers(1, 5))
def test_core_is_the_largest_set_with_enough_rows_each(pairs, least):
    user, item = np.array(pairs, np.int64).reshape(-1, 2).T
    rows = set(core(user, item, least).tolist())
    expected = set(range(len(pairs)))
    while True:  # one bad row at a time
        users, items = (Counter(pairs[n][side] for n in expected) for side in (0, 1))
        bad = next((n for n in expected if users[pairs[n][0]] < least or items[pairs[n][1]] < least), None)
        if bad is None:
            break
        expected.remove(bad)
    assert rows == expected


@given(PAIRS.filter(bool), st.integers(0, 3), st.integers(1, 3))
def test_a_negative_is_an_item_that_the_user_has_no_row_of(pairs, seed, each):
    user, item = np.array(pairs, np.int64).T
    item = np.where(item == 6, -1, item)
    rows = np.repeat(np.arange(len(user)), each)
    chosen = sample_negatives(user, item, rows, 6, np.random.default_rng(seed), tries=400)
    seen = {(int(u), int(i)) for u, i in zip(user, item, strict=True)}
    for row, found in zip(rows, chosen, strict=True):
        free = {n for n in range(6) if (int(user[row]), n) not in seen}
        assert (found in free) if free else found == -1


def test_negatives_are_drawn_evenly():
    users = np.zeros(30_000, np.int64)
    chosen = sample_negatives(users, users + 2, np.arange(30_000), 5, np.random.default_rng(0))
    counts = np.bincount(chosen, minlength=5)
    assert counts[2] == 0 and np.all(np.abs(counts[[0, 1, 3, 4]] - 7_500) < 400)


def test_negatives_follow_their_clicks_and_enter_no_history(tmp_path):
    rows = [("u", "a", 1, 10), ("u", "b", 1, 20), ("v", "c", 1, 20), ("w", "d", 1, 30)]
    write(raw_of(rows, items="abcdefgh"), Protocol(negatives=2), tmp_path / "out", seed=3)
    found = read(tmp_path / "out")
    assert {r["item_id"] for r in found if not r["label"]} <= set("abcd"), "only items that somebody clicked"
    assert [(r["user_id"], r["timestamp"], r["label"]) for r in found] == [
        (user, time, label) for user, _, _, time in rows for label in (1, 0, 0)
    ]
    assert all(r["item_id"] not in {"a", "b"} for r in found if r["user_id"] == "u" and not r["label"])
    assert [r["history"] for r in found] == [[]] * 3 + [["a"]] * 3 + [[]] * 6
    write(raw_of(rows, items="abcdefgh"), Protocol(negatives=2), tmp_path / "again", seed=3)
    assert read(tmp_path / "again") == found


@given(st.lists(st.integers(0, 30), min_size=1, max_size=80).map(sorted), st.tuples(*[st.integers(1, 8)] * 3))
def test_split_by_time_is_in_order_whole_seconds_and_near_its_shares(times, shares):
    protocol, time = Protocol(split="time", shares=shares), np.array(times)
    parts = split(time, protocol, np.random.default_rng(0)).to_pylist()
    assert parts == sorted(parts, key=["train", "valid", "test"].index)
    assert len(set(zip(times, parts, strict=True))) == len(set(times))
    largest = max(Counter(times).values())
    assert abs(parts.count("train") - len(times) * shares[0] / sum(shares)) <= largest


def test_the_other_splits():
    day = 86_400
    time = np.array([5, day, day + 1, 3 * day, 3 * day + 9])
    last = split(time, Protocol(split="last-day"), np.random.default_rng(0)).to_pylist()
    assert last == ["train", "valid", "valid", "test", "test"]
    assert split(time[3:], Protocol(split="last-day"), np.random.default_rng(0)).to_pylist() == ["test"] * 2
    drawn = split(np.zeros(50_000), Protocol(split="random", shares=(2, 1, 1)), np.random.default_rng(0)).to_pylist()
    assert [round(Counter(drawn)[name] / 50_000, 2) for name in ("train", "valid", "test")] == [0.5, 0.25, 0.25]
    assert len({name for name in drawn[:20]}) > 1
