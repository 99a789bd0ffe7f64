"""MLflow, written by the driver's process alone, and never waited for: runs, and a thread that follows a metrics file.

Workers never talk to MLflow. Rank 0 of a training appends lines to a file in the state, and `MetricsTail` in the
driver logs them while `fit()` blocks. All that the driver logs goes through a journal (`raycluster.journal`), so that a
server that is slow, down, or comes back loses nothing and stops nobody.
"""

import contextlib
import hashlib
import json
import logging
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ctrdist.errors import UserError
from ctrdist.storage import State, filesystem, fingerprint
from raycluster.handover import Handover
from raycluster.journal import Journal
from raycluster.mlflow_server import Server

log = logging.getLogger(__name__)

PARAM_KEY_LIMIT, PARAM_VALUE_LIMIT, TAG_VALUE_LIMIT = 250, 6000, 8000
"""Most characters MLflow 3 stores in a parameter's name, a parameter's value and a tag's value."""
RUN_KEY = "ctrdist.run"
"""Tag of a run that is one of its own, whatever its name: the key that it was started under."""
LAST_WAIT = 30.0
"""Seconds that a job waits at its end for the server to take what it logged."""


class Tracker:
    """The runs of one MLflow experiment. Every call names its run; there is no active run to lose track of.

    A call returns once the journal has it. Runs are named by keys of our own; `id_of` tells the server's id of one.

    Args:
        server: that gets the records.
        journal: that delivers them to it.
        experiment: name of the experiment.
        handover: takes what is not delivered to the next job, where the state is on object storage.
    """

    def __init__(self, server: Server, journal: Journal, experiment: str, handover: Handover | None = None) -> None:
        self.server, self.journal, self.experiment, self.handover = server, journal, experiment, handover

    @classmethod
    def open(cls, uri: str | None, state: str | Path, experiment: str) -> "Tracker":
        """Makes first contact, and creates the experiment where it is missing. A server that does not answer within ten
        seconds is warned of, and no more.

        Args:
            uri: a server (`http://...`) or database (`sqlite:///...`, `postgresql://...`); None is
                `sqlite:///<state>/mlflow.db`.
            state: folder of the pipeline's state. A database keeps its artifacts in `<state>/mlflow-artifacts`; a
                server decides that itself. The journal lies in `<state>/tracking`; that of a state on object storage in
                `~/.cache/ctrdist` while the job runs.
            experiment: name of the experiment.

        Raises:
            UserError: `uri` is not usable, the experiment was deleted, or `uri` is None and the state lies on object
                storage, where no SQLite file can be.
        """
        server = Server.of(uri, state)
        server.first_contact(experiment)
        handover = None
        if State(state).is_local:
            folder = Path(filesystem(state)[1]).resolve() / "tracking"
        else:
            folder = Path.home() / ".cache" / "ctrdist" / f"tracking-{fingerprint(str(state).rstrip('/'))}"
            handover = Handover(State(state).path("tracking"), folder)
            handover.take()
        return cls(server, Journal(folder, partial(server.deliver, folder)), experiment, handover)

    @property
    def client(self) -> Any:
        """The `mlflow.MlflowClient` itself, for what the tracker has no word for (the model registry)."""
        return self.server.client

    @property
    def uri(self) -> str:
        """The server's or database's URI."""
        return self.server.uri

    def start_run(
        self, name: str, parent_run_id: str | None = None, params: Mapping | None = None, tags: Mapping | None = None
    ) -> str:
        """Starts a new run, in the state RUNNING, and returns its key; with `parent_run_id`, as that run's child.

        Args:
            params: may be nested; see `flatten`.
            tags: values become strings.
        """
        key = uuid.uuid4().hex
        return self._open(key, name, parent_run_id, params, {**(tags or {}), RUN_KEY: key})

    @contextlib.contextmanager
    def run(
        self, name: str, parent_run_id: str | None = None, params: Mapping | None = None, tags: Mapping | None = None
    ) -> Iterator[str]:
        """The run of a job or a stage, as a block: the newest of that name under that parent that carries all of `tags`
        goes on, whatever became of it, else a new one starts.

        Yields its key. A run that goes on keeps the parameters it has. It ends FINISHED, KILLED after an interrupt, or
        FAILED after any other exception.
        """
        run_id = self._open(uuid.uuid4().hex, name, parent_run_id, params, tags)
        try:
            yield run_id
        except BaseException as error:
            self.end_run(run_id, "KILLED" if isinstance(error, KeyboardInterrupt | SystemExit) else "FAILED")
            raise
        self.end_run(run_id, "FINISHED")

    def _open(
        self, key: str, name: str, parent: str | None, params: Mapping | None = None, tags: Mapping | None = None
    ) -> str:
        self._write("open", key, experiment=self.experiment, name=name, parent=parent, tags=_labels(tags or {}))
        if params:
            self.log_params(key, params)
        return key

    def log_params(self, run_id: str, params: Mapping) -> None:
        """Logs `params`, nested or flat; see `flatten`. One that the run has stays as it is: MLflow changes none."""
        self._write("params", run_id, params=flatten(params))

    def set_tags(self, run_id: str, tags: Mapping) -> None:
        """Sets tags; values become strings."""
        self._write("tags", run_id, tags=_labels(tags))

    def log_metrics(self, run_id: str, metrics: Mapping[str, float | None], step: int = 0) -> None:
        """Logs numbers at one step; a value of None is left out."""
        self.log_records(run_id, [{"step": step, **metrics}])

    def log_records(self, run_id: str, records: list[Mapping]) -> None:
        """Logs many steps.

        Each record holds "step", optionally "time" (seconds since 1970; default now), and numbers by name. Values that
        are no numbers are left out. The same record logged twice, time included, is stored once.
        """
        now = time.time()
        entries = [
            [name, float(value), round(1000 * record.get("time", now)), int(record.get("step", 0))]
            for record in records
            for name, value in record.items()
            if name not in ("step", "time") and isinstance(value, int | float) and not isinstance(value, bool)
        ]
        if entries:
            self._write("metrics", run_id, metrics=entries)

    def log_artifacts(self, run_id: str, folder: str | Path, to: str | None = None) -> None:
        """Copies every file of a local `folder` to the run's artifacts, under the folder `to` where given."""
        kept = self.journal.files / uuid.uuid4().hex
        shutil.copytree(folder, kept)
        self._write("artifacts", run_id, folder=str(kept.relative_to(self.journal.folder)), to=to)

    def end_run(self, run_id: str, status: str = "FINISHED") -> None:
        """Ends a run as FINISHED, FAILED or KILLED."""
        self._write("end", run_id, status=status)

    def _write(self, kind: str, run_id: str, **content: Any) -> None:
        self.journal.append({"kind": kind, "run": run_id, "time": round(1000 * time.time()), **content})

    def id_of(self, run_id: str, seconds: float = LAST_WAIT) -> str:
        """The server's id of a run, once it has all that was logged so far.

        Raises:
            UserError: it has not within so many seconds.
        """
        if waiting := self.journal.flush(seconds):
            trouble = self.journal.trouble or f"no answer in {seconds:.0f} s"
            raise self.server.gone(f"{trouble}; {waiting:,} records wait in {self.journal.folder}")
        if run_id not in self.server.runs:
            raise UserError(f"MLflow at {self.server.shown} refused this run: the warnings before say why")
        return self.server.runs[run_id]

    def close(self, seconds: float = LAST_WAIT) -> int:
        """Waits a while for the server to take what was logged, and stops; returns how many records it did not take.

        They stay in `journal.folder`, or in the state, for its next tracker to deliver.
        """
        return self.journal.close(seconds, self._hand_over)

    def _hand_over(self, left: list[Path]) -> None:
        if self.handover:
            try:
                self.handover.settle(left)
            except OSError as error:  # no reason for a job to fail that has done its work
                log.warning(
                    "%s cannot be written: %s; records wait in %s", self.handover.remote, error, self.journal.folder
                )


