"""The distinct texts of a log's interactions: each is there once, however many rows say the same.

A folder holds `texts.arrow`, the texts in the order of their hashes, `hashes.npy`, uint64 [n], and `sides.arrow`, what
is said of each item by catalog row. A row of the log finds its text's number by the hash of the text.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from ctrdist.config import from_dict, to_dict
from ctrdist.encode import TEXT_ROW
from ctrdist.errors import UserError
from ctrdist.hashing import text_hashes
from ctrdist.interaction_text import TextConfig, interaction_texts, item_sides
from ctrdist.items import Catalog, ItemTexts, by_catalog_row
from ctrdist.language.tokenizer import TextTokenizer
from ctrdist.log import RowGroup, find_faults
from ctrdist.schema import ITEM_ID, Schema
from ctrdist.texts import TEXT

TEXTS, HASHES, SIDES, OPTIONS = "texts.arrow", "hashes.npy", "sides.arrow", "text.json"

Texts = tuple[np.ndarray, pa.Array]
"""Hashes, uint64 [n], ascending and distinct, and the texts, large_string [n]."""
NONE: Texts = np.empty(0, np.uint64), pa.array([], TEXT)


@dataclass(frozen=True)
class Interactions:
    """What makes the texts of rows, and knows their numbers.

    Args:
        sides: fields and free text of each item, large_string by catalog row.
        schema: of the log.
        catalog: numbers the items.
        config: what is said.
        hashes: uint64 [n], of all texts, ascending; empty before they are gathered.
    """

    sides: tuple[pa.Array, pa.Array]
    schema: Schema
    catalog: Catalog
    config: TextConfig
    hashes: np.ndarray

    @classmethod
    def of(
        cls, items: pa.Table, schema: Schema, catalog: Catalog, config: TextConfig, tokenizer: TextTokenizer
    ) -> "Interactions":
        """For the rows of a log with these items (`ctrdist.items.read_items`); `tokenizer` as of `item_sides`."""
        sides = item_sides(items, schema, config, tokenizer)
        fields, free = (by_catalog_row(side, items, catalog.ids) for side in sides)
        return cls((fields, free), schema, catalog, config, NONE[0])

    def save(self, folder: Path, texts: Texts = NONE) -> None:
        """Write it, with the texts of all rows where these are gathered."""
        np.save(folder / HASHES, texts[0])
        ItemTexts.write_column(folder / TEXTS, texts[1])
        table = pa.table(dict(zip(("fields", "free"), self.sides, strict=True)))
        with pa.OSFile(str(folder / SIDES), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        (folder / OPTIONS).write_text(json.dumps(to_dict(self.config)))

    @classmethod
    def load(cls, folder: Path, schema: Schema, catalog: Catalog) -> "Interactions":
        """Map what `save` wrote."""
        table = pa.ipc.open_file(pa.memory_map(str(folder / SIDES))).read_all()
        config = from_dict(TextConfig(), json.loads((folder / OPTIONS).read_text()), str(folder / OPTIONS))
        sides = table["fields"].chunk(0), table["free"].chunk(0)
        return cls(sides, schema, catalog, config, np.load(folder / HASHES, mmap_mode="r"))

    def texts(self, rows: pa.Table) -> pa.Array:
        """The text of each row of the log, large_string [n]."""
        at = self.catalog.ids.lookup(rows[ITEM_ID], ITEM_ID)
        return interaction_texts(rows, at, self.sides, self.schema, self.config)

    def distinct(self, group: RowGroup, rows: pa.Table) -> Texts:
        """The distinct texts of a row group's good rows."""
        texts = self.texts(rows.filter(pa.array(find_faults(rows, group.day, self.catalog) == 0)))
        return merged([(text_hashes(texts), texts)])

    def numbers(self, group: RowGroup, rows: pa.Table) -> dict[str, pa.Array]:
        """The number of each row's text, int64 [n], as the column `beside.text`; 0 where a bad row's is not there.

        Where nothing is said of a row, its text is the empty one, which has a number and a state like any other.

        Raises:
            UserError: the text of a good row is not there.
        """
        at = find(self.hashes, text_hashes(self.texts(rows)))
        there = at >= 0
        if not there.all() and (find_faults(rows, group.day, self.catalog, group.split)[~there] == 0).any():
            raise UserError(
                f"{group.path}: row group {group.index} says what it did not say when texts were gathered: it was "
                "changed since; run the job again"
            )
        return {TEXT_ROW: pa.array(at.clip(min=0))}


def find(known: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """Where in `known`, uint64 [m] ascending, hashes stand: int64 [n], -1 where they do not."""
    if not len(known):
        return np.full(len(hashes), -1)
    at = np.searchsorted(known, hashes).clip(max=len(known) - 1)
    return np.where(known[at] == hashes, at, -1)


def merged(parts: Iterable[Texts]) -> Texts:
    """The distinct ones of several texts, in the order of their hashes."""
    hashes, texts = zip(*parts, strict=True)
    distinct, first = np.unique(np.concatenate(hashes), return_index=True)
    return distinct, pa.concat_arrays(texts).take(pa.array(first))
