"""Our training step, and the same network on dense tables."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.step.world import CATEGORIES, DIM, HISTORY, HOURS, Rows, World
from ctrdist import backbones
from ctrdist.backbones import BackboneConfigs, Inputs, Shape
from ctrdist.backbones.base import all_fields
from ctrdist.batch import Batch, join_items
from ctrdist.embedding import tables_of
from ctrdist.group import Group, attach_group
from ctrdist.loop import make_optimizer, update, wrap
from ctrdist.schema import Field, Schema
from ctrdist.sharded import Store
from ctrdist.tasks.click import ClickConfig, ClickModel

SCHEMA = Schema(
    user=(Field("user_id"),),
    item=(Field("item_id"), Field("category")),
    context=(Field("hour"),),
    history_length=HISTORY,
)
FIND = "find distinct ids"
"""What a profile calls it."""
TARGET = (2, 3)  # fields are user_id, hour, item_id, category


class Ours:
    """The step of `ctrdist.loop` on a `ClickModel` with the defaults, from integers in memory: to find the distinct ids
    is part of it."""

    def __init__(
        self,
        network: str,
        world: World,
        device: str,
        compile_: bool = False,
        group: Group | None = None,
        store: Store = "auto",
    ) -> None:
        self.group, self.device = group or Group(), device
        sizes = {"user_id": world.users, "item_id": world.items, "category": CATEGORIES, "hour": HOURS}
        self.task = ClickModel(SCHEMA, sizes, ClickConfig(backbone=network, dim=DIM), store=store).to(device).train()
        attach_group(self.task, self.group)
        if compile_:
            self.task.backbone.represent = torch.compile(self.task.backbone.represent, dynamic=False)
        self.tables, self.optimizer = tables_of(self.task), make_optimizer(self.task)
        self.model = wrap(self.task, self.group, device)
        self.item_fields = {"item_id": np.arange(world.items), "category": world.category_of}

    def batch(self, rows: Rows) -> Batch:
        """The rows as the loop gets them."""
        fields = {"user_id": rows.user, "hour": rows.hour}
        return join_items(rows.label, fields, rows.item, rows.history, self.item_fields).to(self.device)

    def prepare(self, rows: Rows) -> Rows:
        """What a step takes."""
        return rows

    def step(self, rows: Rows) -> None:
        """One step."""
        with torch.profiler.record_function(FIND):
            batch = self.batch(rows)
        update(self.model(batch)["loss"], self.optimizer, self.tables, self.group)


class DenseNetwork(nn.Module):
    """A backbone on `nn.Embedding` tables, each value looked up by itself."""

    def __init__(self, network: str, world: World) -> None:
        super().__init__()
        self.columns = DIM + backbones.network(network).first_order
        self.tables = nn.ModuleDict({n: nn.Embedding(s, self.columns, padding_idx=0) for n, s in world.sizes.items()})
        for table in self.tables.values():
            nn.init.normal_(table.weight, std=0.01)
        self.backbone = backbones.build(network, Shape(4, 2, DIM), BackboneConfigs())

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        fields = torch.stack([self.tables[name](x[name]) for name in ("user", "hour", "item", "category")], 1)
        history = torch.stack([self.tables["item"](x["history"]), self.tables["category"](x["history_category"])], 2)
        inputs = Inputs(fields, history, x["history"] != 0, TARGET)
        if self.columns > DIM:
            first_order = all_fields(inputs)[:, :, -1] * self.backbone.first_order_scale
            inputs = Inputs(fields[..., :-1], history[..., :-1], inputs.mask, TARGET, first_order)
        representation, direct, auxiliary = self.backbone.represent(inputs)
        logits = self.backbone.head(representation) + direct
        return nn.functional.binary_cross_entropy_with_logits(logits, x["label"]) + sum(auxiliary.values())


class Dense:
    """AdamW on everything, as PyTorch has it by default, or fused."""

    def __init__(self, network: str, world: World, device: str, fused: bool | None = None) -> None:
        self.device, self.model = device, DenseNetwork(network, world).to(device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=fused)

    def prepare(self, rows: Rows) -> dict[str, Tensor]:
        """What a step takes."""
        return rows.tensors(self.device)

    def step(self, x: dict[str, Tensor]) -> None:
        """One step."""
        self.optimizer.zero_grad()
        self.model(x).backward()
        self.optimizer.step()


CONTESTANTS: dict[str, Callable] = {
    "ours": Ours,
    "dense": Dense,
    "fused": lambda network, world, device: Dense(network, world, device, fused=True),
}
