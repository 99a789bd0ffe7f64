"""Embedding tables of which each worker holds some rows: for tables that do not fit into one worker's memory.

A look-up asks the owners of its rows for them, and their gradients go back the same way: both are all-to-all exchanges
whose size follows the distinct rows of the batch. An owner sums the gradients of all workers, in rank order, and
updates its rows.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ctrdist.embedding import EmbeddingTable, gradient_of, tables_of
from ctrdist.group import Group
from ctrdist.optim import RowOptimizer

Store = Literal["auto", "replicated", "sharded"]

BUCKETS = 4096
"""Parts of a table, at least one a worker; each owns consecutive ones."""
MIX = 2531
UNMIX = pow(MIX, -1, BUCKETS)


def bucket_of(rows: Tensor) -> Tensor:
    """The bucket of each row. Of any run of rows every worker gets its share: Fibonacci hashing (Knuth, TAOCP 6.4)."""
    return rows * MIX % BUCKETS


def bucket_rows(buckets: Tensor) -> Tensor:
    """The first row of each bucket; the others follow at steps of `BUCKETS`."""
    return buckets * UNMIX % BUCKETS


def bucket_range(rank: int, size: int) -> tuple[int, int]:
    """The buckets that a worker owns, from the first up to but not including the last."""
    assert size <= BUCKETS, size
    return BUCKETS * rank // size, BUCKETS * (rank + 1) // size


def owner_of(rows: Tensor, size: int) -> Tensor:
    """The worker that owns each row: the one in whose `bucket_range` its bucket lies."""
    return ((bucket_of(rows) + 1) * size - 1) // BUCKETS


@dataclass
class Route:
    """How the rows of a look-up came, by which their gradients go back.

    Args:
        order: int64 [R], the look-up's rows sorted by owner.
        counts: how many of them each worker owns.
        asked: int64, the rows that all workers asked of this one, in rank order.
        received: how many each asked.
    """

    order: Tensor
    counts: list[int]
    asked: Tensor
    received: list[int]


class ShardedTable(EmbeddingTable):
    """One table, its rows spread over the workers; its state is this worker's rows and what the optimizer has of them.

    Look-ups are collective: every worker must do the same ones in the same order, with batches that may be empty.
    """

    replicated = False

    @property
    def buckets(self) -> tuple[int, int]:
        """The buckets that this worker owns (`bucket_range`). Its places are a matrix, by row // BUCKETS and bucket."""
        return bucket_range(self.group.rank, self.group.size)

    @property
    def width(self) -> int:
        """How many they are."""
        first, last = self.buckets
        return last - first

    def _held(self, rows: int) -> int:
        return -(-rows // BUCKETS) * self.width

    def numbers(self, places: Tensor) -> Tensor:
        return places // self.width * BUCKETS + bucket_rows(places % self.width + self.buckets[0])

    def holds(self, rows: Tensor) -> Tensor:
        return owner_of(rows, self.group.size) == self.group.rank

    def places(self, rows: Tensor) -> Tensor:
        rows = rows[self.holds(rows)]
        return rows // BUCKETS * self.width + bucket_of(rows) - self.buckets[0]

    def gather(self, name: str, rows: Tensor) -> Tensor:
        route = self._route(rows)
        return self._answer(route, getattr(self, name)[self.places(route.asked)])

    def _fetch(self, rows: Tensor) -> tuple[Tensor, Route]:
        sent = self.group.sent
        route = self._route(rows)
        values = self._answer(route, self.read(self.places(route.asked)))
        self.traffic += self.group.sent - sent
        return values, route

    def _answer(self, route: Route, values: Tensor) -> Tensor:
        """`values` of the rows that others asked, for the rows that this worker asked, in the look-up's order."""
        values = self.group.all_to_all(values, route.received, route.counts)
        return torch.empty_like(values).index_copy_(0, route.order, values)

    def _route(self, rows: Tensor) -> Route:
        assert len(self.weight) == self._held(self.rows), "the table was made for another group"
        owners, order = owner_of(rows, self.group.size).sort(stable=True)
        counts = torch.bincount(owners, minlength=self.group.size)
        counts, received = torch.stack([counts, self.group.exchange(counts)]).tolist()
        return Route(order, counts, self.group.all_to_all(rows[order], counts, received), received)

    def _collect(self, group: Group) -> tuple[Tensor, Tensor]:
        ids = [torch.empty(0, dtype=torch.int64, device=self.weight.device)]
        gradients = [self._wide(self.weight[:0])]
        for route, leaf in self._pending:
            ids.append(route.asked)
            gradients.append(group.all_to_all(gradient_of(leaf)[route.order], route.counts, route.received))
        return torch.cat(ids), torch.cat(gradients)


def is_collective(module: nn.Module) -> bool:
    """Whether the module's look-ups need all workers: some table of it is spread over several."""
    return any(isinstance(table, ShardedTable) and table.group.size > 1 for table in tables_of(module))


def row_bytes(dim: int, optimizer: RowOptimizer, storage: torch.dtype = torch.float32) -> int:
    """Bytes of a row of a table, the optimizer's state included."""
    return EmbeddingTable(1, dim, optimizer, storage=storage).packed.nbytes


def choose_store(
    store: Store,
    sizes: list[tuple[int, int]],
    optimizer: RowOptimizer,
    memory_gib: float,
    workers: int,
    storage: torch.dtype = torch.float32,
) -> type[EmbeddingTable]:
    """The kind of tables: as named, or for `auto` replicated ones if all of them fit into a worker's memory.

    Args:
        sizes: rows and width of each table.
        memory_gib: GiB of a worker for tables.
    """
    if store == "auto":
        needed = sum(rows * row_bytes(dim, optimizer, storage) for rows, dim in sizes)
        fits = needed <= memory_gib * 2**30
        store = "replicated" if fits or workers == 1 else "sharded"
    return ShardedTable if store == "sharded" else EmbeddingTable
