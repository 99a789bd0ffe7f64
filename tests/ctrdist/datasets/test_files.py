import gzip
import json

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrdist.datasets import files
from ctrdist.datasets.files import drop_repeated, read_json_lines, read_lines, with_unlisted
from ctrdist.errors import UserError

COLUMNS = pa.schema({"id": pa.string(), "n": pa.float32(), "t": pa.int64(), "words": pa.list_(pa.string())})
LINES = [
    {"id": "a", "n": 5, "t": 3, "words": ["x", "y"], "other": {"deep": [1, "2"]}},
    {"other": "text now", "id": "b", "n": 2.5},
    {"id": "c", "t": None, "words": []},
]
ROWS = [
    {"id": "a", "n": 5.0, "t": 3, "words": ["x", "y"]},
    {"id": "b", "n": 2.5, "t": None, "words": None},
    {"id": "c", "n": None, "t": None, "words": []},
]


def as_bytes(lines: list) -> bytes:
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


@pytest.mark.parametrize("block", [7, 60, 1 << 24])
@pytest.mark.parametrize("name", ["x.json", "x.json.gz"])
def test_json_lines_plain_and_packed_in_blocks_of_any_size(tmp_path, monkeypatch, name, block):
    monkeypatch.setattr(files, "BLOCK_BYTES", block)
    content = as_bytes(LINES)[:-1]  # the last line may lack its end
    # two members, as `cat a.gz b.gz` makes
    packed = gzip.compress(content[:50]) + gzip.compress(content[50:])
    (tmp_path / name).write_bytes(packed if name.endswith("gz") else content)
    table = read_json_lines(tmp_path / name, COLUMNS)
    assert table.to_pylist() == ROWS and table.schema == COLUMNS


def test_values_of_varying_type_take_the_columns(tmp_path):
    lines = [
        {"id": 7, "words": "alone"},
        {"id": ["x", None, "y"], "words": ["a", 2, None, ["b", "c"]]},
        {"id": "half \ud83d", "words": None},
        {"id": "whole \U0001f600"},
    ]
    (tmp_path / "x.json").write_bytes(as_bytes(LINES + lines))
    found = [(row["id"], row["words"]) for row in read_json_lines(tmp_path / "x.json", COLUMNS).to_pylist()]
    assert found[3:] == [("7", ["alone"]), ("x  y", ["a", "2", None, "b c"]), ("half ?", None), ("whole 😀", None)]
    assert found[:3] == [(row["id"], row["words"]) for row in ROWS]


@pytest.mark.parametrize("odd", [[], [{"id": 7}]])
def test_objects_within_lines(tmp_path, odd):
    columns = pa.schema({"id": pa.string(), "makers": pa.list_(pa.struct({"name": pa.string()}))})
    lines = [{"id": "a", "makers": [{"name": "A", "role": 1}, {"role": ""}]}, {"id": "b", "makers": []}, *odd]
    (tmp_path / "x.json").write_bytes(as_bytes(lines))
    rows = read_json_lines(tmp_path / "x.json", columns).to_pylist()
    assert rows[:2] == [{"id": "a", "makers": [{"name": "A"}, {"name": None}]}, {"id": "b", "makers": []}]


@pytest.mark.parametrize("block", [30, 1 << 24])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{'id': 'a'}", "line 3: expected a JSON object, found \"{'id': 'a'}\""),
        (b"[1]", "line 3: expected a JSON object"),
        (b"", "line 3: expected a JSON object, found ''"),
        (b'{"id": "a"}{"id": "b"}', "line 3: expected a JSON object"),
        (b'{"id": "\xff"}', "line 3: expected a JSON object"),
        (b'{"n": "5"}', "line 3: 'n' is '5': expected float"),
        (b'{"n": true}', "line 3: 'n' is True"),
        (b'{"t": 1.5}', "line 3: 't' is 1.5: expected int64"),
        (b'{"t": 9223372036854775808}', "line 3: 't' is 9223372036854775808"),
        (b'{"id": {"a": 1}}', r"line 3: 'id' is \{'a': 1\}: expected string"),
        (b'{"words": [{}]}', r"line 3: 'words' is \[\{\}\]"),
    ],
)
def test_malformed_line_is_named(tmp_path, monkeypatch, line, message, block):
    monkeypatch.setattr(files, "BLOCK_BYTES", block)
    (tmp_path / "x.json").write_bytes(b'{"id": "a"}\n{"id": "b"}\n' + line + b'\n{"id": "c"}\n')
    with pytest.raises(UserError, match=rf"x\.json: {message}"):
        read_json_lines(tmp_path / "x.json", COLUMNS)


@pytest.mark.parametrize("content", [b"a::1\r\nb::2\r\n", b"a::1\nb::2", b"a::1\r\nb::2"])
def test_lines_of_any_ending(tmp_path, content):
    (tmp_path / "x.dat").write_bytes(content)
    assert read_lines(tmp_path / "x.dat") == ["a::1", "b::2"]


def test_missing_empty_and_cut_files(tmp_path):
    path = tmp_path / "x.json.gz"
    with pytest.raises(UserError, match="no such file"):
        read_json_lines(path, COLUMNS)
    path.write_bytes(gzip.compress(b""))
    with pytest.raises(UserError, match="the file is empty"):
        read_json_lines(path, COLUMNS)
    for content in (gzip.compress(as_bytes(LINES * 100))[:-10], as_bytes(LINES)):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"x\.json\.gz: cannot be read \(.*\); download the file again"):
            read_json_lines(path, COLUMNS)


KEYS = st.lists(st.tuples(st.sampled_from(["a", "b", None]), st.integers(0, 2)), max_size=20)


@given(keys=KEYS, cut=st.integers(0, 20))
@settings(max_examples=200, deadline=None)
def test_repeated_rows_are_those_with_an_earlier_one(keys, cut):
    types = pa.schema({"user": pa.string(), "time": pa.int64(), "row": pa.int64()})
    rows = [{"user": user, "time": time, "row": row} for row, (user, time) in enumerate(keys)]
    log = pa.concat_tables([pa.Table.from_pylist(part, types) for part in (rows[:cut], rows[cut:])])
    kept, dropped = drop_repeated(log, ["user", "time"])
    expected = [row for row in rows if keys.index((row["user"], row["time"])) == row["row"]]
    assert kept.to_pylist() == expected and dropped == len(rows) - len(expected)


def test_repeated_rows_by_one_key():
    log = pa.table({"item": ["b", "a", "b", "c", "a"], "n": [1, 2, 3, 4, 5]})
    kept, dropped = drop_repeated(log, ["item"])
    assert kept.to_pydict() == {"item": ["b", "a", "c"], "n": [1, 2, 4]} and dropped == 2


def test_items_only_seen_in_the_log_are_added_once():
    items = pa.table({"item_id": ["a", "b"], "title": ["A", "B"]})
    seen = pa.chunked_array([["z", "a"], ["y", "z"]])
    found, added = with_unlisted(items, seen)
    assert found.to_pydict() == {"item_id": ["a", "b", "z", "y"], "title": ["A", "B", None, None]} and added == 2
    assert with_unlisted(items, pa.array(["a"])) == (items, 0)
