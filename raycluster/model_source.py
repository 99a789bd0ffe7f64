"""Where a model to serve comes from: a folder, or MLflow's registry."""

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ctrdist.errors import UserError
from ctrdist.serving.model import find_artifact
from ctrdist.storage import fingerprint
from raycluster.cluster import absolute, check_path
from raycluster.mlflow_server import Server, masked, mlflow_quiet

KEPT = 3
"""Versions of a registered model that stay on a machine: those asked for last."""
VERSIONS = "versions"


class RegistryAway(UserError):
    """The registry does not answer just now."""


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

    @property
    def version(self) -> str:
        """The registered version's number; `folder` of a folder."""
        return self.name.rpartition("/")[2] if self.tracking_uri else "folder"

    def local(self) -> Path:
        """A local folder that holds the artifact. What is registered is downloaded once a machine, which keeps the
        `KEPT` versions of a model that were asked for last."""
        if not self.tracking_uri:
            return find_artifact(Path(self.name))
        versions = _cache(self.name.rpartition("/")[0], self.tracking_uri) / VERSIONS
        folder = versions / f"{self.version}-{fingerprint(self.identity)[:8]}"
        if not folder.exists():
            self._download(folder)
        os.utime(folder)
        others = sorted(versions.glob("[0-9]*-????????"), key=lambda path: path.stat().st_mtime, reverse=True)
        for old in others[KEPT:]:
            _remove(old)
        return find_artifact(folder)

    def _download(self, folder: Path) -> None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix="new."))
        try:
            with mlflow_quiet() as mlflow:
                # `models:/NAME/VERSION` itself would be looked for in the registry of the environment.
                name = self.name.removeprefix("models:/").rpartition("/")[0]
                files = mlflow.MlflowClient(self.tracking_uri).get_model_version_download_uri(name, self.version)
                found = mlflow.artifacts.download_artifacts(
                    artifact_uri=files, dst_path=str(partial), tracking_uri=self.tracking_uri
                )
            Path(found).rename(folder)
        except OSError:
            if not folder.exists():  # else another process was faster
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def find_model(model: str, tracking_uri: str | None, state: str) -> ModelSource:
    """What `--model` names: a folder, or `models:/NAME/VERSION` or `models:/NAME@ALIAS` of MLflow's registry.

    Args:
        tracking_uri: MLflow's server or database; None takes the state's.

    Raises:
        RegistryAway: the registry does not answer.
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
    server = Server(tracking_uri or f"sqlite:///{database.resolve()}")
    name, at, alias = model.removeprefix("models:/").partition("@")
    name, _, version = name.partition("/")
    try:
        client = server.client
        found = client.get_model_version_by_alias(name, alias) if at else client.get_model_version(name, version)
    except Exception as error:  # MLflow, requests and SQLAlchemy each raise their own
        reason = (str(error).replace(server.uri, server.shown).strip().splitlines() or [type(error).__name__])[0]
        if server.away(error):
            raise RegistryAway(f"--model {model}: the registry at {server.shown} does not answer: {reason}") from error
        raise UserError(f"--model {model}: not in the registry at {server.shown}: {reason}") from None
    return ModelSource(f"models:/{name}/{found.version}", server.uri, f"{found.run_id} {found.creation_timestamp}")


def remember(model: str, source: ModelSource) -> None:
    """Note on this machine that a registered model, by the name it was asked for, served as this version."""
    if source.tracking_uri:
        note = _note(model, source.tracking_uri)
        note.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=note.parent, delete=False) as file:
            json.dump({"name": source.name, "identity": source.identity}, file)
        os.replace(file.name, note)


def remembered(model: str, tracking_uri: str) -> ModelSource | None:
    """What `remember` noted last of `models:/NAME@ALIAS` or `models:/NAME/VERSION`."""
    if not model.startswith("models:/"):
        return None
    try:
        return ModelSource(tracking_uri=tracking_uri, **json.loads(_note(model, tracking_uri).read_text()))
    except FileNotFoundError:
        return None


def _cache(model: str, tracking_uri: str) -> Path:
    """This machine's folder for a registered model, `models:/NAME`."""
    return Path(tempfile.gettempdir()) / "ctrdist-models" / fingerprint(masked(tracking_uri), model)


def _note(model: str, tracking_uri: str) -> Path:
    """Where it is noted what `models:/NAME@ALIAS`, or `models:/NAME/VERSION`, was."""
    name = model.replace("@", "/").rpartition("/")[0]
    return _cache(name, tracking_uri) / f"found-{fingerprint(model)}.json"


def _remove(folder: Path) -> None:
    """Remove a version, at once for those who look; who has its files open keeps them."""
    gone = Path(tempfile.mkdtemp(dir=folder.parent, prefix="old."))
    try:
        folder.rename(gone / folder.name)
    except FileNotFoundError:  # another process was faster
        pass
    shutil.rmtree(gone, ignore_errors=True)
