"""A batch of texts computed in parts of like length, and with gradient caching in the memory of one part."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint

from ctrdist.language.tokens import TokenBatch

BUCKETS = 4
"""Parts of like length that a worker's texts are computed in, where memory does not ask for more."""


def in_parts(compute: Callable[[TokenBatch], Any], batch: TokenBatch, chunk: int) -> list[tuple[TokenBatch, Any]]:
    """(part, `compute(part)`) for each of a batch's parts, which hold its texts sorted by length.

    Args:
        compute: parts' texts -> tensors.
        chunk: most texts of a part, of which only `compute`'s results are kept: the backward pass computes it again,
            with the same random state, so that memory follows the chunk and gradients stay the same (gradient
            caching). 0 = `BUCKETS` parts, all kept.
    """
    if not chunk:
        return [(part, compute(part)) for part in batch.buckets(BUCKETS)]
    parts = batch.buckets(max(1, -(-len(batch) // chunk)))
    # The ids are an argument of their own because the random state is kept of the devices of those that are tensors.
    again = partial(checkpoint, lambda part, _ids: compute(part), use_reentrant=False)
    return [(part, again(part, part.input_ids)) for part in parts]
