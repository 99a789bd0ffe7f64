import datetime as dt

import pyarrow as pa
import pytest

from ctrdist.errors import UserError
from ctrdist.texts import join_texts

ITEMS = pa.table({
    "title": [" Heat ", "Up", None, "", "Ran"],
    "year": pa.array([1995, None, 1990, 2000, 1985], pa.int64()),
    "genres": pa.array([["Crime", "Drama"], [], None, ["", None], ["War", None, " Epic "]]),
})  # fmt: skip
PARTS = ("{title} ({year}).", "Genres: {genres}.", "{title}")


def test_parts_with_a_missing_value_are_left_out():
    texts = join_texts(ITEMS, PARTS)
    assert texts.type == pa.large_string()
    assert texts.to_pylist() == [
        "Heat (1995). Genres: Crime, Drama. Heat",
        "Up",
        "",
        "",
        "Ran (1985). Genres: War, Epic. Ran",
    ]


def test_slices_chunks_and_no_rows_agree():
    whole = join_texts(ITEMS, PARTS).to_pylist()
    assert join_texts(ITEMS.slice(1, 4), PARTS).to_pylist() == whole[1:]
    assert join_texts(pa.concat_tables([ITEMS.slice(0, 2), ITEMS.slice(2)]), PARTS).to_pylist() == whole
    assert join_texts(ITEMS.slice(0, 0), PARTS).to_pylist() == []
    assert join_texts(ITEMS, ()).to_pylist() == [""] * 5


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        (pa.array([1.5, None, float("nan"), 2.0]), ["1.5", "", "", "2"]),
        (pa.array([True, None]), ["true", ""]),
        (pa.array(["a", None, "b"]).dictionary_encode(), ["a", "", "b"]),
        (pa.array([dt.date(2024, 1, 2)]), ["2024-01-02"]),
        (pa.array([[1, 2], None, [3]], pa.large_list(pa.int32())), ["1, 2", "", "3"]),
        (pa.array([["a", "b"], None], pa.list_(pa.string(), 2)), ["a, b", ""]),
        (pa.array([None, None], pa.null()), ["", ""]),
        (pa.array(["ÄÖ 東京\u00a0"], pa.string_view()), ["ÄÖ 東京"]),
    ],
)
def test_kinds_of_columns(values: pa.Array, texts: list[str]):
    assert join_texts(pa.table({"x": values}), ("{x}",)).to_pylist() == texts


def test_literals_and_braces():
    assert join_texts(ITEMS.slice(0, 2), ("{{{title}}}", "film")).to_pylist() == ["{Heat} film", "{Up} film"]


@pytest.mark.parametrize("part", ["{titel}", "{", "{}", "{title!r}", "{year:04d}"])
def test_wrong_parts_are_user_errors(part: str):
    with pytest.raises(UserError, match="text part"):
        join_texts(ITEMS, (part,))


def test_a_missing_column_is_named_with_the_nearest():
    with pytest.raises(UserError, match="no column 'titel'; did you mean 'title'"):
        join_texts(ITEMS, ("{titel}",))
