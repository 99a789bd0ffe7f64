import torch

from ctrdist.language.model import LanguageModel
from ctrdist.language.tokens import tokenize


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
