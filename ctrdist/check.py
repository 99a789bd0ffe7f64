"""What a person wants to know of a prepared log before a model trains on it, and what is wrong with it.

One pass, a row group at a time. Memory grows with distinct ids and with `items/`, not with rows, but for some 30 bytes
for each row of the day at hand: rows that say the same thing twice are found by a hash of user, item and timestamp.
"""

import datetime as dt
import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from ctrdist import log
from ctrdist.errors import UserError
from ctrdist.fields import new_encoder
from ctrdist.items import Catalog, build_catalog, grow_catalog_ids, grow_item_vocabularies, read_items
from ctrdist.metrics import json_safe
from ctrdist.numeric import add_samples, sample_values, to_numbers
from ctrdist.schema import HISTORY, ITEM_ID, LABEL, MULTI, NUMERIC, SPLIT, TIMESTAMP, USER_ID, Field, Schema
from ctrdist.serving.fields import list_parts
from ctrdist.storage import filesystem
from ctrdist.texts import join_texts
from ctrdist.vocabulary import UNKNOWN, Counts, Vocabulary, add_counts, sum_counts, to_keys

COLD_BELOW = 5
"""An item is cold on the last day where it has fewer rows than this before; as in the jobs' reports."""
EXAMPLES = 3
"""At most this many are shown of each trouble."""
TEXT_SAMPLE = 10_000
"""Texts that a tokenizer measures."""

FAULT_COLUMNS = (USER_ID, ITEM_ID, ITEM_ID, LABEL, TIMESTAMP, SPLIT)
"""The column that each of log.REASONS[1:] is about."""
REPEATED = "rows with user, item and timestamp of an earlier row"
OWN_ITEM = "rows whose history holds their own item"
STRANGERS = "rows whose history holds items that are not in items/"
NO_ROWS, NO_CLICKS, ONLY_CLICKS = "days without rows, between others", "days without clicks", "days with clicks only"


@dataclass
class Finding:
    """One kind of trouble: how many rows or days have it, and the first few of them.

    Args:
        examples: {"file": relative to the log, "row": from 0, "value": as text}, or {"day"}.
    """

    count: int = 0
    examples: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Check:
    """What a log is like. Rows are good ones, but for `rows`, `bad`, `nulls` and `faults`, which are about all.

    Args:
        data: the log.
        rows: all rows.
        bad: rows that a job sets aside.
        click_rate: clicks a row; None without rows.
        days: by day, {"rows": all, "bad", "clicks", "click_rate"}.
        splits: rows by the column `split`; {} for a log without.
        users: distinct users.
        items: rows of `items/`.
        items_with_rows: of these, the ones that the log shows.
        cold: {"part": the last day, or `test` where the log has splits; "reference": what is before it, or `train`;
            "rows", "items": of the part; "cold_rows", "cold_items": of these, on items with under COLD_BELOW rows in
            the reference; "all_items": in `items/`; "cold_all_items": of these}; None for a log of one day.
        fields: each categorical and multi field, {"side", "kind", "values": distinct ones in rows, "min_count",
            "rare_values": of these, in fewer rows than min_count; "rare_share": rows with one, of the rows with any
            value}. A list counts for each of its values; an item's values count for each row of the item.
        numbers: each numeric field, {"side", "nulls", "nan", "infinite"} and its finite values as {"min", "p01", "p25",
            "p50", "p75", "p99", "max"}, quantiles by `numeric.Sample`. Those of an item field are about `items/`.
        nulls: by "interactions" and "items", nulls of each column.
        histories: {"rows": with one, "share": of these, "mean_length": of theirs, "max_length", "behaviours": in all,
            "strangers": of these, of items not in `items/`}; None for a log without.
        texts: {"items_without": a text, "unit": tokens or words, "tokenizer", "measured": texts, "mean", "min", "p50",
            "p90", "p95", "p99", "max"}; None where the schema has no text.
        faults: what is wrong, by reason, as a job finds it; a row counts once.
        notes: what may be meant so, and may be not.
    """

    data: str
    rows: int
    bad: int
    click_rate: float | None
    days: dict[str, dict[str, Any]]
    splits: dict[str, int]
    users: int
    items: int
    items_with_rows: int
    cold: dict[str, Any] | None
    fields: dict[str, dict[str, Any]]
    numbers: dict[str, dict[str, Any]]
    nulls: dict[str, dict[str, int]]
    histories: dict[str, Any] | None
    texts: dict[str, Any] | None
    faults: dict[str, Finding]
    notes: dict[str, Finding]

    def to_json(self) -> dict[str, Any]:
        """All of it as what JSON holds; None for numbers that are not defined."""
        return json_safe(asdict(self))


