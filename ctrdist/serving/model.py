"""A served artifact: scores rows of raw ids by what lies in one folder, which it memory-maps.

<artifact>/serving.json                     what it is
<artifact>/vocabulary/<field>/              the encoder of each field of the user and the context
<artifact>/catalog/                         item id -> catalog row
<artifact>/items.npy                        [catalog rows, item fields, columns]: the item side as the network takes it,
                                            text included
<artifact>/tables/<field>.npy               [rows, columns]: likewise, for each field of the user and the context
<artifact>/users/<field>.npy                the latest value of each user's fields, encoded, by the user's row
<artifact>/rows.pt2, request.pt2            the network behind the look-ups, for rows of many users and for one user
<artifact>/request.compiled.pt2             the latter, compiled for machines as `compiled.json` says
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from torch import Tensor

from ctrdist.serving.errors import UserError
from ctrdist.serving.fields import (
    HISTORY,
    ITEM_ID,
    MULTI,
    NUMERIC,
    USER_ID,
    Field,
    encode_field,
    load_encoders,
    recent_rows,
)
from ctrdist.serving.graphs import load_graph
from ctrdist.serving.ragged import Column, changes, load_column, take
from ctrdist.serving.vectors import gathered, mapped, rows_of
from ctrdist.serving.vocabulary import UNKNOWN, Ids

FORMAT = 1
"""Version of what an artifact holds."""
DESCRIPTION, SERVING = "serving.json", "serving"
CATALOG, VOCABULARY, TABLES, USERS, ITEMS = "catalog", "vocabulary", "tables", "users", "items.npy"
ROWS, REQUEST = "rows", "request"
"""The graphs."""
A_REQUEST = 16
"""Rows a user, on the average, from which on each user's are computed by themselves."""


@dataclass(frozen=True)
class Rows:
    """Rows to score, as integers.

    Args:
        items: int32 [n], catalog rows.
        fields: of the user and the context, by name: rows of their tables, int32 [n], several a row, or numbers,
            float32 [n], NaN if missing.
        history: int32 [n, T], catalog rows, oldest first, 0 at the end.
    """

    items: np.ndarray
    fields: dict[str, Column]
    history: np.ndarray

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, rows: slice) -> "Rows":
        """Rows one after another."""
        return Rows(self.items[rows], {name: column[rows] for name, column in self.fields.items()}, self.history[rows])

    def users(self) -> np.ndarray:
        """Where rows begin whose user side, all but the item, is another than the row's before, int64; the first is 0.

        There is at least one row.
        """
        changed = (self.history[1:] != self.history[:-1]).any(1)
        for column in self.fields.values():
            changed |= changes(column)
        return np.append(0, np.flatnonzero(changed) + 1)


