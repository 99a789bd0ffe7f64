import datetime as dt
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctrdist.check import NO_CLICKS, NO_ROWS, ONLY_CLICKS, OWN_ITEM, REPEATED, STRANGERS, check
from ctrdist.check_table import show
from ctrdist.errors import UserError
from ctrdist.log import REASONS


def rows_of(data: Path, side: str) -> list[dict]:
    """All rows of `interactions/` or `items/`, with their day, file and number, in order."""
    return [
        row | {"day": path.parent.name[3:], "file": str(path.relative_to(data)), "row": number}
        for path in sorted((data / side).rglob("*.parquet"))
        for number, row in enumerate(pq.ParquetFile(path).read().to_pylist())
    ]


def is_good(row: dict, items: set) -> bool:
    day = str(dt.datetime.fromtimestamp(row["timestamp"], dt.UTC).date())
    return row["user_id"] is not None and row["item_id"] in items and row["label"] in (0, 1) and day == row["day"]


def fields_by_hand(good: list[dict], items: dict, sides: dict) -> dict:
    facts = {}
    for name, (side, min_count) in sides.items():
        values = [(items[row["item_id"]] if side == "item" else row)[name] for row in good]
        flat = [v for value in values for v in (value if isinstance(value, list) else [value]) if v is not None]
        counts = Counter(flat)
        rare = [n for n in counts.values() if n < min_count]
        facts[name] = (side, len(counts), min_count, len(rare), sum(rare) / len(flat))
    return facts


def test_a_small_log_against_plain_python(small_log):
    found = check(str(small_log))
    log, listed = rows_of(small_log, "interactions"), rows_of(small_log, "items")
    items = {item["item_id"]: item for item in listed}
    good = [row for row in log if is_good(row, set(items))]
    assert (found.rows, found.bad) == (len(log), len(log) - len(good)) == (44, 5)
    assert found.click_rate == sum(row["label"] for row in good) / len(good)
    for day in {row["day"] for row in log}:
        mine = [row for row in good if row["day"] == day]
        all_ = sum(row["day"] == day for row in log)
        clicks = sum(row["label"] for row in mine)
        assert found.days[day] == {
            "rows": all_, "bad": all_ - len(mine), "clicks": clicks, "click_rate": clicks / len(mine)
        }  # fmt: skip
    assert list(found.days) == sorted({row["day"] for row in log})
    assert found.users == len({row["user_id"] for row in good})
    assert (found.items, found.items_with_rows) == (12, len({row["item_id"] for row in good}))

    before = Counter(row["item_id"] for row in good if row["day"] < "2024-01-05")
    last = Counter(row["item_id"] for row in good if row["day"] == "2024-01-05")
    assert found.cold == {
        "part": "2024-01-05", "reference": "before 2024-01-05",
        "rows": last.total(), "cold_rows": sum(n for item, n in last.items() if before[item] < 5),
        "items": len(last), "cold_items": sum(before[item] < 5 for item in last),
        "all_items": 12, "cold_all_items": sum(before[item] < 5 for item in items),
    }  # fmt: skip

    sides = {"user_id": ("user", 1), "item_id": ("item", 3), "genres": ("item", 1), "studio": ("item", 1),
             "hour": ("context", 1), "tags": ("context", 1)}  # fmt: skip
    names = ("side", "values", "min_count", "rare_values", "rare_share")
    shown = {name: tuple(facts[key] for key in names) for name, facts in found.fields.items()}
    assert shown == fields_by_hand(good, items, sides)
    assert found.fields["item_id"]["rare_values"] > 0

    columns = ("user_id", "item_id", "label", "timestamp", "hour", "tags", "history")
    assert found.nulls["interactions"] == {name: sum(row[name] is None for row in log) for name in columns}
    columns = ("item_id", "genres", "studio", "title")
    assert found.nulls["items"] == {name: sum(item[name] is None for item in listed) for name in columns}

    histories = [row["history"] or [] for row in good]
    lengths = [len(history) for history in histories if history]
    assert found.histories == {
        "rows": len(lengths), "share": len(lengths) / len(good), "mean_length": sum(lengths) / len(lengths),
        "max_length": max(lengths), "behaviours": sum(lengths),
        "strangers": sum(item not in items for history in histories for item in history),
    }  # fmt: skip
    strange = [row for row in good if set(row["history"] or []) - set(items)]
    own = [row for row in good if row["item_id"] in (row["history"] or [])]
    for name, rows in ((STRANGERS, strange), (OWN_ITEM, own)):
        assert found.notes[name].count == len(rows) > 3
        assert [(e["file"], e["row"]) for e in found.notes[name].examples] == [(r["file"], r["row"]) for r in rows[:3]]
    assert {example["value"] for example in found.notes[STRANGERS].examples} == {"ghost"}
    assert found.notes[NO_ROWS].count == 1 and found.notes[NO_ROWS].examples == [{"day": "2024-01-03"}]
    assert set(found.notes) == {STRANGERS, OWN_ITEM, NO_ROWS}

    file = "interactions/dt=2024-01-04/part-0.parquet"
    values = {1: "null", 8: "null", 2: "ghost", 7: "0.5", 9: "1704412800 (2024-01-05T00:00:00)"}
    assert list(found.faults) == list(REASONS[1:-1])
    for finding, (row, value) in zip(found.faults.values(), values.items(), strict=True):
        assert (finding.count, finding.examples) == (1, [{"file": file, "row": row, "value": value}])

    texts = [f"Title {item['item_id']}." for item in listed]
    for n, item in enumerate(listed):
        genres = [genre for genre in item["genres"] or [] if genre]
        texts[n] += f" Genres: {', '.join(genres)}." if genres else ""
    words = sorted(len(text.split()) for text in texts)
    assert found.texts == {
        "items_without": 0, "unit": "words", "tokenizer": None, "measured": 12, "mean": sum(words) / 12,
        "min": words[0], "p50": words[5], "p90": words[10], "p95": words[11], "p99": words[11], "max": words[11],
    }  # fmt: skip