def check(data: str, lm: str = "", tell: Callable[[int, int], None] = lambda done, rows: None) -> Check:
    """Read a whole log and say what is in it.

    Args:
        data: the log, a folder or URI.
        lm: folder or Hugging Face name of a language model whose tokenizer measures texts; words are counted without.
        tell: called after each row group with the rows done and all rows.

    Raises:
        UserError: as from the jobs: no data, or wrong columns or types; or no such language model.
    """
    schema, files = Schema.load(f"{data}/schema.yaml"), log.list_days(data)
    groups = log.list_row_groups(data, files, tuple(files), schema)
    rows, done = sum(group.rows for group in groups), 0
    if not rows:
        raise UserError(f"{data}/interactions: none of its {sum(map(len, files.values()))} files has a row")
    items = read_items(data, schema)
    texts = _texts(items, schema, lm) if schema.text else None
    ids = grow_catalog_ids(items, Vocabulary())
    catalog = build_catalog(items, ids, schema, {f.name: new_encoder(f) for f in schema.item})
    seen = _Pass(data, schema, catalog, last=groups[-1].day)
    for _, of_day in itertools.groupby(groups, key=lambda group: group.day):
        for group in of_day:
            seen.read(group)
            tell(done := done + group.rows, rows)
        seen.end_day()

    days = {str(day): counts for day, counts in seen.days.items()}
    bad, clicks = sum(day["bad"] for day in days.values()), sum(day["clicks"] for day in days.values())
    for counts in days.values():
        counts["click_rate"] = share_of(counts["clicks"], counts["rows"] - counts["bad"])
    item_rows = seen.item_rows["before"] + seen.item_rows["last"]
    fields, numbers = _fields(seen, items, item_rows)
    histories: dict[str, Any] = dict(seen.histories)
    histories["share"] = share_of(histories["rows"], rows - bad)
    histories["mean_length"] = share_of(histories["behaviours"], histories["rows"])
    return Check(
        data=str(data),
        rows=rows,
        bad=bad,
        click_rate=share_of(clicks, rows - bad),
        days=days,
        splits=dict(seen.splits),
        users=len(seen.counts(USER_ID)[0]),
        items=items.num_rows,
        items_with_rows=int((item_rows > 0).sum()),
        cold=_cold(seen),
        fields=fields,
        numbers=numbers,
        nulls={"interactions": dict(seen.nulls), "items": {n: items[n].null_count for n in items.column_names}},
        histories=histories if schema.history_length else None,
        texts=texts,
        faults={reason: seen.faults[reason] for reason in log.REASONS if reason in seen.faults},
        notes={**seen.notes, **_day_notes(seen.days)},
    )


class _Numbers:
    """A numeric field in passing: quantiles by an even sample, everything else exact."""

    def __init__(self) -> None:
        self.sample = (np.empty(0), np.empty(0))
        self.nulls, self.nan, self.infinite, self.least, self.most = 0, 0, 0, np.nan, np.nan

    def add(self, column: pa.ChunkedArray, name: str, piece: int) -> "_Numbers":
        """Count a piece of the column; `piece` is a number of its own."""
        numbers = to_numbers(column.combine_chunks(), name)
        finite, nan = numbers[np.isfinite(numbers)], int(np.isnan(numbers).sum())
        self.nulls += column.null_count
        self.nan += nan - column.null_count
        self.infinite += len(numbers) - len(finite) - nan
        if len(finite):
            self.least, self.most = np.fmin(self.least, finite.min()), np.fmax(self.most, finite.max())
        self.sample = add_samples(self.sample, sample_values(finite, piece))
        return self

    def facts(self) -> dict[str, Any]:
        """As in `Check.numbers`."""
        counts = {"nulls": self.nulls, "nan": self.nan, "infinite": self.infinite}
        spread = _spread(self.sample[1], (0, 1, 25, 50, 75, 99, 100))
        return counts | spread | {"min": float(self.least), "max": float(self.most)}


