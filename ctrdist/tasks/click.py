"""Click prediction: the task of the ID model, the fused model and every other model that is trained on clicks alone."""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ctrdist import backbones
from ctrdist.backbones import BackboneConfigs, Inputs, Shape
from ctrdist.backbones.base import all_fields
from ctrdist.batch import Batch, Lookup
from ctrdist.embedding import Tables, gather
from ctrdist.errors import UserError, nearest
from ctrdist.group import Group, current_group
from ctrdist.losses import binary_cross_entropy
from ctrdist.optim import ROW_OPTIMIZERS, Schedule, split_decay
from ctrdist.precision import Precision
from ctrdist.schema import ITEM_ID, Schema
from ctrdist.sharded import Store, choose_store
from ctrdist.tasks import Task
from ctrdist.text_field import FuseConfig, TextField
from ctrdist.vocabulary import PADDING, UNKNOWN


@dataclass(frozen=True)
class ClickConfig:
    """The CTR model and how it is trained.

    Args:
        backbone: name of a network, a file of `ctrdist/backbones/`.
        dim: d, the width of every field in the network.
        widths: `field=width` for fields whose table has another width than d; a learned matrix brings them to d.
        epochs: passes over the training days.
        warm_epochs: the same, for a day that starts from the day before.
        patience: stop after this many epochs without a better validation AUC, and keep the best epoch's weights; 0
            trains to the end and keeps the last ones. Where the rate falls to zero the last epoch is the one that
            settles, and a day's validation rows are often too few to tell epochs apart: then 0 is better.
        batch_size: rows of a global batch, over all workers.
        order: `shuffled`: an epoch's rows in any order. `chronological`: its days in order, rows shuffled within a day;
            with `epochs` 1 each row is seen once, the newest last.
        lr: learning rate of the network; 0 takes the network's own (`Backbone.lr`).
        weight_decay: AdamW's, on the network's matrices.
        table_lr: learning rate of the embedding tables; 0 takes the network's own (`Backbone.table_lr`).
        table_decay: L2 coefficient on the rows a batch touches; for `adamw`, decay of every row at every step.
        table_optimizer: `adam`, `adamw`, row-wise `adagrad` (one number a row), or `sgd` (none). The networks' own
            rates are for the first two.
        table_store: `replicated`: every worker has the tables. `sharded`: each has some of their rows. `auto`:
            replicated if they fit into `table_memory_gib`, with their optimizer's state, those of both networks for
            a pair that is trained together (ELEC).
        table_memory_gib: memory of a worker for tables.
        table_precision: of the tables' weights at rest. `bfloat16` takes half the memory for them; their optimizer
            computes in float32 in any case, and keeps its state in it.
        schedule: course of both learning rates over all epochs.
        warmup: share of the steps over which they rise.
        unknown_share: share of a batch's items whose id is taken for unknown in training, so that the unknown row, and
            what the network makes of an item without an id of its own, are trained.
        precision: of the network's arithmetic; embeddings enter it in float32 in any case.
        networks: hyper-parameters of the backbones, by name.
    """

    backbone: str = "din"
    dim: int = 16
    widths: tuple[str, ...] = ()
    epochs: int = 4
    warm_epochs: int = 1
    patience: int = 0
    batch_size: int = 1024
    order: Literal["shuffled", "chronological"] = "shuffled"
    lr: float = 0.0
    weight_decay: float = 1e-2
    table_lr: float = 0.0
    table_decay: float = 0.0
    table_optimizer: Literal["adam", "adamw", "adagrad", "sgd"] = "adam"
    table_store: Store = "auto"
    table_memory_gib: float = 8.0
    table_precision: Literal["float32", "bfloat16"] = "float32"
    schedule: Schedule = "linear"
    warmup: float = 0.0
    unknown_share: float = 0.1
    precision: Precision = "float32"
    networks: BackboneConfigs = field(default_factory=BackboneConfigs)

    def __post_init__(self) -> None:
        for name in ("dim", "epochs", "warm_epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"ctr.{name}: {getattr(self, name)} is under 1")
        for name in ("lr", "table_lr", "weight_decay", "table_decay"):
            if getattr(self, name) < 0:
                raise UserError(f"ctr.{name}: {getattr(self, name)} is under 0")
        if self.patience < 0:
            raise UserError(f"ctr.patience: {self.patience} is under 0; 0 trains to the end")
        if not 0 <= self.unknown_share < 1:
            raise UserError(f"ctr.unknown_share: {self.unknown_share} is not a share from 0 to under 1")


@dataclass(frozen=True)
class Layout:
    """How what was looked up becomes a network's inputs.

    Args:
        target: of the backbone's inputs (`Inputs.target`).
        first_order: what weights of the first order are multiplied by, the last number of a field; None without them.
        text: which side's last item field, the text, is shown: `target`, `behaviours` or `both`.
    """

    target: tuple[int, ...]
    first_order: float | None
    text: Literal["both", "target", "behaviours"] = "both"

    def __call__(self, rows: Tensor, target: Tensor, history: Tensor, mask: Tensor) -> Inputs:
        """The inputs of B rows.

        Args:
            rows: fields of the user and the context [B, F_row, columns].
            target: the item side of the target [B, F_item, columns].
            history: that of the behaviours [B, T, F_item, columns].
            mask: bool [B, T].

        `rows`, `history` and `mask` may have one row for all of them.
        """
        target, history = self.shown(target, "target"), self.shown(history, "behaviours")
        fields = torch.cat([rows.expand(target.shape[0], -1, -1), target], 1)
        inputs = Inputs(fields, history[:, :, : len(self.target)], mask, self.target)
        if self.first_order is None:
            return inputs
        first_order = all_fields(inputs)[:, :, -1] * self.first_order
        return Inputs(fields[:, :, :-1], inputs.history[..., :-1], mask, self.target, first_order)

    def shown(self, items: Tensor, to: str) -> Tensor:
        """Items [..., F_item, columns], their text zeros where it is not shown to that side."""
        if self.text in ("both", to):
            return items
        return torch.cat([items[..., :-1, :], torch.zeros_like(items[..., -1:, :])], -2)


class ClickModel(Task):
    """Embeddings, backbone and binary cross-entropy (CELA, eq. 2, 3, 14).

    Args:
        schema: the fields.
        sizes: rows of each field's table, by name.
        config: model and training.
        text_dim: width of the text table; 0 for an ID model (eq. 7).
        fuse: the text field, for a fused model.
        seed: decides the initial weights.
        store: where the tables are, other than the configuration says.
        vector_dim: width of `Batch.vector`, which is joined to the representation (ELEC's gain network); 0 for none.
        networks: how many like this one a worker has, each with tables of its own: all are to fit into its memory.
    """

    def __init__(
        self,
        schema: Schema,
        sizes: dict[str, int],
        config: ClickConfig,
        text_dim: int = 0,
        fuse: FuseConfig | None = None,
        seed: int = 0,
        store: Store | None = None,
        vector_dim: int = 0,
        networks: int = 1,
    ) -> None:
        super().__init__()
        self.group, self.vector_dim = Group(), vector_dim
        self.config, self.text_dim, self.fuse = config, text_dim, (fuse or FuseConfig()) if text_dim else None
        self.row_names = [f.name for f in schema.row_fields]
        self.item_names = [f.name for f in schema.item]
        # A field's weight of the first order, for backbones that have them, is one more column of its table.
        network = backbones.network(config.backbone)
        self.columns = config.dim + network.first_order
        optimizer = ROW_OPTIMIZERS[config.table_optimizer](config.table_lr or network.table_lr, config.table_decay)
        names, storage = self.row_names + self.item_names, getattr(torch, config.table_precision)
        widths = dict.fromkeys(names, self.columns) | field_widths(config, names)
        kind = choose_store(
            store or config.table_store,
            [(sizes[name], widths[name]) for name in names] * networks,
            optimizer,
            config.table_memory_gib,
            current_group().size,
            storage,
        )
        self.tables = Tables(
            {
                name: kind(sizes[name], widths[name], optimizer, seed=seed * 100 + position, storage=storage)
                for position, name in enumerate(names)
            }
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            history_fields = len(self.item_names) + (text_dim > 0) if schema.history_length else 0
            fields = len(self.row_names) + len(self.item_names) + (text_dim > 0)
            self.backbone = backbones.build(config.backbone, Shape(fields, history_fields, config.dim), config.networks)
            self.text_field = TextField(text_dim, config.dim, self.fuse) if self.fuse else None
            if self.fuse and self.columns > config.dim:
                self.text_weight = nn.Linear(config.dim, 1, bias=False)
                nn.init.zeros_(self.text_weight.weight)
            self.projections = Tables(
                {n: nn.Linear(w, self.columns, bias=False) for n, w in widths.items() if w != self.columns}
            )
        if vector_dim:
            self.join = Join(self.backbone.width, vector_dim)
        self.layout = Layout(
            target=tuple(range(len(self.row_names), fields)) if schema.history_length else (),
            first_order=self.backbone.first_order_scale if network.first_order else None,
            text=self.fuse.on if self.fuse else "both",
        )

    def inputs(self, batch: Batch) -> Inputs:
        """Look up and join every field of a batch. Each distinct item is embedded once."""
        return self.layout(*self.look_up(batch))

    def look_up(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Row fields [B, F_row, columns], the item side of the target [B, F_item, columns] and of the behaviours
        [B, T, F_item, columns], and the behaviours' mask [B, T]."""
        items = self.item_side(batch.item_fields, batch.text)
        rows = [self.project(name, self.tables[name](batch.row_fields[name])) for name in self.row_names]
        fields = torch.stack(rows, 1) if rows else items.new_empty(len(batch), 0, self.columns)
        target = gather(items, batch.target)
        history = gather(items, batch.history.flatten()).unflatten(0, batch.history.shape)
        return fields, target, history, batch.history != 0

    def item_side(self, item_fields: dict[str, Lookup], text: Tensor | None) -> Tensor:
        """Every field of U items, the text at the end if the model has one [U, F_item, columns].

        Args:
            text: [U, text width].
        """
        items = torch.stack([self.item_vectors(name, item_fields[name]) for name in self.item_names], 1)
        if self.text_field is None:
            return items
        text = self.text_field(text.to(items.dtype))
        if self.columns > self.config.dim:
            text = torch.cat([text, self.text_weight(text)], 1)
        return torch.cat([items, text.unsqueeze(1)], 1)

    def project(self, name: str, vectors: Tensor) -> Tensor:
        """Vectors of a field as its table has them [n, width], as the network takes them [n, columns]."""
        return self.projections[name](vectors) if name in self.projections.names else vectors

    def item_vectors(self, name: str, lookup: Lookup) -> Tensor:
        """An item field of U items [U, columns]; in training, some items' ids are unknown."""
        if name == ITEM_ID and self.training and self.config.unknown_share:
            hidden = torch.rand(len(lookup.index), device=lookup.index.device) < self.config.unknown_share
            hidden[0] = False  # padding
            lookup = hide(lookup, hidden)
        return self.project(name, self.tables[name](lookup))

    def represent(self, batch: Batch, inputs: Inputs | None = None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """What the head reads [B, H], what is added to its logits [B], and the backbone's auxiliary losses by name.

        Args:
            inputs: the embedded batch, where it is there already.
        """
        representation, direct, auxiliary = self.backbone.represent(inputs or self.inputs(batch))
        if self.vector_dim:
            representation = self.join(representation, batch.vector)
        return representation, direct, auxiliary

    def logits(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits [B], and the backbone's auxiliary losses by name."""
        representation, direct, auxiliary = self.represent(batch)
        return self.backbone.head(representation) + direct, auxiliary

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        logits, auxiliary = self.logits(batch)
        click = binary_cross_entropy(logits, batch.label.to(logits.dtype), self.group)
        return {"loss": click + sum(auxiliary.values()), **({"click": click, **auxiliary} if auxiliary else {})}

    def predict(self, batch: Batch) -> Tensor:
        return torch.sigmoid(self.logits(batch)[0].float())

    def parameter_groups(self) -> list[dict[str, Any]]:
        frozen = set(self.text_field.mlp.parameters()) if self.fuse and self.fuse.frozen else set()
        trained = [p for p in self.parameters() if p not in frozen]
        return split_decay(trained, self.config.lr or self.backbone.lr, self.config.weight_decay)

    def grow(self, sizes: dict[str, int]) -> None:
        """Add rows for ids that have come since; the others stay as they are."""
        for name, table in self.tables.items():
            table.grow(sizes[name])

    def renew(self, rows: dict[str, np.ndarray]) -> None:
        """Forget what the tables learnt in some rows, by field: their ids are others now."""
        for name, those in rows.items():
            self.tables[name].renew(torch.from_numpy(those.astype(np.int64)))

    @torch.no_grad()
    def item_embeddings(self, item_fields: dict[str, Lookup]) -> Tensor:
        """The item side of U items, text left out, joined: [U, F_item * d] (CELA, eq. 8)."""
        vectors = [
            self.project(name, self.tables[name](item_fields[name]))[:, : self.config.dim] for name in self.item_names
        ]
        return torch.cat(vectors, 1)


class Join(nn.Linear):
    """h = W [representation, vector] + b, at first the representation itself: what a head expects stays what it was."""

    def __init__(self, width: int, vector_dim: int) -> None:
        super().__init__(width + vector_dim, width)
        nn.init.eye_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, representation: Tensor, vector: Tensor) -> Tensor:
        return super().forward(torch.cat([representation, vector.to(representation.dtype)], 1))


def hide(lookup: Lookup, hidden: Tensor) -> Lookup:
    """The same look-up, but the unknown row where `hidden`, bool [n]. That row stands first, and padding where it was.

    One look-up of distinct rows needs no sort when their gradients are pushed, which two of one table would.
    """
    known = lookup.rows != UNKNOWN
    rows = torch.cat([lookup.rows.new_full((1,), UNKNOWN), lookup.rows.where(known, PADDING)])
    numbers = torch.arange(1, len(rows), device=rows.device) * known
    return Lookup(rows, numbers[lookup.index].masked_fill(hidden, 0))


def field_widths(config: ClickConfig, names: list[str]) -> dict[str, int]:
    """The widths that a configuration gives to fields, by name.

    Raises:
        UserError: no such field, or not a width.
    """
    widths = {}
    for text in config.widths:
        name, _, width = text.rpartition("=")
        if name not in names:
            raise UserError(f"ctr.widths: '{text}': {nearest(name, names)}; expected field=width")
        if not width.isdigit() or not int(width):
            raise UserError(f"ctr.widths: '{text}': '{width}' is not a width; expected such as {name}=8")
        widths[name] = int(width)
    return widths


def table_sizes(vocabularies: dict[str, Any], schema: Schema) -> dict[str, int]:
    """Rows of each field's table, by name."""
    return {field.name: vocabularies[field.name].size for field in schema.row_fields + schema.item}
