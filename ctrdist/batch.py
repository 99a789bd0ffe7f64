"""One typed batch of tensors, with the item side joined."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from torch import Tensor

from ctrdist.encode import FILLER, ITEM, TEXT_ROW, VECTOR, vectors_of
from ctrdist.items import Catalog, Ragged
from ctrdist.language.tokens import TokenBatch, pad
from ctrdist.schema import HISTORY, LABEL, MULTI, Schema
from ctrdist.serving.fields import list_parts
from ctrdist.serving.ragged import Column
from ctrdist.vocabulary import FIRST_ROW, PADDING, UNKNOWN

if TYPE_CHECKING:
    from ctrdist.row_texts import RowTexts


@dataclass
class Lookup:
    """What a batch asks of one embedding table: distinct rows, and where each goes.

    Args:
        rows: int64 [R], distinct table rows.
        index: int64 [n] into `rows`, one a value.
        offsets: None for one value each; else int64 [m + 1], the values of bag i are `index[offsets[i]:offsets[i+1]]`.
        factors: None, or float32 [n], what each value's vector is multiplied by: a numeric field's numbers.
    """

    rows: Tensor
    index: Tensor
    offsets: Tensor | None = None
    factors: Tensor | None = None

    @classmethod
    def of(cls, values: np.ndarray | Ragged) -> "Lookup":
        """The look-up of one row, one bag of rows, or one number (floats, NaN if missing), for each of n things."""
        if isinstance(values, np.ndarray) and values.dtype.kind == "f":
            known = ~np.isnan(values)
            factors = np.where(known, values, 1).astype(np.float32)
            rows = torch.tensor([UNKNOWN, FIRST_ROW])
            return cls(rows, torch.from_numpy(known.astype(np.int64)), None, torch.from_numpy(factors))
        flat = values.values if isinstance(values, Ragged) else values
        index, rows = distinct(flat)
        offsets = torch.from_numpy(np.asarray(values.offsets)) if isinstance(values, Ragged) else None
        return cls(torch.from_numpy(rows.astype(np.int64)), torch.from_numpy(index.astype(np.int64)), offsets)

    def head(self, count: int) -> "Lookup":
        """The look-up of the first `count` of the n things."""
        values = count if self.offsets is None else int(self.offsets[count])
        rows, index = torch.unique(self.rows[self.index[:values]], return_inverse=True)
        offsets = None if self.offsets is None else self.offsets[: count + 1]
        return Lookup(rows, index, offsets, None if self.factors is None else self.factors[:values])


@dataclass
class Batch:
    """Rows of the log. Items appear once each, however often the rows and their histories name them.

    Args:
        label: float32 [B].
        row_fields: user and context fields by name, a look-up of B values or bags each.
        items: int64 [U], the distinct catalog rows; items[0] is padding, row 0.
        item_fields: item fields by name, a look-up of U values or bags each.
        target: int64 [B] into `items`.
        history: int64 [B, T] into `items`, oldest first, 0 (padding) at the end; T is 0 without histories.
        text: float [U, dim], the items' rows of the text table, zeros at padding; None for a model without text.
        vector: float [B, width], what a language model made of each row (`ctrdist.beside`); None without one.
        tokens: of B texts, what is said of each row (`ctrdist.row_texts`); None without any.
    """

    label: Tensor
    row_fields: dict[str, Lookup]
    items: Tensor
    item_fields: dict[str, Lookup]
    target: Tensor
    history: Tensor
    text: Tensor | None = None
    vector: Tensor | None = None
    tokens: TokenBatch | None = None

    def __len__(self) -> int:
        return len(self.label)

    def empty(self) -> "Batch":
        """A batch of the same fields without rows; its only item is padding."""
        return replace(
            self,
            label=self.label[:0],
            row_fields={name: lookup.head(0) for name, lookup in self.row_fields.items()},
            items=self.items[:1],
            item_fields={name: lookup.head(1) for name, lookup in self.item_fields.items()},
            target=self.target[:0],
            history=self.history[:0],
            text=None if self.text is None else self.text[:1],
            vector=None if self.vector is None else self.vector[:0],
            tokens=None if self.tokens is None else self.tokens.empty(),
        )

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on `device`; copies from pinned memory do not wait."""

        def move(value):
            if isinstance(value, Tensor):
                return value.to(device, non_blocking=True)
            if isinstance(value, TokenBatch):
                return value.to(device)
            if isinstance(value, Lookup):
                return Lookup(*map(move, (value.rows, value.index, value.offsets, value.factors)))
            if isinstance(value, dict):
                return {name: move(part) for name, part in value.items()}
            return value

        return replace(self, **{name: move(value) for name, value in self.__dict__.items()})


