"""MLflow, written by the driver's process alone: runs by explicit id, and a thread that follows the metrics file.

Workers never talk to MLflow. Rank 0 of a training appends lines to a file in the state, and `MetricsTail` in the
driver logs them while `fit()` blocks.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ctrdist.errors import UserError

log = logging.getLogger(__name__)

PARENT_TAG = "mlflow.parentRunId"
PARAM_KEY_LIMIT, PARAM_VALUE_LIMIT, TAG_VALUE_LIMIT = 250, 6000, 8000
"""Most characters MLflow 3 stores in a parameter's name, a parameter's value and a tag's value."""
_PARAMS_PER_REQUEST, _METRICS_PER_REQUEST = 100, 1000


def masked(uri: str) -> str:
    """A URI as it may be shown: without user and password."""
    return re.sub(r"//[^/@]*@", "//***@", uri)


class Tracker:
    """The runs of one MLflow experiment. Every call names its run; there is no active run to lose track of."""

    def __init__(self, client: Any, experiment_id: str, uri: str):
        self.client = client
        """The `mlflow.MlflowClient` itself, for what the tracker has no word for (the model registry)."""
        self.experiment_id = experiment_id
        self.uri = uri

    @classmethod
    def open(cls, uri: str | None, state: str | Path, experiment: str) -> "Tracker":
        """Connects, and creates the experiment where it is missing.

        Args:
            uri: a server (`http://...`) or database (`sqlite:///...`, `postgresql://...`); None is
                `sqlite:///<state>/mlflow.db`.
            state: folder of the pipeline's state. A database keeps its artifacts in `<state>/mlflow-artifacts`; a
                server decides that itself.
            experiment: name of the experiment.

        Raises:
            UserError: nothing usable answers at `uri`, the experiment was deleted, or `uri` is None and the state
                lies on object storage, where no SQLite file can be.
        """
        state = str(state).rstrip("/")
        remote = "://" in state
        if uri is None:
            if remote:
                raise UserError(
                    f"the state {state} is on object storage, where MLflow's SQLite file cannot be: "
                    "give a server or database with --tracking-uri"
                )
            Path(state).mkdir(parents=True, exist_ok=True)
            uri = f"sqlite:///{Path(state).resolve()}/mlflow.db"
        served = uri.startswith(("http://", "https://", "databricks"))
        artifacts = f"{state if remote else Path(state).resolve().as_uri()}/mlflow-artifacts"
        shown = masked(uri)
        with mlflow_quiet() as mlflow, _quick_failure():
            try:
                client = mlflow.MlflowClient(tracking_uri=uri)
                found = client.get_experiment_by_name(experiment)
                location = None if served else artifacts
                experiment_id = found.experiment_id if found else client.create_experiment(experiment, location)
            except Exception as error:  # MLflow, requests and SQLAlchemy each raise their own
                lines = str(error).replace(uri, shown).strip().splitlines()
                reason = lines[0].rstrip(".") if lines else type(error).__name__
                raise UserError(
                    f"cannot use MLflow at {shown} (--tracking-uri): {reason}. Give the URL of a running "
                    "server or a database URI such as sqlite:////folder/mlflow.db, or leave the option out"
                ) from error
        if found and found.lifecycle_stage == "deleted":
            raise UserError(
                f"the MLflow experiment {experiment!r} at {shown} was deleted: bring it back with "
                f"`mlflow experiments restore --experiment-id {found.experiment_id}`, or choose another name"
            )
        return cls(client, experiment_id, uri)

    def start_run(
        self, name: str, parent_run_id: str | None = None, params: Mapping | None = None, tags: Mapping | None = None
    ) -> str:
        """Creates a run in the state RUNNING and returns its id; with `parent_run_id`, as that run's child.

        Args:
            params: may be nested; see `flatten`.
            tags: string values.
        """
        labels = {key: str(value)[:TAG_VALUE_LIMIT] for key, value in (tags or {}).items()}
        if parent_run_id:
            labels[PARENT_TAG] = parent_run_id
        run_id = self.client.create_run(self.experiment_id, tags=labels, run_name=name).info.run_id
        self.log_params(run_id, params or {})
        return run_id

    def find_run(self, name: str, parent_run_id: str | None = None, tags: Mapping | None = None) -> str | None:
        """The newest run of that name under that parent (None: a top-level run), whatever its status, or None.

        With `tags`, only a run that carries them all. Lets a job that runs again go on with the run it left.
        """
        quote = '"' if "'" in name else "'"
        query = f"attributes.run_name = {quote}{name}{quote}"
        if parent_run_id:
            query += f" and tags.`{PARENT_TAG}` = '{parent_run_id}'"
        page = None
        while True:
            page = self.client.search_runs(
                [self.experiment_id], query, order_by=["attributes.start_time DESC"], page_token=page and page.token
            )
            for run in page:
                wanted = {**{key: str(value) for key, value in (tags or {}).items()}, PARENT_TAG: parent_run_id}
                if all(run.data.tags.get(key) == value for key, value in wanted.items()):
                    return run.info.run_id
            if not page.token:
                return None

    def resume_run(self, run_id: str, params: Mapping | None = None) -> str:
        """Puts a run back to RUNNING and adds the parameters it lacks; those it has stay, MLflow never changes one."""
        self.client.update_run(run_id, status="RUNNING")
        known = self.client.get_run(run_id).data.params
        self.log_params(run_id, {key: value for key, value in flatten(params or {}).items() if key not in known})
        return run_id

    @contextlib.contextmanager
    def run(
        self, name: str, parent_run_id: str | None = None, params: Mapping | None = None, tags: Mapping | None = None
    ) -> Iterator[str]:
        """The run of a job or a stage, as a block: the one found by `find_run` goes on, else a new one starts.

        Yields its id. The run ends FINISHED, KILLED after an interrupt, or FAILED after any other exception.
        """
        found = self.find_run(name, parent_run_id, tags)
        run_id = self.resume_run(found, params) if found else self.start_run(name, parent_run_id, params, tags)
        try:
            yield run_id
        except BaseException as error:
            # The error of the block is what the user must see, not one of a tracking server that is gone as well.
            with contextlib.suppress(Exception):
                self.end_run(run_id, "KILLED" if isinstance(error, KeyboardInterrupt | SystemExit) else "FAILED")
            raise
        self.end_run(run_id, "FINISHED")

    def log_params(self, run_id: str, params: Mapping) -> None:
        """Logs `params`, nested or flat; see `flatten`."""
        from mlflow.entities import Param

        entries = [Param(key, value) for key, value in flatten(params).items()]
        for start in range(0, len(entries), _PARAMS_PER_REQUEST):
            self.client.log_batch(run_id, params=entries[start : start + _PARAMS_PER_REQUEST])

    def log_metrics(self, run_id: str, metrics: Mapping[str, float | None], step: int = 0) -> None:
        """Logs numbers at one step in as few requests as can be; a value of None is left out."""
        self.log_records(run_id, [{"step": step, **metrics}])

    def log_records(self, run_id: str, records: list[Mapping]) -> None:
        """Logs many steps in as few requests as can be.

        Each record holds "step", optionally "time" (seconds since 1970; default now), and numbers by name. Values that
        are no numbers are left out. The same record logged twice, time included, is stored once.
        """
        from mlflow.entities import Metric

        now = time.time()
        entries = [
            Metric(name, float(value), round(1000 * record.get("time", now)), int(record.get("step", 0)))
            for record in records
            for name, value in record.items()
            if name not in ("step", "time") and isinstance(value, int | float) and not isinstance(value, bool)
        ]
        for start in range(0, len(entries), _METRICS_PER_REQUEST):
            self.client.log_batch(run_id, metrics=entries[start : start + _METRICS_PER_REQUEST])

    def log_artifacts(self, run_id: str, folder: str | Path, to: str | None = None) -> None:
        """Copies every file of a local `folder` to the run's artifacts, under the folder `to` where given."""
        self.client.log_artifacts(run_id, str(folder), artifact_path=to)

    def end_run(self, run_id: str, status: str = "FINISHED") -> None:
        """Ends a run as FINISHED, FAILED or KILLED."""
        self.client.set_terminated(run_id, status=status)


