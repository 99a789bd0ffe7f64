"""The log that every contestant trains on: random ids of a large vocabulary, as integers in memory."""

from dataclasses import dataclass

import numpy as np
import torch

HISTORY = 20
DIM = 16
CATEGORIES, HOURS = 1000, 24
ITEMS_A_USER = 0.1
FIRST = 2
"""The first row of a table that is an id's; 0 is padding."""


@dataclass(frozen=True)
class Rows:
    """B rows; ids are rows of tables, int64.

    Args:
        label: float32 [B].
        user: [B].
        hour: [B].
        item: [B].
        category: [B], the item's.
        history: [B, T], 0 at the end.
        history_category: [B, T].
    """

    label: np.ndarray
    user: np.ndarray
    hour: np.ndarray
    item: np.ndarray
    category: np.ndarray
    history: np.ndarray
    history_category: np.ndarray

    def tensors(self, device: str) -> dict[str, torch.Tensor]:
        """All of them on a device."""
        return {name: torch.from_numpy(value).to(device) for name, value in vars(self).items()}


@dataclass(frozen=True)
class World:
    """Sizes of the tables, and the category of each item (0 of padding).

    Args:
        users: rows of the users' table.
        items: rows of the items' table.
        category_of: int64 [items].
    """

    users: int
    items: int
    category_of: np.ndarray

    @classmethod
    def of(cls, users: int) -> "World":
        """A world of so many users, and a tenth as many items."""
        items = int(users * ITEMS_A_USER)
        category_of = np.random.default_rng(0).integers(FIRST, CATEGORIES, items)
        category_of[0] = 0
        return cls(users, items, category_of)

    @property
    def sizes(self) -> dict[str, int]:
        """Rows of each field's table."""
        return {"user": self.users, "hour": HOURS, "item": self.items, "category": CATEGORIES}

    def draw(self, batch: int, seed: int) -> Rows:
        """Rows of users drawn evenly and of items by a power law; two thirds of the histories are full."""
        draw = np.random.default_rng(seed)
        ids = FIRST + ((self.items - FIRST) * draw.random((batch, HISTORY + 1)) ** 3).astype(np.int64)
        lengths = np.minimum(draw.integers(0, 3 * HISTORY, batch), HISTORY)
        history = ids[:, 1:] * (np.arange(HISTORY) < lengths[:, None])
        return Rows(
            label=(draw.random(batch) < 0.3).astype(np.float32),
            user=draw.integers(FIRST, self.users, batch),
            hour=draw.integers(FIRST, HOURS, batch),
            item=ids[:, 0],
            category=self.category_of[ids[:, 0]],
            history=history,
            history_category=self.category_of[history],
        )
