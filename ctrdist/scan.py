"""One pass over new days before training: what is wrong, which ids there are, how often each item stands."""

import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ctrdist.fields import Encoder, new_encoder
from ctrdist.items import Catalog
from ctrdist.log import REASONS, Part, RowGroup, find_faults, first_row, read_row_group, with_reasons
from ctrdist.numeric import Sample, add_samples, sample_values, to_numbers
from ctrdist.schema import HISTORY, ITEM_ID, LABEL, MULTI, NUMERIC, SPLIT, USER_ID, Schema
from ctrdist.serving.fields import list_parts
from ctrdist.storage import filesystem
from ctrdist.vocabulary import UNKNOWN, Counts, add_counts, sum_counts, to_keys

IdsOf = Literal["counted", "seen", "ignored"]


@dataclass
class Scan:
    """What a pass over some rows found. Scans add up, in any order.

    Args:
        rows: good rows by day or split.
        clicks: of these, the clicks.
        good: good rows by row group.
        faults: rows by what is wrong with them (REASONS, without "ok").
        strangers: behaviours in histories of items that are not in `items/`; they count as unknown items.
        items: catalog rows and good rows of each, by day or split.
        ids: distinct values of each user and context field and how often each occurs.
        samples: an even sample of each numeric one.
    """

    rows: dict[Part, int] = field(default_factory=dict)
    clicks: dict[Part, int] = field(default_factory=dict)
    good: dict[RowGroup, int] = field(default_factory=dict)
    faults: dict[str, int] = field(default_factory=dict)
    strangers: int = 0
    items: dict[Part, Counts] = field(default_factory=dict)
    ids: dict[str, Counts] = field(default_factory=dict)
    samples: dict[str, Sample] = field(default_factory=dict)

    @property
    def quarantined(self) -> int:
        """Bad rows."""
        return sum(self.faults.values())

    def add(self, other: "Scan") -> None:
        """Add another scan to this one."""
        for name in ("rows", "clicks", "good", "faults"):
            mine = getattr(self, name)
            for key, count in getattr(other, name).items():
                mine[key] = mine.get(key, 0) + count
        for name in ("items", "ids"):
            mine = getattr(self, name)
            for key, counts in getattr(other, name).items():
                mine[key] = add_counts(mine[key], counts, str(key)) if key in mine else counts
        for key, sample in other.samples.items():
            self.samples[key] = add_samples(self.samples[key], sample) if key in self.samples else sample
        self.strangers += other.strangers


def sum_scans(scans: Iterable[Scan]) -> Scan:
    """Their sum, merged in pairs of like size: millions of distinct ids are not gone through again for every scan."""
    sums: list[tuple[int, Scan]] = []
    for scan in scans:
        rank = 0
        while sums and sums[-1][0] == rank:
            scan = _merged(sums.pop()[1], scan)
            rank += 1
        sums.append((rank, scan))
    total = Scan()
    for _, scan in reversed(sums):
        total = _merged(scan, total)
    return total


def _merged(a: Scan, b: Scan) -> Scan:
    a.add(b)
    return a


def grow_encoders(encoders: dict[str, Encoder], scan: Scan, schema: Schema, **days: int) -> dict[str, Encoder]:
    """Encoders of the user and context fields, grown by what a scan found.

    Args:
        encoders: those so far; a field without one gets a new one.
        days: `day` and `reuse_until` of `Vocabulary.grow`.
    """
    grown = dict(encoders)
    for field_ in schema.row_fields:
        encoder = grown.get(field_.name) or new_encoder(field_)
        if field_.name in scan.samples:
            encoder = encoder.fit(scan.samples[field_.name], field_.buckets)
        if field_.name in scan.ids:
            encoder = encoder.grow(*scan.ids[field_.name], field_.min_count, field_.name, **days)
        grown[field_.name] = encoder
    return grown


