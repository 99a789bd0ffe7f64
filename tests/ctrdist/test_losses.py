import math

import pytest
import torch
from torch import Tensor

from ctrdist import losses
from ctrdist.errors import UserError
from ctrdist.group import Group

SPLITS = [[3, 4], [7, 0], [0, 7], [1, 6]]


def rows(count: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(count, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_binary_cross_entropy_is_equation_2():
    logit, label = rows(5), torch.tensor([0, 1, 1, 0, 1])
    total = 0.0
    for z, y in zip(logit.tolist(), label.tolist(), strict=True):
        p = 1 / (1 + math.exp(-z))
        total -= y * math.log(p) + (1 - y) * math.log(1 - p)
    assert losses.binary_cross_entropy(logit, label).item() == pytest.approx(total / 5, abs=1e-12)


def test_info_nce_of_equal_vectors_is_log_of_the_batch():
    same = torch.ones(6, 3)
    for similarity in ("dot", "cosine"):
        assert losses.info_nce(same, same, 0.5, similarity=similarity).item() == pytest.approx(math.log(6), abs=1e-6)
    assert losses.symmetric_info_nce(same, same, 1.0).item() == pytest.approx(2 * math.log(6), abs=1e-6)


def test_info_nce_of_perfectly_aligned_vectors_is_zero():
    axes = torch.eye(6)
    assert losses.info_nce(axes * 100, axes, 1.0).item() == pytest.approx(0, abs=1e-6)
    assert losses.info_nce(axes * 7, axes * 3, 0.01, similarity="cosine").item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_info_nce_is_equation_10(similarity: str):
    query, key, temperature = rows(5, 3), rows(5, 3, seed=1), 0.7

    def sim(a: Tensor, b: Tensor) -> float:
        norm = a.norm() * b.norm() if similarity == "cosine" else 1.0
        return float(a @ b / norm) / temperature

    def one_way(queries: Tensor, keys: Tensor) -> float:
        total = 0.0
        for i in range(5):
            total -= math.log(math.exp(sim(queries[i], keys[i])) / sum(math.exp(sim(queries[i], k)) for k in keys))
        return total / 5

    forth = losses.info_nce(query, key, temperature, similarity=similarity)
    both = losses.symmetric_info_nce(query, key, temperature, similarity=similarity)
    assert forth.item() == pytest.approx(one_way(query, key), abs=1e-12)
    assert both.item() == pytest.approx(one_way(query, key) + one_way(key, query), abs=1e-12)


def test_language_model_total_is_equation_4():
    logits, targets = rows(4, 5), torch.tensor([0, 4, 2, 2])
    total = -sum(math.log(torch.softmax(row, 0)[t].item()) for row, t in zip(logits, targets, strict=True))
    assert losses.language_model_total(logits, targets).item() == pytest.approx(total, abs=1e-12)


LOGITS = [(-1.3, 0.4), (0.2, -2.0), (2.5, 1.1), (-4.0, -3.0), (0.0, 0.7)]
"""Of a student and a teacher."""


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def by_hand(kind: str) -> float:
    """The distillation of LOGITS, written as the papers do."""
    students, teachers = zip(*LOGITS, strict=True)
    if kind == "pointwise":
        pairs = [(sigmoid(s), sigmoid(t)) for s, t in LOGITS]
        return -sum(t * math.log(s) + (1 - t) * math.log(1 - s) for s, t in pairs) / 5
    value = sigmoid if kind == "clid" else math.exp
    own, its = sum(map(value, students)), sum(map(value, teachers))
    return -sum(value(t) / its * math.log(value(s) / own) for s, t in LOGITS)


@pytest.mark.parametrize("kind", losses.SCORE_LOSSES)
def test_score_distillation_is_what_the_papers_say(kind: str):
    student, teacher = torch.tensor(LOGITS, dtype=torch.float64).T
    found = losses.score_distillation(student, teacher, kind)
    assert found.item() == pytest.approx(by_hand(kind), abs=1e-12)
    order = torch.tensor([3, 0, 4, 2, 1])
    torch.testing.assert_close(losses.score_distillation(student[order], teacher[order], kind), found)
    if kind != "pointwise":
        assert losses.score_distillation(student, teacher, kind, mean=True).item() == pytest.approx(by_hand(kind) / 5)


@pytest.mark.parametrize("kind", losses.SCORE_LOSSES)
def test_distillation_moves_the_student_alone_and_rests_at_the_teacher(kind: str):
    student, teacher = torch.tensor(LOGITS, dtype=torch.float64).T
    student, teacher = student.clone().requires_grad_(), teacher.clone().requires_grad_()
    losses.score_distillation(student, teacher, kind).backward()
    assert student.grad.abs().min() > 1e-4 and teacher.grad is None
    alike = teacher.detach().clone().requires_grad_()
    losses.score_distillation(alike, teacher, kind).backward()
    torch.testing.assert_close(alike.grad, torch.zeros_like(alike), rtol=0, atol=1e-12)
    own, its = rows(5, 3).requires_grad_(), rows(5, 3, seed=1).requires_grad_()
    losses.representation_distillation(own, its).backward()
    torch.testing.assert_close(own.grad, 2 / 5 * (own - its).detach())
    assert its.grad is None


def test_representation_distillation_is_elec_equation_3():
    student, teacher = rows(5, 3), rows(5, 3, seed=1)
    expected = sum((a - b) ** 2 for a, b in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True))
    assert losses.representation_distillation(student, teacher).item() == pytest.approx(expected / 5, abs=1e-12)


def test_listwise_softmax_is_the_cross_entropy_of_pytorch_at_any_size_of_the_logits():
    student, teacher = 300 * torch.tensor(LOGITS).T
    expected = torch.nn.functional.cross_entropy(student, torch.softmax(teacher, 0))
    torch.testing.assert_close(losses.score_distillation(student, teacher, "softmax"), expected)
    assert losses.score_distillation(student - 90, teacher, "clid").isfinite()


def test_half_precision_is_summed_in_float32():
    assert losses.binary_cross_entropy(torch.zeros(4, dtype=torch.bfloat16), torch.ones(4)).dtype == torch.float32
    assert losses.info_nce(torch.ones(2, 3).bfloat16(), torch.ones(2, 3).bfloat16(), 1.0).dtype == torch.float32


def test_nothing_at_all_gives_zero_and_zero_gradients():
    for kind in losses.SCORE_LOSSES:
        for function in (losses.score_distillation, losses.local_score_distillation):
            empty = torch.zeros(0, requires_grad=True)
            loss = function(empty, torch.zeros(0), kind)
            loss.backward()
            assert loss.item() == 0 and empty.grad is not None
    logits = torch.zeros(0, 5, requires_grad=True)
    loss = losses.global_mean(losses.language_model_total(logits, torch.zeros(0, dtype=torch.int64)), 0)
    loss.backward()
    assert loss.item() == 0 and logits.grad is not None


def test_user_errors():
    with pytest.raises(UserError, match="similarity: unknown 'l2'; known: dot, cosine"):
        losses.info_nce(torch.ones(2, 3), torch.ones(2, 3), 1.0, similarity="l2")
    with pytest.raises(UserError, match="temperature: 0 "):
        losses.info_nce(torch.ones(2, 3), torch.ones(2, 3), 0)
    with pytest.raises(UserError, match="distillation: unknown 'kl'; known: clid, softmax, pointwise"):
        losses.score_distillation(torch.ones(2), torch.ones(2), "kl")


WEIGHTS = torch.tensor([3.0, 0.1, 0.0, 1.0, 0.5, 2.0, 0.01], dtype=torch.float64)


def test_weights_count_each_row_over_their_sum():
    query, key = rows(7, 4), rows(7, 4, seed=1)
    own = torch.log_softmax(query @ key.T / 0.5, 1).diagonal()
    expected = -(WEIGHTS * own).sum() / WEIGHTS.sum()
    torch.testing.assert_close(losses.info_nce(query, key, 0.5, weight=WEIGHTS), expected)
    torch.testing.assert_close(losses.info_nce(query, key, 0.5, weight=WEIGHTS / 1000), expected)
    torch.testing.assert_close(losses.info_nce(query, key, 0.5, weight=torch.full((7,), 9)),
                               losses.info_nce(query, key, 0.5))  # fmt: skip
    assert losses.info_nce(query, key, 0.5, weight=torch.zeros(7)) == 0


def local_loss(group: Group, split: list[int]) -> Tensor:
    start = sum(split[: group.rank])
    mine = slice(start, start + split[group.rank])
    return losses.info_nce(rows(7, 4)[mine], rows(7, 4, seed=1)[mine], 0.5, group, negatives="local")


def local_lists(group: Group, split: list[int]) -> Tensor:
    start = sum(split[: group.rank])
    mine = slice(start, start + split[group.rank])
    return losses.local_score_distillation(rows(7)[mine], rows(7, seed=1)[mine], "clid", group)


def all_losses(group: Group, split: list[int]) -> dict[str, list[Tensor]]:
    """Each loss and its gradient with respect to one shared matrix, from this worker's part of seven rows."""
    start = sum(split[: group.rank])
    mine = slice(start, start + split[group.rank]) if group.size > 1 else slice(None)
    out = {}
    for name in ("bce", "dot", "cosine", "symmetric", "frozen", "weighted", "mlm", "mse", *losses.SCORE_LOSSES):
        weight = rows(4, 4, seed=2).requires_grad_()
        query, key = rows(7, 4)[mine] @ weight, torch.tanh(rows(7, 4, seed=1)[mine] @ weight)
        if name == "bce":
            loss = losses.binary_cross_entropy(query[:, 0], torch.arange(7)[mine] % 2, group)
        elif name == "mlm":
            loss = losses.global_mean(losses.language_model_total(query, torch.arange(7)[mine] % 4), len(query), group)
        elif name in losses.SCORE_LOSSES:
            loss = losses.score_distillation(query[:, 0], key[:, 1], name, group, mean=name == "softmax")
        elif name == "mse":
            loss = losses.representation_distillation(query, key, group)
        elif name == "symmetric":
            loss = losses.symmetric_info_nce(query, key, 0.5, group)
        elif name == "frozen":
            loss = losses.symmetric_info_nce(query, key.detach(), 0.5, group, "cosine")
        elif name == "weighted":
            loss = losses.symmetric_info_nce(query, key, 0.5, group, "dot", WEIGHTS[mine])
        else:
            loss = losses.info_nce(query, key, 0.5, group, name)
        loss.backward()
        out[name] = [loss.detach(), weight.grad]
    return out


def every_split(group: Group, splits: list[list[int]]) -> list[dict[str, list[Tensor]]]:
    return [
        all_losses(group, split) | {"local": [local_loss(group, split)], "lists": [local_lists(group, split)]}
        for split in splits
    ]


def test_two_workers_have_the_loss_and_the_mean_gradient_of_one(two_workers):
    alone = all_losses(Group(), [])
    first, second = two_workers(every_split, SPLITS)
    for split, one, other in zip(SPLITS, first, second, strict=True):
        total = sum(torch.log_softmax(query @ key.T / 0.5, 1).diagonal().sum() for query, key in
                    zip(rows(7, 4).split(split), rows(7, 4, seed=1).split(split), strict=True))  # fmt: skip
        assert torch.equal(one["local"][0], other["local"][0])
        torch.testing.assert_close(one["local"][0], -total / 7)
        lists = [losses.score_distillation(s, t, "clid") for s, t in
                 zip(rows(7).split(split), rows(7, seed=1).split(split), strict=True) if len(s)]  # fmt: skip
        assert torch.equal(one["lists"][0], other["lists"][0])
        torch.testing.assert_close(one["lists"][0], torch.stack(lists).mean())
        for name, (loss, gradient) in alone.items():
            assert torch.equal(one[name][0], other[name][0]), (split, name)
            torch.testing.assert_close(one[name][0], loss, rtol=1e-12, atol=0)
            torch.testing.assert_close((one[name][1] + other[name][1]) / 2, gradient, rtol=1e-10, atol=1e-12)
