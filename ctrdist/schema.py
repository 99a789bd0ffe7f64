"""What a dataset is: its fields, history and texts, read from `schema.yaml` and checked."""

import hashlib
import json
import string
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from ctrdist.errors import UserError, nearest
from ctrdist.serving.fields import CATEGORICAL, HISTORY, ITEM_ID, MULTI, NUMERIC, USER_ID, Field
from ctrdist.storage import filesystem

OPTIONS = {CATEGORICAL: ("min_count",), MULTI: ("min_count",), NUMERIC: ("scale", "buckets")}
"""Kinds of fields, and the options of each."""
SCALES = ("quantile", "log")

LABEL, TIMESTAMP, SPLIT = "label", "timestamp", "split"
# Columns of an encoded row; no field of the log may have their names.
RESERVED = (LABEL, HISTORY, SPLIT, "item", "filler")


@dataclass(frozen=True)
class Schema:
    """The columns of a log and what they mean.

    Args:
        user: fields of the user, columns of the log.
        item: fields of the item, columns of `items/`; joined late, for the target and for every behaviour.
        context: fields of the impression, columns of the log.
        history_length: the most recent behaviours used, at most this many; 0 where the log has no `history` column.
        text: the parts of an item's text, each with one or more `{column}` of `items/`. Parts are joined by a space;
            a part with a null or empty column is left out.
        truth: column of the log with the true click probability; only a synthetic world knows it.
    """

    user: tuple[Field, ...]
    item: tuple[Field, ...]
    context: tuple[Field, ...] = ()
    history_length: int = 0
    text: tuple[str, ...] = ()
    truth: str = ""

    @property
    def row_fields(self) -> tuple[Field, ...]:
        """The fields read from the log itself: user and context."""
        return self.user + self.context

    @property
    def text_columns(self) -> tuple[str, ...]:
        """Columns of `items/` that the text parts name, in order of first use."""
        names = [name for part in self.text for _, name, _, _ in string.Formatter().parse(part) if name]
        return tuple(dict.fromkeys(names))

    @property
    def fingerprint(self) -> str:
        """Twelve hex digits that change with anything in the schema."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]

    @classmethod
    def load(cls, path: str | Path) -> "Schema":
        """Read `schema.yaml` from a path or URI.

        Raises:
            UserError: no such file, not YAML, an unknown key or kind, or a field listed twice.
        """
        filesystem_, location = filesystem(path)
        try:
            with filesystem_.open_input_stream(location) as stream:
                content = yaml.load(stream.read(), _Loader)
        except FileNotFoundError:
            raise UserError(
                f"{path}: no such file. A prepared log has a schema.yaml; see jobs/prepare.py --help"
            ) from None
        except yaml.YAMLError as error:
            raise UserError(f"{path}: not valid YAML: {error}") from None
        return cls.from_dict(content, source=str(path))

    @classmethod
    def from_dict(cls, content: Any, source: str = "schema") -> "Schema":
        """The schema from its YAML content; `source` names it in errors. Raises UserError as `load` does."""
        known = cls.__dataclass_fields__
        if not isinstance(content, dict):
            raise UserError(f"{source}: expected keys {', '.join(known)}, found {type(content).__name__}")
        for key in content:
            if key not in known:
                raise UserError(f"{source}: unknown key '{key}'; {nearest(str(key), known)}")
        sides = {side: _fields(content.get(side) or {}, f"{source}: {side}") for side in ("user", "item", "context")}
        names = [field.name for fields in sides.values() for field in fields]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"{source}: field '{name}' is listed twice; each field belongs to one side")
        for name in [field.name for side in ("user", "context") for field in sides[side]]:
            if name in RESERVED:
                raise UserError(f"{source}: a field of the log cannot have the name '{name}'; rename that column")
        for key in (USER_ID, ITEM_ID):
            if any(field.name == key and field.kind != CATEGORICAL for fields in sides.values() for field in fields):
                raise UserError(f"{source}: '{key}' is an id; its kind is categorical")
        if ITEM_ID not in [field.name for field in sides["item"]]:
            raise UserError(f"{source}: item: '{ITEM_ID}' is missing; it is the key of items/ and a field of its own")
        length = content.get("history_length", 0)
        if type(length) is not int or length < 0:
            raise UserError(f"{source}: history_length: {length!r} is not a whole number of 0 or more")
        text = content.get("text") or ()
        if not isinstance(text, list | tuple) or not all(isinstance(part, str) for part in text):
            raise UserError(f"{source}: text: expected a list of parts such as '{{title}}.', found {text!r}")
        for part in text:
            try:
                list(string.Formatter().parse(part))
            except ValueError as error:
                raise UserError(f"{source}: text: '{part}': {error}; write columns as {{title}}") from None
        truth = content.get("truth") or ""
        if not isinstance(truth, str):
            raise UserError(f"{source}: truth: expected the name of a column, found {truth!r}")
        return cls(**sides, history_length=length, text=tuple(text), truth=truth)

    def save(self, path: str | Path) -> None:
        """Write `schema.yaml`, in the form that `load` reads."""
        content: dict[str, Any] = {
            side: {
                f.name: {"kind": f.kind} | {name: getattr(f, name) for name in OPTIONS[f.kind]}
                for f in getattr(self, side)
            }
            for side in ("user", "item", "context")
        }
        content |= {"history_length": self.history_length, "text": list(self.text), "truth": self.truth}
        Path(path).write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key written twice; plain YAML would drop the first one silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"'{key}' is listed twice in {node.start_mark}")
        return super().construct_mapping(node, deep)


def _fields(content: Any, source: str) -> tuple[Field, ...]:
    if not isinstance(content, dict):
        raise UserError(f"{source}: expected 'name: kind' lines, found {content!r}")
    fields = []
    for name, options in content.items():
        options = {"kind": options} if isinstance(options, str) else options
        if not isinstance(options, dict):
            raise UserError(f"{source}: {name}: expected a kind ({', '.join(OPTIONS)}), found {options!r}")
        kind = options.get("kind", CATEGORICAL)
        if kind not in OPTIONS:
            raise UserError(f"{source}: {name}: unknown kind '{kind}'; {nearest(str(kind), OPTIONS)}")
        known = ("kind", *OPTIONS[kind])
        for key in options:
            if key not in known:
                raise UserError(f"{source}: {name}: unknown key '{key}' of a {kind} field; {nearest(str(key), known)}")
        field = Field(str(name), **options)
        for key, least in (("min_count", 1), ("buckets", 2)):
            value = getattr(field, key)
            if type(value) is not int or value < least:
                raise UserError(f"{source}: {name}: {key}: {value!r} is not a whole number of {least} or more")
        if field.scale not in SCALES:
            raise UserError(f"{source}: {name}: unknown scale '{field.scale}'; {nearest(str(field.scale), SCALES)}")
        fields.append(field)
    return tuple(fields)
