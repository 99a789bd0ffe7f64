"""Batch scoring: files by Ray Data actors, each of which holds the model."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import ray.data
from ray.data import ActorPoolStrategy

from ctrdist.errors import UserError
from ctrdist.scoring import Job, Scored, score_file
from ctrdist.serving.model import ServedModel
from raycluster.model_source import ModelSource
from raycluster.planning import Plan


class FileScorer:
    """An actor that scores files, one at a time."""

    def __init__(self, source: ModelSource, keep: tuple[str, ...], threads: int) -> None:
        import torch

        from ctrdist.allocator import keep_freed_memory

        torch.set_num_threads(threads)
        keep_freed_memory()
        self.model, self.keep = ServedModel(source.local()), keep

    def __call__(self, job: dict[str, str]) -> dict[str, Any]:
        """What became of a file (`Scored`), and `error`, what is wrong with it: one does not stop the others."""
        try:
            return asdict(score_file(Job(**job), self.model, self.keep)) | {"error": ""}
        except UserError as error:
            return asdict(Scored(rows=0, bad=0, before=False)) | {"error": str(error)}


def score_files(
    jobs: list[Job], source: ModelSource, keep: tuple[str, ...], plan: Plan, progress: Callable[[int, int], None]
) -> list[Scored]:
    """Score files, as many at a time as the plan has workers; what an earlier run has done is left as it is.

    Args:
        keep: columns to keep (`score_file`).
        progress: called with (files done, files in all) after each.

    Raises:
        UserError: something is wrong with a file; all others are scored.
    """
    size = min(plan.workers, len(jobs))
    done = ray.data.from_items([asdict(job) for job in jobs], override_num_blocks=len(jobs)).map(
        FileScorer,
        num_cpus=plan.worker_cpus,
        compute=ActorPoolStrategy(size=size),
        fn_constructor_kwargs={"source": source, "keep": keep, "threads": plan.threads},
    )
    found, wrong = [], []
    for row in done.iter_rows():
        error = row.pop("error")
        (wrong if error else found).append(error or Scored(**row))
        progress(len(found) + len(wrong), len(jobs))
    if wrong:
        others = f" {len(wrong) - 1} other files are wrong too." if len(wrong) > 1 else ""
        raise UserError(f"{wrong[0]}.{others} Mend them and run again: {len(found)} of {len(jobs)} files are scored")
    return found
