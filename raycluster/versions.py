"""The versions of a registered model: which one serves (`champion`), which came last (`challenger`), and why.

What is said of a version stands in its tags; who was champion before whom, in a tag of the model. An alias is moved by
one call, so that who loads `models:/NAME@champion` gets one whole version or another.
"""

import hashlib
import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from ctrdist.errors import UserError
from ctrdist.gate import NOISE
from ctrdist.serving.model import SERVING
from ctrdist.storage import checksums
from raycluster.mlflow_server import Server, mlflow_quiet

log = logging.getLogger(__name__)

CHAMPION, CHALLENGER = "champion", "challenger"
RELEASE, ARTIFACT, DATE, GATE, SERVED_SINCE = "release", "artifact", "date", "gate", "champion_since"
"""Tags of a version: fingerprints of the release's content and of the artifact's files, the day's date, what the gate
decided (JSON), and when it became champion last."""
CHAMPIONS = "champions"
"""Tag of the model: the numbers of the champions so far, the present one last; one that was rolled back is gone."""
MOST_CHARACTERS = 5000
"""Of a tag's value, on every database that MLflow takes."""
DOWNLOADS = 3
"""Tries for an artifact before it counts as broken: a connection that is lost on the way looks the same."""


def artifact_digest(folder: Path) -> str:
    """Sixteen hex digits of an artifact's files, by which they are known again: the same in all versions of this
    project."""
    return hashlib.sha256(json.dumps(checksums(folder), sort_keys=True).encode()).hexdigest()[:16]


class Unfit(Exception):
    """A version cannot serve, or be compared; the message says why."""


class Version(NamedTuple):
    """A version of the model.

    Args:
        number: of it, as the registry and the command line name it.
        tags: what is said of it.
    """

    number: str
    tags: dict[str, str]

    @property
    def decision(self) -> dict[str, Any] | None:
        """What the gate decided of it, if it did."""
        return json.loads(self.tags[GATE]) if GATE in self.tags else None


