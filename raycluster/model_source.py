"""Where a model to serve comes from: a folder, or MLflow's registry."""

import fcntl
import json
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from ctrdist.errors import UserError
from ctrdist.serving.model import find_artifact
from ctrdist.storage import fingerprint, masked
from raycluster.cluster import absolute, check_path
from raycluster.mlflow_server import Server, mlflow_quiet
from raycluster.versions import ARTIFACT, artifact_digest

KEPT = 3
"""Versions of a registered model that stay on a machine: those asked for last, besides one that is remembered."""
LOADING = 3600.0
"""Seconds that a process may take from when it asked for a version to when it has its files open."""
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
        `KEPT` versions of a model that were asked for last.

        Raises:
            UserError: the registry's files are not there, or not those that were registered.
        """
        if not self.tracking_uri:
            return find_artifact(Path(self.name))
        versions = _cache(self._model, self.tracking_uri) / VERSIONS
        versions.mkdir(parents=True, exist_ok=True)
        folder = versions / f"{self.version}-{fingerprint(self.identity)[:8]}"
        with (versions.parent / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_whole(folder):
                shutil.rmtree(folder, ignore_errors=True)
                self._download(folder)
            now = time.time_ns()  # the kernel's own stamps are a tick apart, so that two versions may have the same
            os.utime(folder, ns=(now, now))
            _forget(versions)
        return find_artifact(folder)

    @property
    def _model(self) -> str:
        return self.name.rpartition("/")[0]

    def _download(self, folder: Path) -> None:
        for left in folder.parent.glob("new.*"):  # of a process that died
            shutil.rmtree(left)
        server = Server(self.tracking_uri)
        _require_database(server)
        partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix="new."))
        try:
            with mlflow_quiet() as mlflow:
                # `models:/NAME/VERSION` itself would be looked for in the registry of the environment.
                name, client = self._model.removeprefix("models:/"), server.client
                found = mlflow.artifacts.download_artifacts(
                    artifact_uri=client.get_model_version_download_uri(name, self.version),
                    dst_path=str(partial),
                    tracking_uri=self.tracking_uri,
                )
                expected = client.get_model_version(name, self.version).tags.get(ARTIFACT)
            if expected and artifact_digest(find_artifact(Path(found))) != expected:
                raise UserError("files are missing, or have other bytes than when it was registered")
            _contents(folder).write_text(json.dumps(_sizes(Path(found))))
            Path(found).rename(folder)
        except Exception as error:  # MLflow, requests and SQLAlchemy each raise their own
            raise UserError(f"{self.name} at {server.shown} cannot be fetched: {server.reason(error)}") from None
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
    if not (tracking_uri or state):
        raise UserError(f"--model {model}: give --tracking-uri, or the --state of the job that registered it")
    server = Server(tracking_uri) if tracking_uri else Server.of(None, absolute(state))
    _require_database(server)
    name, at, alias = model.removeprefix("models:/").partition("@")
    name, _, version = name.partition("/")
    try:
        client = server.client
        found = client.get_model_version_by_alias(name, alias) if at else client.get_model_version(name, version)
    except Exception as error:  # MLflow, requests and SQLAlchemy each raise their own
        reason = server.reason(error)
        if server.away(error):
            raise RegistryAway(f"--model {model}: the registry at {server.shown} does not answer: {reason}") from None
        raise UserError(f"--model {model}: not in the registry at {server.shown}: {reason}") from None
    return ModelSource(f"models:/{name}/{found.version}", server.uri, f"{found.run_id} {found.creation_timestamp}")


def _require_database(server: Server) -> None:
    """Raise a UserError for a SQLite file that is not on this machine: looking into it would make an empty one."""
    if server.file and not server.file.exists():
        raise UserError(
            f"{server.shown}: no registry there, on this machine. A daily job makes one in its state unless it has a "
            "--tracking-uri: give the same. To score or serve on other nodes than the job's, that must be a server"
        )


def remember(model: str, source: ModelSource) -> None:
    """Note on this machine that a registered model, by the name it was asked for, served as this version."""
    if source.tracking_uri:
        note = _note(model, source.tracking_uri)
        note.parent.mkdir(exist_ok=True)
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
    own = Path(tempfile.gettempdir()) / f"ctrdist-models-{os.getuid()}"
    own.mkdir(mode=0o700, parents=True, exist_ok=True)
    if own.is_symlink() or own.stat().st_uid != os.getuid():
        raise UserError(f"{own} is somebody else's, who could change what is served: remove it, or set TMPDIR")
    return own / fingerprint(masked(tracking_uri), model)


def _note(model: str, tracking_uri: str) -> Path:
    """Where it is noted what `models:/NAME@ALIAS`, or `models:/NAME/VERSION`, was."""
    name = model.replace("@", "/").rpartition("/")[0]
    return _cache(name, tracking_uri) / f"found-{fingerprint(model)}.json"


def _forget(versions: Path) -> None:
    """Remove versions that nobody asked for lately; who has files of one open keeps them."""
    notes = [json.loads(note.read_text()) for note in versions.parent.glob("found-*.json")]
    noted = {note["name"].rpartition("/")[2] for note in notes}
    found = sorted(versions.glob("[0-9]*-????????"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for folder in found[KEPT:]:
        if folder.name.split("-")[0] not in noted and time.time() - folder.stat().st_mtime > LOADING:
            shutil.rmtree(folder)
            _contents(folder).unlink(missing_ok=True)


def _contents(folder: Path) -> Path:
    """Where it is noted which files a version's folder has."""
    return folder.with_name(f"{folder.name}.json")


def _sizes(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def _is_whole(folder: Path) -> bool:
    """Whether a version is there with all of its files: systems clear folders for temporary files now and then."""
    noted = _contents(folder)
    return folder.exists() and noted.exists() and json.loads(noted.read_text()) == _sizes(folder)
