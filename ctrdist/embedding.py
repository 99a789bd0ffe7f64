"""Embedding tables whose cost follows the batch, never the vocabulary.

A step fetches the distinct rows that its batch touches as a small dense leaf, computes on them, and pushes back their
gradients; the row-wise optimizer updates those rows only. What a row has, weights and state, lies side by side
(`ctrdist.packing`). Between workers, rows and their gradients are exchanged, never the table. Here every worker has a
replica and applies the same update to it; in `ctrdist.sharded` each holds some of the rows.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctrdist.batch import Lookup
from ctrdist.group import Group, current_group
from ctrdist.initial import initial_rows
from ctrdist.optim import RowOptimizer
from ctrdist.packing import pack, unpack
from ctrdist.rounding import round_randomly
from ctrdist.serving.vectors import bag_mean
from ctrdist.vocabulary import PADDING

CHUNK = 65_536
"""Rows that are drawn, or settled, at a time."""


class EmbeddingTable(nn.Module):
    """One table, replicated on every worker. Its weights are a buffer: DDP and dense optimizers never see them.

    `weight` and what the optimizer has for a row, by their names, are views of the columns of one buffer, `packed`.
    `rows_touched` is the number of rows that the last step updated here, and `traffic` the bytes that this worker has
    sent for the table so far (its share of what went for several tables together).

    Args:
        rows: rows of the table, padding (0) and unknown (1) included.
        dim: width.
        optimizer: what updates the rows that a batch touched.
        std: standard deviation of new rows, drawn from a normal distribution.
        seed: decides the draws, which depend on it and on the row's number alone (`ctrdist.initial`).
        group: the workers that have the table; those of `torch.distributed` if None.
        storage: dtype of the weights at rest, float32 or bfloat16. The optimizer computes in float32 and keeps its
            state in it; what goes back is rounded at random, so that small steps add up (`ctrdist.rounding`).
    """

    replicated = True
    """Whether every worker has all rows."""

    def __init__(
        self,
        rows: int,
        dim: int,
        optimizer: RowOptimizer,
        std: float = 0.01,
        seed: int = 0,
        group: Group | None = None,
        storage: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.group = group or current_group()
        self.dim, self.optimizer, self.std, self.seed = dim, optimizer, std, seed
        self.register_buffer("weight", torch.empty(0, dim, dtype=storage))
        for name, state in optimizer.init_state(torch.empty(0, dim)).items():
            self.register_buffer(name, state)
        self.state_names = optimizer.state_names
        if storage != torch.float32:
            self.register_buffer("roundings", torch.zeros((), dtype=torch.int64))
            self.state_names += ("roundings",)
        if optimizer.decoupled:
            # Logarithms of the decay of all steps so far, and of what each row has had of it.
            self.register_buffer("decay", torch.zeros((), dtype=torch.float64))
            self.register_buffer("decayed", torch.empty(0))
            self.state_names += ("decay", "decayed")
        self._pending: list[tuple[Any, Tensor]] = []
        self.rows = self.rows_touched = self.traffic = 0
        self._pack(0)
        self.grow(rows)

    def _pack(self, places: int) -> None:
        """Lay the rows side by side in a new buffer with room for `places`; what they hold stays."""
        held = self.row_buffers()
        self.packed = pack(held, places)
        for name, columns in unpack(self.packed, held).items():
            setattr(self, name, columns)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "EmbeddingTable":
        """Move or convert the table as `nn.Module` does, buffer by buffer, and lay its rows out again."""
        before = self.weight
        super()._apply(fn, recurse)
        if self.weight is not before:
            self._pack(len(self.weight))
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """What unpickles or copies a table; pickled views share no memory."""
        super().__setstate__(state)
        self._pack(len(self.weight))

    def grow(self, rows: int) -> None:
        """Add rows at the end until there are `rows`; those that are there stay as they are."""
        first = self.rows
        if rows <= first:
            return
        self.settle()
        places = self._held(rows)
        self._pack(places)
        self.rows = rows
        for start in range(0, places, CHUNK):
            chunk = torch.arange(start, min(start + CHUNK, places))
            self._begin(chunk[self.numbers(chunk) >= first])

    def renew(self, rows: Tensor) -> None:
        """Make `rows`, int64, like new ones: drawn, but not as at first, and with no state of the optimizer."""
        self.settle()
        self._begin(self.places(rows), salt=1)

    def _begin(self, places: Tensor, salt: int = 0) -> None:
        """Draw the rows at `places` and give them a new row's state; the table is settled."""
        drawn = initial_rows(self.numbers(places).numpy(), self.dim, self.seed, salt)
        self.weight[places] = (torch.from_numpy(drawn) * self.std).to(self.weight)
        for name, state in self.optimizer.init_state(self._wide(self.weight[places])).items():
            getattr(self, name)[places] = state
        if self.optimizer.decoupled:
            self.decayed[places] = 0

    def _held(self, rows: int) -> int:
        """Places that this worker has for a table of `rows`."""
        return rows

    def numbers(self, places: Tensor) -> Tensor:
        """The rows at this worker's `places`, int64: here, a row's place is its number."""
        return places

    def places(self, rows: Tensor) -> Tensor:
        """The places of those of `rows`, int64, that this worker holds."""
        return rows

    def holds(self, rows: Tensor) -> Tensor:
        """Which of `rows` this worker holds, bool."""
        return torch.ones_like(rows, dtype=torch.bool)

    def gather(self, name: str, rows: Tensor) -> Tensor:
        """What buffer `name` has for `rows`, int64 [n]: [n, ...]. The table is settled."""
        return getattr(self, name)[rows]

    def fetch(self, rows: Tensor) -> Tensor:
        """Values of `rows`, int64 [n], as of now: [n, dim]."""
        return self._fetch(rows)[0]

    def _fetch(self, rows: Tensor) -> tuple[Tensor, Any]:
        """Values of `rows`, and what `_collect` needs to know of them."""
        return self.read(rows), rows

    def _collect(self, group: Group) -> tuple[Tensor, Tensor]:
        """Rows of this worker's look-ups and their gradients; rows may repeat. What others are to know of is sent."""
        ids = [rows for rows, _ in self._pending] or [torch.empty(0, dtype=torch.int64, device=self.weight.device)]
        gradients = [gradient_of(leaf) for _, leaf in self._pending] or [self._wide(self.weight[:0])]
        return torch.cat(ids), torch.cat(gradients)

    def row_buffers(self) -> dict[str, Tensor]:
        """What the table holds for each row, by name."""
        return {name: value for name, value in self.named_buffers() if value.ndim}

    def read(self, places: Tensor) -> Tensor:
        """Values of the rows at `places` [n, dim], with the decay that they have missed."""
        names = ("weight", "decayed") if self.optimizer.decoupled else ("weight",)
        return self._values({name: getattr(self, name).index_select(0, places) for name in names})

    def _values(self, rows: dict[str, Tensor]) -> Tensor:
        """`read` of rows as they are stored, by name."""
        values = self._wide(rows["weight"])
        if not self.optimizer.decoupled:
            return values
        # As rounded in `decayed`: then the factors of a row's reads multiply to that of its whole time.
        missed = self.decay.to(rows["decayed"].dtype) - rows["decayed"]
        return values * missed.exp_().unsqueeze(1)

    @staticmethod
    def _wide(values: Tensor) -> Tensor:
        """Stored values as the optimizer and the network take them."""
        return values.float() if values.dtype == torch.bfloat16 else values

    def _stored(self, places: Tensor, values: Tensor) -> Tensor:
        """`values` [n, dim] of the rows at `places` as they are stored."""
        if self.weight.dtype == torch.bfloat16:
            return round_randomly(values, self.numbers(places), self.seed, self.roundings)
        return values

    def _count_rounding(self) -> None:
        if "roundings" in self.state_names:
            self.roundings += 1

    @torch.no_grad()
    def settle(self) -> None:
        """Give every row the decay that it has missed: before the weights are evaluated, exported or copied.

        Unlike a step, this costs time in proportion to the table; nothing, if its rows miss none.
        """
        if self.optimizer.decoupled and self.decay:
            self._count_rounding()
            for places in torch.arange(len(self.weight), device=self.weight.device).split(CHUNK):
                self.weight.index_copy_(0, places, self._stored(places, self.read(places)))
            self.decayed.zero_()
            self.decay.zero_()

    def forward(self, lookup: Lookup) -> Tensor:
        """Vectors of each value [n, dim], times its factor if there is one, or the mean of each bag [m, dim] (zeros for
        an empty one)."""
        rows, route = self._fetch(lookup.rows)
        if torch.is_grad_enabled():
            rows.requires_grad_()
            self._pending.append((route, rows))
        values = F.embedding(lookup.index, rows)
        if lookup.factors is not None:
            values = values * lookup.factors.to(values.dtype).unsqueeze(1)
        return values if lookup.offsets is None else bag_mean(values, lookup.offsets)

    @torch.no_grad()
    def push(self, group: Group, lr_scale: float = 1.0) -> None:
        """Update the rows fetched since the last push by the mean over the workers of their gradients.

        The padding row never changes. Call it on every worker after the backward pass; `push_all` does several tables
        at once.
        """
        push_all([self], group, lr_scale)

    def _descend(self, ids: Tensor, gradients: Tensor, distinct: bool, lr_scale: float) -> None:
        """Update rows by the sums of their gradients [n, dim], from all workers; `distinct` if none repeats."""
        if not distinct:
            ids, gradients = sum_rows(ids, gradients)
        keep = ids != PADDING
        ids, gradients = ids[keep], gradients[keep]
        self.rows_touched = len(ids)
        self._update(self.places(ids), gradients, lr_scale)

    def _update(self, places: Tensor, gradients: Tensor, lr_scale: float) -> None:
        """One step of the optimizer on the rows at distinct `places`, with `gradients` [R, dim], and of the decay."""
        if self.optimizer.decoupled:
            self.decay += math.log(self.optimizer.shrink(lr_scale))
        self._count_rounding()
        packed = self.packed.index_select(0, places)
        rows = unpack(packed, self.row_buffers())
        values = self.optimizer.step(self._values(rows), gradients, rows, lr_scale)
        rows["weight"].copy_(self._stored(places, values))
        if self.optimizer.decoupled:
            rows["decayed"].copy_(self.decay)
        self.packed.index_copy_(0, places, packed)