class Versions:
    """The versions of one registered model. Every call waits a while for a server that is away.

    Args:
        server: that has the registry.
        name: of the model.
    """

    def __init__(self, server: Server, name: str) -> None:
        self.server, self.name = server, name

    def all(self) -> list[Version]:
        """All versions, the newest first."""
        found = self._call(lambda client: client.search_model_versions(f"name = '{self.name}'"))
        return [Version(str(v.version), dict(v.tags)) for v in sorted(found, key=lambda v: -int(v.version))]

    def get(self, number: str) -> Version:
        """A version. Raises UserError if there is no such one."""
        for version in (every := self.all()):
            if version.number == number:
                return version
        known = ", ".join(version.number for version in every) or "none"
        raise UserError(f"{self.name} has no version {number} at {self.server.shown}; its versions: {known}")

    def find(self, release: str) -> Version | None:
        """The version of a release, by the fingerprint of its content."""
        return next((version for version in self.all() if version.tags.get(RELEASE) == release), None)

    def create(self, source: str, run_id: str, model_id: str, tags: dict[str, str]) -> str:
        """Register a release, and the model with its first one; returns the version's number."""

        def make(client: Any) -> str:
            if found := self.find(tags[RELEASE]):  # made by an earlier try, of which no answer came
                return found.number
            if not client.search_registered_models(f"name = '{self.name}'"):
                client.create_registered_model(self.name)
            return str(client.create_model_version(self.name, source, run_id, tags, model_id=model_id).version)

        return self._call(make)

    def aliases(self) -> dict[str, str]:
        """Versions by alias."""
        model = self._model()
        return {alias: str(number) for alias, number in model.aliases.items()} if model else {}

    def champion(self) -> Version | None:
        """The version that serves."""
        number = self.aliases().get(CHAMPION)
        return self.get(number) if number else None

    def challenge(self, number: str) -> None:
        """Give a version the alias `challenger`."""
        self._call(lambda client: client.set_registered_model_alias(self.name, CHALLENGER, number))

    def record(self, number: str, decision: dict[str, Any]) -> None:
        """Keep what the gate decided of a version."""
        self._tag(number, GATE, json.dumps(decision))

    def promote(self, number: str) -> None:
        """Make a version the champion. The same in whatever state an earlier try ended."""
        champions = self.champions()
        if champions[-1:] != [number]:
            self._keep([*champions, number])
        self._call(lambda client: client.set_registered_model_alias(self.name, CHAMPION, number))
        self._serves_since_now(number)

    def previous(self) -> tuple[str, str]:
        """The champion, and the one before it.

        Raises:
            UserError: there was none before.
        """
        champions = self.champions()
        if len(champions) < 2:
            now = f"version {champions[0]} is the first" if champions else "there is none yet"
            raise UserError(f"{self.name} has no champion to go back to: {now}; see `jobs/release.py list`")
        return champions[-1], champions[-2]

    def demote(self) -> None:
        """Make the champion before this one champion again. Raises UserError if there was none before."""
        now, before = self.previous()
        self._call(lambda client: client.set_registered_model_alias(self.name, CHAMPION, before))
        self._keep(self.champions())
        self._serves_since_now(before)

    def champions(self) -> list[str]:
        """The champions so far, the present one last.

        The alias is right where the tag says otherwise: a try was cut off between the two, or somebody set the alias.
        """
        model = self._model()
        if model is None or CHAMPION not in model.aliases:
            return []
        now, known = str(model.aliases[CHAMPION]), json.loads(model.tags.get(CHAMPIONS, "[]"))
        while known and known[-1] != now and now in known:
            known.pop()
        return known if known and known[-1] == now else [*known, now]

    @contextmanager
    def artifact(self, number: str) -> Iterator[tuple[Path, Path]]:
        """For a while, a local copy of a version's MLflow model, and within it the folder of what is served.

        Raises:
            Unfit: files are missing, or have other bytes than those that were registered.
        """
        expected = self.get(number).tags.get(ARTIFACT)
        with tempfile.TemporaryDirectory(prefix="ctrdist-") as folder, mlflow_quiet() as mlflow:
            uri = f"models:/{self.name}/{number}"
            mlflow.set_tracking_uri(self.server.uri)

            def download(_client: Any) -> str:
                return mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=tempfile.mkdtemp(dir=folder))

            try:
                model = Path(self._persistently(download))
                flavor = mlflow.models.Model.load(model).flavors["python_function"]
                release = model / flavor["artifacts"][SERVING]["path"]
            except UserError:
                raise
            except Exception as error:
                raise self._broken(number, self.server.reason(error)) from error
            if expected and artifact_digest(release) != expected:
                raise self._broken(number, "files are missing, or have other bytes than when it was registered")
            yield model, release

    def require_whole(self, number: str, frame: pd.DataFrame | None = None, expected: np.ndarray | None = None) -> None:
        """Load a version through MLflow and score with it.

        Args:
            frame: rows to score; its own example if not given.
            expected: float [n] probabilities that must come out.

        Raises:
            Unfit: it cannot be loaded, does not score its rows, or scores them otherwise.
        """
        with self.artifact(number) as (folder, _), mlflow_quiet() as mlflow:
            try:
                model = mlflow.pyfunc.load_model(str(folder))
                frame = mlflow.models.Model.load(folder).load_input_example(str(folder)) if frame is None else frame
                found = model.predict(frame)["probability"].to_numpy()
            except Exception as error:  # of whatever library: it does not serve
                raise self._broken(number, f"{type(error).__name__}: {self.server.reason(error)}") from error
        if expected is None and not (len(found) == len(frame) and np.isfinite(found).all()):
            raise self._broken(number, "it does not score its own example")
        if expected is not None and not np.allclose(found, expected, rtol=0, atol=NOISE, equal_nan=True):
            off = np.nanmax(np.abs(found - expected))
            raise self._broken(number, f"its scores are up to {off:.2g} off those of the release that it was made from")

    def _broken(self, number: str, reason: str) -> Unfit:
        return Unfit(
            f"the artifact of {self.name} version {number} at {self.server.shown} is broken: {reason}. It cannot "
            "serve; restore its files, or choose another version (jobs/release.py list)"
        )

    def _model(self) -> Any | None:
        """The registered model; None before its first version."""

        def find(client: Any) -> Any | None:
            known = client.search_registered_models(f"name = '{self.name}'")
            return client.get_registered_model(self.name) if known else None  # only this one is sure to have aliases

        return self._call(find)

    def _keep(self, champions: list[str]) -> None:
        while len(kept := json.dumps(champions)) > MOST_CHARACTERS:
            champions = champions[1:]
        self._call(lambda client: client.set_registered_model_tag(self.name, CHAMPIONS, kept))

    def _serves_since_now(self, number: str) -> None:
        self._tag(number, SERVED_SINCE, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))

    def _tag(self, number: str, key: str, value: str) -> None:
        self._call(lambda client: client.set_model_version_tag(self.name, number, key, value))

    def _persistently(self, action: Callable[[Any], Any]) -> Any:
        """`_call`, tried again, with a warning that says why, where it fails though the server answers."""
        for left in reversed(range(DOWNLOADS)):
            try:
                return self._call(action)
            except UserError:
                raise
            except Exception as error:  # MLflow's, of a file that is not there as of one that was cut off
                if not left:
                    raise
                log.warning("%s at %s: %s; trying again", self.name, self.server.shown, self.server.reason(error))
                time.sleep(1.0)

    def _call(self, action: Callable[[Any], Any]) -> Any:
        return self.server.patiently(lambda: action(self.server.client))
