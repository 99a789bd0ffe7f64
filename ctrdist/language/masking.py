"""BERT's masking by a hash of (seed, epoch, item, position): no order, batch or worker changes what is masked."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ctrdist.errors import UserError
from ctrdist.language.tokens import TokenBatch


@dataclass(frozen=True)
class MaskVocabulary:
    """What masking knows about a tokenizer.

    Args:
        mask_id: the token that stands for a masked word.
        special_ids: tokens that are never masked.
        size: random words are drawn from [0, size).
    """

    mask_id: int
    special_ids: tuple[int, ...]
    size: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "MaskVocabulary":
        """Raises UserError for a tokenizer without a mask token (a decoder's)."""
        if tokenizer.mask_token_id is None:
            raise UserError(
                f"language model '{tokenizer.name_or_path}': its tokenizer has no mask token; domain-adaptive "
                "pre-training needs an encoder such as sentence-transformers/all-MiniLM-L6-v2"
            )
        return cls(tokenizer.mask_token_id, tuple(sorted(tokenizer.all_special_ids)), len(tokenizer))


@dataclass(frozen=True)
class MaskedTokens:
    """A masked batch.

    Args:
        input_ids: [B, L] int64, masked.
        positions: [M] int64, where words are to be predicted, in the flattened [B * L].
        targets: [M] int64, the words that stood there.
    """

    input_ids: Tensor
    positions: Tensor
    targets: Tensor


def mask_tokens(batch: TokenBatch, vocabulary: MaskVocabulary, probability: float, seed: int) -> MaskedTokens:
    """Choose each real, not special token with `probability`; of those 80 % become the mask, 10 % a random word, and
    10 % stay. BERT (Devlin et al. 2019, section 3.1), as in CELA section 4.1.1.

    Args:
        batch: B texts; `epoch` and `items` enter the draw.
        vocabulary: of the tokenizer.
        probability: 0 to 1.
        seed: of the run.
    """
    ids = batch.input_ids
    position = torch.arange(ids.shape[1], device=ids.device)
    row = _mix(_mix(torch.full_like(batch.items, seed)) + batch.epoch)
    key = _mix(_mix(row + batch.items)[:, None] + position)
    special = torch.isin(ids, torch.tensor(vocabulary.special_ids, dtype=ids.dtype, device=ids.device))
    chosen = (_uniform(_mix(key)) < probability) & ~special & (batch.attention_mask == 1)
    action = _uniform(_mix(key + 1))
    word = (_uniform(_mix(key + 2)) * vocabulary.size).long()
    masked = torch.where(chosen & (action < 0.8), vocabulary.mask_id, ids)
    masked = torch.where(chosen & (action >= 0.8) & (action < 0.9), word, masked)
    positions = chosen.flatten().nonzero().squeeze(1)
    return MaskedTokens(masked, positions, ids.flatten()[positions])


def _mix(value: Tensor) -> Tensor:
    """splitmix64 of int64 values, whose products wrap around."""
    value = value + -0x61C8864680B583EB
    value = (value ^ _shift(value, 30)) * -0x40A7B892E31B1A47
    value = (value ^ _shift(value, 27)) * -0x6B2FB644ECCEEE15
    return value ^ _shift(value, 31)


def _shift(value: Tensor, bits: int) -> Tensor:
    """Logical shift to the right: torch's own repeats the sign."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _uniform(value: Tensor) -> Tensor:
    """int64 bits -> float64 in [0, 1)."""
    return _shift(value, 11).double() * 2.0**-53
