import datetime as dt

import pyarrow as pa
import pytest
import torch

from ctrdist.errors import UserError
from ctrdist.language.model import LanguageModel
from ctrdist.language.texts import join_texts, tokenize

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


def test_tokens_are_padded_on_the_right_and_cut(tiny_lm):
    tokenizer = LanguageModel.load(str(tiny_lm)).tokenizer
    batch = tokenize(tokenizer, ["red dog", "", "old old old old old old"], [7, 3, 5], max_length=6, epoch=2)
    assert batch.items.tolist() == [7, 3, 5] and batch.epoch == 2 and len(batch) == 3
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]]
    plain = tokenizer(["red dog"])["input_ids"][0]
    assert batch.input_ids[0].tolist() == plain + [tokenizer.pad_token_id] * 2
    assert batch.input_ids[2, -1] == tokenizer.sep_token_id
    long = tokenize(tokenizer, ["old " * 100], [0], max_length=512)
    assert long.input_ids.shape == (1, 32)
    assert batch.to("cpu").epoch == 2


def test_no_texts_give_an_empty_batch(tiny_lm):
    model = LanguageModel.load(str(tiny_lm))
    batch = tokenize(model.tokenizer, [], [], max_length=8)
    assert batch.input_ids.shape == batch.attention_mask.shape == (0, 2) and batch.items.dtype == torch.int64
    assert model(batch.input_ids, batch.attention_mask).shape == (0, 16)


def test_buckets_hold_the_same_texts_with_less_padding(tiny_lm):
    model = LanguageModel.load(str(tiny_lm), pooling="mean").eval()
    texts = ["red dog", "old " * 9, "", "a funny film about war", "cat", "blue " * 12, "the sea"]
    batch = tokenize(model.tokenizer, texts, range(7), max_length=16, epoch=3)
    whole = model(batch.input_ids, batch.attention_mask)
    parts = batch.buckets(3)
    assert [len(part) for part in parts] == [3, 2, 2] and all(part.epoch == 3 for part in parts)
    assert sum(part.input_ids.numel() for part in parts) < batch.input_ids.numel()
    for part in parts:
        assert part.input_ids.shape[1] == part.attention_mask.sum(1).max()
        torch.testing.assert_close(model(part.input_ids, part.attention_mask), whole[part.items])
    assert sorted(torch.cat([part.items for part in parts]).tolist()) == list(range(7))
    empty = tokenize(model.tokenizer, [], [], max_length=8)
    assert empty.buckets(3) == [empty]
