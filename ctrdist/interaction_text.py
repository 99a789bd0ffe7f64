"""ELEC: an interaction as text, `<field> is <value>.` for every field, and the item's free text (section 2.2.1)."""

import string
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ctrdist.errors import UserError, nearest
from ctrdist.language.tokenizer import TextTokenizer
from ctrdist.schema import Field, Schema
from ctrdist.texts import TEXT, join_texts


@dataclass(frozen=True)
class TextConfig:
    """What a language model reads of an item, or of an interaction.

    Args:
        template: what is said of a field, with `{field}` and `{value}`; one without a value is left out, the values of
            a list are joined by commas.
        leave_out: fields that nothing is said of, such as ids that tell a language model nothing.
        item_text: where the item's free text stands, `last` or `first`. The language model reads `encode.max_length`
            tokens: what comes last is cut.
        item_tokens: tokens of the free text that are read, cut after a whole word; 0 takes all.
    """

    template: str = "{field} is {value}."
    leave_out: tuple[str, ...] = ()
    item_text: Literal["last", "first"] = "last"
    item_tokens: int = 0

    def __post_init__(self) -> None:
        try:
            names = {name for _, name, _, _ in string.Formatter().parse(self.template) if name is not None}
        except ValueError as error:
            raise UserError(f"text.template: '{self.template}': {error}; write {{field}} is {{value}}.") from None
        if not {"value"} <= names <= {"field", "value"}:
            raise UserError(f"text.template: '{self.template}': expected {{value}}, and {{field}} where it is wanted")
        if self.item_tokens < 0:
            raise UserError(f"text.item_tokens: {self.item_tokens} is under 0; 0 takes all")

    def check(self, schema: Schema) -> None:
        """Raise a UserError for a field to leave out that the schema does not have."""
        known = [field.name for field in schema.row_fields + schema.item]
        for name in self.leave_out:
            if name not in known:
                raise UserError(f"text.leave_out: '{name}': {nearest(name, known)}")

    def parts(self, fields: tuple[Field, ...]) -> list[str]:
        """The template filled with each field's name, as `join_texts` takes it."""
        return [_filled(self.template, field.name) for field in fields if field.name not in self.leave_out]


def _filled(template: str, name: str) -> str:
    """`{field} is {value}.` -> `genres is {genres}.`"""
    written = name.replace("{", "{{").replace("}", "}}")
    out = ""
    for literal, part, _, _ in string.Formatter().parse(template):
        out += literal.replace("{", "{{").replace("}", "}}")
        out += {"field": written, "value": f"{{{name}}}", None: ""}[part]
    return out


def free_parts(schema: Schema) -> list[str]:
    """The parts of the schema's text that say more than the item's fields do: the template says those."""
    fields = {field.name for field in schema.item}
    named = {part: {name for _, name, _, _ in string.Formatter().parse(part) if name} for part in schema.text}
    return [part for part in schema.text if named[part] - fields]


def item_sides(
    items: pa.Table, schema: Schema, config: TextConfig, tokenizer: TextTokenizer
) -> tuple[pa.Array, pa.Array]:
    """What is said of each item's fields, and its free text: large_string [rows] each.

    Args:
        tokenizer: counts the tokens of the free text, where `config` limits them.
    """
    fields = join_texts(items, config.parts(schema.item))
    free = join_texts(items, free_parts(schema))
    if config.item_tokens:
        free = pa.array(tokenizer.shorten(free.to_pylist(), config.item_tokens), TEXT)
    return fields, free


def compose(parts: list[pa.Array], free: pa.Array, config: TextConfig) -> pa.Array:
    """Texts of n things: `parts`, large_string [n] each, in their order, and the free text last or first; no nulls."""
    ordered = [*parts, free] if config.item_text == "last" else [free, *parts]
    empty, space = pa.scalar("", TEXT), pa.scalar(" ", TEXT)
    ended = [
        pc.if_else(pc.equal(part, empty), empty, pc.binary_join_element_wise(part, empty, space)) for part in ordered
    ]
    return pc.utf8_trim_whitespace(pc.binary_join_element_wise(*ended, empty))


def item_texts(items: pa.Table, schema: Schema, config: TextConfig, tokenizer: TextTokenizer) -> pa.Array:
    """The text of each item by itself: large_string [rows]. Arguments as of `item_sides`."""
    fields, free = item_sides(items, schema, config, tokenizer)
    return compose([fields], free, config)


def interaction_texts(
    rows: pa.Table, at: np.ndarray, sides: tuple[pa.Array, pa.Array], schema: Schema, config: TextConfig
) -> pa.Array:
    """The text of each row of the log: user and context fields, then the item's side: large_string [n].

    Args:
        rows: columns of the log.
        at: int [n], where the item of each row stands in `sides`.
        sides: what `item_sides` gave.
    """
    own = join_texts(rows, config.parts(schema.row_fields))
    fields, free = (side.take(pa.array(at)) for side in sides)
    return compose([own, fields], free, config)