def scan_row_group(
    data: str, group: RowGroup, schema: Schema, catalog: Catalog, quarantine: Path, ids: IdsOf = "counted"
) -> Scan:
    """Check and count the rows of one row group; bad ones go to a Parquet file in `quarantine` with their reason.

    Args:
        ids: values of user and context fields are `counted` in rows to train on, `seen` (counted as 0) in others whose
            ids must not expire, or `ignored`.
    """
    table = read_row_group(data, group, schema)
    faults = find_faults(table, group.day, catalog, group.split)
    by_fault = np.bincount(faults[faults >= 0], minlength=len(REASONS))
    scan = Scan(faults={reason: int(n) for reason, n in zip(REASONS[1:], by_fault[1:], strict=True) if n})
    if scan.quarantined:
        write_quarantine(table, faults, group, first_row(data, group), quarantine)
    good = table.filter(pa.array(faults == 0))
    item_rows = catalog.ids.lookup(good[ITEM_ID], ITEM_ID)
    scan.rows[group.part] = scan.good[group] = good.num_rows
    scan.clicks[group.part] = int(pc.sum(good[LABEL].cast(pa.int64())).as_py() or 0)
    scan.items[group.part] = sum_counts(item_rows, np.ones(len(item_rows)))
    if schema.history_length:
        _, flat = list_parts(good[HISTORY].combine_chunks())
        scan.strangers = int((catalog.ids.lookup(flat, HISTORY) == UNKNOWN).sum())
    for schema_field in schema.row_fields if ids != "ignored" else ():
        values = good[schema_field.name].combine_chunks()
        if schema_field.kind == NUMERIC:
            if ids == "seen":
                continue
            piece = zlib.crc32(f"{schema_field.name} {group.part} {Path(group.path).name} {group.index}".encode())
            scan.samples[schema_field.name] = sample_values(to_numbers(values, schema_field.name), piece)
            continue
        if schema_field.kind == MULTI:
            values = pc.list_flatten(values)
        found = pc.value_counts(values.drop_null())
        scan.ids[schema_field.name] = sum_counts(
            to_keys(found.field("values"), schema_field.name),
            found.field("counts").to_numpy() * (ids == "counted"),
        )
    return scan


def with_good_rows(groups: list[RowGroup], good: Iterable[int]) -> list[RowGroup]:
    """The row groups, with their good rows."""
    return [replace(group, good=int(count)) for group, count in zip(groups, good, strict=True)]


def write_quarantine(table: pa.Table, faults: np.ndarray, group: RowGroup, first: int, folder: Path) -> None:
    """The bad rows of a row group, as they are, with the columns `reason`, `file` and `row` beside them.

    Args:
        first: rows of the file before this row group, so that `row` counts from the start of the file.
    """
    bad = np.flatnonzero(faults > 0)
    out = with_reasons(table, bad, [REASONS[code] for code in faults[bad]], group.path, first)
    folder.mkdir(parents=True, exist_ok=True)
    name = Path(group.path).stem
    pq.write_table(out, folder / f"{group.part}.dt={group.day}.{name}.{group.index}.parquet")


def item_counts(scans: dict[Part, Counts], days: tuple[Part, ...], size: int) -> np.ndarray:
    """Good rows of each item over `days`, int64 [size], by catalog row."""
    counts = np.zeros(size, np.int64)
    for day in days:
        if day in scans:
            rows, numbers = scans[day]
            counts[rows] += numbers
    return counts


def count_users(data: str, group: RowGroup) -> pa.Table:
    """The users of a row group's rows, bad ones included, or of its split's: `values`, as text, and `counts`."""
    filesystem_, _ = filesystem(data)
    columns = [USER_ID, SPLIT] if group.split else [USER_ID]
    with filesystem_.open_input_file(group.path) as stream:
        rows = pq.ParquetFile(stream).read_row_group(group.index, columns=columns)
    if group.split:
        rows = rows.filter(pc.equal(rows[SPLIT].cast(pa.string()), group.split))
    column = rows[USER_ID]
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    found = pc.value_counts(column.cast(pa.large_string()).drop_null())
    return pa.table({"values": found.field("values"), "counts": found.field("counts")})