SCHEMA = """
user: {user_id: {kind: categorical, min_count: 3}, age: numeric}
item: {item_id: categorical, price: numeric}
history_length: 2
text: ["{title}"]
"""
PRICES = [1.0, 2.0, None, float("nan"), float("inf")]


def write_log(folder: Path, days: dict[str, list[list[dict]]], split: bool = False) -> str:
    """A log of files of rows, two rows a row group; what a row does not name is right."""
    (folder / "items").mkdir(parents=True)
    (folder / "schema.yaml").write_text(SCHEMA)
    items = {"item_id": [0, 1, 2, 3, 4], "price": PRICES, "title": ["red book", "a", " ", None, "the long red book"]}
    pq.write_table(pa.table(items), folder / "items" / "part-0.parquet")
    for day, files in days.items():
        midnight = int(dt.datetime.fromisoformat(f"{day}T00:00:00+00:00").timestamp())
        for number, rows in enumerate(files):
            usual = {"user_id": "u", "item_id": 0, "label": 0, "age": 1.0, "history": None}
            rows = [usual | {"timestamp": midnight + 100 * number + at} | row for at, row in enumerate(rows)]
            table = {name: [row[name] for row in rows] for name in (*usual, "timestamp")}
            types = {"user_id": pa.string(), "item_id": pa.int64(), "label": pa.float64(), "age": pa.float64(),
                     "history": pa.list_(pa.int64()), "timestamp": pa.int64()}  # fmt: skip
            columns = {name: pa.array(table[name], types[name]) for name in table}
            if split:
                columns["split"] = pa.array([row.get("split", "train") for row in rows], pa.string())
            path = folder / "interactions" / f"dt={day}" / f"part-{number}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.table(columns), path, row_group_size=2)
    return str(folder)


def test_rows_that_stand_twice(tmp_path):
    same = {"user_id": "v", "item_id": 1, "timestamp": 1704067205}
    bad = same | {"label": 7}
    files = [[{}, same, {}, same | {"label": 1}, bad, bad], [{}, {}, same], [same | {"item_id": 2}]]
    found = check(write_log(tmp_path / "log", {"2024-01-01": files, "2024-01-02": [[{}, {"label": 1}]]}))
    repeated = found.notes[REPEATED]
    assert repeated.count == 2, "the third and the second of three good rows"
    at = {"file": "interactions/dt=2024-01-01/part-0.parquet", "row": 3}
    assert repeated.examples == [at | {"value": "user_id v, item_id 1, timestamp 1704067205"}]
    assert found.faults["label not 0 or 1"].count == 2 and found.bad == 2


def test_at_most_three_examples_and_many_bad_rows(tmp_path):
    rows = [{"user_id": None} for _ in range(5)] + [{"timestamp": None}, {"timestamp": 2**62}, {"label": None}]
    found = check(write_log(tmp_path / "log", {"2024-01-01": [rows]}))
    assert found.bad == 8 and found.click_rate is None and found.users == 0 and found.cold is None
    assert [example["row"] for example in found.faults["null user_id"].examples] == [0, 1, 2]
    assert found.faults["timestamp outside its day"].examples[0]["value"] == "null"
    assert np.isnan(found.numbers["age"]["p50"])
    assert found.notes == {} and found.fields["user_id"]["rare_share"] is None
    assert show(found).splitlines()[-1] == "8 of 8 rows are bad (100.00%): a job puts them in quarantine"
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["numbers"]["age"]["min"] is None


def test_days_of_one_label_and_without_rows(tmp_path):
    days = {"2024-01-01": [[{}, {}]], "2024-01-03": [[{"label": 1}]], "2024-01-07": [[{"label": 1}, {}]]}
    notes = check(write_log(tmp_path / "log", days)).notes
    found = {name: (note.count, [example["day"][-2:] for example in note.examples]) for name, note in notes.items()}
    assert found == {NO_ROWS: (4, ["02", "04", "05"]), NO_CLICKS: (1, ["01"]), ONLY_CLICKS: (1, ["03"])}


