import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ctrdist.batch import Lookup
from ctrdist.embedding import EmbeddingTable, bag_mean, push_all, sum_rows, sum_runs, tables_of
from ctrdist.group import Group
from ctrdist.items import Ragged
from ctrdist.losses import global_mean
from ctrdist.optim import ROW_OPTIMIZERS, RowAdam
from ctrdist.sharded import ShardedTable

STATE = ("weight", "exp_avg", "exp_avg_sq", "steps")


def table_of(rows: int, dim: int = 3, seed: int = 0, **options: float) -> EmbeddingTable:
    return EmbeddingTable(rows, dim, RowAdam(**options), std=1.0, seed=seed).double()


def lookup(*ids: int) -> Lookup:
    return Lookup.of(np.array(ids, np.int64))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class RowByRow:
    """The same by dense PyTorch: each row a parameter with an Adam of its own that steps when the row is named."""

    def __init__(self, table: EmbeddingTable) -> None:
        self.rows = [nn.Parameter(row.clone()) for row in table.weight]
        rule = table.optimizer
        self.adams = [torch.optim.Adam([r], lr=rule.lr, weight_decay=rule.weight_decay) for r in self.rows]

    def __call__(self, ids: list[int]) -> Tensor:
        return torch.stack([self.rows[row] for row in ids]) if ids else noise(0, 3)

    def step(self, ids: set[int], lr_scale: float = 1.0) -> None:
        for row in ids - {0}:
            for group in self.adams[row].param_groups:
                group["lr"] = group["lr"] * lr_scale
            self.adams[row].step()
            for group in self.adams[row].param_groups:
                group["lr"] = group["lr"] / lr_scale
        for parameter in self.rows:
            parameter.grad = None

    @property
    def weight(self) -> Tensor:
        return torch.stack([row.detach() for row in self.rows])


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_with_every_row_touched_a_step_is_dense_adam(weight_decay: float):
    table = table_of(6, lr=0.1, weight_decay=weight_decay)
    dense = nn.Embedding(6, 3, padding_idx=0, _weight=table.weight.clone())
    adam = torch.optim.Adam(dense.parameters(), lr=0.1, weight_decay=weight_decay)
    ids = [5, 1, 2, 4, 4, 3, 1, 0]
    for step in range(6):
        goal = noise(8, 3, seed=step)
        (table(lookup(*ids)) - goal).square().mean().backward()
        table.push(Group())
        adam.zero_grad()
        (dense(torch.tensor(ids)) - goal).square().mean().backward()
        adam.step()
        torch.testing.assert_close(table.weight, dense.weight.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("scale", [1.0, 1e-8])
def test_each_row_has_an_adam_of_its_own(scale: float):
    # Gradients as small as epsilon show where it is added.
    table = table_of(7, lr=0.05, weight_decay=0.2 if scale == 1 else 0.0)
    reference = RowByRow(table)
    draws = np.random.default_rng(0)
    for step, size in enumerate([5, 1, 9, 0, 3, 12, 2]):
        ids = draws.integers(0, 7, size).tolist()
        factor = 1 - step / 10
        (table(lookup(*ids)).sin() * noise(size, 3, seed=step)).sum().mul(scale).backward()
        table.push(Group(), factor)
        if size:
            (reference(ids).sin() * noise(size, 3, seed=step)).sum().mul(scale).backward()
        reference.step(set(ids), factor)
        torch.testing.assert_close(table.weight, reference.weight, rtol=1e-11, atol=1e-13)


def test_rows_that_a_batch_does_not_name_do_not_change_a_bit():
    table = table_of(50, lr=0.1, weight_decay=0.5)
    for ids in ([3, 7, 7, 0], [40, 3, 2]):
        before = {name: getattr(table, name).clone() for name in STATE}
        table(lookup(*ids)).square().sum().backward()
        table.push(Group())
        touched = sorted(set(ids) - {0})
        others = [row for row in range(50) if row not in touched]
        assert table.rows_touched == len(touched)
        for name in STATE:
            assert torch.equal(getattr(table, name)[others], before[name][others]), name
            assert (getattr(table, name)[touched] != before[name][touched]).any(-1).all(), name


def test_padding_is_zero_and_stays():
    table = table_of(4, lr=0.1, weight_decay=0.5)
    assert not table.weight[0].any() and table.weight[1:].any(1).all()
    for _ in range(3):
        vectors = table(lookup(0, 2, 0))
        assert not vectors[0].any()
        (vectors - 1).square().sum().backward()
        table.push(Group())
    assert not any(getattr(table, name)[0].any() for name in STATE)


def test_several_look_ups_in_a_step_add_up():
    table = table_of(8, lr=0.1, weight_decay=0.1)
    reference = RowByRow(table)
    asked = ([1, 2, 2], [2, 5], [], [6, 1, 6])
    for step in range(3):
        loss = sum((table(lookup(*ids)).exp() * noise(len(ids), 3, seed=step + 5 * i)).sum() for i, ids in
                   enumerate(asked))  # fmt: skip
        loss.backward()
        table.push(Group())
        same = sum((reference(ids).exp() * noise(len(ids), 3, seed=step + 5 * i)).sum() for i, ids in enumerate(asked))
        same.backward()
        reference.step({1, 2, 5, 6})
        torch.testing.assert_close(table.weight, reference.weight, rtol=1e-12, atol=1e-14)
    assert table.rows_touched == 4


def test_a_look_up_without_gradients_is_not_trained_on():
    table = table_of(5, lr=0.1)
    before = table.weight.clone()
    with torch.no_grad():
        vectors = table(lookup(2, 3))
    table.push(Group())
    assert torch.equal(vectors, before[2:4]) and torch.equal(table.weight, before) and table.rows_touched == 0


def test_bags_are_means_and_train_as_means():
    bags = [[2, 3, 3], [], [4], [5, 2], []]
    offsets = np.cumsum([0, *map(len, bags)])
    table = table_of(6, lr=0.1)
    reference = RowByRow(table)
    asked = Lookup.of(Ragged(np.array(sum(bags, []), np.int32), offsets))
    expected = torch.stack([torch.stack([table.weight[i] for i in bag]).mean(0) if bag else noise(3) * 0 for bag in
                            bags])  # fmt: skip
    torch.testing.assert_close(table(asked).detach(), expected, rtol=1e-14, atol=0)
    table._pending.clear()
    for step in range(3):
        goal = noise(5, 3, seed=step)
        (table(asked) - goal).square().sum().backward()
        table.push(Group())
        sum((reference(bag).mean(0) - goal[i]).square().sum() for i, bag in enumerate(bags) if bag).backward()
        reference.step({2, 3, 4, 5})
        torch.testing.assert_close(table.weight, reference.weight, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("counts", [[2, 0, 3, 1], [0, 0], [], [4], [0, 1]])
def test_bag_mean(counts: list[int]):
    values, offsets = noise(sum(counts), 2), torch.tensor([0, *counts]).cumsum(0)
    expected = [
        values[a:b].mean(0) if b > a else values.new_zeros(2) for a, b in zip(offsets, offsets[1:], strict=False)
    ]
    out = bag_mean(values, offsets)
    assert out.shape == (len(counts), 2)
    for row, mean in zip(out, expected, strict=True):
        torch.testing.assert_close(row, mean)


def test_sum_rows():
    ids, values = torch.tensor([7, 2, 7, 7, 0, 2]), noise(6, 2)
    distinct, sums = sum_rows(ids, values)
    assert distinct.tolist() == [0, 2, 7]
    for row, total in zip([0, 2, 7], sums, strict=True):
        torch.testing.assert_close(total, sum(values[i] for i in range(6) if ids[i] == row))
    distinct, sums = sum_rows(ids[:0], values[:0])
    assert distinct.shape == (0,) and sums.shape == (0, 2)


@pytest.mark.parametrize("ids", [[7, 2, 7, 7, 0, 2], [3], [], [5] * 40, list(range(30)) * 3])
def test_runs_are_summed_as_rows_are(ids: list[int]):
    ids, values = torch.tensor(ids, dtype=torch.int64), noise(len(ids), 2)
    _, inverse, counts = torch.unique(ids, return_inverse=True, return_counts=True)
    assert torch.equal(sum_runs(values[inverse.argsort(stable=True)], counts), sum_rows(ids, values)[1])


def test_growing_keeps_rows_and_their_state():
    table = table_of(4, lr=0.1)
    table(lookup(1, 3)).sum().backward()
    table.push(Group())
    before = {name: getattr(table, name).clone() for name in STATE}
    table.grow(3)
    assert table.rows == 4
    table.grow(9)
    assert table.rows == 9
    for name in STATE:
        assert torch.equal(getattr(table, name)[:4], before[name]), name
        assert name == "weight" or not getattr(table, name)[4:].any(), name
    assert table.weight[4:].any(1).all() and len(table.weight[1:].unique(dim=0)) == 8
    assert set(table.state_dict()) == set(STATE)
    reference = RowByRow(table)
    (table(lookup(8, 8, 5)) * noise(3, 3)).sum().backward()
    table.push(Group())
    (reference([8, 8, 5]) * noise(3, 3)).sum().backward()
    reference.step({8, 5})
    torch.testing.assert_close(table.weight, reference.weight, rtol=1e-12, atol=1e-14)


def test_weights_follow_the_seed():
    first, again, other = (EmbeddingTable(2000, 4, RowAdam(), std=0.5, seed=seed).weight for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first[1:], other[1:])
    assert first[1:].std().item() == pytest.approx(0.5, rel=0.05) and abs(first[1:].mean().item()) < 0.02


def test_a_table_that_grew_has_the_rows_of_one_made_at_once():
    whole = EmbeddingTable(70_000, 2, RowAdam(), seed=3).weight
    table = EmbeddingTable(5, 2, RowAdam(), seed=3)
    for rows in (6, 1023, 1024, 1025, 3000, 70_000):
        table.grow(rows)
        assert torch.equal(table.weight, whole[:rows]) and len(table.steps) == rows


class Allocations(TorchDispatchMode):
    """Notes the size of every tensor that an operation makes (in-place results are no new tensors)."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        out = function(*arguments, **(options or {}))
        given = {value.data_ptr() for value in arguments if isinstance(value, Tensor)}
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, Tensor) and value.data_ptr() not in given:
                self.largest, self.count = max(self.largest, value.numel()), self.count + 1
        return out


@pytest.mark.parametrize("rule", ROW_OPTIMIZERS)
def test_a_step_makes_nothing_of_the_tables_size(rule: str):
    table = EmbeddingTable(100_000, 4, ROW_OPTIMIZERS[rule](weight_decay=0.1))
    places = {name: buffer.data_ptr() for name, buffer in table.named_buffers()}
    with Allocations() as seen:
        table(lookup(5, 77_000, 5)).sum().backward()
        table.push(Group())
    assert seen.count > 10 and seen.largest <= 3 * table.packed[0].nbytes // 4, "three rows at most"
    assert places == {name: buffer.data_ptr() for name, buffer in table.named_buffers()}
    with Allocations() as seen:
        table.weight * 2
    assert seen.largest == 400_000


def test_renewed_rows_are_like_new_and_others_stay():
    table = table_of(9, lr=0.1)
    for _ in range(3):
        table(lookup(1, 4, 7)).sum().backward()
        table.push(Group())
    before = {name: getattr(table, name).clone() for name in STATE}
    table.renew(torch.tensor([4, 6]))
    kept = torch.tensor([0, 1, 2, 3, 5, 7, 8])
    for name in STATE:
        assert torch.equal(getattr(table, name)[kept], before[name][kept]), name
        if name != "weight":
            assert not getattr(table, name)[[4, 6]].any(), name
    drawn = table.weight[[4, 6]]
    assert not torch.isin(drawn, before["weight"]).any() and drawn.abs().max() < 6 * table.std
    table.renew(torch.empty(0, dtype=torch.int64))
    table.renew(torch.tensor([0]))
    assert not table.weight[0].any()


def test_tables_of_finds_all_and_ddp_would_see_none():
    module = nn.ModuleDict({"b": table_of(3), "a": nn.Sequential(nn.Linear(1, 1), table_of(4))})
    assert [table.rows for table in tables_of(module)] == [3, 4]
    assert len(list(module.parameters())) == 2


def train(group: Group, steps: list[list[list[int]]]) -> list[dict[str, Tensor]]:
    """Steps on one table, each with the ids of either worker; None asks for no look-up at all."""
    table, out = table_of(9, lr=0.1, weight_decay=0.2), []
    for step, ids_of in enumerate(steps):
        everyone = [i for ids in ids_of for i in ids or []]
        ids = (ids_of[group.rank] if group.size > 1 else everyone) or []
        goal = noise(9, 3, seed=step)
        if group.size == 1 or ids_of[group.rank] is not None:
            total = (table(lookup(*ids)) - goal[ids]).pow(2).sum()
        else:
            total = goal.new_zeros((), requires_grad=True)
        global_mean(total, len(ids), group).backward()
        table.push(group)
        out.append(
            {name: getattr(table, name).clone() for name in STATE} | {"touched": torch.tensor(table.rows_touched)}
        )
    return out


def test_two_workers_keep_the_table_of_one(two_workers):
    steps = [
        [[1, 2, 2, 5], [2, 7]],
        [[3, 3], []],
        [[], [8, 1, 0]],
        [[], []],
        [[4], None],
        [[0], [0]],
        [[1, 2, 3, 4, 5, 6, 7], [5, 5, 5]],
    ]
    alone = train(Group(), steps)
    first, second = two_workers(train, steps)
    for one, left, right in zip(alone, first, second, strict=True):
        for name, value in one.items():
            assert torch.equal(left[name], right[name]), name
            torch.testing.assert_close(left[name], value, rtol=1e-12, atol=1e-14, msg=name)


def train_several(group: Group, together: bool) -> list[list[Tensor]]:
    """Three steps on tables of several widths and both stores, pushed `together` or one by one; their weights."""
    sizes = [(9, 3), (5, 1), (700, 4), (6, 2)]
    tables = [table_of(rows, dim=dim, lr=0.1) for rows, dim in sizes[:3]]
    tables.append(ShardedTable(*sizes[3], RowAdam(lr=0.1), group=group).double())
    for step in range(3):
        draw = np.random.default_rng((step, group.rank))
        for table, (rows, dim) in zip(tables, sizes, strict=True):
            count = 0 if dim == step + 1 and group.rank else 4  # at times this worker has none
            ids = draw.integers(0, rows, count).tolist()
            (table(lookup(*ids)) - noise(rows, dim, seed=step)[ids]).pow(2).sum().backward()
        if together:
            push_all(tables, group)
        else:
            for table in tables:
                push_all([table], group)
    assert all(table.traffic > 0 for table in tables)
    return [table.gather("weight", torch.arange(table.rows)) for table in tables]


def test_tables_pushed_together_are_those_pushed_one_by_one(two_workers):
    together, alone = two_workers(train_several, True), two_workers(train_several, False)
    for one, other in zip(together[0] + together[1], alone[0] + alone[1], strict=True):
        assert torch.equal(one, other) and one.any()
    for left, right in zip(*together, strict=True):
        assert torch.equal(left, right)
