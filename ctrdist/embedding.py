"""Embedding tables whose cost follows the batch, never the vocabulary.

A step fetches the distinct rows that its batch touches as a small dense leaf, computes on them, and pushes back their
gradients; the row-wise optimizer updates those rows only. Between workers, rows and their gradients are exchanged,
never the table, and every worker applies the same update to its replica.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctrdist.batch import Lookup
from ctrdist.group import Group
from ctrdist.initial import initial_rows
from ctrdist.optim import RowOptimizer
from ctrdist.vocabulary import PADDING

CHUNK = 65_536
"""Rows that are drawn, or settled, at a time."""


class EmbeddingTable(nn.Module):
    """One table, replicated on every worker. Its weights are a buffer: DDP and dense optimizers never see them.

    Args:
        rows: rows of the table, padding (0) and unknown (1) included.
        dim: width.
        optimizer: what updates the rows that a batch touched.
        std: standard deviation of new rows, drawn from a normal distribution.
        seed: decides the draws, which depend on it and on the row's number alone (`ctrdist.initial`).
    """

    def __init__(self, rows: int, dim: int, optimizer: RowOptimizer, std: float = 0.01, seed: int = 0) -> None:
        super().__init__()
        self.dim, self.optimizer, self.std, self.seed = dim, optimizer, std, seed
        self.register_buffer("weight", torch.empty(0, dim))
        for name, state in optimizer.init_state(self.weight).items():
            self.register_buffer(name, state)
        self.state_names = optimizer.state_names
        if optimizer.decoupled:
            # Logarithms of the decay of all steps so far, and of what each row has had of it.
            self.register_buffer("decay", torch.zeros((), dtype=torch.float64))
            self.register_buffer("decayed", torch.empty(0))
            self.state_names += ("decay", "decayed")
        self._pending: list[tuple[Tensor, Tensor]] = []
        self.rows_touched = 0
        self.grow(rows)

    @property
    def rows(self) -> int:
        """Rows of the table now."""
        return self.weight.shape[0]

    def grow(self, rows: int) -> None:
        """Add rows at the end until there are `rows`; those that are there stay as they are."""
        first = self.rows
        if rows <= first:
            return
        self.settle()
        for name, value in self._row_buffers().items():
            grown = value.new_zeros(rows, *value.shape[1:])
            grown[:first] = value
            setattr(self, name, grown)
        for start in range(first, rows, CHUNK):
            self._begin(torch.arange(start, min(start + CHUNK, rows)))

    def renew(self, rows: Tensor) -> None:
        """Make `rows`, int64, like new ones: drawn, but not as at first, and with no state of the optimizer."""
        self.settle()
        self._begin(rows, salt=1)

    def _begin(self, rows: Tensor, salt: int = 0) -> None:
        """Draw `rows` and give them a new row's state; the table is settled."""
        drawn = torch.from_numpy(initial_rows(rows.numpy(), self.dim, self.seed, salt)).to(self.weight) * self.std
        self.weight[rows] = drawn
        for name, state in self.optimizer.init_state(drawn).items():
            getattr(self, name)[rows] = state
        if self.optimizer.decoupled:
            self.decayed[rows] = 0

    def _row_buffers(self) -> dict[str, Tensor]:
        """What the table holds for each row, by name."""
        return {name: value for name, value in self.named_buffers() if value.ndim}

    def read(self, rows: Tensor) -> Tensor:
        """Values of `rows` [n, dim], with the decay that they have missed."""
        values = self.weight[rows]
        return values * self._missed(rows) if self.optimizer.decoupled else values

    def _missed(self, rows: Tensor | slice) -> Tensor:
        # As rounded in `decayed`: then the factors of a row's reads multiply to that of its whole time.
        return (self.decay.to(self.decayed.dtype) - self.decayed[rows]).exp_().unsqueeze(1)

    @torch.no_grad()
    def settle(self) -> None:
        """Give every row the decay that it has missed: before the weights are evaluated, exported or copied.

        Unlike a step, this costs time in proportion to the table; nothing, if its rows miss none.
        """
        if self.optimizer.decoupled and self.decay:
            for start in range(0, len(self.weight), CHUNK):
                rows = slice(start, start + CHUNK)
                self.weight[rows] *= self._missed(rows)
            self.decayed.zero_()
            self.decay.zero_()

    def forward(self, lookup: Lookup) -> Tensor:
        """Vectors of each value [n, dim], times its factor if there is one, or the mean of each bag [m, dim] (zeros for
        an empty one)."""
        rows = self.read(lookup.rows)
        if torch.is_grad_enabled():
            rows.requires_grad_()
            self._pending.append((lookup.rows, rows))
        values = F.embedding(lookup.index, rows)
        if lookup.factors is not None:
            values = values * lookup.factors.to(values.dtype).unsqueeze(1)
        return values if lookup.offsets is None else bag_mean(values, lookup.offsets)

    @torch.no_grad()
    def push(self, group: Group, lr_scale: float = 1.0) -> None:
        """Update the rows fetched since the last push by the mean over the workers of their gradients.

        The padding row never changes. Call it on every worker after the backward pass.
        """
        if self._pending:
            ids = torch.cat([rows for rows, _ in self._pending])
            gradients = torch.cat(
                [leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for _, leaf in self._pending]
            )
        else:
            ids = torch.empty(0, dtype=torch.int64, device=self.weight.device)
            gradients = self.weight.new_empty(0, self.dim)
        self._pending.clear()
        ids, gradients = group.all_gather(ids), group.all_gather(gradients)
        ids, gradients = sum_rows(ids, gradients / group.size)
        keep = ids != PADDING
        ids, gradients = ids[keep], gradients[keep]
        self.rows_touched = len(ids)
        self._update(ids, gradients, lr_scale)

    def _update(self, rows: Tensor, gradients: Tensor, lr_scale: float) -> None:
        """One step of the optimizer on distinct `rows` with `gradients` [R, dim], and of the decay on all."""
        if self.optimizer.decoupled:
            self.decay += math.log(self.optimizer.shrink(lr_scale))
            values = self.read(rows)
            self.decayed[rows] = self.decay.to(self.decayed.dtype)
        else:
            values = self.read(rows)
        state = {name: getattr(self, name)[rows] for name in self.optimizer.state_names}
        self.weight[rows] = self.optimizer.step(values, gradients, state, lr_scale)
        for name, value in state.items():
            getattr(self, name)[rows] = value


class Tables(nn.Module):
    """Tables by the name of their field; any name will do, which `nn.ModuleDict` does not allow."""

    def __init__(self, tables: dict[str, EmbeddingTable]) -> None:
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


def bag_mean(values: Tensor, offsets: Tensor) -> Tensor:
    """The mean of each bag of rows of `values` [n, dim], [m, dim]; zeros for an empty bag."""
    counts = offsets.diff()
    bags = torch.repeat_interleave(torch.arange(len(counts), device=values.device), counts, output_size=len(values))
    sums = values.new_zeros(len(counts), values.shape[1]).index_add(0, bags, values)
    return sums / counts.clamp(min=1).unsqueeze(1).to(values.dtype)


def sum_rows(ids: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct ids, ascending, and the sum of each one's rows."""
    distinct, inverse = torch.unique(ids, return_inverse=True)
    return distinct, rows.new_zeros(len(distinct), rows.shape[1]).index_add_(0, inverse, rows)


def tables_of(module: nn.Module) -> list[EmbeddingTable]:
    """Every embedding table within a module, in a fixed order."""
    return [submodule for submodule in module.modules() if isinstance(submodule, EmbeddingTable)]
