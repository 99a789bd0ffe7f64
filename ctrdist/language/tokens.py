"""Token ids -> batches that a language model reads."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ctrdist.items import Ragged
from ctrdist.language.tokenizer import token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TokenBatch:
    """The tokens of some texts, of items or of rows of the log.

    Args:
        items: [B] int64, catalog rows; of rows of the log, a number that goes with what each one's text says. Masks
            are drawn by it.
        input_ids: [B, L] int64, padded on the right.
        attention_mask: [B, L] int64, 1 at real tokens; each row has one at least.
        epoch: which pass over the items this is, or any number (int64 [] if a tensor); masks differ with it.
        lengths: real tokens of each text, known without asking the device; () if nobody counted.
        places: [B] int64, where each text stands in the batch that this is a part of; None if it is no part.
    """

    items: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    epoch: int | Tensor = 0
    lengths: tuple[int, ...] = ()
    places: Tensor | None = None

    def __len__(self) -> int:
        return self.items.shape[0]

    def to(self, device: torch.device | str) -> "TokenBatch":
        """The same batch on a device."""
        names = ("items", "input_ids", "attention_mask")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})

    def empty(self) -> "TokenBatch":
        """A batch as wide without texts."""
        return TokenBatch(self.items[:0], self.input_ids[:0], self.attention_mask[:0], self.epoch)

    def buckets(self, count: int) -> list["TokenBatch"]:
        """The same texts in at most `count` batches of like length, short ones first, each padded to its own longest.

        Most of the padding, and of the time that a model spends on it, is gone. A batch without lengths stays whole.
        """
        order = np.argsort(self.lengths, kind="stable")
        parts = [part for part in np.array_split(order, count) if len(part)]
        return [self._take(part) for part in parts] or [self]

    def _take(self, rows: np.ndarray) -> "TokenBatch":
        lengths = tuple(self.lengths[row] for row in rows)
        at = torch.from_numpy(rows).to(self.items.device, non_blocking=True)
        longest = max(lengths)
        ids, mask = self.input_ids[at, :longest], self.attention_mask[at, :longest]
        return TokenBatch(self.items[at], ids, mask, self.epoch, lengths, at)


def tokenize(
    tokenizer: "PreTrainedTokenizerBase", texts: list[str], items: Sequence[int], max_length: int, epoch: int = 0
) -> TokenBatch:
    """Tokens of texts, with special tokens, cut to `max_length` and to what the model can read, padded (see `pad`).

    Args:
        tokenizer: `LanguageModel.tokenizer`.
        texts: B texts.
        items: [B] their catalog rows.
        max_length: most tokens of a text, special tokens included.
        epoch: passed on to the batch.
    """
    return pad(token_ids(tokenizer, texts, max_length), items, tokenizer.pad_token_id or 0, epoch)


def pad(tokens: Ragged, items: Sequence[int], padding: int, epoch: int = 0) -> TokenBatch:
    """Token ids of B texts as a batch, padded on the right to the longest.

    A text without any token gets one padding token as its only real one. No texts at all give L = 2.

    Args:
        tokens: of B texts.
        items: [B] their catalog rows.
        padding: id of the padding token.
        epoch: passed on to the batch.
    """
    lengths = np.diff(tokens.offsets)
    assert len(lengths) == len(items), (len(lengths), len(items))
    rows = torch.as_tensor(np.asarray(items, dtype=np.int64))
    shown = np.maximum(lengths, 1)
    real = np.arange(shown.max(initial=1 if len(shown) else 2)) < shown[:, None]
    padded = np.full(real.shape, padding, dtype=np.int64)
    padded[np.arange(real.shape[1]) < lengths[:, None]] = tokens.values
    mask = torch.from_numpy(real.astype(np.int64))
    return TokenBatch(rows, torch.from_numpy(padded), mask, epoch, tuple(shown.tolist()))