class MetricsTail:
    """A thread that follows a growing JSON-lines file and logs its lines to one MLflow run.

    Each line is {"step": n, name: value, ...}, optionally with "time" in seconds; see `Tracker.log_records`. The file
    may not exist yet, and its last line may be half written: that one is left for the next look. A line that is no
    JSON object is skipped with a warning. While MLflow does not answer, lines wait here and the training goes on.
    Use as a context manager, or `close()` it.
    """

    def __init__(
        self,
        tracker: Tracker,
        run_id: str,
        path: str | Path,
        lines: int = 0,
        every: float = 3.0,
        on_record: Callable[[dict], None] | None = None,
    ):
        """Starts the thread.

        Args:
            path: a file that this process can read: local, or on a file system shared with rank 0.
            lines: complete lines at the head of the file to pass over, logged by an earlier run of the job.
            every: seconds between looks.
            on_record: called once with each record, in the thread, before it is logged: progress on the console.
        """
        self.lines = lines
        """Complete lines read so far, passed-over ones included: what a later tail resumes from."""
        self._tracker, self._run_id, self._path = tracker, run_id, Path(path)
        self._every, self._on_record = every, on_record
        self._skip, self._position = lines, 0
        self._waiting: list[dict] = []
        self._warned = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="metrics-tail", daemon=True)
        self._thread.start()

    def __enter__(self) -> "MetricsTail":
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self, timeout: float = 60.0) -> int:
        """Logs what the file still holds and stops; returns how many records MLflow did not take (0: all is well).

        Never raises, for a tracking server that is down is no reason to lose a training. Records not taken are
        counted in a warning and stay in the file.
        """
        self._closing.set()
        self._thread.join(timeout)
        if self._waiting:
            log.warning("MLflow did not take %d records of %s; the file keeps them", len(self._waiting), self._path)
        return len(self._waiting)

    def _follow(self) -> None:
        while True:
            last = self._closing.is_set()  # read before the look, so that the last look sees everything
            self._read()
            self._send()
            if last:
                return
            self._closing.wait(self._every)

    def _read(self) -> None:
        try:
            with open(self._path, "rb") as file:
                if os.fstat(file.fileno()).st_size < self._position:
                    # A resumed training began the file again: all of its lines are new.
                    self.lines = self._skip = self._position = 0
                file.seek(self._position)
                content = file.read()
        except OSError:
            return
        whole = content[: content.rfind(b"\n") + 1]
        self._position += len(whole)
        for line in whole.splitlines():
            if self._skip:
                self._skip -= 1
                continue
            self.lines += 1
            self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("no JSON object")
        except ValueError as error:
            log.warning("%s line %d is skipped: %s", self._path, self.lines, error)
            return
        self._waiting.append(record)
        if self._on_record:
            try:
                self._on_record(record)
            except Exception:  # a line on the console is not worth the metrics of a run
                log.exception("the progress callback failed on line %d of %s", self.lines, self._path)

    def _send(self) -> None:
        if not self._waiting:
            return
        try:
            self._tracker.log_records(self._run_id, self._waiting)
        except Exception as error:  # a server that is away for a while: keep the records and try again
            if not self._warned:
                log.warning("MLflow at %s takes no metrics for now, they wait: %s", self._tracker.uri, error)
            self._warned = True
        else:
            self._waiting, self._warned = [], False


