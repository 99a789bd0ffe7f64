"""What is said of each row of a log, as tokens: every distinct value is said and tokenised once, a row is numbers.

A row of the log carries the numbers of what is said of its user and context fields, column `beside.said`; what is said
of its item is known by catalog row. So nothing in an epoch touches a string.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from ctrdist.encode import ITEM, SAID, vectors_of
from ctrdist.errors import UserError
from ctrdist.hashing import text_hashes
from ctrdist.interaction_text import TextConfig, item_sides
from ctrdist.interactions import Texts, find, merged
from ctrdist.items import Catalog, ItemTexts, Ragged
from ctrdist.language.assemble import RowTokenizer, RowTokens, say
from ctrdist.language.tokenizer import TextTokenizer
from ctrdist.log import RowGroup, read_row_group
from ctrdist.schema import ITEM_ID, Field, Schema

FREE_TEXT = "text"
"""What the item's free text is called among the fields."""
_ARRAYS = "items", "ids", "offsets", "clean"


@dataclass(frozen=True)
class RowTextConfig(TextConfig):
    """What a language model reads of a row.

    Args:
        max_length: tokens of a row that are read, special tokens included.
    """

    max_length: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_length < 3:
            raise UserError(f"text.max_length: {self.max_length} is under 3; special tokens take two")


@dataclass(frozen=True)
class RowTexts:
    """What makes the tokens of rows.

    Args:
        fields: what is said, in order: user and context fields, item fields, and the item's free text last, or first.
        rows: how many of them are user and context fields.
        parts: the template of each of these.
        items: int32 [catalog rows, the other fields], the number of what is said of each item, -1 for nothing.
        tokenizer: knows the distinct texts of each field, and their tokens.
        first: whether the free text comes first.
        hashes: of each user and context field, uint64, the hashes of its texts, which are in their order.
    """

    fields: tuple[str, ...]
    rows: int
    parts: tuple[str, ...]
    items: np.ndarray
    tokenizer: RowTokenizer
    first: bool
    hashes: tuple[np.ndarray, ...]

    @property
    def padding(self) -> int:
        """Id of the padding token."""
        return self.tokenizer.tokenizer.padding

    @classmethod
    def of(
        cls,
        said: Iterable[list[Texts]],
        items: pa.Table,
        schema: Schema,
        catalog: Catalog,
        config: RowTextConfig,
        tokenizer: TextTokenizer,
    ) -> "RowTexts":
        """For the rows of a log, every distinct text of which is tokenised now.

        Args:
            said: what `distinct` gave of the log's row groups, in any order.
            items: of the log (`ctrdist.items.read_items`).

        Raises:
            UserError: the tokenizer is none of the library `tokenizers`.
        """
        own, its = _spoken(schema.row_fields, config), _spoken(schema.item, config)
        by_hash = [merged(found) for found in zip(*said, strict=True)]
        texts = [texts for _, texts in by_hash] if own else []
        at, columns = catalog.ids.lookup(items[ITEM_ID], ITEM_ID), []
        free = pa.table({FREE_TEXT: item_sides(items, schema, config, tokenizer)[1]})
        sides = [(items[name], part, name) for name, part in its] + [(free[FREE_TEXT], f"{{{FREE_TEXT}}}", FREE_TEXT)]
        for side in sides:
            distinct_, codes = say(*side)
            texts.append(distinct_)
            columns.append(np.full(catalog.size, -1, np.int32))
            columns[-1][at] = codes
        fields, first = [name for name, _ in own + its] + [FREE_TEXT], config.item_text == "first"
        order = _order(len(fields), first)
        made = RowTokenizer.of(tokenizer, [texts[number] for number in order])
        names = tuple(fields[number] for number in order)
        hashes = tuple(hashes for hashes, _ in by_hash) if own else ()
        return cls(names, len(own), tuple(part for _, part in own), np.stack(columns, 1), made, first, hashes)

    def numbers(self, _group: RowGroup, rows: pa.Table) -> dict[str, pa.Array]:
        """The numbers of what is said of each row's own fields, as the column `beside.said`: a fixed-size list of
        int32, -1 for nothing."""
        start = int(self.first)
        out = np.full((rows.num_rows, max(1, self.rows)), -1, np.int32)
        for number, (name, part, known) in enumerate(zip(self.fields[start:], self.parts, self.hashes, strict=False)):
            texts, codes = _say(rows[name], part, name)
            out[:, number] = np.append(find(known, text_hashes(texts)), -1)[codes]
        return {SAID: pa.FixedSizeListArray.from_arrays(pa.array(out.ravel()), out.shape[1])}

    def codes(self, table: pa.Table) -> np.ndarray:
        """What is said of encoded rows, int64 [n, fields]: the number of each field's text, -1 for nothing."""
        own = vectors_of(table[SAID])[:, : self.rows]
        codes = np.concatenate([own, self.items[table[ITEM].to_numpy()]], 1).astype(np.int64)
        return codes[:, _order(codes.shape[1], self.first)]

    def tokens(self, table: pa.Table) -> tuple[Ragged, np.ndarray]:
        """The tokens of encoded rows, and int64 [n], a hash of what each says."""
        codes = self.codes(table)
        factors = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, codes.shape[1])
        return self.tokenizer(codes).tokens, (codes + 1) @ factors

    def tokens_by_field(self, table: pa.Table) -> RowTokens:
        """The tokens of encoded rows, each with the number of its field in `fields`."""
        return self.tokenizer(self.codes(table))

    def save(self, folder: Path) -> None:
        """Write it to a folder."""
        made, about = self.tokenizer, self.tokenizer.tokenizer
        for number, texts in enumerate(made.texts):
            ItemTexts.write_column(folder / f"texts.{number}.arrow", texts)
        for name, values in zip(
            _ARRAYS, (self.items, made.pieces.values, made.pieces.offsets, made.clean), strict=True
        ):
            np.save(folder / f"{name}.npy", values)
        for number, hashes in enumerate(self.hashes):
            np.save(folder / f"hashes.{number}.npy", hashes)
        described = {"fields": self.fields, "rows": self.rows, "parts": self.parts, "first": self.first}
        described |= {"tokenizer": about.content, "limit": about.limit, "padding": about.padding}
        (folder / "row_texts.json").write_text(json.dumps(described))

    @classmethod
    def load(cls, folder: Path) -> "RowTexts":
        """Map what `save` wrote."""
        about = json.loads((folder / "row_texts.json").read_text())
        items, ids, offsets, clean = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS)
        numbers = range(len(about["fields"]))
        made = RowTokenizer(
            TextTokenizer(about["tokenizer"], about["limit"], about["padding"]),
            tuple(ItemTexts(folder / f"texts.{number}.arrow").column for number in numbers),
            Ragged(ids, offsets),
            clean,
        )
        numbers = range(len(about["parts"]))
        hashes = tuple(np.load(folder / f"hashes.{number}.npy", mmap_mode="r") for number in numbers)
        return cls(tuple(about["fields"]), about["rows"], tuple(about["parts"]), items, made, about["first"], hashes)


