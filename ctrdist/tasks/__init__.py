"""One file for each thing that is optimised. What they share, the contract of the training loop, is here."""

from typing import Any

from torch import Tensor, nn

from ctrdist.errors import UserError


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
        """Click probabilities [B] of this worker's rows, float32. Only click models have it.

        Validation judges a task that has it by the AUC, any other by its loss.
        """
        raise TypeError(f"{type(self).__name__} predicts nothing")

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups for AdamW: `{"params": [...], "lr": ..., "weight_decay": ...}`, and `schedule` and `warmup` if other
        than the loop's.

        The loop freezes every parameter that no group names. Embedding tables are not parameters: they update
        themselves (`ctrdist.embedding`).
        """
        raise TypeError(f"{type(self).__name__} names no parameters")


def check_text_options(group: str, config: Any) -> None:
    """Raise a UserError for what is wrong with options that all tasks on items' texts have.

    Args:
        group: what the options are named by.
        config: has `chunk`, `clip_norm`, `valid_share` and `patience`.
    """
    if config.chunk < 0:
        raise UserError(f"{group}.chunk: {config.chunk} is under 0; 0 encodes the whole batch at once")
    if config.clip_norm < 0:
        raise UserError(f"{group}.clip_norm: {config.clip_norm} is under 0; 0 sets no limit")
    if not 0 <= config.valid_share < 1:
        raise UserError(f"{group}.valid_share: {config.valid_share} is not 0 or more and under 1")
    if config.patience < 0:
        raise UserError(f"{group}.patience: {config.patience} is under 0; 0 trains to the end")
    if config.patience and not config.valid_share:
        raise UserError(f"{group}.patience: {config.patience} epochs without a better loss, but of no held-out items; "
                        f"set {group}.valid_share too")  # fmt: skip
