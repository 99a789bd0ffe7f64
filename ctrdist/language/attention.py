"""Attention of the language models: PyTorch's own, and on a CPU, where that has no quick one with dropout, ours."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ctrdist.dropout import drop

NAME = "ctrdist"
"""What transformers calls it."""


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of transformers' interface: dropout(softmax(scaling query key^T)) value, of each head. Scores have the
    precision of queries, as in transformers' own `eager`.

    With dropout on a CPU PyTorch takes 2.5 times as long as this (measured: bfloat16, 12 heads of 32, 64 tokens,
    backward pass included), most of it for random numbers and in copies.

    Args:
        module: the attention that calls.
        query: [B, heads, T, d].
        key: [B, heads or fewer, S, d].
        value: [B, heads or fewer, S, d].
        attention_mask: bool [B, 1, T, S], true where a token is seen; None = all are or, if the module is causal, all
            before.
        dropout: share of the weights that are dropped.
        scaling: d^-1/2 if not given.
        options: as `sdpa_attention_forward` takes them.

    Returns:
        [B, T, heads, d].
    """
    ours = dropout > 0 and query.device.type == "cpu" and (attention_mask is None or attention_mask.dtype == torch.bool)
    if not ours or any(options.get(name) is not None for name in ("position_bias", "softcap", "is_causal")):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    batch, heads, length, width = query.shape
    key, value = (repeat_kv(x, heads // x.shape[1]).flatten(0, 1) for x in (key, value))
    scaled = query.flatten(0, 1) * (width**-0.5 if scaling is None else scaling)
    scores = torch.bmm(scaled, key.transpose(1, 2)).view(batch, heads, length, -1)
    if attention_mask is None and length > 1 and getattr(module, "is_causal", True):
        attention_mask = torch.ones_like(scores[:1, :1], dtype=torch.bool).tril(scores.shape[3] - length)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = drop(torch.softmax(scores, -1), dropout).to(value.dtype)
    return torch.bmm(weights.flatten(0, 1), value).view(batch, heads, length, -1).transpose(1, 2), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
