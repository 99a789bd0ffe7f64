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
SCORE_LOSSES = ("clid", "softmax", "pointwise")
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


def score_distillation(student: Tensor, teacher: Tensor, kind: str, group: Group = ALONE, mean: bool = False) -> Tensor:
    """What a student's scores are to learn from a teacher's, of the same rows. No gradient reaches the teacher.

    - `clid`, calibration-compatible listwise distillation (ELEC eq. 1 and 2; Gui et al. 2024): the cross-entropy of
      the probabilities normalised over the batch, p = sigmoid(logit).

          L = -sum_i Q_t,i log Q_s,i,  Q_i = p_i / sum_j p_j

    - `softmax`: the same of Q_i = exp(logit_i) / sum_j exp(logit_j), which leaves the level of the probabilities open.
    - `pointwise`: each row by itself, L = -1/N sum_i [p_t,i log p_s,i + (1 - p_t,i) log(1 - p_s,i)].

    A listwise loss is least, but not 0, where Q_s = Q_t: then it is about log N.

    Args:
        student: [B] float, logits.
        teacher: [B] float, logits of the same rows.
        kind: `clid`, `softmax` or `pointwise`.
        group: the workers; i, j and N run over the rows of all.
        mean: divide a listwise loss by N, as eq. 1 does; the larger the batch, the less it then weighs.

    Raises:
        UserError: an unknown kind.
    """
    if kind not in SCORE_LOSSES:
        raise UserError(f"distillation: unknown '{kind}'; known: {', '.join(SCORE_LOSSES)}")
    student, teacher = _wide(student), _wide(teacher.detach())
    if kind == "pointwise":
        return binary_cross_entropy(student, torch.sigmoid(teacher), group)
    if kind == "clid":
        student, teacher = F.logsigmoid(student), F.logsigmoid(teacher)
    shift = _largest(torch.stack([student.detach(), teacher]), group)
    student, teacher = student - shift[0], (teacher - shift[1]).exp()
    sums = torch.stack([student.exp().sum(), teacher.sum(), (teacher * student).sum()])
    rows = torch.as_tensor(student.shape[0]).to(sums)
    own, its, both, count = group.all_reduce(torch.cat([sums, rows.unsqueeze(0)]), alike=True)
    loss = own.where(own > 0, 1).log() - both / its.where(its > 0, 1)
    return loss / count.clamp(min=1) if mean else loss


def local_score_distillation(
    student: Tensor, teacher: Tensor, kind: str, group: Group = ALONE, mean: bool = False
) -> Tensor:
    """`score_distillation` within the rows of each worker, a list of its own: the mean over the workers with rows."""
    own = score_distillation(student, teacher, kind, ALONE, mean)
    return global_mean(own, int(student.shape[0] > 0), group)


def representation_distillation(student: Tensor, teacher: Tensor, group: Group = ALONE) -> Tensor:
    """Squared distance of a student's representations from a teacher's. No gradient reaches the teacher.

        L = 1/N sum_i |h_s,i - h_t,i|^2

    ELEC eq. 3: a sum over the H numbers of a representation, a mean over the rows.

    Args:
        student: [B, H] float.
        teacher: [B, H] float, of the same rows.
        group: the workers; N counts the rows of all.
    """
    assert student.shape == teacher.shape and student.ndim == 2, (student.shape, teacher.shape)
    return global_mean((_wide(student) - _wide(teacher.detach())).square().sum(), student.shape[0], group)


def _largest(values: Tensor, group: Group) -> Tensor:
    """The largest of each of k rows of `values` [k, B] over all workers: [k], 0 where there are none."""
    if not values.shape[1]:
        values = values.new_full((len(values), 1), -torch.inf)
    found = group.all_gather(values.amax(1, keepdim=True).T, [1] * group.size).amax(0)
    return found.where(found.isfinite(), 0)


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))