def flatten(config: Mapping, prefix: str = "") -> dict[str, str]:
    """Nested configuration as MLflow parameters: {"ctr": {"lr": 0.1}} is {"ctr.lr": "0.1"}.

    Values become strings, lists JSON. What is longer than MLflow stores is cut and ends in `...sha256:` and eight
    digits of the whole value's hash, so that two different values never look the same.
    """
    flat: dict[str, str] = {}
    for name, value in config.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{key}.")
        else:
            text = json.dumps(value, default=str) if isinstance(value, Mapping | list | tuple) else str(value)
            flat[_cut(key, PARAM_KEY_LIMIT, "_")] = _cut(text, PARAM_VALUE_LIMIT, "...sha256:")
    return flat


def _cut(text: str, limit: int, mark: str) -> str:
    if len(text) <= limit:
        return text
    end = mark + hashlib.sha256(text.encode()).hexdigest()[:8]
    return text[: limit - len(end)] + end


@contextlib.contextmanager
def mlflow_quiet() -> Iterator[Any]:
    """Imports mlflow (seconds, hence here) without its telemetry, and its chatter at INFO silenced from now on.

    Telemetry stays on where the environment says so itself.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import mlflow

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Making a database resets logger levels from MLflow's own file, so INFO is turned off altogether meanwhile.
    before = logging.root.manager.disable
    logging.disable(max(before, logging.INFO))
    try:
        yield mlflow
    finally:
        logging.disable(before)
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)


@contextlib.contextmanager
def _quick_failure() -> Iterator[None]:
    """No retry and ten seconds instead of MLflow's minutes, for the first contact only."""
    limits = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
    before = {name: os.environ.get(name) for name in limits}
    os.environ.update(limits)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
