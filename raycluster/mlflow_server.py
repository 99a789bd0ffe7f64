"""An MLflow server or database: found, spoken to, and waited for."""

import contextlib
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

from ctrdist.errors import UserError
from ctrdist.storage import State, filesystem, masked

log = logging.getLogger(__name__)
T = TypeVar("T")

PARENT_TAG = "mlflow.parentRunId"
FIRST_CONTACT = 10.0
"""Seconds that a job waits for the server's first answer."""
PATIENCE = 120.0
"""Seconds that `patiently` goes on trying."""
_PARAMS_PER_REQUEST, _METRICS_PER_REQUEST = 100, 1000
_REFUSED = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE")
"""Error codes of MLflow for what no other try will change."""
_NO_SUCH_DATA = re.compile(r"sqlalche\.me/e/\w+/(9h9h|gkpj)\)")
"""How SQLAlchemy signs a DataError or an IntegrityError: the database cannot hold the value. MLflow gives these the
code BAD_REQUEST, as it does for a connection that is lost."""


_LATER = (401, 403, 407, 408, 425, 429)
"""HTTP's answers that another try, or other credentials, may change; those from 400 to 499 besides stay as they are."""


def refused(error: Exception) -> bool:
    """Whether MLflow, or a proxy before it, will say the same at every other try."""
    code, answer = getattr(error, "error_code", ""), getattr(error, "response", None)
    if isinstance(error, UserError):  # the experiment was deleted
        return True
    if answer is not None and 400 <= answer.status_code < 500 and not code:
        return answer.status_code not in _LATER
    return code in _REFUSED or (code == "BAD_REQUEST" and _NO_SUCH_DATA.search(str(error)) is not None)


