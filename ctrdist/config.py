"""Typed configuration: dataclasses to and from plain dictionaries, strictly."""

import dataclasses
import datetime as dt
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ctrdist.errors import UserError, nearest

T = TypeVar("T")


def to_dict(config: Any) -> Any:
    """A dataclass as nested dictionaries of plain values: tuples become lists, dates and paths become text."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, tuple | list):
        return [to_dict(value) for value in config]
    if isinstance(config, dt.date | Path):
        return str(config)
    return config


def from_dict(default: T, content: Any, source: str, others: bool = False) -> T:
    """`default`, a dataclass, with the values that `content` gives.

    Args:
        source: what to call the origin of `content` in errors.
        others: `content` may have keys that are for others; they are left aside.

    Raises:
        UserError: a key that the dataclass does not have (the nearest one is named), or a value of another type.
    """
    if not isinstance(content, dict):
        raise UserError(f"{source}: expected 'option: value' lines, found {content!r}")
    hints = typing.get_type_hints(type(default))
    names = [f.name for f in dataclasses.fields(default)]
    changes = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in names and others:
            continue
        if name not in names:
            raise UserError(f"{source}: unknown option '{key}'; {nearest(name, names)}")
        old = getattr(default, name)
        where = f"{source}: {key}"
        changes[name] = (
            from_dict(old, value, where) if dataclasses.is_dataclass(old) else _convert(value, hints[name], where)
        )
    return dataclasses.replace(default, **changes)


def _convert(value: Any, type_: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(type_), typing.get_args(type_)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _convert(value, next(a for a in arguments if a is not type(None)), where)
    if origin is typing.Literal:
        if value not in arguments:
            raise UserError(f"{where}: {value!r}; {nearest(str(value), map(str, arguments))}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{where}: expected a list, found {value!r}")
        return tuple(_convert(part, arguments[0], where) for part in value)
    if type_ is dt.date and isinstance(value, str):
        try:
            return dt.date.fromisoformat(value)
        except ValueError:
            raise UserError(f"{where}: {value!r} is not a date such as 2024-01-31") from None
    if type_ is Path and isinstance(value, str):
        return Path(value)
    if type_ is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            raise UserError(f"{where}: expected a number, found {value!r}") from None
    if not isinstance(value, type_) or type(value) in (bool, dt.datetime) and type_ is not type(value):
        raise UserError(f"{where}: expected {type_.__name__}, found {value!r}")
    return value


def load_yaml(default: T, path: Path, others: bool = False) -> T:
    """`default` with the values of a YAML file. Raises UserError as `from_dict` does, or for an unreadable file."""
    try:
        content = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; --config names a YAML file of options") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    return from_dict(default, content or {}, str(path), others)
