"""The item side, joined late: every item's fields and texts by catalog row.

A catalog row numbers every item of `items/`; the log, the histories and the text table carry it. It is not the row of
the `item_id` feature's vocabulary: a rare item may be unknown there while its text is known here.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

from ctrdist.errors import UserError, nearest
from ctrdist.fields import Encoder, new_encoder
from ctrdist.hashing import text_hashes
from ctrdist.numeric import sample_values, to_numbers
from ctrdist.schema import ITEM_ID, MULTI, NUMERIC, Schema
from ctrdist.serving.ragged import Column, Ragged, load_column, offsets_of, save_column
from ctrdist.storage import filesystem
from ctrdist.texts import join_texts, with_large_offsets
from ctrdist.vocabulary import UNKNOWN, Vocabulary, sum_counts, to_keys


@dataclass(frozen=True)
class Catalog:
    """All items of a dataset.

    Args:
        ids: item id -> catalog row.
        present: bool [rows], whether the item is in today's `items/` (an item may have left it since).
        fields: by name, the vocabulary row of every item, int32 [rows], a `Ragged` of them, or a number, float32 and
            NaN if missing; padding at row 0.
    """

    ids: Vocabulary
    present: np.ndarray
    fields: dict[str, Column]

    @property
    def size(self) -> int:
        """Catalog rows, padding and unknown included."""
        return self.ids.size

    @property
    def items(self) -> np.ndarray:
        """Catalog rows of today's items, ascending, int64."""
        return np.flatnonzero(self.present)

    def save(self, folder: Path) -> None:
        """Write the catalog as NumPy files."""
        self.ids.save(folder / "ids")
        np.save(folder / "present.npy", self.present)
        for name, column in self.fields.items():
            save_column(folder, f"field.{name}", column)

    @classmethod
    def load(cls, folder: Path, schema: Schema) -> "Catalog":
        """Memory-map what `save` wrote."""
        fields = {field.name: load_column(folder, f"field.{field.name}", field.kind == MULTI) for field in schema.item}
        return cls(Vocabulary.load(folder / "ids"), np.load(folder / "present.npy", mmap_mode="r"), fields)


def read_items(data: str, schema: Schema) -> pa.Table:
    """All of `items/`: the item id, item fields and text columns, one row an item, checked.

    Raises:
        UserError: no such folder, a missing column, a null or repeated item id.
    """
    filesystem_, root = filesystem(data)
    selector = fs.FileSelector(f"{root}/items", allow_not_found=True)
    paths = sorted(info.path for info in filesystem_.get_file_info(selector) if info.path.endswith(".parquet"))
    if not paths:
        raise UserError(f"{data}/items: no Parquet files there; a prepared log has them (see jobs/prepare.py --help)")
    return read_item_files(filesystem_, paths, schema, f"{data}/items")


def read_item_files(
    filesystem_: fs.FileSystem, paths: list[str], schema: Schema, where: str, id_column: str = ITEM_ID
) -> pa.Table:
    """What `read_items` returns, of any Parquet files.

    Args:
        where: what to call them all in errors.
        id_column: their column with the ids, `item_id` in what is returned.
    """
    columns = dict.fromkeys([field.name for field in schema.item] + list(schema.text_columns))
    wanted = [id_column, *(name for name in columns if name not in (ITEM_ID, id_column))]
    tables = []
    for path in paths:
        with filesystem_.open_input_file(path) as stream:
            try:
                file = pq.ParquetFile(stream)
            except pa.ArrowInvalid as error:
                raise UserError(f"{path}: not a readable Parquet file ({error}); restore or remove it") from None
            require_columns(path, wanted, file.schema_arrow.names)
            table = file.read(columns=wanted)
        if id_column != ITEM_ID:
            table = table.append_column(ITEM_ID, table[id_column])
        nulls = table[ITEM_ID].null_count
        if nulls:
            raise UserError(
                f"{path}: column '{id_column}': {nulls} of {table.num_rows} ids are null; every item needs one"
            )
        tables.append(table)
    items = join_items(tables, where)
    counts = pc.value_counts(items[ITEM_ID])
    repeated = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(repeated):
        raise UserError(
            f"{where}: column '{id_column}': {len(repeated)} ids stand in more than one row, "
            f"{repeated[0]['values'].as_py()!r} for one; keep one row an item"
        )
    return items