def _labels(tags: Mapping) -> dict[str, str]:
    return {key: str(value)[:TAG_VALUE_LIMIT] for key, value in tags.items()}


class MetricsTail:
    """A thread that follows a growing JSON-lines file and logs its lines to one MLflow run.

    Each line is {"step": n, name: value, ...}, optionally with "time" in seconds; see `Tracker.log_records`. The file
    may not exist yet, and its last line may be half written: that one is left for the next look. A line that is no
    JSON object is skipped with a warning. Use as a context manager, or `close()` it.
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
            path: a path or URI of a file that this process can read.
            lines: complete lines at the head of the file to pass over, logged by an earlier run of the job.
            every: seconds between looks.
            on_record: called once with each record, in the thread, before it is logged: progress on the console.
        """
        self.lines = lines
        """Complete lines read so far, passed-over ones included: what a later tail resumes from."""
        self._tracker, self._run_id, self._path = tracker, run_id, str(path)
        self._every, self._on_record = every, on_record
        self._skip, self._position = lines, 0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="metrics-tail", daemon=True)
        self._thread.start()

    def __enter__(self) -> "MetricsTail":
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self, timeout: float = 60.0) -> None:
        """Logs what the file still holds and stops."""
        self._closing.set()
        self._thread.join(timeout)

    def _follow(self) -> None:
        while True:
            last = self._closing.is_set()  # read before the look, so that the last look sees everything
            self._tracker.log_records(self._run_id, self._read())
            if last:
                return
            self._closing.wait(self._every)

    def _read(self) -> list[dict]:
        """The records of the whole lines that have come since."""
        try:
            filesystem_, path = filesystem(self._path)
            with filesystem_.open_input_file(path) as file:
                if file.size() < self._position:
                    # A resumed training began the file again: all of its lines are new.
                    self.lines = self._skip = self._position = 0
                file.seek(self._position)
                content = file.read()
        except (OSError, UserError):
            return []
        whole = content[: content.rfind(b"\n") + 1]
        self._position += len(whole)
        records = []
        for line in whole.splitlines():
            if self._skip:
                self._skip -= 1
                continue
            self.lines += 1
            records += self._take(line)
        return records

    def _take(self, line: bytes) -> list[dict]:
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("no JSON object")
        except ValueError as error:
            log.warning("%s line %d is skipped: %s", self._path, self.lines, error)
            return []
        if self._on_record:
            try:
                self._on_record(record)
            except Exception:  # a line on the console is not worth the metrics of a run
                log.exception("the progress callback failed on line %d of %s", self.lines, self._path)
        return [record]


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
