"""A checkpoint of a training: weights, optimizer state, the best weights, and where the run stands."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ctrdist.errors import UserError
from ctrdist.group import Group
from ctrdist.shards import read_state, save_state
from ctrdist.tasks import Task

LAST, BEST = "last.safetensors", "best.safetensors"


@dataclass
class Progress:
    """Where a run stands; with the weights, all that a checkpoint holds.

    Args:
        step: global batches done: the cursor of the run.
        best_auc: validation AUC of the weights kept so far; NaN without validation, or if it is by the loss.
        best_loss: their validation loss; NaN without validation, or if it is by the AUC.
        best_epoch: the epoch (from 1) they are of.
        losses: [step, loss] pairs, the mean loss since the pair before.
        valid_auc: [epoch, AUC] pairs.
        valid_loss: [epoch, loss] pairs of the validation.
        finished: whether training has ended.
        seconds: in training steps, without validation and checkpoints' ends, from the first batch of each try on.
        waited: of these, seconds spent waiting for the next batch.
    """

    step: int = 0
    best_auc: float = math.nan
    best_loss: float = math.nan
    best_epoch: int = 0
    losses: list[list[float]] = field(default_factory=list)
    valid_auc: list[list[float]] = field(default_factory=list)
    valid_loss: list[list[float]] = field(default_factory=list)
    finished: bool = False
    seconds: float = 0.0
    waited: float = 0.0


def save_checkpoint(
    folder: Path,
    task: Task,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    best: dict[str, Tensor] | None,
    group: Group,
) -> None:
    """Write weights, optimizer state, best weights and progress, as safetensors and JSON.

    Rank 0 calls it, or every worker if tables are spread over them; each then writes its rows (`ctrdist.shards`).
    """
    save_state(folder / LAST, unshared(task), task, group)
    if best is not None:
        save_state(folder / BEST, best, task, group)
    if group.rank:
        return
    moments = {
        f"{index}.{name}": value
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }
    save_file(moments, folder / "optimizer.safetensors")
    (folder / "progress.json").write_text(json.dumps(progress.__dict__))


def load_checkpoint(
    folder: Path, task: Task, optimizer: torch.optim.Optimizer
) -> tuple[Progress, dict[str, Tensor] | None]:
    """Load what `save_checkpoint` wrote into task and optimizer; returns the progress and the best weights.

    Every worker calls it, any number of them; of spread tables each reads the rows that it holds.
    """
    saved = read_state(folder / LAST, task)
    if unknown := set(saved) ^ set(unshared(task)):
        raise UserError(f"{folder}: the checkpoint of another version ({sorted(unknown)[0]}); remove it and run again")
    task.load_state_dict(saved, strict=False)
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in load_file(folder / "optimizer.safetensors").items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    progress = Progress(**json.loads((folder / "progress.json").read_text()))
    return progress, read_state(folder / BEST, task) if (folder / BEST).exists() else None


def unshared(module: nn.Module) -> dict[str, Tensor]:
    """The state of a module with each tensor once: safetensors refuses tied weights."""
    seen: set[int] = set()
    return {
        name: value
        for name, value in module.state_dict().items()
        if value.numel() == 0 or not (value.data_ptr() in seen or seen.add(value.data_ptr()))
    }
