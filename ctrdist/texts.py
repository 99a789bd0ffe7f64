"""Items -> texts, by Arrow's kernels."""

import string
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ctrdist.errors import UserError, nearest

TEXT = pa.large_string()


def join_texts(items: pa.Table, parts: Sequence[str]) -> pa.Array:
    """Each item's text, by Arrow's kernels (no Python loop over rows).

    A part such as `{title} ({year}).` is filled from the columns. Lists are joined by ", ", leaving out null and
    empty elements; whitespace at both ends of a value is dropped. A part with a null, NaN or empty value is left out
    of that row; the others are joined by one space. A row without any part gets "".

    Args:
        items: columns of strings, numbers, booleans, dates, or lists of those.
        parts: templates, as in `Schema.text`.

    Returns:
        large_string [rows], no nulls.

    Raises:
        UserError: a part that is no template, or names a column that `items` lacks.
    """
    # Arrow's own null_handling="skip" loses the rows that are null in every part.
    filled = [pa.array([""] * items.num_rows, TEXT)] + [pc.fill_null(_fill(items, part), "") for part in parts]
    return pc.utf8_trim_whitespace(pc.binary_join_element_wise(*filled, pa.scalar("", TEXT)))


def _fill(items: pa.Table, part: str) -> pa.Array:
    """One part and a space after it [rows], null where one of its values is."""
    try:
        pieces = list(string.Formatter().parse(part))
    except ValueError as error:
        raise UserError(
            f"text part '{part}': {error}; write columns as {{title}}, and a brace as {{{{ or }}}}"
        ) from None
    values: list[pa.Array | pa.Scalar] = []
    for literal, name, spec, conversion in pieces:
        values.append(pa.scalar(literal, TEXT))
        if name is None:
            continue
        if not name or spec or conversion:
            raise UserError(f"text part '{part}': expected plain columns such as {{title}}")
        if name not in items.column_names:
            raise UserError(f"text part '{part}': items/ has no column '{name}'; {nearest(name, items.column_names)}")
        values.append(_strings(items[name]))
    spaces = pa.array([" "] * items.num_rows, TEXT)
    return pc.binary_join_element_wise(*values, spaces, pa.scalar("", TEXT), null_handling="emit_null")


def _strings(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """Any column as trimmed large_string [rows], null where there is nothing to say."""
    values = with_large_offsets(column).combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    kind = values.type
    if pa.types.is_dictionary(kind):
        return _strings(values.cast(kind.value_type))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        elements, parents = _strings(pc.list_flatten(values)), pc.list_parent_indices(values)
        real = pc.is_valid(elements)
        counts = np.bincount(parents.filter(real).to_numpy(), minlength=len(values))
        offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int64())
        lists = pa.LargeListArray.from_arrays(offsets, elements.filter(real))
        text = pc.binary_join(lists, pa.scalar(", ", TEXT))
    else:
        if pa.types.is_floating(kind):
            values = pc.if_else(pc.is_finite(values), values, pa.scalar(None, kind))
        text = pc.utf8_trim_whitespace(values.cast(TEXT))
    return pc.if_else(pc.equal(text, pa.scalar("", TEXT)), pa.scalar(None, TEXT), text)


def with_large_offsets(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Strings and lists of strings with 64-bit offsets: of joined 32-bit ones, two GiB of text are too much."""
    type_ = column.type
    if pa.types.is_string(type_):
        return column.cast(pa.large_string())
    if pa.types.is_list(type_):
        value = pa.large_string() if pa.types.is_string(type_.value_type) else type_.value_type
        return column.cast(pa.large_list(value))
    return column
