"""Labels and times of one's own tables as the canonical log has them."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ctrdist.datasets.canonical import SECONDS_A_DAY
from ctrdist.datasets.table_files import NUMBER, NUMERIC, convert, without_no_value
from ctrdist.errors import UserError
from ctrdist.schema import LABEL, TIMESTAMP

UNITS = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
AFTER_LAST = int(np.datetime64("2262-01-01", "s").astype(np.int64))  # nanoseconds end in that year


def to_labels(column: pa.ChunkedArray, path: str) -> pa.ChunkedArray:
    """int8: 0, 1, and null for any other, which a job sets aside. Raises UserError for a column without any number."""
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        column = without_no_value(column)
        numbers = pc.if_else(pc.match_substring_regex(column, NUMBER), column, pa.scalar(None, pa.string()))
        if numbers.null_count == len(numbers) and column.null_count < len(column):
            raise UserError(
                f"{path}: column '{LABEL}': {column.drop_null()[0].as_py()[:80]!r} is no number; write 1 for a click "
                "and 0 for none"
            )
        column = numbers
    column = convert(column, NUMERIC, path, LABEL)
    known = pc.is_in(column, pa.array([0.0, 1.0]))
    return pc.if_else(known, column, pa.scalar(None, pa.float64())).cast(pa.int8())


def to_seconds(column: pa.ChunkedArray, path: str, unit: str) -> pa.Array:
    """Whole seconds UTC, int64, from numbers, times, days or strings of these; NaN and infinite are null.

    Raises:
        UserError: of another type, no time, or one that is not in 1970 to 2261.
    """
    where = f"{path}: column '{TIMESTAMP}'"
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        try:
            column = _parse_times(column)
        except pa.ArrowInvalid as error:
            raise UserError(f"{where}: neither numbers nor ISO 8601 times ({str(error).splitlines()[0]})") from None
    type_, per = column.type, UNITS[unit]
    if pa.types.is_null(type_):
        column = column.cast(pa.int64())
    elif pa.types.is_date(type_):
        column, per = pc.multiply(column.cast(pa.date32()).cast(pa.int32()).cast(pa.int64()), SECONDS_A_DAY), 1
    elif pa.types.is_timestamp(type_):
        column, per = column.cast(pa.int64()), UNITS[type_.unit]
    elif pa.types.is_floating(type_):
        column = column.cast(pa.float64())
        column = pc.if_else(pc.is_finite(column), column, pa.scalar(None, pa.float64()))
    elif not pa.types.is_integer(type_):
        raise UserError(f"{where} is of type {type_}; expected integers ({unit}) or timestamps")
    missing = column.is_null().to_numpy()
    values = pc.fill_null(column, 0).to_numpy()
    seconds = values // per
    wrong = np.flatnonzero((seconds < 0) | (seconds >= AFTER_LAST))
    if len(wrong):
        raise UserError(
            f"{where}: {values[wrong[0]]} is not in 1970 to 2261 ({len(wrong):,} such rows); "
            f"numbers are read as --time-unit {unit}: choose s, ms, us or ns, or correct them"
        )
    return pa.array(seconds.astype(np.int64), mask=missing)


def _parse_times(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Strings as int64 or float64 where all are numbers, else as times: ISO 8601, UTC where they have no zone."""
    text, none = without_no_value(column), pa.scalar(None, pa.string())
    for pattern, type_ in ((r"^-?[0-9]+$", pa.int64()), (NUMBER, pa.float64())):
        if pc.all(pc.match_substring_regex(text, pattern)).as_py() is not False:
            return text.cast(type_)
    zoned = pc.match_substring_regex(text, r"(Z|:.*[-+][0-9]{2}(:?[0-9]{2})?)$")
    there = pc.if_else(zoned, text, none).cast(pa.timestamp("ns", "UTC")).cast(pa.timestamp("ns"))
    return pc.coalesce(there, pc.if_else(zoned, none, text).cast(pa.timestamp("ns")))