def collate(
    table: pa.Table,
    schema: Schema,
    catalog: Catalog,
    text_table: np.ndarray | None = None,
    row_texts: "RowTexts | None" = None,
) -> Batch:
    """Encoded rows (`ctrdist.encode.encode`) as a Batch; fillers are dropped, so it may be empty.

    Args:
        text_table: float [catalog rows, dim], may be memory-mapped; only the rows of the batch's items are read. Where
            rows have texts of their own, `beside.text`, it is by their number, and gives `Batch.vector`.
        row_texts: gives `Batch.tokens` of rows with `beside.said`.
    """
    own_texts = TEXT_ROW in table.column_names
    filler = table[FILLER].to_numpy()
    if filler.any():
        table = table.filter(pa.array(~filler))
    table = table.combine_chunks()
    row_fields, history = row_columns(table, schema)
    batch = join_items(
        table[LABEL].to_numpy(),
        row_fields,
        table[ITEM].to_numpy(),
        history,
        {field.name: catalog.fields[field.name] for field in schema.item},
        None if own_texts else text_table,
    )
    if own_texts:
        batch.vector = torch.from_numpy(np.array(text_table[table[TEXT_ROW].to_numpy()], dtype=np.float32))
    if VECTOR in table.column_names:
        batch.vector = torch.from_numpy(vectors_of(table[VECTOR]).astype(np.float32))
    if row_texts is not None:
        tokens, numbers = row_texts.tokens(table)
        batch.tokens = pad(tokens, numbers, row_texts.padding)
    return batch


def row_columns(table: pa.Table, schema: Schema) -> tuple[dict[str, Column], np.ndarray]:
    """User and context fields of encoded rows by name, and their histories, int32 [n, T]."""
    fields: dict[str, Column] = {}
    for field in schema.row_fields:
        column = table[field.name].combine_chunks()
        if field.kind == MULTI:
            offsets, flat = list_parts(column)
            fields[field.name] = Ragged(flat.to_numpy(), offsets)
        else:
            fields[field.name] = column.to_numpy()
    length = schema.history_length
    history = table[HISTORY].combine_chunks().flatten().to_numpy() if length else np.empty(0, np.int32)
    return fields, history.reshape(table.num_rows, length)


def join_items(
    label: np.ndarray,
    row_fields: dict[str, np.ndarray | Ragged],
    target: np.ndarray,
    history: np.ndarray,
    item_fields: dict[str, np.ndarray | Ragged],
    text_table: np.ndarray | None = None,
) -> Batch:
    """B encoded rows as a Batch: distinct rows of every table, and the item side of every distinct item.

    Args:
        label: [B].
        row_fields: user and context fields by name, B values or bags each.
        target: int [B], catalog rows.
        history: int [B, T], catalog rows, 0 at the end.
        item_fields: item fields by name, a value or bag for each catalog row.
        text_table: float [catalog rows, dim].
    """
    size = len(label)
    index, items = distinct(np.concatenate([[PADDING], target, history.ravel()]))
    index = torch.from_numpy(index.astype(np.int64))
    return Batch(
        label=torch.from_numpy(label.astype(np.float32)),
        row_fields={name: Lookup.of(values) for name, values in row_fields.items()},
        items=torch.from_numpy(items.astype(np.int64)),
        item_fields={
            name: Lookup.of(column.take(items) if isinstance(column, Ragged) else column[items])
            for name, column in item_fields.items()
        },
        target=index[1 : 1 + size],
        history=index[1 + size :].reshape(history.shape),
        text=None if text_table is None else torch.from_numpy(np.array(text_table[items], dtype=np.float32)),
    )


def distinct(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each of `values`, integers [n], is among the distinct ones, int64 [n]; and these as they first appear."""
    return pd.factorize(values)  # by hashing: a third of the time of a sort
