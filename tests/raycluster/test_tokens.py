import numpy as np
import pyarrow as pa
import pytest
import torch

from ctrdist.items import ItemTexts, grow_catalog_ids, item_batches
from ctrdist.language.encode import Source
from ctrdist.language.model import load_tokenizer
from ctrdist.language.tokenizer import StoredTokens, token_ids
from ctrdist.language.tokens import tokenize
from ctrdist.schema import Field, Schema
from ctrdist.storage import State
from ctrdist.vocabulary import Vocabulary
from raycluster import tokens
from raycluster.stages.language import _text_batches
from raycluster.tokens import stored_tokens

WORDS = "long sad film about love and war the sea cat old story house with short funny blue new a of".split()
TEXTS = ["red dog", "", "a long sad film about love and war and the sea and the cat", "old book", "the story"]
SCHEMA = Schema(user=(), item=(Field("item_id"),), text=("{text}",))


@pytest.mark.parametrize("part", [2, 100])
def test_tokens_are_stored_once_by_what_they_are_made_of(tiny_lm, tmp_path, monkeypatch, part):
    """In parts by tasks that end in another order than they begin; and in one part, without a task."""
    monkeypatch.setattr(tokens, "PART", part)
    monkeypatch.setattr(tokens, "in_parallel", lambda function, calls: (function(*call) for call in reversed(calls)))
    monkeypatch.setattr(tokens.ray, "put", lambda value: value)
    state = State(tmp_path)
    table = pa.table({"item_id": list("abcde"), "text": TEXTS})
    with state.create("read") as folder:
        ItemTexts.write(folder / "texts.arrow", table, grow_catalog_ids(table, Vocabulary()), SCHEMA)
    read, tokenizer = state.find("read"), Source(str(tiny_lm)).tokenizer(8)
    made = stored_tokens(state, read, tokenizer, np.arange(2, 7))
    stored = StoredTokens.load(state.local(made.name))
    expected = token_ids(Source(str(tiny_lm)).load().tokenizer, [TEXTS[4], TEXTS[0]], 8)
    found = stored.take(np.array([6, 2]))
    assert found.values.tolist() == expected.values.tolist() and found.offsets.tolist() == expected.offsets.tolist()
    assert stored_tokens(state, read, tokenizer, np.arange(2, 7)).folder == made.folder
    others = [(Source(str(tiny_lm)).tokenizer(9), np.arange(2, 7)), (tokenizer, np.arange(2, 6))]
    assert len({made.name, *(stored_tokens(state, read, *other).name for other in others)}) == 3


def test_batches_of_stored_tokens_are_those_of_the_texts(tiny_lm, tmp_path):
    state, texts = State(tmp_path), [f"red dog {word} book" * (n % 4) for n, word in enumerate(WORDS)]
    table = pa.table({"item_id": np.arange(20), "text": texts})
    with state.create("read") as folder:
        ItemTexts.write(folder / "texts.arrow", table, grow_catalog_ids(table, Vocabulary()), SCHEMA)
    every, items = np.arange(2, 22), np.arange(3, 22, 2)
    made = stored_tokens(state, state.find("read"), Source(str(tiny_lm)).tokenizer(8), every)
    tokenizer, read = load_tokenizer(str(tiny_lm)), ItemTexts(state.local("read") / "texts.arrow")
    found = list(_text_batches(state.uri, made.name, items, batch=4, seed=3, epochs=2, rank=1, workers=2, step=1))
    expected = [
        tokenize(tokenizer, read.take(rows[2:4]), rows[2:4], 8, epoch)
        for epoch in range(2)
        for rows in item_batches(items, 4, 3, epoch)
    ][1:]
    assert len(found) == len(expected) == 5
    for one, other in zip(found, expected, strict=True):
        assert one.epoch == other.epoch and one.lengths == other.lengths
        for name in ("items", "input_ids", "attention_mask"):
            assert torch.equal(getattr(one, name), getattr(other, name))