class Server:
    """MLflow at one URI. It may be away: only `client`, and what speaks to it, needs it.

    Args:
        uri: a server (`http://...`) or a database (`sqlite:///...`, `postgresql://...`).
        artifacts: where a database keeps artifacts; a server decides that itself.
    """

    def __init__(self, uri: str, artifacts: str | None = None) -> None:
        self.uri = uri
        self.runs: dict[str, str] = {}
        """The server's ids of runs, by the keys that records name them by."""
        self._location = None if uri.startswith(("http://", "https://", "databricks")) else artifacts
        self._experiments: dict[str, str] = {}
        self._client: Any = None
        self._lock = threading.RLock()

    @classmethod
    def of(cls, uri: str | None, state: str | Path) -> "Server":
        """What `uri` names, or the SQLite database of a local state.

        Raises:
            UserError: `uri` is None and the state lies on object storage, where no SQLite file can be.
        """
        state = str(state).rstrip("/")
        root = Path(filesystem(state)[1]).resolve() if State(state).is_local else None
        if uri is None:
            if root is None:
                raise UserError(
                    f"the state {state} is on object storage, where MLflow's SQLite file cannot be: "
                    "give a server or database with --tracking-uri"
                )
            uri = f"sqlite:///{root}/mlflow.db"
        return cls(uri, f"{root.as_uri() if root else state}/mlflow-artifacts")

    @property
    def file(self) -> Path | None:
        """The file of a SQLite database."""
        if not self.uri.startswith("sqlite"):
            return None
        import sqlalchemy

        return Path(sqlalchemy.engine.make_url(self.uri).database or "")

    @property
    def shown(self) -> str:
        """The URI as it may be shown."""
        return masked(self.uri)

    @property
    def client(self) -> Any:
        """The `mlflow.MlflowClient`, made on first use: that of a database connects at once."""
        with self._lock:
            if self._client is None:
                if self.file:
                    self.file.parent.mkdir(parents=True, exist_ok=True)
                self._probe()
                with mlflow_quiet() as mlflow:
                    client = mlflow.MlflowClient(tracking_uri=self.uri)
                    client.search_experiments(max_results=1)
                self._client = client
            return self._client

    def _probe(self) -> None:
        """Raise what a database that is away raises: MLflow itself would try for minutes, and hold a lock meanwhile."""
        if self.uri.startswith(("sqlite", "http://", "https://", "databricks")) or "://" not in self.uri:
            return
        import sqlalchemy

        engine = sqlalchemy.create_engine(self.uri, poolclass=sqlalchemy.NullPool)
        engine.connect().close()

    def experiment(self, name: str) -> str:
        """The id of an experiment, which is created if it is missing.

        Raises:
            UserError: it was deleted.
        """
        with self._lock:
            if name not in self._experiments:
                found = self.client.get_experiment_by_name(name)
                if found and found.lifecycle_stage == "deleted":
                    raise UserError(
                        f"the MLflow experiment {name!r} at {self.shown} was deleted: bring it back with "
                        f"`mlflow experiments restore --experiment-id {found.experiment_id}`, or choose another name"
                    )
                self._experiments[name] = found.experiment_id if found else self._make_experiment(name)
            return self._experiments[name]

    def _make_experiment(self, name: str) -> str:
        try:
            return self.client.create_experiment(name, self._location)
        except Exception as error:  # of MLflow, which is imported late
            if getattr(error, "error_code", "") != "RESOURCE_ALREADY_EXISTS":
                raise
            return self.client.get_experiment_by_name(name).experiment_id  # another job was faster

    def first_contact(self, experiment: str) -> bool:
        """Whether it answers within a few seconds; if not, a warning says so. SQLite is waited for.

        Raises:
            UserError: it never will: nothing usable is at the URI, or the experiment was deleted.
        """
        failed: list[Exception] = []

        def contact() -> None:
            try:
                self.experiment(experiment)
            except Exception as error:  # MLflow, requests and SQLAlchemy each raise their own
                failed.append(error)

        with mlflow_quiet():  # the import takes seconds, which are not the server's
            pass
        thread = threading.Thread(target=contact, name="mlflow-first-contact", daemon=True)
        thread.start()
        thread.join(None if self.uri.startswith("sqlite") else FIRST_CONTACT)
        if failed and isinstance(failed[0], UserError):
            raise failed[0]
        if failed and not self.away(failed[0]):
            raise UserError(
                f"cannot use MLflow at {self.shown} (--tracking-uri): {self.reason(failed[0])}. Give the URL of "
                "a running server or a database URI such as sqlite:////folder/mlflow.db, or leave the option out"
            ) from failed[0]
        if failed or thread.is_alive():
            reason = self.reason(failed[0]) if failed else f"no answer in {FIRST_CONTACT:.0f} s"
            log.warning("MLflow at %s is away (%s): what is logged waits for it", self.shown, reason)
            return False
        return True

    def away(self, error: BaseException | None) -> bool:
        """Whether an error says that the server, or its database, does not answer just now."""
        import requests
        from sqlalchemy.exc import OperationalError

        nobody = (
            requests.exceptions.ConnectionError,
            requests.exceptions.Timeout,
            requests.exceptions.RetryError,
            OperationalError,
        )
        while error is not None:
            code = getattr(error, "error_code", "")
            if isinstance(error, nobody) or code in ("TEMPORARILY_UNAVAILABLE", "DEADLINE_EXCEEDED"):
                return not self.uri.startswith("sqlite")  # a file that cannot be opened will not be there later
            error = error.__cause__ or error.__context__
        return False

    def gone(self, reason: str) -> UserError:
        """What to raise where nothing can be done without the server."""
        return UserError(
            f"MLflow at {self.shown} (--tracking-uri) does not answer: {reason}. What is computed is complete: "
            "run the job again when the server is back"
        )

    def reason(self, error: Exception) -> str:
        """What an error says in one line, as it may be shown."""
        lines = masked(str(error).replace(self.uri, self.shown)).strip().splitlines()
        return lines[0].rstrip(".") if lines else type(error).__name__

    def patiently(self, action: Callable[[], T]) -> T:
        """What `action` returns, tried again with longer and longer pauses while the server is away.

        Raises:
            UserError: it stayed away for too long.
        """
        end, pause = time.monotonic() + PATIENCE, 1.0
        while True:
            try:
                return action()
            except Exception as error:
                if not self.away(error):
                    raise
                if time.monotonic() + pause > end:
                    raise self.gone(self.reason(error)) from error
                log.warning("MLflow at %s does not answer; the next try is in %.0f s", self.shown, pause)
            time.sleep(pause)
            pause = min(2 * pause, 30.0)

    def deliver(self, folder: Path, records: list[dict[str, Any]]) -> None:
        """Write what a `raycluster.tracking.Tracker` recorded. All of it may come a second time, and changes nothing.

        What the server refuses for good is left out with a warning.

        Args:
            folder: of the journal, which has the files that records refer to.

        Raises:
            ConnectionError: anything else went wrong; another try may go better.
        """
        for (kind, run), group in groupby(records, lambda record: (record["kind"], record["run"])):
            for record in _together(list(group)) if kind == "metrics" else group:
                files = {"folder": str(folder / record["folder"])} if kind == "artifacts" else {}
                self._write(kind, run, record | files)

    def _write(self, kind: str, run: str, record: dict[str, Any]) -> None:
        try:
            if kind == "open":
                self._open(run, record)
            elif run in self.runs:  # else it was refused
                getattr(self, f"_{kind}")(self.runs[run], record)
        except Exception as error:
            if not refused(error):
                raise ConnectionError(self.reason(error)) from error
            if len(entries := record.get("metrics", [])) > 1:  # one of them may be to blame
                for entry in entries:
                    self._write(kind, run, {"metrics": [entry]})
            else:
                log.warning("MLflow refuses %s: %s", json.dumps(record)[:200], self.reason(error))

    def _open(self, run: str, record: dict[str, Any]) -> None:
        experiment, tags = self.experiment(record["experiment"]), record["tags"]
        parent = record["parent"] and self.runs.get(record["parent"])
        found = self._find_run(experiment, record["name"], parent, tags)
        if found:
            self.client.update_run(found, status="RUNNING")
        else:
            tags = tags | ({PARENT_TAG: parent} if parent else {})
            made = self.client.create_run(experiment, start_time=record["time"], tags=tags, run_name=record["name"])
            found = made.info.run_id
        self.runs[run] = found

    def _find_run(self, experiment: str, name: str, parent: str | None, tags: dict[str, str]) -> str | None:
        """The newest run of that name under that parent (None: a top-level run) that carries all of `tags`."""
        quote = '"' if "'" in name else "'"
        query = f"attributes.run_name = {quote}{name}{quote}"
        if parent:
            query += f" and tags.`{PARENT_TAG}` = '{parent}'"
        page = None
        while True:
            page = self.client.search_runs(
                [experiment], query, order_by=["attributes.start_time DESC"], page_token=page and page.token
            )
            for run in page:
                if all(run.data.tags.get(key) == value for key, value in {**tags, PARENT_TAG: parent}.items()):
                    return run.info.run_id
            if not page.token:
                return None

    def _params(self, run_id: str, record: dict[str, Any]) -> None:
        from mlflow.entities import Param

        known = self.client.get_run(run_id).data.params
        entries = [Param(key, value) for key, value in record["params"].items() if key not in known]
        for start in range(0, len(entries), _PARAMS_PER_REQUEST):
            self.client.log_batch(run_id, params=entries[start : start + _PARAMS_PER_REQUEST])

    def _tags(self, run_id: str, record: dict[str, Any]) -> None:
        from mlflow.entities import RunTag

        self.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in record["tags"].items()])

    def _metrics(self, run_id: str, record: dict[str, Any]) -> None:
        from mlflow.entities import Metric

        self.client.log_batch(run_id, metrics=[Metric(*entry) for entry in record["metrics"]])

    def _artifacts(self, run_id: str, record: dict[str, Any]) -> None:
        self.client.log_artifacts(run_id, record["folder"], artifact_path=record["to"])

    def _end(self, run_id: str, record: dict[str, Any]) -> None:
        self.client.set_terminated(run_id, status=record["status"], end_time=record["time"])


