import numpy as np
import pyarrow as pa
import pytest

from ctrdist.errors import UserError
from ctrdist.interaction_text import TextConfig, free_parts, interaction_texts, item_sides, item_texts
from ctrdist.language.tokenizer import TextTokenizer
from ctrdist.schema import Field, Schema
from tests.conftest import build_tokenizer

TOKENIZER = TextTokenizer.of(build_tokenizer("bert"), 512)
SCHEMA = Schema(
    user=(Field("user_id"), Field("gender")),
    item=(Field("item_id"), Field("genres", "multi"), Field("year")),
    context=(Field("hour"),),
    text=("{title}.", "({year}).", "{year}, {story}"),
)
ITEMS = pa.table({
    "item_id": ["a", "b", "c"],
    "genres": pa.array([["war", "love"], [], None], pa.list_(pa.string())),
    "year": [1999, None, 2001],
    "title": ["Old Sea", None, "New {House}"],
    "story": ["two dogs and  one cat", "nothing", None],
})  # fmt: skip
ROWS = pa.table({"user_id": ["u1", "u2", "u1"], "gender": ["female", None, "male"], "hour": [7, 8, None]})


def test_every_field_with_a_value_and_then_the_free_text():
    assert free_parts(SCHEMA) == ["{title}.", "{year}, {story}"]
    assert item_texts(ITEMS, SCHEMA, TextConfig(), TOKENIZER).to_pylist() == [
        "item_id is a. genres is war, love. year is 1999. Old Sea. 1999, two dogs and  one cat",
        "item_id is b.",
        "item_id is c. year is 2001. New {House}.",
    ]


def test_interactions_say_user_context_and_item():
    sides = item_sides(ITEMS, SCHEMA, TextConfig(), TOKENIZER)
    assert interaction_texts(ROWS, np.array([2, 1, 2]), sides, SCHEMA, TextConfig()).to_pylist() == [
        "user_id is u1. gender is female. hour is 7. item_id is c. year is 2001. New {House}.",
        "user_id is u2. hour is 8. item_id is b.",
        "user_id is u1. gender is male. item_id is c. year is 2001. New {House}.",
    ]


def test_template_order_length_and_fields_are_the_users():
    config = TextConfig(
        template="<{field}={{{value}}}>", leave_out=("item_id", "user_id"), item_text="first", item_tokens=17
    )
    assert item_texts(ITEMS, SCHEMA, config, TOKENIZER).to_pylist() == [
        "Old Sea. 1999, two <genres={war, love}> <year={1999}>",
        "",
        "New {House}. <year={2001}>",
    ]
    texts = interaction_texts(ROWS, np.array([0, 1, 1]), item_sides(ITEMS, SCHEMA, config, TOKENIZER), SCHEMA, config)
    assert texts.to_pylist() == [
        "Old Sea. 1999, two <gender={female}> <hour={7}> <genres={war, love}> <year={1999}>",
        "<hour={8}>",
        "<gender={male}>",
    ]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"template": "{field}"}, "text.template: .* expected {value}"),
        ({"template": "{field} {worth}"}, "text.template"),
        ({"template": "{value"}, "text.template: .*expected"),
        ({"item_tokens": -1}, "text.item_tokens: -1"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict, match: str):
    with pytest.raises(UserError, match=match):
        TextConfig(**options)


def test_a_field_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="text.leave_out: 'genre': did you mean 'genres'"):
        TextConfig(leave_out=("genre",)).check(SCHEMA)
