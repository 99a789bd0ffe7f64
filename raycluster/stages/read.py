"""The first stage: check every row, grow the vocabularies, number the items."""

import datetime as dt
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from ctrdist.errors import UserError
from ctrdist.fields import load_encoders, new_encoder, save_encoders
from ctrdist.items import (
    ItemTexts,
    build_catalog,
    grow_catalog_ids,
    grow_item_vocabularies,
    read_items,
    with_items_that_left,
)
from ctrdist.log import Part, RowGroup, file_facts
from ctrdist.numeric import Numeric
from ctrdist.scan import Scan, grow_encoders, item_counts, with_good_rows
from ctrdist.storage import Manifest, fingerprint
from ctrdist.vocabulary import Vocabulary
from raycluster import ingest
from raycluster.day import Day, day_releases, say
from raycluster.ingest import LogReader

Days = tuple[Part, ...]
ITEMS, COUNTS, GOOD_ROWS = "items.parquet", "item_counts_by_day.npz", "good_rows.npy"


@dataclass
class Read:
    """What the first pass over the day's log gave.

    Args:
        output: the output with schema, vocabularies, catalog and texts.
        train: days that are trained on now: those of the window that no earlier day has trained on.
        counts: training rows of each item in the whole window, by catalog row.
        click_rate: of the rows of `train`.
        rows: good rows by day or split.
        faults: bad rows by reason.
        strangers: behaviours in histories of items that are not in `items/`.
        quarantine: folder of the bad rows, if any.
        row_groups: those that were read, with their good rows.
    """

    output: Manifest
    train: Days
    counts: np.ndarray
    click_rate: float
    rows: dict[str, int]
    faults: dict[str, int]
    strangers: int
    quarantine: str | None
    row_groups: list[RowGroup]

    @property
    def identity(self) -> str:
        """Fingerprint of the log's files and of what was made of them."""
        return fingerprint(self.output.inputs, self.output.identity)

    def total(self, days: Days) -> int:
        """Good rows of some days."""
        return sum(self.rows.get(str(day), 0) for day in days)

    def groups(self, days: Days) -> list[RowGroup]:
        """The row groups of some days, in the order of the log."""
        wanted = set(days)
        return [group for group in self.row_groups if group.part in wanted]


def read_log(day: Day, whole_window: bool = False) -> Read:
    """Check every row of the days that are used, grow the vocabularies, and number the items.

    Args:
        whole_window: read all days of the window; otherwise those that are new to the state, and the later ones.

    Raises:
        UserError: more bad rows than `max_bad_fraction`.
    """
    before = day.previous
    train = day.window.train if whole_window else (*day.new_days, *_uncounted(day))
    groups = day.groups(tuple(sorted(train)) + day.window.valid + day.window.test)
    files = file_facts(day.options.data, [g.path for g in groups])
    parts = day.schema.fingerprint, files, before and before.identity, day.window, day.options.expire_days, "clicks"
    inputs = fingerprint(*parts)

    def make(name: str, inputs: str, _metrics: str) -> Manifest:
        return _read(day, name, inputs, groups, before)

    output = day.stage("read", inputs, make)
    facts = output.facts
    folder = day.state.local(output.name)
    counts = np.load(folder / "item_counts.npy")
    _judge(facts["faults"], facts["rows"], day.options.max_bad_fraction, facts["quarantine"])
    read = Read(
        output,
        day.new_days,
        counts,
        facts["clicks"] / max(1, facts["trained_rows"]),
        facts["rows_by_day"],
        facts["faults"],
        facts["strangers"],
        facts["quarantine"],
        with_good_rows(groups, np.load(folder / GOOD_ROWS)),
    )
    for kind, days in (("training", read.train), ("validation", day.window.valid), ("test", day.window.test)):
        if days and not read.total(days):
            raise UserError(f"{day.options.data}: no good rows on the {kind} days, {days[0]} to {days[-1]}")
    return read


