"""Rows of the log as integers: what is streamed to the trainers."""

import numpy as np
import pyarrow as pa

from ctrdist.fields import Encoder
from ctrdist.items import Catalog, Ragged
from ctrdist.schema import HISTORY, ITEM_ID, LABEL, MULTI, Field, Schema
from ctrdist.serving.fields import encode_field, recent_rows
from ctrdist.vocabulary import UNKNOWN

ITEM, FILLER = "item", "filler"
VECTOR = "beside.vector"
"""Column with what a language model made of each row (`ctrdist.beside`)."""
TEXT_ROW = "beside.text"
"""Column with the number of each row's text (`ctrdist.interactions`)."""
SAID = "beside.said"
"""Column with the numbers of what is said of each row's fields (`ctrdist.row_texts`)."""


def encode(
    table: pa.Table, schema: Schema, vocabularies: dict[str, Encoder], catalog: Catalog, keep: tuple[str, ...] = ()
) -> pa.Table:
    """Good rows as integers: what is streamed to the trainers.

    Returns:
        Columns `label` (float32), `item` (int32 catalog row), `history` (fixed-size list of int32 catalog rows, oldest
        first, padding at the end), each user and context field (int32 row, a list of them, or a float32 number, NaN if
        missing), `filler` (bool, false), `beside.vector`, `beside.text` or `beside.said` if the rows have one, and each
        column named in `keep` as it is, under the name `raw.` and its own.
    """
    columns: dict[str, pa.Array | pa.ChunkedArray] = {
        LABEL: table[LABEL].cast(pa.float32()),
        ITEM: pa.array(catalog.ids.lookup(table[ITEM_ID], ITEM_ID)),
        FILLER: pa.array(np.zeros(table.num_rows, bool)),
    }
    columns |= encode_fields(table, schema.row_fields, vocabularies)
    if schema.history_length:
        rows = recent_rows(table[HISTORY].combine_chunks(), catalog.ids, schema.history_length)
        columns[HISTORY] = pa.FixedSizeListArray.from_arrays(rows.ravel(), schema.history_length)
    columns |= {name: table[name] for name in (VECTOR, TEXT_ROW, SAID) if name in table.column_names}
    return pa.table(columns | {f"raw.{name}": _one_type(table[name]) for name in keep})


def encode_fields(table: pa.Table, fields: tuple[Field, ...], encoders: dict[str, Encoder]) -> dict[str, pa.Array]:
    """Some user and context fields of rows, by name, as `encode` has them."""
    columns: dict[str, pa.Array] = {}
    for field in fields:
        encoded = encode_field(table[field.name].combine_chunks(), field, encoders[field.name])
        several = isinstance(encoded, Ragged)
        columns[field.name] = (
            pa.LargeListArray.from_arrays(encoded.offsets, encoded.values) if several else pa.array(encoded)
        )
    return columns


def _one_type(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The same values in the widest type of their kind, whatever the file's: int64, float64 or large_string."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_integer(column.type):
        return column.cast(pa.int64(), safe=False)
    if pa.types.is_floating(column.type):
        return column.cast(pa.float64())
    return column.cast(pa.large_string()) if pa.types.is_string(column.type) else column


def vectors_of(column: pa.ChunkedArray) -> np.ndarray:
    """A column of fixed-size lists, none of them null, as an array [n, width]."""
    return column.combine_chunks().flatten().to_numpy().reshape(-1, column.type.list_size)


def fillers(schema: Schema, count: int, like: pa.Schema | None = None) -> pa.Table:
    """`count` rows that stand for nothing: they fill the last batch of an epoch; who gets them drops them.

    Args:
        like: what the other rows have, where it may be more than the schema says.
    """
    columns: dict[str, pa.Array] = {
        LABEL: pa.array(np.zeros(count, np.float32)),
        ITEM: pa.array(np.zeros(count, np.int32)),
        FILLER: pa.array(np.ones(count, bool)),
    }
    for field in schema.row_fields:
        if field.kind == MULTI:
            empty = pa.LargeListArray.from_arrays(np.zeros(count + 1, np.int64), np.empty(0, np.int32))
            columns[field.name] = empty
        else:
            missing = np.full(count, np.nan, np.float32) if field.is_value else np.full(count, UNKNOWN, np.int32)
            columns[field.name] = pa.array(missing)
    if schema.history_length:
        columns[HISTORY] = pa.FixedSizeListArray.from_arrays(
            np.zeros(count * schema.history_length, np.int32), schema.history_length
        )
    beside = like.names if like else []
    for name in (name for name in (VECTOR, SAID) if name in beside):
        type_ = like.field(name).type
        zeros = pa.array(np.zeros(count * type_.list_size, type_.value_type.to_pandas_dtype()))
        columns[name] = pa.FixedSizeListArray.from_arrays(zeros, type=type_)
    if TEXT_ROW in beside:
        columns[TEXT_ROW] = pa.array(np.zeros(count, np.int64))
    return pa.table(columns)
