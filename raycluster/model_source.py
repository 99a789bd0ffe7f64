"""Where a model to serve comes from: a folder, or MLflow's registry."""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ctrdist.errors import UserError
from ctrdist.serving.model import find_artifact
from ctrdist.storage import fingerprint
from raycluster.cluster import absolute, check_path
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

    @property
    def version(self) -> str:
        """The registered version's number; `folder` of a folder."""
        return self.name.rpartition("/")[2] if self.tracking_uri else "folder"

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