def join_items(tables: list[pa.Table], where: str) -> pa.Table:
    """Tables of items as one, of one chunk a column. Raises UserError for a column of types that do not go together."""
    try:
        items = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise UserError(f"{where}: {str(error).splitlines()[0]}; give the column one type in all files") from None
    columns = {name: with_large_offsets(items[name]) for name in items.column_names}
    return pa.table(columns).combine_chunks()


def require_columns(path: str, wanted: list[str], found: list[str]) -> None:
    """Raise a UserError that names `path` and the first of the `wanted` columns that is not `found`."""
    for column in wanted:
        if column not in found:
            raise UserError(f"{path}: no column '{column}'; {nearest(column, found)}")


def grow_catalog_ids(items: pa.Table, ids: Vocabulary, **days: int) -> Vocabulary:
    """Catalog rows for all items: rows given before stay, new items follow in the order of their ids.

    Args:
        days: `day` and `reuse_until` of `Vocabulary.grow`.
    """
    keys = to_keys(items[ITEM_ID].combine_chunks(), ITEM_ID)
    return ids.grow(keys, np.ones(len(keys), np.int64), column=ITEM_ID, **days)


def with_items_that_left(items: pa.Table, before: pa.Table, ids: Vocabulary, since: int) -> pa.Table:
    """Today's items, and those of `before` that are no longer among them but were on day `since` or later.

    The log's rows and histories of these days name them still, and what was said of them holds.

    Args:
        before: the items of an earlier run, as this function gave them.
        ids: its catalog rows.
    """
    gone = pc.invert(pc.is_in(before[ITEM_ID], items[ITEM_ID].combine_chunks().cast(before[ITEM_ID].type)))
    left = before.filter(gone)
    last = ids.seen[ids.find(to_keys(left[ITEM_ID].combine_chunks(), ITEM_ID))]
    return join_items([items, left.filter(pa.array(last >= since))], "items/, beside those of an earlier day")


def grow_item_vocabularies(
    items: pa.Table,
    item_rows: np.ndarray,
    item_counts: np.ndarray,
    schema: Schema,
    vocabularies: dict[str, Encoder],
    **days: int,
) -> dict[str, Encoder]:
    """Encoders of the item fields, grown by the values of items that have training rows; values of all are seen.

    Args:
        item_rows: catalog row of each row of `items`.
        item_counts: new training rows by catalog row, int64 [catalog rows].
        days: `day` and `reuse_until` of `Vocabulary.grow`.
    """
    grown = dict(vocabularies)
    counts = item_counts[item_rows]
    for field in schema.item:
        values, counts_of_values = items[field.name].combine_chunks(), counts
        encoder = grown.get(field.name) or new_encoder(field)
        if field.kind == NUMERIC:
            trained = values.filter(pa.array(counts > 0))
            grown[field.name] = encoder.fit(sample_values(to_numbers(trained, field.name), 0), field.buckets)
            continue
        if field.kind == MULTI:
            _require_list(values.type, field.name)
            parents = pc.list_parent_indices(values).to_numpy(zero_copy_only=False)
            values, counts_of_values = pc.list_flatten(values), counts_of_values[parents]
        known = values.is_valid().to_numpy(zero_copy_only=False)
        keys, sums = sum_counts(to_keys(values.drop_null(), field.name), counts_of_values[known])
        grown[field.name] = encoder.grow(keys, sums, field.min_count, field.name, **days)
    return grown


