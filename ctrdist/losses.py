"""One function a loss. Each is the mean over the **global** batch: the same number on every worker of `group`, with
gradients whose mean over the workers is its gradient (see `ctrdist.group`).

A worker's share may be empty. Sums are taken in float32 or wider. All workers must call a loss together, and a model
should compute its outputs first and its losses last, so that the collectives of the backward pass come in one order.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ctrdist.errors import UserError
from ctrdist.group import Group

ALONE = Group()
SIMILARITIES = ("dot", "cosine")
NEGATIVES = ("global", "local")


def global_mean(total: Tensor, count: int | Tensor, group: Group = ALONE) -> Tensor:
    """A sum over this worker's rows -> the mean over all workers' rows, 0 where there are none.

    Args:
        total: scalar, the sum over this worker's rows.
        count: the number of this worker's rows, or the sum of their weights; a scalar tensor if only the device knows
            it.
        group: the workers.
    """
    both = group.all_reduce(torch.stack([total, torch.as_tensor(count).to(total)]), alike=True)
    return both[0] / both[1].where(both[1] > 0, 1)


def binary_cross_entropy(logit: Tensor, label: Tensor, group: Group = ALONE) -> Tensor:
    """Log loss of clicks.

        L = -1/N sum_k [y_k log p_k + (1 - y_k) log(1 - p_k)],  p = sigmoid(logit)

    CELA eq. 2.

    Args:
        logit: [B] float.
        label: [B], 0 or 1, any dtype; or probabilities (soft labels).
        group: the workers; N counts the rows of all.
    """
    logit = _wide(logit)
    total = F.binary_cross_entropy_with_logits(logit, label.to(logit.dtype), reduction="sum")
    return global_mean(total, logit.shape[0], group)


def in_batch_logits(
    query: Tensor, key: Tensor, temperature: float, group: Group = ALONE, similarity: str = "dot"
) -> tuple[Tensor, Tensor]:
    """This worker's queries against the keys of all workers: what `info_nce` classifies.

    Args:
        query: [B, D] float.
        key: [B, D] float, row k the positive of query k.
        temperature: divides the similarities; over 0.
        group: the workers; N is the number of keys of all.
        similarity: `dot` (inner product) or `cosine`.

    Returns:
        Logits [B, N] and each query's positive [B] (int64), its row in the global batch.

    Raises:
        UserError: a temperature of 0 or less, or an unknown similarity.
    """
    assert query.shape == key.shape and query.ndim == 2, (query.shape, key.shape)
    if temperature <= 0:
        raise UserError(f"temperature: {temperature} is not a number over 0")
    query, key = _wide(query), _wide(key)
    if similarity == "cosine":
        query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
    elif similarity != "dot":
        raise UserError(f"similarity: unknown '{similarity}'; known: {', '.join(SIMILARITIES)}")
    first = sum(group.sizes(query)[: group.rank])
    positive = torch.arange(first, first + query.shape[0], device=query.device)
    with torch.autocast(query.device.type, enabled=False):  # which would round the similarities to half precision
        return query @ group.all_gather(key).T / temperature, positive


def info_nce(
    query: Tensor,
    key: Tensor,
    temperature: float,
    group: Group = ALONE,
    similarity: str = "dot",
    weight: Tensor | None = None,
    negatives: str = "global",
) -> Tensor:
    """Contrastive loss: each query should find its own key among the keys of the whole global batch.

        L = -sum_i w_i / (sum_i w_i) log [ exp(sim(q_i, k_i) / t) / sum_j exp(sim(q_i, k_j) / t) ]

    CELA eq. 10 (ROMA, `dot`, t = 1) and eq. 5 (SimCSE, `cosine`, t = 0.05), with all w_i = 1. Each worker holds [B, N]
    similarities, never [N, N].

    Args:
        query: [B, D] float.
        key: [B, D] float, row k the positive of query k; the other rows, and the other workers' rows, are negatives.
        temperature: t, over 0.
        group: the workers; i runs over the queries of all.
        similarity: `dot` or `cosine`.
        weight: w [B], 0 or more; 1 if None.
        negatives: `global`, or `local`: j runs over this worker's keys only.

    Raises:
        UserError: a temperature of 0 or less, or an unknown similarity.
    """
    logits, positive = in_batch_logits(query, key, temperature, among(group, negatives), similarity)
    if weight is None:
        return global_mean(F.cross_entropy(logits, positive, reduction="sum"), logits.shape[0], group)
    weight = weight.to(logits.dtype)
    each = F.cross_entropy(logits, positive, reduction="none")
    return global_mean((weight * each).sum(), weight.sum(), group)


def among(group: Group, negatives: str) -> Group:
    """The workers that the negatives come from: `global` is all of `group`, `local` this one alone."""
    assert negatives in NEGATIVES, negatives
    return ALONE if negatives == "local" else group


def symmetric_info_nce(
    text: Tensor,
    item: Tensor,
    temperature: float,
    group: Group = ALONE,
    similarity: str = "dot",
    weight: Tensor | None = None,
    negatives: str = "global",
) -> Tensor:
    """InfoNCE in both directions, summed.

        L = L_tn + L_nt = info_nce(text, item) + info_nce(item, text)

    CELA eq. 12. Not halved: the chance level is 2 log N.

    Args:
        text: [B, D] float, vectors of the items' texts.
        item: [B, D] float, vectors of the same items' other features; may need no gradient.
        temperature: over 0.
        group: the workers.
        similarity: `dot` or `cosine`.
        weight: [B], of the items, in both directions; 1 if None.
        negatives: `global` or `local`.

    Raises:
        UserError: a temperature of 0 or less, or an unknown similarity.
    """
    options = (temperature, group, similarity, weight, negatives)
    return info_nce(text, item, *options) + info_nce(item, text, *options)


def language_model_total(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of the words that a language model is to predict, as a sum over this worker's.

        L = -sum_m log P(x_m | what the state of m has read)

    CELA eq. 4 for masked words. `global_mean` makes it the mean over the words of all parts and workers, which keeps
    its scale when batches differ.

    Args:
        logits: [M, V] float, at the positions that predict a word only.
        targets: [M] int64, the words.
    """
    return F.cross_entropy(_wide(logits), targets, reduction="sum")


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))