def _together(records: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The metrics of several records of a run, in as few requests as can be."""
    entries = [entry for record in records for entry in record["metrics"]]
    for start in range(0, len(entries), _METRICS_PER_REQUEST):
        yield {"metrics": entries[start : start + _METRICS_PER_REQUEST]}


@contextlib.contextmanager
def mlflow_quiet() -> Iterator[Any]:
    """Imports mlflow (seconds, hence here) without its telemetry, and its chatter at INFO silenced from now on.

    Telemetry stays on where the environment says so itself.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # who calls it tries again, and can be interrupted
    import mlflow

    _Silence.begin()
    try:
        yield mlflow
    finally:
        _Silence.end()


class _Silence:
    """INFO turned off altogether while any thread speaks to MLflow: making a database resets the levels of loggers."""

    lock, threads, before = threading.Lock(), 0, 0

    @classmethod
    def begin(cls) -> None:
        with cls.lock:
            if not cls.threads:
                cls.before = logging.root.manager.disable
                logging.disable(max(cls.before, logging.INFO))
            cls.threads += 1

    @classmethod
    def end(cls) -> None:
        with cls.lock:
            cls.threads -= 1
            if not cls.threads:
                logging.disable(cls.before)
                for name in ("mlflow", "alembic"):
                    logging.getLogger(name).setLevel(logging.WARNING)