class _Pass:
    """What is counted while the log goes by, in the order of its days."""

    def __init__(self, data: str, schema: Schema, catalog: Catalog, last: dt.date) -> None:
        self.data, self.schema, self.catalog, self.last = data, schema, catalog, last
        self.root = f"{filesystem(data)[1]}/"
        self.days: dict[dt.date, dict[str, Any]] = {}
        self.splits: dict[str, int] = defaultdict(int)
        self.item_rows: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(catalog.size, np.int64))
        self.ids: dict[str, list[Counts]] = defaultdict(list)
        self.numbers: dict[str, _Numbers] = defaultdict(_Numbers)
        self.nulls: dict[str, int] = defaultdict(int)
        self.histories = {"rows": 0, "max_length": 0, "behaviours": 0, "strangers": 0}
        self.faults: dict[str, Finding] = defaultdict(Finding)
        self.notes: dict[str, Finding] = defaultdict(Finding)
        self.today: list[tuple[log.RowGroup, np.ndarray, np.ndarray]] = []
        self.pieces = itertools.count()

    def read(self, group: log.RowGroup) -> None:
        """Count one row group."""
        # Asking for a split reads that column where a file has it.
        table = log.read_row_group(self.data, replace(group, split=log.SPLITS[0]), self.schema)
        faults = self._find_faults(table, group)
        at = np.flatnonzero(faults == 0)
        good = table.filter(pa.array(faults == 0))
        for name in table.column_names:
            self.nulls[name] += table[name].null_count
        day = self.days.setdefault(group.day, {"rows": 0, "bad": 0, "clicks": 0})
        day["rows"] += table.num_rows
        day["bad"] += table.num_rows - len(at)
        day["clicks"] += pc.sum(good[LABEL].cast(pa.int64())).as_py() or 0

        rows = self.catalog.ids.lookup(good[ITEM_ID], ITEM_ID)
        self._count_items("last" if group.day == self.last else "before", rows)
        if SPLIT in good.column_names:
            for name in log.SPLITS:
                of_split = rows[pc.equal(good[SPLIT].cast(pa.string()), name).to_numpy()]
                self.splits[name] += len(of_split)
                self._count_items(name, of_split)
        for column in {f.name: f for f in (Field(USER_ID), *self.schema.row_fields)}.values():
            self._count_values(good[column.name], column)
        if self.schema.history_length:
            self._read_histories(good[HISTORY].combine_chunks(), rows, at, group)
        keys = good.select([USER_ID, ITEM_ID, TIMESTAMP]).to_pandas()
        self.today.append((group, at.astype(np.int32), pd.util.hash_pandas_object(keys, index=False).to_numpy()))

    def counts(self, name: str) -> Counts:
        """Distinct values of a column, and how often each occurs."""
        return functools.reduce(lambda a, b: add_counts(a, b, name), self.ids[name])

    def end_day(self) -> None:
        """Count the rows that stand twice in the day that was read last."""
        hashes = np.concatenate([part for _, _, part in self.today])
        ordered = np.sort(hashes)
        again = ordered[1:][ordered[1:] == ordered[:-1]]
        if len(again):
            ends = np.cumsum([len(part) for _, _, part in self.today])
            self.notes[REPEATED].count += len(again)
            for repeated in np.unique(again)[: EXAMPLES - len(self.notes[REPEATED].examples)]:
                second = np.flatnonzero(hashes == repeated)[1]
                part = int(np.searchsorted(ends, second, side="right"))
                group, at, _ = self.today[part]
                row = at[second - ends[part]]  # counted from the end of its part
                whole = log.read_row_group(self.data, group, self.schema).slice(row, 1).to_pylist()[0]
                value = ", ".join(f"{name} {whole[name]}" for name in (USER_ID, ITEM_ID, TIMESTAMP))
                self._show(self.notes[REPEATED], group, [row], [value])
        self.today = []

    def _find_faults(self, table: pa.Table, group: log.RowGroup) -> np.ndarray:
        if SPLIT in table.column_names:
            log.check_types(group.path, table.schema, self.schema, split=True)
            faults = [log.find_faults(table, group.day, self.catalog, split) for split in log.SPLITS]
            faults = np.maximum.reduce(faults)  # each row belongs to one of them, and is -1 elsewhere
        else:
            faults = log.find_faults(table, group.day, self.catalog)
        for code in np.unique(faults[faults > 0]):
            rows = np.flatnonzero(faults == code)
            finding, name = self.faults[log.REASONS[code]], FAULT_COLUMNS[code - 1]
            finding.count += len(rows)
            values = table[name].take(pa.array(rows[:EXAMPLES])).to_pylist()
            if name == TIMESTAMP:
                values = [None if v is None else f"{v} ({np.array(v).astype('datetime64[s]')})" for v in values]
            self._show(finding, group, rows, values)
        return faults

    def _show(self, finding: Finding, group: log.RowGroup, rows: Iterable[int], values: Iterable[Any]) -> None:
        """Add examples to a finding that has room for them; `rows` are those of the row group."""
        if len(finding.examples) < EXAMPLES:
            first, file = log.first_row(self.data, group), group.path.removeprefix(self.root)
            found = [
                {"file": file, "row": first + int(row), "value": "null" if value is None else str(value)}
                for row, value in zip(rows, values, strict=False)
            ]
            finding.examples += found[: EXAMPLES - len(finding.examples)]

    def _count_items(self, part: str, rows: np.ndarray) -> None:
        self.item_rows[part] += np.bincount(rows, minlength=self.catalog.size)

    def _count_values(self, column: pa.ChunkedArray, of: Field) -> None:
        if of.kind == NUMERIC:
            self.numbers[of.name].add(column, of.name, next(self.pieces))
            return
        values = column.combine_chunks()
        found = pc.value_counts((pc.list_flatten(values) if of.kind == MULTI else values).drop_null())
        counts = sum_counts(to_keys(found.field("values"), of.name), found.field("counts").to_numpy())
        # Counts of like size are added, as in a merge sort: not the whole vocabulary anew for each row group.
        stack = self.ids[of.name]
        while stack and len(stack[-1][0]) <= 2 * len(counts[0]):
            counts = add_counts(stack.pop(), counts, of.name)
        stack.append(counts)

    def _read_histories(self, histories: pa.Array, rows: np.ndarray, at: np.ndarray, group: log.RowGroup) -> None:
        offsets, flat = list_parts(histories)
        lengths = np.diff(offsets)
        parents, items = np.repeat(np.arange(len(lengths)), lengths), self.catalog.ids.lookup(flat, HISTORY)
        mine = self.histories
        mine["rows"] += int((lengths > 0).sum())
        mine["max_length"] = max(mine["max_length"], int(lengths.max(initial=0)))
        mine["behaviours"] += len(items)
        mine["strangers"] += int((items == UNKNOWN).sum())
        for name, hit in ((OWN_ITEM, items == rows[parents]), (STRANGERS, items == UNKNOWN)):
            found, first = np.unique(parents[hit], return_index=True)
            if len(found):
                self.notes[name].count += len(found)
                values = flat.take(pa.array(np.flatnonzero(hit)[first[:EXAMPLES]])).to_pylist()
                self._show(self.notes[name], group, at[found], values)


