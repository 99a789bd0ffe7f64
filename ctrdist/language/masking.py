"""What a language model is to predict: masked words (an encoder), or each next word (a decoder)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ctrdist.draws import mix, uniform
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
class WordsToPredict:
    """A batch as the model reads it, and the words that it is to predict.

    Args:
        input_ids: [B, L] int64, masked for an encoder.
        positions: [M] int64, the states that predict a word, in the flattened [B * L].
        targets: [M] int64, the words.
    """

    input_ids: Tensor
    positions: Tensor
    targets: Tensor


def mask_tokens(batch: TokenBatch, vocabulary: MaskVocabulary, probability: float, seed: int) -> WordsToPredict:
    """Choose each real, not special token with `probability`; of those 80 % become the mask, 10 % a random word, and
    10 % stay. BERT (Devlin et al. 2019, section 3.1), as in CELA section 4.1.1. The draws are a hash of (seed, epoch,
    item, position).

    Args:
        batch: B texts; `epoch` and `items` enter the draw.
        vocabulary: of the tokenizer.
        probability: 0 to 1.
        seed: of the run.
    """
    ids = batch.input_ids
    position = torch.arange(ids.shape[1], device=ids.device)
    row = mix(mix(torch.full_like(batch.items, seed)) + batch.epoch)
    key = mix(mix(row + batch.items)[:, None] + position)
    special = torch.isin(ids, torch.tensor(vocabulary.special_ids, dtype=ids.dtype, device=ids.device))
    chosen = (uniform(mix(key)) < probability) & ~special & (batch.attention_mask == 1)
    action = uniform(mix(key + 1))
    word = (uniform(mix(key + 2)) * vocabulary.size).long()
    masked = torch.where(chosen & (action < 0.8), vocabulary.mask_id, ids)
    masked = torch.where(chosen & (action >= 0.8) & (action < 0.9), word, masked)
    positions = chosen.flatten().nonzero().squeeze(1)
    return WordsToPredict(masked, positions, ids.flatten()[positions])


def next_tokens(batch: TokenBatch) -> WordsToPredict:
    """Each real token but a text's first, from the states of those before it; padding is never a target.

    Args:
        batch: B texts, padded on the right. A text of one token has nothing to predict.
    """
    real = batch.attention_mask == 1
    positions = F.pad(real[:, :-1] & real[:, 1:], (0, 1)).flatten().nonzero().squeeze(1)
    return WordsToPredict(batch.input_ids, positions, batch.input_ids.flatten()[positions + 1])
