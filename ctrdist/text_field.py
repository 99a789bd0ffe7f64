"""MF²'s text field: an item's text vector on its way into the CTR model (CELA, section 4.3)."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctrdist.dropout import Dropout

SAMPLE, CHUNK = 131_072, 8_192
"""Text vectors of which mean and covariance are taken at most, and at a time."""
FLOOR, NOTHING = 1e-2, 1e-6
"""Variances over the mean of all: the least that a direction is taken to have, and where it says nothing, as some do
where items are few. Such a direction is left out: no weight on it could be learnt."""


@dataclass(frozen=True)
class FuseConfig:
    """MF²: the text vector as one more field.

    Args:
        hidden: hidden units of the MLP that brings a text vector to the width of a field (eq. 13).
        dropout: after each of them.
        scale: the field's root mean square before training, LayerNorm's initial gain. An embedding starts at 0.01:
            a text field at 1 drowns the ids, which are then learnt late and badly.
        whiten: the MLP sees text vectors with mean 0 and covariance 1 over the items, as they are when a model is
            made; one that goes on from an earlier day keeps what was measured then. It helps some logs and hurts others
            (docs/cela.md): try it on days of your own.
        source: where a text vector comes from: `text`, by the language model, or `id`, the ID model's embeddings of the
            item in its place (the paper's "w/o text"), with which no stage of the language model has anything to do.
        on: what has its text: the target item and its behaviours, or only one of them; zeros stand for the other's.
        frozen: leave the MLP as it was drawn, a random projection; LayerNorm is trained in any case.
    """

    hidden: tuple[int, ...] = (64,)
    dropout: float = 0.2
    scale: float = 0.1
    whiten: bool = False
    source: Literal["text", "id"] = "text"
    on: Literal["both", "target", "behaviours"] = "both"
    frozen: bool = False


class TextField(nn.Module):
    """The text vector of an item [U, text width] as a field [U, d]: MLP and LayerNorm (CELA, eq. 13).

    Whitened, its first layer is W C^-1/2 (x - m) + b, of which mean m and covariance C are measured once (`measure`)
    and kept with the weights. A step multiplies W and C^-1/2, not every vector: it costs next to nothing. Zeros, which
    stand for no text, stay zeros.
    """

    def __init__(self, text_dim: int, dim: int, config: FuseConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = text_dim
        for units in config.hidden:
            layers += [nn.Linear(width, units), nn.ReLU(inplace=True), Dropout(config.dropout)]
            width = units
        self.mlp = nn.Sequential(*layers, nn.Linear(width, dim))
        self.norm = nn.LayerNorm(dim)
        nn.init.constant_(self.norm.weight, config.scale)
        self.whiten = config.whiten
        if config.whiten:
            self.register_buffer("mean", torch.zeros(text_dim))
            self.register_buffer("whitening", torch.eye(text_dim))

    def forward(self, text: Tensor) -> Tensor:
        first, *others = self.mlp
        hidden = self.whitened(first, text) if self.whiten else first(text)
        for layer in others:
            hidden = layer(hidden)
        return self.norm(hidden)

    def whitened(self, first: nn.Linear, text: Tensor) -> Tensor:
        """The first layer, in the precision of its weights in any case: large means are taken off small differences."""
        with torch.autocast(text.device.type, enabled=False):
            weight = first.weight @ self.whitening
            mean = text.any(1, keepdim=True) * (weight @ self.mean)
            return F.linear(text.to(weight.dtype), weight, first.bias) - mean

    def measure(self, table: np.ndarray) -> None:
        """Take mean and covariance of the vectors to come from a text table, float [rows, text width].

        Rows of zeros have no text and do not count. Does nothing where text is not whitened.
        """
        if not self.whiten:
            return
        mean, covariance = moments(table)
        variances, directions = np.linalg.eigh(covariance)
        told = variances > NOTHING * variances.mean() + 1e-12 * mean @ mean  # what rounding makes of none
        scales = told / np.sqrt(np.where(told, np.maximum(variances, FLOOR * variances.mean()), 1.0))
        # Of all that whiten, the one that moves vectors least (ZCA): it does not depend on the directions' signs.
        whitening = directions * scales @ directions.T
        self.mean.copy_(torch.from_numpy(mean))
        self.whitening.copy_(torch.from_numpy(whitening))


def moments(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [width] and covariance [width, width], float64, of the rows [rows, width] that are not zeros; of every n-th
    where there are more than `SAMPLE`."""
    rows = table[:: -(-len(table) // SAMPLE)]
    chunks = [rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]
    count, total, squares = 0, np.zeros(table.shape[1]), np.zeros((table.shape[1],) * 2)
    for chunk in chunks:
        present = np.asarray(chunk[chunk.any(1)], np.float64)
        count, total, squares = count + len(present), total + present.sum(0), squares + present.T @ present
    mean = total / max(count, 1)
    return mean, squares / max(count, 1) - np.outer(mean, mean)