def share_of(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _spread(values: np.ndarray, percents: Sequence[int]) -> dict[str, float]:
    """Quantiles that are values themselves, {"p50": ...}, 0 and 100 as "min" and "max"; nan where there are none."""
    values = values if len(values) else np.array([np.nan])
    found = np.quantile(values, np.array(percents) / 100, method="inverted_cdf")
    names = [{0: "min", 100: "max"}.get(percent, f"p{percent:02}") for percent in percents]
    return dict(zip(names, found.tolist(), strict=True))


def _cold(seen: _Pass) -> dict[str, Any] | None:
    names = {"part": str(seen.last), "reference": f"before {seen.last}"}
    before, last = seen.item_rows["before"], seen.item_rows["last"]
    if seen.splits:
        names = {"part": "test", "reference": "in train"}
        before, last = seen.item_rows["train"], seen.item_rows["test"]
    elif len(seen.days) == 1:
        return None
    cold, items = before < COLD_BELOW, seen.catalog.items
    return names | {
        "rows": int(last.sum()), "cold_rows": int(last[cold].sum()),
        "items": int((last > 0).sum()), "cold_items": int((cold & (last > 0)).sum()),
        "all_items": len(items), "cold_all_items": int(cold[items].sum()),
    }  # fmt: skip


def _fields(seen: _Pass, items: pa.Table, item_rows: np.ndarray) -> tuple[dict[str, Any], dict[str, Any]]:
    """`Check.fields` and `Check.numbers`."""
    schema, ids = seen.schema, seen.catalog.ids
    # A min_count that no value reaches leaves all values of the item's fields pending, with their counts.
    endless = replace(schema, item=tuple(replace(f, min_count=np.iinfo(np.int64).max) for f in schema.item))
    of_items = grow_item_vocabularies(items, ids.lookup(items[ITEM_ID], ITEM_ID), item_rows, endless, {})
    fields, numbers = {}, {}
    listed = [("user", f) for f in schema.user] + [("item", f) for f in schema.item]
    for side, f in listed + [("context", f) for f in schema.context]:
        if f.kind == NUMERIC:
            found = _Numbers().add(items[f.name], f.name, 0) if side == "item" else seen.numbers[f.name]
            numbers[f.name] = {"side": side} | found.facts()
        else:
            counts = of_items[f.name].pending_counts if side == "item" else seen.counts(f.name)[1]
            rare = counts[counts < f.min_count]
            fields[f.name] = {
                "side": side, "kind": f.kind, "values": len(counts), "min_count": f.min_count,
                "rare_values": len(rare), "rare_share": share_of(int(rare.sum()), int(counts.sum())),
            }  # fmt: skip
    return fields, numbers


def _texts(items: pa.Table, schema: Schema, lm: str) -> dict[str, Any]:
    texts = join_texts(items, schema.text)
    texts = texts.filter(pc.not_equal(texts, ""))
    facts = {"items_without": items.num_rows - len(texts), "unit": "tokens" if lm else "words", "tokenizer": lm or None}
    if lm:
        chosen = np.random.default_rng(0).choice(len(texts), min(len(texts), TEXT_SAMPLE), replace=False)
        lengths = _count_tokens(lm, texts.take(pa.array(chosen, pa.int64())).to_pylist())
    else:
        lengths = pc.count_substring_regex(texts, r"\S+").to_numpy(zero_copy_only=False)
    mean = float(lengths.mean()) if len(lengths) else None
    return facts | {"measured": len(lengths), "mean": mean} | _spread(lengths, (0, 50, 90, 95, 99, 100))


def _count_tokens(lm: str, texts: list[str]) -> np.ndarray:
    from ctrdist.language.model import load_tokenizer  # takes seconds to import

    try:
        tokenizer = load_tokenizer(lm)
    except UserError:
        raise
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"language model '{lm}': no tokenizer can be loaded ({reason}); it needs config.json and tokenizer.json"
        ) from error
    return np.array([len(row) for row in tokenizer(texts, verbose=False)["input_ids"]] if texts else [], np.int64)


def _day_notes(days: dict[dt.date, dict[str, Any]]) -> dict[str, Finding]:
    present = list(days)
    between = (present[0] + dt.timedelta(n) for n in range((present[-1] - present[0]).days))
    kinds = {
        NO_ROWS: [day for day in between if day not in days],
        NO_CLICKS: [day for day, counts in days.items() if counts["click_rate"] == 0],
        ONLY_CLICKS: [day for day, counts in days.items() if counts["click_rate"] == 1],
    }
    return {
        name: Finding(len(found), [{"day": str(day)} for day in found[:EXAMPLES]])
        for name, found in kinds.items()
        if found
    }
