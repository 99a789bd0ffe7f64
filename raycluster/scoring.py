"""Batch scoring: files by Ray Data actors, each of which holds the model, and where the model comes from."""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray.data
from ray.data import ActorPoolStrategy

from ctrdist.errors import UserError
from ctrdist.scoring import Job, Scored, score_file
from ctrdist.serving.model import ServedModel, find_artifact
from ctrdist.storage import fingerprint
from raycluster.cluster import Plan, absolute, check_path
from raycluster.mlflow_server import masked, mlflow_quiet


@dataclass(frozen=True)
class ModelSource:
    """Where a model to serve comes from, the same for every process.

    Args:
        name: a folder, or `models:/NAME/VERSION`.
        tracking_uri: of MLflow, for a registered one.
        identity: tells a version from one of the same number in another registry.
    """

    name: str
    tracking_uri: str = ""
    identity: str = ""

    def local(self) -> Path:
        """A local folder that holds the artifact; what is registered is downloaded once a machine."""
        if not self.tracking_uri:
            return find_artifact(Path(self.name))
        cache = Path(tempfile.gettempdir()) / "ctrdist-cache"
        folder = cache / fingerprint(masked(self.tracking_uri), self.name, self.identity)
        if not folder.exists():
            cache.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(dir=cache, prefix=f"{folder.name}."))
            try:
                with mlflow_quiet() as mlflow:
                    mlflow.artifacts.download_artifacts(
                        artifact_uri=self.name, dst_path=str(partial), tracking_uri=self.tracking_uri
                    )
                partial.rename(folder)
            except OSError:
                if not folder.exists():  # else another process was faster
                    raise
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        return find_artifact(folder)


def find_model(model: str, tracking_uri: str | None, state: str) -> ModelSource:
    """What `--model` names: a folder, or `models:/NAME/VERSION` or `models:/NAME@ALIAS` of MLflow's registry.

    Args:
        tracking_uri: MLflow's server or database; None takes the state's.

    Raises:
        UserError: there is no such folder or model, or nothing says where the registry is.
    """
    if not model.startswith("models:/"):
        check_path("--model", model)
        if not Path(model).is_dir():
            raise UserError(f"--model {model}: no such folder; name a release's, or a registered models:/NAME@champion")
        return ModelSource(str(find_artifact(Path(absolute(model)))))
    database = Path(state) / "mlflow.db"
    if not tracking_uri and not (state and database.exists()):
        raise UserError(f"--model {model}: give --tracking-uri, or the --state of the job that registered it")
    uri = tracking_uri or f"sqlite:///{database.resolve()}"
    name, at, alias = model.removeprefix("models:/").partition("@")
    name, _, version = name.partition("/")
    with mlflow_quiet() as mlflow:
        client = mlflow.MlflowClient(tracking_uri=uri)
        try:
            found = client.get_model_version_by_alias(name, alias) if at else client.get_model_version(name, version)
        except mlflow.MlflowException as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"--model {model}: not in the registry at {masked(uri)}: {reason}") from None
    return ModelSource(f"models:/{name}/{found.version}", uri, f"{found.run_id} {found.creation_timestamp}")


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
