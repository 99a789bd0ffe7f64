"""A prepared log in memory, encoded."""

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ctrdist.batch import Batch, collate
from ctrdist.draws import held_out
from ctrdist.epoch import plan_pass, read_chunk
from ctrdist.fields import Encoder
from ctrdist.items import Catalog, Ragged, build_catalog, grow_catalog_ids, grow_item_vocabularies, read_items
from ctrdist.log import Window, list_days, list_row_groups
from ctrdist.row_texts import RowTexts
from ctrdist.scan import grow_encoders, item_counts, scan_row_group, sum_scans
from ctrdist.schema import Schema
from ctrdist.tasks.click import table_sizes
from ctrdist.texts import join_texts
from ctrdist.vocabulary import Vocabulary

ROOT = Path(__file__).parents[2]
SOURCE = ROOT.parent / "shared" / "data" / "movietweetings"
"""Where MovieTweetings' own files lie, if nothing else is said."""
COLD = 5
"""Training rows from which on an item is no longer cold."""


@dataclass(frozen=True)
class Log:
    """A log in memory.

    Args:
        schema: its fields.
        catalog: its items.
        sizes: rows of each field's table, by name.
        counts: training rows of each item, int64 by catalog row.
        texts: each item's text, large_string by catalog row; "" without an item.
        train, valid, test: encoded rows (`ctrdist.encode`).
        row_texts: makes the tokens of rows with `beside.said`, if they have any.
        encoders: by name, what encoded each field.
    """

    schema: Schema
    catalog: Catalog
    sizes: dict[str, int]
    counts: np.ndarray
    texts: pa.Array
    train: pa.Table
    valid: pa.Table
    test: pa.Table
    row_texts: RowTexts | None = None
    encoders: dict[str, Encoder] = field(default_factory=dict)

    @property
    def items_with_text(self) -> np.ndarray:
        """Catalog rows of the items that have a text, ascending, int64."""
        items = self.catalog.items
        return items[pc.binary_length(self.texts).to_numpy()[items] > 0]

    def with_texts_of(self, share: float) -> "Log":
        """The same log, in which only a share of the items, drawn by their rows, has its text."""
        kept = held_out(np.arange(self.catalog.size), share, 0)
        return replace(self, texts=pc.if_else(pa.array(kept), self.texts, pa.scalar("", self.texts.type)))

    @cached_property
    def text_fingerprint(self) -> str:
        """Sixteen hex digits that change with any item's text."""
        return _digest(pa.table({"text": self.texts, "present": self.catalog.present}))

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hex digits that change with any row, item field or text."""
        columns = {}
        for name, column in self.catalog.fields.items():
            parts = {"values": column.values, "offsets": column.offsets} if isinstance(column, Ragged) else {"": column}
            columns |= {f"{name} {part}": pa.table({part: values}) for part, values in parts.items()}
        sizes = pa.table({name: [size] for name, size in sorted(self.sizes.items())})
        own = _digest(self.train, self.valid, self.test, *(columns[name] for name in sorted(columns)), sizes)
        return hashlib.sha256(f"{own} {self.text_fingerprint}".encode()).hexdigest()[:16]

    def batches(
        self, rows: pa.Table, size: int, seed: tuple[int, ...] | None = None, text_table: np.ndarray | None = None
    ) -> Iterator[Batch]:
        """Rows in their order or, with a seed, shuffled; with their items' rows of `text_table`, if there is one."""
        if seed is not None:
            rows = rows.take(pa.array(np.random.default_rng(seed).permutation(rows.num_rows)))
        for start in range(0, rows.num_rows, size):
            yield collate(rows.slice(start, size), self.schema, self.catalog, text_table, self.row_texts)


def _digest(*tables: pa.Table) -> str:
    digest = hashlib.sha256()
    for table in tables:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        digest.update(sink.getvalue())
    return digest.hexdigest()[:16]


def prepare_movietweetings(source: Path, out: Path, texts: Path | None = None) -> None:
    """MovieTweetings in the canonical layout, unless it is there.

    Args:
        texts: JSON lines with `item_id` and `text`.
    """
    if not source.is_dir():
        raise SystemExit(f"{source}: no such folder; --source names the dataset's own files")
    if not (out / "schema.yaml").exists():
        prepare = [sys.executable, str(ROOT / "jobs" / "prepare.py"), "movietweetings", "--source", str(source)]
        prepare += ["--item-text", str(texts)] if texts else []
        subprocess.run([*prepare, "--out", str(out)], check=True, stdout=subprocess.DEVNULL)


def last_fifth(data: str, days: int = 0, valid_days: int = 7) -> Window:
    """The last fifth of the rows, by whole days, as the test, and the week before it for validation.

    Args:
        days: use only the last so many days; 0 uses all.
    """
    schema, files = Schema.load(f"{data}/schema.yaml"), list_days(data)
    days_ = list(files)[-days:]
    rows = np.cumsum([sum(g.rows for g in list_row_groups(data, files, (day,), schema)) for day in days_])
    cut = int(np.searchsorted(rows, 0.8 * rows[-1]))
    return Window(tuple(days_[: cut - valid_days]), tuple(days_[cut - valid_days : cut]), tuple(days_[cut:]))


def raw_fields(rows: pa.Table, schema: Schema) -> pa.Table:
    """Users' and context fields of encoded rows as the log has them; `open_log` has kept them (`keep`)."""
    return pa.table({field.name: rows[f"raw.{field.name}"] for field in schema.row_fields})


def open_log(data: str, window: Window, quarantine: Path, keep: tuple[str, ...] = ()) -> Log:
    """Check and encode the days of a window; vocabularies and counts are of its training days.

    Args:
        keep: columns of the log that its rows have as they are besides, named `raw.` and their name.
    """
    schema, files = Schema.load(f"{data}/schema.yaml"), list_days(data)
    groups = {name: list_row_groups(data, files, getattr(window, name), schema) for name in ("train", "valid", "test")}
    items = read_items(data, schema)
    ids = grow_catalog_ids(items, Vocabulary())
    blank = build_catalog(items, ids, schema, {field.name: Vocabulary() for field in schema.item})
    scan = sum_scans(scan_row_group(data, group, schema, blank, quarantine) for group in groups["train"])
    counts, at = item_counts(scan.items, window.train, ids.size), ids.lookup(items["item_id"])
    encoders = grow_item_vocabularies(items, at, counts, schema, grow_encoders({}, scan, schema))
    catalog = build_catalog(items, ids, schema, encoders)
    texts = np.full(catalog.size, "", object)
    texts[at] = join_texts(items, schema.text).to_pylist()

    def read(name: str) -> pa.Table:
        chunks = plan_pass(groups[name])
        return pa.concat_tables(read_chunk(data, c, schema, encoders, catalog, keep) for c in chunks).combine_chunks()

    sizes = table_sizes(encoders, schema)
    rows = map(read, groups)
    return Log(schema, catalog, sizes, counts, pa.array(texts, pa.large_string()), *rows, encoders=encoders)