class ServedModel:
    """A released model, ready to score. It needs none of the code that trained it.

    Args:
        folder: an artifact; or a release, or what MLflow downloads, that holds one.

    Raises:
        UserError: no artifact is there, or one of another version.
    """

    def __init__(self, folder: Path) -> None:
        folder = find_artifact(Path(folder))
        about = json.loads((folder / DESCRIPTION).read_text())
        if about["format"] != FORMAT:
            raise UserError(
                f"{folder}: an artifact of version {about['format']}, this code reads {FORMAT}; load it by MLflow in "
                "a process of its own, or release the day again"
            )
        self.identity: str = about["identity"]
        self.fields = tuple(Field(**field) for field in about["fields"])
        self.history_length: int = about["history_length"]
        self.encoders = load_encoders(folder / VOCABULARY)
        self.ids = Ids.load(folder / CATALOG)
        self.items = mapped(folder / ITEMS)
        self.tables = {field.name: mapped(folder / TABLES / f"{field.name}.npy") for field in self.fields}
        self.latest = {
            field.name: load_column(folder / USERS, field.name, field.kind == MULTI)
            for field in self.fields
            if field.name in about["users"]
        }
        self.of_rows, self.of_request = load_graph(folder, ROWS), load_graph(folder, REQUEST)

    @property
    def columns(self) -> list[str]:
        """The columns that a row to score has."""
        names = [field.name for field in self.fields] + [ITEM_ID]
        return names + ([HISTORY] if self.history_length else [])

    @property
    def optional(self) -> list[str]:
        """Those of them that may be left out: the user's fields are then the latest that the release knows of the user,
        and the history is empty."""
        return [name for name in self.columns if name in self.latest or name == HISTORY]

    def predict(self, rows: pa.Table) -> np.ndarray:
        """Click probabilities, float32 [n], of rows of raw ids; columns that are not among `columns` are left aside.

        What the release does not know, an item or any other id, is scored as unknown. Rows of one user that follow one
        another are computed together.

        Raises:
            UserError: a column is missing, or of another type than the log's was.
        """
        return self.score(self.encode(rows))

    def predict_frame(self, frame: pd.DataFrame) -> np.ndarray:
        """`predict` for a DataFrame. Whole floats are integer ids: pandas makes them of integers beside a null."""
        ids = [field.name for field in self.fields if field.kind != NUMERIC] + [ITEM_ID]
        floats = [name for name in ids if name in frame and pd.api.types.is_float_dtype(frame[name])]
        frame = frame.astype({name: "Int64" for name in floats})
        present = [name for name in self.columns if name in frame]
        return self.predict(pa.Table.from_pandas(frame[present], preserve_index=False))

    def predict_request(self, request: pa.Table, items: pa.Array) -> np.ndarray:
        """`predict` of one user and context, who is shown many items: nothing is said, or computed, twice.

        Args:
            request: one row, without `item_id`.
            items: ids, [n].

        Returns:
            Click probabilities, float32 [n].
        """
        assert request.num_rows == 1
        one = self.encode(request.append_column(ITEM_ID, pa.array([None], items.type)))
        return self._of_one(one, self.ids.lookup(items, ITEM_ID))

    def known(self, rows: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        """Whether each row has a user with a row of its own in the vocabulary, and an item of the catalog, bool [n]."""
        users = np.ones(rows.num_rows, bool)
        if USER_ID in self.encoders:
            users = self.encoders[USER_ID].lookup(rows[USER_ID], USER_ID) != UNKNOWN
        return users, self.ids.lookup(rows[ITEM_ID], ITEM_ID) != UNKNOWN

    def encode(self, rows: pa.Table) -> Rows:
        """Raw ids as integers. Raises UserError as `predict` does."""
        for column in self.columns:
            if column not in rows.column_names and column not in self.optional:
                needed = [name for name in self.columns if name not in self.optional]
                raise UserError(f"the rows to score have no column '{column}'; needed: {', '.join(needed)}")
        fields: dict[str, Column] = {}
        for field in sorted(self.fields, key=lambda field: field.name != USER_ID):  # the user first
            if field.name in rows.column_names:
                values = rows[field.name].combine_chunks()
                fields[field.name] = encode_field(values, field, self.encoders[field.name])
            else:
                fields[field.name] = take(self.latest[field.name], fields[USER_ID])
        history = np.zeros((rows.num_rows, self.history_length), np.int32)
        if HISTORY in rows.column_names and self.history_length:
            history = recent_rows(rows[HISTORY].combine_chunks(), self.ids, self.history_length)
        return Rows(self.ids.lookup(rows[ITEM_ID], ITEM_ID), fields, history)

    def score(self, rows: Rows) -> np.ndarray:
        """Click probabilities, float32 [n], of encoded rows."""
        if not len(rows):
            return np.empty(0, np.float32)
        users = rows.users()
        if len(rows) < A_REQUEST * len(users):
            with torch.inference_mode():
                fields, history, mask = self._users(rows)
                return self.of_rows(fields, self._items(rows.items), history, mask).numpy()
        ends = np.append(users[1:], len(rows))
        parts = [self._of_one(rows[at : at + 1], rows.items[at:end]) for at, end in zip(users, ends, strict=True)]
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    @torch.inference_mode()
    def _of_one(self, user: Rows, items: np.ndarray) -> np.ndarray:
        if not len(items):
            return np.empty(0, np.float32)
        fields, history, mask = self._users(user)
        return self.of_request(fields, self._items(items), history, mask).numpy()

    def _users(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """What the graphs take of users: fields [R, F_row, columns], histories [R, T, F_item, columns], mask [R, T]."""
        count, columns = len(rows), self.items.shape[2]
        vectors = [gathered(self.tables[field.name], rows.fields[field.name]) for field in self.fields]
        fields = torch.stack(vectors, 1) if vectors else torch.zeros(count, 0, columns)
        history = rows_of(rows.history)
        vectors = self.items.index_select(0, history.flatten())
        return fields, vectors.view(*history.shape, *self.items.shape[1:]), history != 0

    def _items(self, items: np.ndarray) -> Tensor:
        return self.items.index_select(0, rows_of(items))


def find_artifact(folder: Path) -> Path:
    """The artifact that a folder is or holds. Raises UserError if there is none."""
    for inner in (folder, folder / SERVING, folder / "artifacts" / SERVING):
        if (inner / DESCRIPTION).exists():
            return inner
    raise UserError(f"{folder}: no {DESCRIPTION} there; name the folder of a release, or what MLflow downloads of one")
