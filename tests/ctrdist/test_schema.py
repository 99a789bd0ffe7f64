from pathlib import Path

import pytest

from ctrdist.errors import UserError
from ctrdist.schema import Field, Schema

FULL = Schema(
    user=(Field("user_id", min_count=2), Field("interests", "multi")),
    item=(Field("item_id"), Field("genre", "multi", 3)),
    context=(Field("städte"),),
    history_length=7,
    text=("{title} ({year}).", "By {author}, {title}", "no column"),
    truth="p",
)


def load(folder: Path, text: str) -> Schema:
    (folder / "schema.yaml").write_text(text)
    return Schema.load(folder / "schema.yaml")


def test_round_trip(tmp_path):
    FULL.save(tmp_path / "schema.yaml")
    assert Schema.load(tmp_path / "schema.yaml") == FULL
    assert Schema.load(str(tmp_path / "schema.yaml")) == FULL
    assert Schema.load(f"file://{tmp_path}/schema.yaml") == FULL


def test_short_forms_and_defaults(tmp_path):
    schema = load(tmp_path, "user: {user_id: categorical}\nitem:\n  item_id: {min_count: 5}\n  tags: multi\ncontext:\n")
    assert schema == Schema((Field("user_id"),), (Field("item_id", "categorical", 5), Field("tags", "multi", 1)))


def test_derived_names():
    assert [f.name for f in FULL.row_fields] == ["user_id", "interests", "städte"]
    assert FULL.text_columns == ("title", "year", "author")


def test_fingerprint_changes_with_anything(tmp_path):
    variants = [
        FULL,
        Schema(FULL.user, FULL.item, FULL.context, 8, FULL.text, FULL.truth),
        Schema(FULL.user, FULL.item, FULL.context, 7, FULL.text[:1], FULL.truth),
        Schema(FULL.user, FULL.item, FULL.context, 7, FULL.text, ""),
        Schema(FULL.user[::-1], FULL.item, FULL.context, 7, FULL.text, FULL.truth),
        Schema((Field("user_id"), *FULL.user[1:]), FULL.item, FULL.context, 7, FULL.text, FULL.truth),
    ]
    assert len({schema.fingerprint for schema in variants}) == len(variants)
    FULL.save(tmp_path / "schema.yaml")
    assert Schema.load(tmp_path / "schema.yaml").fingerprint == FULL.fingerprint


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("item: {item_id: categorical}\ncontex: {}", ["unknown key 'contex'", "did you mean 'context'"]),
        ("item: {item_id: categorial}", ["item: item_id", "unknown kind 'categorial'", "did you mean 'categorical'"]),
        ("item: {item_id: {kind: number}}", ["unknown kind 'number'", "multi"]),
        ("item: {item_id: {min_cont: 2}}", ["unknown key 'min_cont'", "did you mean 'min_count'"]),
        ("item: {item_id: {min_count: 0}}", ["item_id: min_count: 0"]),
        ("item: {item_id: {min_count: true}}", ["item_id: min_count: True"]),
        ("item: {item_id: {min_count: 1.5}}", ["item_id: min_count: 1.5"]),
        ("item: {item_id: }", ["item_id", "None", "categorical"]),
        ("item: [item_id]", ["item", "name: kind"]),
        ("item: {item_id: multi, a: multi}\nuser: {a: multi}", ["'a'", "twice"]),
        ("item: {item_id: categorical, b: multi, b: categorical}", ["'b'", "twice"]),
        ("item: {item_id: categorical}\nitem: {item_id: categorical}", ["'item'", "twice"]),
        ("item: {genre: multi}", ["'item_id' is missing"]),
        ("user: {item_id: categorical}", ["'item_id' is missing"]),
        ("item: {item_id: categorical}\nhistory_length: -1", ["history_length: -1"]),
        ("item: {item_id: categorical}\nhistory_length: '5'", ["history_length: '5'"]),
        ("item: {item_id: categorical}\nhistory_length: 2.0", ["history_length: 2.0"]),
        ("item: {item_id: categorical}\nhistory_length: true", ["history_length: True"]),
        ("item: {item_id: categorical}\ntext: '{title}'", ["text", "list of parts"]),
        ("item: {item_id: categorical}\ntext: 5", ["text", "list of parts"]),
        ("item: {item_id: categorical}\ntext: ['{title']", ["text", "{title"]),
        ("item: {item_id: categorical}\ntruth: 1", ["truth", "1"]),
        ("item: {item_id: categorical}\ncontext: {label: categorical}", ["'label'", "rename"]),
        ("item: {item_id: categorical}\nuser: {item: categorical}", ["'item'", "rename"]),
        ("item: {item_id: categorical", ["not valid YAML"]),
        ("just words", ["expected keys", "str"]),
        ("", ["expected keys", "NoneType"]),
    ],
)
def test_errors_name_the_file_and_the_fault(tmp_path, text, parts):
    with pytest.raises(UserError) as error:
        load(tmp_path, text)
    for part in [str(tmp_path / "schema.yaml"), *parts]:
        assert part in str(error.value)


def test_no_file(tmp_path):
    with pytest.raises(UserError, match=r"none\.yaml: no such file"):
        Schema.load(tmp_path / "none.yaml")