def build_catalog(items: pa.Table, ids: Vocabulary, schema: Schema, vocabularies: dict[str, Encoder]) -> Catalog:
    """The catalog of `items`: encoded fields by catalog row."""
    rows = ids.lookup(items[ITEM_ID], ITEM_ID)
    present = np.zeros(ids.size, bool)
    present[rows] = True
    fields: dict[str, Column] = {}
    for field in schema.item:
        column, vocabulary = items[field.name].combine_chunks(), vocabularies[field.name]
        if field.kind != MULTI:
            by_row = np.full(ids.size, np.nan, np.float32) if field.is_value else np.full(ids.size, UNKNOWN, np.int32)
            by_row[0] = 0
            by_row[rows] = vocabulary.lookup(column, field.name)
            fields[field.name] = by_row
        else:
            _require_list(column.type, field.name)
            lengths = np.zeros(ids.size, np.int64)
            lengths[rows] = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
            flat = vocabulary.lookup(pc.list_flatten(column), field.name)
            parents = rows[pc.list_parent_indices(column).to_numpy(zero_copy_only=False)]
            fields[field.name] = Ragged(flat[np.argsort(parents, kind="stable")], offsets_of(lengths))
    return Catalog(ids, present, fields)


def _require_list(type_: pa.DataType, name: str) -> None:
    if not (pa.types.is_list(type_) or pa.types.is_large_list(type_)):
        raise UserError(f"column '{name}': {type_}, but a multi field needs a list of strings or integers")


class ItemTexts:
    """Every item's text by catalog row, memory-mapped from an Arrow file: nothing is held in memory."""

    def __init__(self, path: Path) -> None:
        self.column = pa.ipc.open_file(pa.memory_map(str(path))).read_all()["text"].chunk(0)

    @staticmethod
    def write(path: Path, items: pa.Table, ids: Vocabulary, schema: Schema) -> None:
        """Join each item's text parts (`Schema.text`) and write them in catalog-row order; "" where there is none."""
        ItemTexts.write_column(path, by_catalog_row(join_texts(items, schema.text), items, ids))

    @staticmethod
    def write_column(path: Path, texts: pa.Array) -> None:
        """Write texts, large_string [rows], by row."""
        with pa.OSFile(str(path), "wb") as sink:
            table = pa.table({"text": texts})
            with pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)  # one chunk, or reading would have to copy the chunks together

    def __len__(self) -> int:
        return len(self.column)

    def take(self, rows: np.ndarray) -> list[str]:
        """The texts of the given catalog rows."""
        return self.column.take(pa.array(rows)).to_pylist()

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        """Bytes of each of the given rows' texts, int64: what batches are bucketed by."""
        return pc.binary_length(self.column.take(pa.array(rows))).to_numpy(zero_copy_only=False).astype(np.int64)

    def hashes(self, rows: np.ndarray, block: int = 65536) -> np.ndarray:
        """A 64-bit hash of each of the given rows' texts, uint64 (`ctrdist.hashing`)."""
        out = np.empty(len(rows), np.uint64)
        for start in range(0, len(rows), block):
            out[start : start + block] = text_hashes(self.column.take(pa.array(rows[start : start + block])))
        return out


def by_catalog_row(texts: pa.Array, items: pa.Table, ids: Vocabulary) -> pa.Array:
    """Texts of each row of `items`, by catalog row; "" where there is no item."""
    position = np.full(ids.size, len(texts))
    position[ids.lookup(items[ITEM_ID], ITEM_ID)] = np.arange(len(texts))
    return pa.concat_arrays([texts, pa.array([""], texts.type)]).take(pa.array(position))


def item_batches(items: np.ndarray, size: int, seed: int, epoch: int) -> Iterator[np.ndarray]:
    """Global batches of an epoch over items: a permutation drawn from (seed, epoch), cut into parts of `size`."""
    order = np.random.default_rng([seed, epoch]).permutation(items)
    for start in range(0, len(order), size):
        yield order[start : start + size]


def most_popular(items: np.ndarray, counts: np.ndarray, share: float) -> np.ndarray:
    """The `share` of the items that have the most training rows, in the order given; of equals the first ones.

    Args:
        items: [items] catalog rows.
        counts: training rows by catalog row.
        share: over 0, at most 1; one item at least is kept.
    """
    order = np.argsort(-counts[items], kind="stable")
    return items[np.sort(order[: max(1, round(share * len(items)))])]