def distinct(rows: pa.Table, schema: Schema, config: RowTextConfig) -> list[Texts]:
    """The distinct texts of each user and context field that something is said of, in rows of the log, by hash."""
    said = [_say(rows[name], part, name)[0] for name, part in _spoken(schema.row_fields, config)]
    return [merged([(text_hashes(texts), texts)]) for texts in said]


def distinct_of_group(data: str, group: RowGroup, schema: Schema, config: RowTextConfig) -> list[Texts]:
    """`distinct` of all rows of a row group, bad ones included. A process that calls it loads no torch."""
    return distinct(read_row_group(data, group, schema), schema, config)


def _spoken(fields: tuple[Field, ...], config: RowTextConfig) -> list[tuple[str, str]]:
    names = [field.name for field in fields if field.name not in config.leave_out]
    return list(zip(names, config.parts(fields), strict=True))


def _say(column: pa.ChunkedArray, part: str, name: str) -> tuple[pa.Array, np.ndarray]:
    column = column.combine_chunks()
    if not (pa.types.is_nested(column.type) or pa.types.is_dictionary(column.type)):
        column = column.dictionary_encode()
    return say(column, part, name)


def _order(fields: int, first: bool) -> list[int]:
    """The order of the fields in a text, of their order with the free text last."""
    return [fields - 1, *range(fields - 1)] if first else list(range(fields))
