import pytest
import torch
from torch import Tensor

from ctrdist.errors import UserError
from ctrdist.language.masking import MaskVocabulary, mask_tokens
from ctrdist.language.tokens import TokenBatch

VOCABULARY = MaskVocabulary(mask_id=4, special_ids=(0, 1, 2, 3, 4), size=1000)


def batch(rows: int, length: int, epoch: int = 0) -> TokenBatch:
    ids = torch.randint(5, 1000, (rows, length), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[:, -1] = 2, 3
    return TokenBatch(torch.arange(rows), ids, torch.ones_like(ids), epoch)


def test_fifteen_percent_of_which_80_10_10():
    tokens = batch(2000, 52)
    masked = mask_tokens(tokens, VOCABULARY, 0.15, seed=1)
    before, after = tokens.input_ids.flatten(), masked.input_ids.flatten()
    assert len(masked.positions) / (2000 * 50) == pytest.approx(0.15, abs=0.005)
    assert torch.equal(masked.targets, before[masked.positions])
    new = after[masked.positions]
    assert (new == 4).double().mean().item() == pytest.approx(0.8, abs=0.015)
    assert (new == masked.targets).double().mean().item() == pytest.approx(0.1, abs=0.015)
    random = new[(new != 4) & (new != masked.targets)]
    assert random.min() < 20 and random.max() > 980 and random.double().mean().item() == pytest.approx(500, abs=30)
    rest = torch.ones_like(before, dtype=torch.bool)
    rest[masked.positions] = False
    assert torch.equal(before[rest], after[rest])


def test_special_tokens_and_padding_are_never_masked():
    tokens = batch(200, 12)
    tokens.attention_mask[:, 8:] = 0
    masked = mask_tokens(tokens, VOCABULARY, 1.0, seed=0)
    column = masked.positions % 12
    assert column.min() == 1 and column.max() == 7 and len(column) == 200 * 7


def chosen(tokens: TokenBatch, seed: int = 3) -> dict[tuple[int, int], tuple[int, int]]:
    """(item, position) -> (target, input) of every masked word."""
    masked = mask_tokens(tokens, VOCABULARY, 0.15, seed)
    length = tokens.input_ids.shape[1]
    new = masked.input_ids.flatten()[masked.positions]
    item = tokens.items[masked.positions // length]
    columns: list[Tensor] = [item, masked.positions % length, masked.targets, new]
    return {(i, p): (t, n) for i, p, t, n in zip(*(c.tolist() for c in columns), strict=True)}


def test_no_order_split_or_padding_changes_the_masks():
    tokens = batch(300, 20)
    order = torch.randperm(300)
    whole, parts = chosen(tokens), {}
    for rows in order.split(70):
        ids = torch.cat([tokens.input_ids[rows], torch.zeros(len(rows), 3, dtype=torch.int64)], 1)
        mask = torch.cat([tokens.attention_mask[rows], torch.zeros(len(rows), 3, dtype=torch.int64)], 1)
        parts |= chosen(TokenBatch(tokens.items[rows], ids, mask))
    assert parts == whole and len(whole) > 500


def test_seed_and_epoch_change_the_masks():
    first = set(chosen(batch(300, 20)))
    for other in (set(chosen(batch(300, 20), seed=4)), set(chosen(batch(300, 20, epoch=1)))):
        assert len(first & other) / len(first) == pytest.approx(0.15, abs=0.06)
    assert chosen(batch(300, 20)) == chosen(batch(300, 20))


def test_no_rows():
    masked = mask_tokens(
        TokenBatch(*(torch.zeros(s, dtype=torch.int64) for s in (0, (0, 2), (0, 2)))), VOCABULARY, 1, 0
    )
    assert masked.input_ids.shape == (0, 2) and len(masked.positions) == len(masked.targets) == 0


def test_a_tokenizer_without_mask_token_is_a_user_error():
    class Tokenizer:
        mask_token_id, name_or_path = None, "gpt2"

    with pytest.raises(UserError, match="'gpt2': its tokenizer has no mask token"):
        MaskVocabulary.of(Tokenizer())
