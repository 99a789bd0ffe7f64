"""One file for each thing that is optimised. What they share, the contract of the training loop, is here."""

from typing import Any

from torch import Tensor, nn


class Task(nn.Module):
    """One thing to optimise: a module whose forward pass is its loss.

    A task never touches devices, ranks, checkpoints or logging. What must reach across workers goes through the
    `group` attribute (`ctrdist.group.Group`) of the submodules that need it; the loop sets it.
    """

    def forward(self, batch: Any) -> dict[str, Tensor]:
        """Scalars, the total under `"loss"` and every term beside it.

        Each is the mean over the rows of the **global** batch, the same number on every worker, and differentiable
        through `Group` (see `ctrdist.group`). A worker's share of the batch may be empty.
        """
        raise TypeError(f"{type(self).__name__} has no forward pass")

    def predict(self, batch: Any) -> Tensor:
        """Click probabilities [B] of this worker's rows, float32. Only click models have it."""
        raise TypeError(f"{type(self).__name__} predicts nothing")

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups for AdamW: `{"params": [...], "lr": ..., "weight_decay": ...}`.

        The loop freezes every parameter that no group names. Embedding tables are not parameters: they update
        themselves (`ctrdist.embedding`).
        """
        raise TypeError(f"{type(self).__name__} names no parameters")
