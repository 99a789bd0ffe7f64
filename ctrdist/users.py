"""What the log last said of each user: what serving takes for a request that says nothing of it."""

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ctrdist.encode import encode_fields
from ctrdist.fields import Encoder
from ctrdist.log import RowGroup
from ctrdist.schema import MULTI, TIMESTAMP, USER_ID, Field, Schema
from ctrdist.serving.fields import list_parts
from ctrdist.serving.ragged import Column, Ragged, offsets_of
from ctrdist.storage import filesystem
from ctrdist.vocabulary import FIRST_ROW, UNKNOWN

USER, PIECE = "user", "piece"
AT_ONCE = 2**20
"""Users' rows that are put together at a time, at least."""


def user_fields(schema: Schema) -> tuple[Field, ...]:
    """The fields that a user's id tells: those of the user but the id, if that is a field."""
    if USER_ID not in [field.name for field in schema.user]:
        return ()
    return tuple(field for field in schema.user if field.name != USER_ID)


def read_users(data: str, group: RowGroup, piece: int, schema: Schema, encoders: dict[str, Encoder]) -> pa.Table:
    """The latest row of each known user in a row group, of every split: its number and fields, encoded.

    Args:
        piece: the row group's number in the order of the log; of rows of one second the later counts.
    """
    fields, (filesystem_, _) = user_fields(schema), filesystem(data)
    with filesystem_.open_input_file(group.path) as stream:
        names = [USER_ID, TIMESTAMP, *(field.name for field in fields)]
        rows = pq.ParquetFile(stream).read_row_group(group.index, columns=names)
    rows = rows.filter(pc.is_valid(rows[TIMESTAMP]))
    columns = {
        USER: pa.array(encoders[USER_ID].lookup(rows[USER_ID], USER_ID)),
        TIMESTAMP: rows[TIMESTAMP].cast(pa.int64()),
        PIECE: pa.array(np.full(rows.num_rows, piece)),
    }
    found = pa.table(columns | encode_fields(rows, fields, encoders))
    return latest(found.filter(pc.greater_equal(found[USER], FIRST_ROW)))


def latest(rows: pa.Table) -> pa.Table:
    """The latest of each user's rows, by user; of those of one second that of the last piece, and there the last."""
    user, timestamp, piece = (rows[name].to_numpy() for name in (USER, TIMESTAMP, PIECE))
    order = np.lexsort((piece, timestamp, user))
    user = user[order]
    return rows.take(pa.array(order[np.append(user[1:] != user[:-1], True)[: len(user)]]))


def latest_values(pieces: Iterable[pa.Table], schema: Schema, users: int) -> dict[str, Column]:
    """The latest value of each user's fields by the user's row, int32 or float32 [users] or a `Ragged`; unknown, or
    missing, for a row that stands for no user of the pieces.

    Args:
        pieces: what `read_users` gave, in any order.
        users: rows of the user's vocabulary.
    """
    together: list[pa.Table] = []
    for piece in pieces:
        together.append(piece)
        if len(together) > 1 and sum(table.num_rows for table in together[1:]) > max(AT_ONCE, together[0].num_rows):
            together = [latest(pa.concat_tables(together))]
    if not together:
        return {}
    found = latest(pa.concat_tables(together))
    rows, values = found[USER].to_numpy(), {}
    for field in user_fields(schema):
        column = found[field.name].combine_chunks()
        if field.kind == MULTI:
            lengths, (offsets, flat) = np.zeros(users, np.int64), list_parts(column)
            lengths[rows] = np.diff(offsets)
            values[field.name] = Ragged(flat.to_numpy(), offsets_of(lengths))
        else:
            missing = np.full(users, np.nan, np.float32) if field.is_value else np.full(users, UNKNOWN, np.int32)
            missing[rows] = column.to_numpy()
            values[field.name] = missing
    return values
