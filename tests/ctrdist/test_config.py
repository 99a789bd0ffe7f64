import datetime as dt
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import pytest
import yaml

from ctrdist.backbones import NAMES, BackboneConfigs
from ctrdist.config import from_dict, load_yaml, to_dict
from ctrdist.errors import UserError
from ctrdist.tasks.click import ClickConfig


@dataclass(frozen=True)
class Inner:
    widths: tuple[int, ...] = (8, 4)
    rate: float = 0.5


@dataclass(frozen=True)
class Outer:
    name: str = "n"
    count: int = 1
    on: bool = False
    date: dt.date | None = None
    limit: int | None = 3
    folder: Path = Path("here")
    mode: Literal["fast", "slow"] = "fast"
    level: Literal[1, 2] = 1
    pairs: tuple[tuple[int, ...], ...] = ()
    inner: Inner = field(default_factory=Inner)


OTHER = Outer(
    "x", 7, True, dt.date(2024, 2, 29), None, Path("a/b"), "slow", 2, ((1, 2), (), (3,)), Inner((1,), 1e-3)
)  # fmt: skip


def test_round_trip_through_json_and_yaml():
    plain = to_dict(OTHER)
    assert plain["date"] == "2024-02-29" and plain["folder"] == "a/b" and plain["pairs"] == [[1, 2], [], [3]]
    assert from_dict(Outer(), json.loads(json.dumps(plain)), "s") == OTHER
    assert from_dict(Outer(), yaml.safe_load(yaml.safe_dump(plain)), "s") == OTHER


def test_round_trip_of_a_task():
    name = NAMES[0]
    networks = BackboneConfigs()
    networks = replace(networks, **{name: replace(getattr(networks, name), hidden=(3, 5), dropout=0.25)})
    config = ClickConfig(backbone=name, dim=4, lr=2e-5, schedule="cosine", precision="bfloat16", networks=networks)
    assert from_dict(ClickConfig(), json.loads(json.dumps(to_dict(config))), "s") == config
    assert to_dict(config)["networks"][name]["hidden"] == [3, 5]


def test_what_is_not_given_stays():
    assert from_dict(OTHER, {"inner": {"rate": 2}}, "s") == replace(OTHER, inner=Inner((1,), 2.0))
    assert from_dict(OTHER, {}, "s") == OTHER


def test_dashes_stand_for_underscores():
    assert from_dict(ClickConfig(), {"batch-size": 3, "table_lr": 1}, "s") == ClickConfig(batch_size=3, table_lr=1.0)


def test_numbers_as_yaml_gives_them():
    content = yaml.safe_load("inner: {rate: 1e-3}\ndate: 2024-01-31\nlimit: null")
    changed = from_dict(Outer(), content, "s")
    assert changed.inner.rate == 0.001 and changed.date == dt.date(2024, 1, 31) and changed.limit is None
    whole = from_dict(Inner(), {"rate": 1}, "s").rate
    assert whole == 1.0 and isinstance(whole, float)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ({"cuont": 1}, ["unknown option 'cuont'", "did you mean 'count'", "folder"]),
        ({"inner": {"raet": 1}}, ["inner", "unknown option 'raet'", "did you mean 'rate'", "widths"]),
        ({"inner": 5}, ["inner", "option: value", "5"]),
        ({"inner": None}, ["inner", "None"]),
        ({"inner": {"rate": "fast"}}, ["inner: rate", "number", "'fast'"]),
        ({"inner": {"rate": True}}, ["inner: rate", "True"]),
        ({"inner": {"rate": None}}, ["inner: rate", "float", "None"]),
        ({"inner": {"widths": 8}}, ["inner: widths", "list", "8"]),
        ({"inner": {"widths": "88"}}, ["inner: widths", "list", "'88'"]),
        ({"inner": {"widths": [8, "x"]}}, ["inner: widths", "int", "'x'"]),
        ({"pairs": [[1], 2]}, ["pairs", "list", "2"]),
        ({"count": 1.0}, ["count", "int", "1.0"]),
        ({"count": True}, ["count", "int", "True"]),
        ({"count": "1"}, ["count", "int", "'1'"]),
        ({"count": None}, ["count", "None"]),
        ({"on": 1}, ["on", "bool", "1"]),
        ({"on": "yes"}, ["on", "bool", "'yes'"]),
        ({"name": 3}, ["name", "str", "3"]),
        ({"limit": "many"}, ["limit", "int", "'many'"]),
        ({"date": "31.1.2024"}, ["date", "'31.1.2024'", "2024-01-31"]),
        ({"date": dt.datetime(2024, 1, 31, 5)}, ["date", "datetime"]),
        ({"date": 20240131}, ["date", "20240131"]),
        ({"mode": "slwo"}, ["mode", "'slwo'", "did you mean 'slow'"]),
        ({"level": 3}, ["level", "3", "1, 2"]),
        ({"folder": 3}, ["folder", "Path", "3"]),
        (["name"], ["option: value", "name"]),
        ("name", ["option: value", "name"]),
    ],
)
def test_errors_name_place_and_value(content, parts):
    with pytest.raises(UserError) as error:
        from_dict(Outer(), content, "ctr.yaml")
    for part in ["ctr.yaml", *parts]:
        assert part in str(error.value)


def test_load_yaml(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("count: 4\ninner:\n  widths: [1, 2]\n")
    assert load_yaml(Outer(), path) == Outer(count=4, inner=Inner((1, 2)))
    path.write_text("# nothing\n")
    assert load_yaml(OTHER, path) == OTHER
    path.write_text("count: [")
    with pytest.raises(UserError, match=r"c\.yaml: not valid YAML"):
        load_yaml(Outer(), path)
    path.write_text("conut: 4")
    with pytest.raises(UserError, match=r"c\.yaml: unknown option 'conut'; did you mean 'count'"):
        load_yaml(Outer(), path)
    with pytest.raises(UserError, match=r"none\.yaml: no such file"):
        load_yaml(Outer(), tmp_path / "none.yaml")
