import pytest
import torch
from torch import Tensor, nn

from ctrdist.group import Group, attach_group

SPLITS = [[3, 4], [7, 0], [0, 7], [1, 6], [0, 0]]


def rows(count: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(count, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def share(group: Group, split: list[int]) -> slice:
    start = sum(split[: group.rank])
    return slice(start, start + split[group.rank]) if group.size > 1 else slice(None)


def group_loss(group: Group, split: list[int]) -> tuple[Tensor, Tensor]:
    """A loss that mixes all rows with all rows, and the gradient of a matrix that every worker has."""
    weight = rows(3, 2, seed=9).requires_grad_()
    own = torch.tanh(rows(sum(split), 3)[share(group, split)] @ weight)
    everyone = group.all_gather(own)
    spread = group.all_reduce((own @ everyone.T).exp().sum())
    mean = group.all_reduce(own.sum(0)) / max(1, sum(split))
    loss = torch.log1p(spread) + mean.square().sum()
    loss.backward()
    return loss.detach(), weight.grad


def operations(group: Group, splits: list[list[int]]) -> list[dict[str, Tensor]]:
    out = []
    for split in splits:
        own = rows(sum(split), 3)[share(group, split)].clone().requires_grad_()
        joined = group.all_gather(own)
        (joined.square() * rows(sum(split), 3, seed=10 + group.rank)).sum().backward()
        loss, gradient = group_loss(group, split)
        ids = torch.arange(sum(split))[share(group, split)]
        out.append(
            {
                "joined": joined.detach(),
                "gradient": own.grad,
                "sizes": torch.tensor(group.sizes(own)),
                "ids": group.all_gather(ids),
                "vectors": group.all_gather(torch.full((split[group.rank],), float(group.rank))),
                "loss": loss,
                "weight": gradient,
            }
        )
    # A transposed value: what is summed is the value, not its memory; and the value itself stays.
    value = rows(4, 3, seed=group.rank).T.requires_grad_()
    value.retain_grad()
    total = group.all_reduce(value)
    (total.sin() * rows(3, 4, seed=20 + group.rank)).sum().backward()
    out.append({"total": total.detach(), "gradient": value.grad, "value": value.detach()})
    scalar = group.all_reduce(torch.tensor(2.5 + group.rank))
    out.append({"scalar": scalar})
    return out


def test_two_workers(two_workers):
    found = two_workers(operations, SPLITS)
    for at, split in enumerate(SPLITS):
        everything = rows(sum(split), 3)
        slope = 2 * everything * (rows(sum(split), 3, seed=10) + rows(sum(split), 3, seed=11))
        for rank, worker in enumerate(found):
            start = sum(split[:rank])
            assert torch.equal(worker[at]["joined"], everything)
            torch.testing.assert_close(worker[at]["gradient"], slope[start : start + split[rank]], rtol=1e-14, atol=0)
            assert worker[at]["sizes"].tolist() == split
            assert worker[at]["ids"].tolist() == list(range(sum(split))) and worker[at]["ids"].dtype == torch.int64
            assert worker[at]["vectors"].tolist() == [0.0] * split[0] + [1.0] * split[1]
        loss, weight = group_loss(Group(), split)
        assert torch.equal(found[0][at]["loss"], found[1][at]["loss"])
        torch.testing.assert_close(found[0][at]["loss"], loss, rtol=1e-12, atol=0)
        mean = (found[0][at]["weight"] + found[1][at]["weight"]) / 2
        torch.testing.assert_close(mean, weight, rtol=1e-10, atol=1e-13)
        assert bool(weight.any()) == (sum(split) > 0)
    values = [rows(4, 3, seed=rank).T for rank in range(2)]
    total = values[0] + values[1]
    slope = total.cos() * (rows(3, 4, seed=20) + rows(3, 4, seed=21))
    for rank, worker in enumerate(found):
        torch.testing.assert_close(worker[-2]["total"], total, rtol=1e-14, atol=0)
        torch.testing.assert_close(worker[-2]["gradient"], slope, rtol=1e-14, atol=0)
        assert torch.equal(worker[-2]["value"], values[rank])
        assert worker[-1]["scalar"].item() == 2.5 + 3.5


COUNTS = [[[1, 2], [0, 3]], [[0, 0], [0, 0]], [[0, 4], [0, 0]], [[2, 0], [5, 0]]]


def exchanges(group: Group, cases: list[list[list[int]]]) -> list[dict[str, Tensor]]:
    """For each matrix of how much each worker has for each: what arrives, and the bytes that were sent for it."""
    out = []
    for counts in cases:
        own, before = counts[group.rank], group.sent
        received = group.exchange(torch.tensor(own)).tolist()
        counted = group.sent - before
        values = torch.arange(2 * sum(own), dtype=torch.float32).view(-1, 2) + 100 * group.rank
        for value in (values, values[:, 0].long()):
            before = group.sent
            found = group.all_to_all(value, own, received)
            out.append({"received": torch.tensor(received), "found": found, "sent": group.sent - before,
                        "counted": counted})  # fmt: skip
    return [*out, {"shared": group.share({"rank": group.rank, "text": "é"})}]


def test_two_workers_exchange_rows(two_workers):
    found = two_workers(exchanges, COUNTS)
    for case, counts in enumerate(COUNTS):
        for rank, worker in enumerate(found):
            pieces = []
            for source in range(2):
                values = torch.arange(2 * sum(counts[source]), dtype=torch.float32).view(-1, 2) + 100 * source
                pieces.append(values[: counts[source][0]] if rank == 0 else values[counts[source][0] :])
            expected = torch.cat(pieces)
            for at, (value, size) in enumerate(((expected, 8), (expected[:, 0].long(), 8))):
                part = worker[2 * case + at]
                assert torch.equal(part["found"], value) and part["found"].dtype == value.dtype
                assert part["received"].tolist() == [row[rank] for row in counts]
                assert part["sent"] == size * counts[rank][1 - rank] and part["counted"] == 8
    assert [worker[-1]["shared"] for worker in found] == [[{"rank": rank, "text": "é"} for rank in range(2)]] * 2


def test_alone_everything_stays_here():
    group, value = Group(), rows(3, 2)
    assert group.all_to_all(value, [3], [3]) is value and group.exchange(torch.tensor([3])).tolist() == [3]
    assert group.share("x") == ["x"] and group.sent == 0


@pytest.mark.parametrize("count", [0, 3])
def test_one_worker_alone(count: int):
    group, value = Group(), rows(count, 2)
    assert (group.rank, group.size, group.sizes(value)) == (0, 1, [count])
    assert torch.equal(group.all_reduce(value), rows(count, 2)) and torch.equal(group.all_gather(value), rows(count, 2))


def test_attach_group_reaches_nested_modules_that_have_one():
    outer, inner, other = nn.Sequential(), nn.Linear(1, 1), nn.Linear(1, 1)
    outer.append(nn.Sequential(inner, other))
    outer.group, inner.group, other.group = Group(), Group(), "a name of its own"
    group = Group()
    attach_group(outer, group)
    assert outer.group is group and inner.group is group
    assert other.group == "a name of its own" and not hasattr(outer[0], "group")