def test_numbers_and_ids_of_many_row_groups(tmp_path):
    draw = np.random.default_rng(0)
    ages = [*draw.normal(40, 9, 197).tolist(), None, float("nan"), float("-inf")]
    users = [f"u{int(n)}" for n in draw.exponential(20, 200)]
    rows = [
        {"age": age, "user_id": user} for age, user in zip(draw.permutation(np.array(ages, object)), users, strict=True)
    ]
    found = check(write_log(tmp_path / "log", {"2024-01-01": [rows[:77], rows[77:]]}))
    rare = [n for n in Counter(users).values() if n < 3]
    assert found.users == found.fields["user_id"]["values"] == len(set(users)) > 40
    assert found.fields["user_id"]["rare_values"] == len(rare)
    assert found.fields["user_id"]["rare_share"] == sum(rare) / 200
    ages = sorted(ages[:197])
    assert found.numbers["age"] == {
        "side": "user", "nulls": 1, "nan": 1, "infinite": 1, "min": ages[0], "p01": ages[1], "p25": ages[49],
        "p50": ages[98], "p75": ages[147], "p99": ages[195], "max": ages[-1],
    }  # fmt: skip
    price = found.numbers["price"]
    assert (price["nulls"], price["nan"], price["infinite"], price["min"], price["max"]) == (1, 1, 1, 1.0, 2.0)
    assert found.nulls["interactions"]["age"] == 1 and found.nulls["items"]["price"] == 1


def test_a_log_with_splits(tmp_path):
    rows = [{"item_id": 1, "split": "train"} for _ in range(5)] + [{"item_id": 2, "split": "valid"} for _ in range(6)]
    rows += [{"item_id": n, "split": "test"} for n in (1, 1, 2, 3)] + [{"split": None}, {"split": "dev"}]
    found = check(write_log(tmp_path / "log", {"1970-01-01": [rows[:4], rows[4:]]}, split=True))
    assert found.splits == {"train": 5, "valid": 6, "test": 4}
    assert found.cold == {
        "part": "test", "reference": "in train", "rows": 4, "cold_rows": 2, "items": 3, "cold_items": 2,
        "all_items": 5, "cold_all_items": 4,
    }  # fmt: skip
    wrong = found.faults["split not train, valid or test"]
    assert wrong.count == found.bad == 2 and [example["value"] for example in wrong.examples] == ["null", "dev"]


def test_texts_by_words_and_by_a_tokenizer(tmp_path, tiny_lm):
    data = write_log(tmp_path / "log", {"2024-01-01": [[{}]]})
    words = check(data).texts
    assert words["items_without"] == 2 and words["measured"] == 3
    assert [words[key] for key in ("min", "p50", "max")] == [1, 2, 4]
    tokens = check(data, str(tiny_lm)).texts
    assert (tokens["unit"], tokens["tokenizer"]) == ("tokens", str(tiny_lm))
    assert [tokens[key] for key in ("min", "p50", "max")] == [3, 4, 6], "two special tokens each"


@pytest.mark.parametrize("name", ["/no/such/model", "tmp_path"])
def test_no_such_language_model(tmp_path, name):
    data = write_log(tmp_path / "log", {"2024-01-01": [[{}]]})
    with pytest.raises(UserError, match="language model"):
        check(data, str(tmp_path) if name == "tmp_path" else name)


def test_progress_and_no_data(tmp_path):
    said = []
    data = write_log(tmp_path / "log", {"2024-01-01": [[{}, {}, {}], [{}]], "2024-01-02": [[{}]]})
    check(data, tell=lambda done, rows: said.append((done, rows)))
    assert said == [(2, 5), (3, 5), (4, 5), (5, 5)]
    with pytest.raises(UserError, match="none of its 1 files has a row"):
        check(write_log(tmp_path / "empty", {"2024-01-01": [[]]}))
    with pytest.raises(UserError, match="schema.yaml: no such file"):
        check(str(tmp_path / "nowhere"))
    path = tmp_path / "log" / "interactions" / "dt=2024-01-02" / "part-0.parquet"
    pq.write_table(pq.ParquetFile(path).read().drop_columns("age"), path)
    with pytest.raises(UserError, match="no column 'age'"):
        check(data)


def test_what_is_shown(small_log, tmp_path):
    lines = show(check(str(small_log))).splitlines()
    assert len(lines) < 60 and lines[-1] == "5 of 44 rows are bad (11.36%): a job puts them in quarantine"
    assert any(line.startswith("2024-01-02    10    0       60.0%  ███") for line in lines)
    assert "      interactions/dt=2024-01-04/part-0.parquet row 7: 0.5" in lines

    first = dt.date(2024, 1, 1)
    days = {str(first + dt.timedelta(2 * n)): [[{}, {"label": 1}] * (1 + n // 20)] for n in range(80)}
    found = check(write_log(tmp_path / "log", days))
    lines = show(found).splitlines()
    assert len(lines) < 60 and lines[-1] == "nothing is wrong in 400 rows"
    assert any("first 2, last 8, min 2, median 5, max 8" in line for line in lines)
    bars = next(line for line in lines if line.startswith("a bar: 3 days")).split()[-1]
    assert (len(bars), bars[0], bars[-1]) == (53, "▂", "█") and sorted(bars) == list(bars)