def _read(day: Day, name: str, inputs: str, groups: list, before: Manifest | None) -> Manifest:
    schema, state, data = day.schema, day.state, day.options.data
    items = read_items(data, schema)
    old = state.local(before.facts["read"]) if before else None
    vocabularies = load_encoders(old / "vocabulary") if old else {}
    expiry = Expiry.of(day)
    known = Vocabulary.load(old / "catalog" / "ids") if old else Vocabulary()
    ids = expiry.apply(grow_catalog_ids(items, known, **expiry.days))
    if old:
        items = with_items_that_left(items, pq.read_table(old / ITEMS), known, expiry.window)
    blank = {f.name: vocabularies.get(f.name) or new_encoder(f) for f in schema.item + schema.row_fields}
    first = f"{name}.catalog"
    with state.create(first, inputs) as folder:
        schema.save(folder / "schema.yaml")
        save_encoders(blank, folder / "vocabulary")
        build_catalog(items, ids, schema, blank).save(folder / "catalog")
    reader = LogReader(data, state.uri, first)
    with state.create(day.name("quarantine", inputs), inputs) as quarantine:
        ids_of = dict.fromkeys(day.new_days, "counted") | dict.fromkeys(day.window.valid, "seen")
        scan = ingest.scan(reader, groups, ids_of, quarantine, day.plan)
    rows = sum(scan.rows.values())
    where = None
    if scan.quarantined:
        where = state.path(state.find(day.name("quarantine", inputs)).folder)
    counts_by_day = _window_counts(day, old, scan)
    counts = item_counts(counts_by_day, day.window.train, ids.size)
    fresh = item_counts(scan.items, day.new_days, ids.size)
    vocabularies = grow_encoders(blank, scan, schema, **expiry.days)
    vocabularies = grow_item_vocabularies(
        items, ids.lookup(items["item_id"]), fresh, schema, vocabularies, **expiry.days
    )  # fmt: skip
    vocabularies = {
        name: encoder if isinstance(encoder, Numeric) else expiry.apply(encoder)
        for name, encoder in vocabularies.items()
    }
    facts = {
        "rows": rows,
        "rows_by_day": {str(d): n for d, n in sorted(scan.rows.items())},
        "clicks": sum(scan.clicks.get(d, 0) for d in day.new_days),
        "trained_rows": sum(scan.rows.get(d, 0) for d in day.new_days),
        "faults": scan.faults,
        "strangers": scan.strangers,
        "quarantine": where,
        "items": items.num_rows,
    }
    with state.create(name, inputs, facts) as folder:
        schema.save(folder / "schema.yaml")
        save_encoders(vocabularies, folder / "vocabulary")
        build_catalog(items, ids, schema, vocabularies).save(folder / "catalog")
        ItemTexts.write(folder / "texts.arrow", items, ids, schema)
        pq.write_table(items, folder / ITEMS, compression="zstd")
        np.save(folder / "item_counts.npy", counts)
        np.save(folder / GOOD_ROWS, np.array([scan.good[group] for group in groups], np.int64))
        np.savez(
            folder / COUNTS,
            **{
                f"{d}.{part}": a
                for d, pair in counts_by_day.items()
                for part, a in zip(("items", "rows"), pair, strict=True)
            },
        )
    state.remove(first)
    return state.find(name)


@dataclass(frozen=True)
class Expiry:
    """Which ids lose their rows today, and which rows may be given again.

    Days are ordinals.

    Args:
        date: the day of the run, on which ids of its rows and items count as seen.
        window: the first day of its window.
        before: ids last seen before this day expire; None if none do.
        reuse_until: rows freed by this day may be given again: no release that is kept refers to them.
    """

    date: int
    window: int
    before: int | None
    reuse_until: int

    @classmethod
    def of(cls, day: Day) -> "Expiry":
        """The expiry of a day's run: never of an id that was seen within its window."""
        if day.options.split_name:
            return cls(0, 0, None, -1)
        date, window = day.date.toordinal(), day.window.train[0].toordinal()
        kept = [dt.date.fromisoformat(name.rsplit("/", 1)[1]) for name in day_releases(day.state)]
        before = min(window, date - day.options.expire_days) if day.options.expire_days else None
        return cls(date, window, before, min(kept).toordinal() if kept else -1)

    @property
    def days(self) -> dict[str, int]:
        """What `Vocabulary.grow` wants to know."""
        return {"day": self.date, "reuse_until": self.reuse_until}

    def apply(self, vocabulary: Vocabulary) -> Vocabulary:
        """The vocabulary without the ids that expire today."""
        return vocabulary if self.before is None else vocabulary.expire(self.before, self.date)


def _judge(faults: dict[str, int], rows: int, limit: float, where: str | None) -> None:
    bad = sum(faults.values())
    if not bad:
        return
    reasons = ", ".join(f"{n:,} {reason}" for reason, n in sorted(faults.items(), key=lambda pair: -pair[1]))
    if bad > limit * (rows + bad):
        raise UserError(
            f"{bad:,} of {rows + bad:,} rows ({bad / (rows + bad):.1%}) are bad: {reasons}. They lie in {where} with "
            "file, row and reason; mend the log, or allow more with --max-bad-fraction"
        )
    say(f"read       {bad:,} bad rows set aside ({reasons}) in {where}")


def _uncounted(day: Day) -> Days:
    """Days of the window that were trained on, but whose rows by item the day before does not know: its window was
    narrower."""
    if not day.previous:
        return ()
    with np.load(day.state.local(day.previous.facts["read"]) / COUNTS) as saved:
        counted = {key.rsplit(".", 1)[0] for key in saved.files}
    return tuple(d for d in day.window.train if d not in day.new_days and str(d) not in counted)


def _window_counts(day: Day, old: Path | None, scan: Scan) -> dict:
    """Rows of each item by day of the window: from the day before, and from this run's pass."""
    window = {str(d): d for d in day.window.train}
    counts = {}
    if old:
        with np.load(old / COUNTS) as saved:
            for key in saved.files:
                d, part = key.rsplit(".", 1)
                if part == "items" and d in window:
                    counts[window[d]] = (saved[key], saved[f"{d}.rows"])
    return counts | {d: pair for d, pair in scan.items.items() if d in set(day.window.train)}