@torch.no_grad()
def push_all(tables: list[EmbeddingTable], group: Group, lr_scale: float = 1.0) -> None:
    """`EmbeddingTable.push` of several tables: rows and gradients of all replicated ones travel together."""
    collected, distinct = [], [group.size == len(table._pending) == 1 for table in tables]
    for table in tables:
        sent = group.sent
        collected.append(table._collect(group))
        table.traffic += group.sent - sent
        table._pending.clear()
    replicas = [number for number, table in enumerate(tables) if table.replicated]
    if group.size > 1 and replicas:
        sent, own = group.sent, [collected[number] for number in replicas]
        gathered = gather_rows(own, group)
        sent = group.sent - sent
        shares = [ids.nbytes + gradients.nbytes + ids.itemsize for ids, gradients in own]
        for number, share, everyones in zip(replicas, shares, gathered, strict=True):
            tables[number].traffic += round(sent * share / sum(shares))
            collected[number] = everyones
    for table, (ids, gradients), alone in zip(tables, collected, distinct, strict=True):
        table._descend(ids, gradients if alone else gradients / group.size, alone, lr_scale)


def gather_rows(own: list[tuple[Tensor, Tensor]], group: Group) -> list[tuple[Tensor, Tensor]]:
    """Ids [n] and rows [n, dim] of each table, of all workers, in rank order: two messages for all tables."""
    lengths = torch.tensor([len(ids) for ids, _ in own], device=own[0][0].device)
    counts = group.all_gather(lengths, [len(own)] * group.size).view(group.size, -1).tolist()
    dims, dtype = [rows.shape[1] for _, rows in own], own[0][1].dtype
    shares = [(sum(of_rank), sum(n * dim for n, dim in zip(of_rank, dims, strict=True))) for of_rank in counts]
    # As bytes: ids, rows, and what makes a share a multiple of an id, so that each share can be read as ids again.
    parts = [torch.cat([ids for ids, _ in own]), torch.cat([rows.flatten() for _, rows in own])]
    sizes = [8 * ids + -(-numbers * dtype.itemsize // 8) * 8 for ids, numbers in shares]
    sent = torch.cat([part.view(torch.uint8) for part in parts])
    sent = F.pad(sent, (0, sizes[group.rank] - len(sent)))
    found: list[list[tuple[Tensor, Tensor]]] = []
    everyones = group.all_gather(sent, sizes).split(sizes)
    for of_rank, (ids, numbers), share in zip(counts, shares, everyones, strict=True):
        rows = share[8 * ids :].view(dtype)[:numbers].split([n * dim for n, dim in zip(of_rank, dims, strict=True)])
        found.append(list(zip(share[: 8 * ids].view(torch.int64).split(of_rank), rows, strict=True)))
    return [
        (torch.cat([ids for ids, _ in of_table]), torch.cat([rows for _, rows in of_table]).view(-1, dim))
        for of_table, dim in zip(zip(*found, strict=True), dims, strict=True)
    ]


class Tables(nn.Module):
    """Tables, or other modules, by the name of their field; any will do, which `nn.ModuleDict` does not allow."""

    def __init__(self, tables: dict[str, EmbeddingTable] | dict[str, nn.Linear]) -> None:
        super().__init__()
        self.names = tuple(tables)
        for name, table in tables.items():
            self.add_module(self.key(name), table)

    @staticmethod
    def key(name: str) -> str:
        """The name under which a field's table stands in the state."""
        return "field_" + name.replace("%", "%25").replace(".", "%2E")

    def __getitem__(self, name: str) -> EmbeddingTable:
        return self.get_submodule(self.key(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def items(self) -> list[tuple[str, EmbeddingTable]]:
        """Names and tables."""
        return [(name, self[name]) for name in self.names]

    def values(self) -> list[EmbeddingTable]:
        """The tables."""
        return [self[name] for name in self.names]


def sum_rows(ids: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct ids, ascending, and the sum of each one's rows, added in the order in which they stand."""
    distinct, inverse = torch.unique(ids, return_inverse=True)
    if rows.is_cuda:  # where `index_add_` adds in any order, by which replicas would drift apart
        return distinct, sum_runs(rows[inverse.argsort(stable=True)], inverse.bincount(minlength=len(distinct)))
    return distinct, rows.new_zeros(len(distinct), rows.shape[1]).index_add_(0, inverse, rows)


def sum_runs(rows: Tensor, counts: Tensor) -> Tensor:
    """The sums of the first `counts[0]` rows, of the `counts[1]` after them, and so on."""
    if not len(counts):
        return rows.new_zeros(0, rows.shape[1])
    return torch.segment_reduce(rows, "sum", lengths=counts, axis=0, unsafe=True)


def gather(rows: Tensor, index: Tensor) -> Tensor:
    """`rows[index]`, int64 [n], with a gradient that is added in a fixed order: [n, ...]."""
    if rows.is_cuda:  # where the backward pass of `index_select` adds in any order
        return F.embedding(index, rows.flatten(1)).unflatten(1, rows.shape[1:])
    return rows.index_select(0, index)


def gradient_of(leaf: Tensor) -> Tensor:
    """The gradient of a leaf; zeros if the loss did not depend on it."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def tables_of(module: nn.Module) -> list[EmbeddingTable]:
    """Every embedding table within a module, in a fixed order."""
    return [submodule for submodule in module.modules() if isinstance(submodule, EmbeddingTable)]
