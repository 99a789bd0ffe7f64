"""Records on their way to a server that may be slow, or away: a file takes them at once, a thread delivers them."""

import datetime as dt
import fcntl
import json
import logging
import shutil
import threading
import time
import uuid
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

log = logging.getLogger(__name__)

BATCH = 200
"""Most records that are delivered together, and held in memory."""
FIRST_DELAY, LONGEST_DELAY = 0.5, 30.0
"""Seconds between one try and the next: twice as long each time."""


class Journal:
    """An append-only file of JSON lines, and a daemon thread that delivers them in order.

    A process writes a file of its own, which goes once all of it is delivered. Files that earlier processes left are
    delivered first, the oldest first; a file is locked while its process lives. What is delivered may be delivered once
    more, after a try that failed or a process that died: whoever takes it must not mind.

    Args:
        folder: of the files; made with the first record.
        deliver: takes a list of records, all or (an exception) not; called in the thread.
    """

    def __init__(self, folder: Path, deliver: Callable[[list[dict[str, Any]]], None]) -> None:
        self.folder = folder
        self.path = folder / f"{dt.datetime.now(dt.UTC):%Y%m%dT%H%M%S%f}-{uuid.uuid4().hex[:8]}.jsonl"
        self.trouble = ""
        """Why the last try failed; "" once one goes well."""
        self._deliver = deliver
        self._file: IO[bytes] | None = None
        self._earlier = self._left()
        self._written = self._delivered = self._position = 0
        self._changed = threading.Condition()
        self._hurry = self._closing = False
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    @property
    def files(self) -> Path:
        """A folder for what records refer to; it goes with the file."""
        return self.path.with_suffix(".files")

    @property
    def waiting(self) -> int:
        """Records that are not delivered yet, those of earlier processes included."""
        with self._changed:
            return self._written - self._delivered + sum(count for _, _, count in self._earlier)

    def append(self, record: dict[str, Any]) -> None:
        """Add a record; when this returns, the file has it."""
        line = json.dumps(record).encode() + b"\n"
        with self._changed:
            if self._file is None:
                self._file = _create(self.path)
            self._file.write(line)
            self._file.flush()
            self._written += 1
            self._changed.notify_all()

    def flush(self, seconds: float) -> int:
        """Wait until all is delivered, at most so long; returns how many records still wait."""
        end = time.monotonic() + seconds
        with self._changed:
            self._hurry = True
            self._changed.notify_all()
            while (waiting := self.waiting) and (left := end - time.monotonic()) > 0 and self._thread.is_alive():
                self._changed.wait(left)
            self._hurry = False
        return waiting

    def close(self, seconds: float, leave: Callable[[list[Path]], None] = lambda paths: None) -> int:
        """`flush`, and stop. What is left stays in its file, for the next process to deliver.

        Args:
            leave: called at the end with the files that are left, while no other process can have them.
        """
        waiting = self.flush(seconds)
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(1.0)  # it may be in the middle of a call that hangs
        held = [(path, file) for path, file, _ in self._earlier]
        if self._file and waiting:
            held.append((self.path, self._file))
        elif self._file:
            _remove(self.path, self._file)
        try:
            leave([path for path, _ in held])
        finally:
            for _, file in held:
                file.close()
        return waiting

    def _run(self) -> None:
        delay = FIRST_DELAY
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self.waiting)
                if self._closing:
                    return
            try:
                self._step()
                delay, self.trouble = FIRST_DELAY, ""
            except Exception as error:  # whatever it is, the records are safe, and the next try may go better
                if not self.trouble:
                    log.warning("records wait in %s: %s", self.folder, error)
                self.trouble = str(error) or type(error).__name__
                self._pause(delay)
                delay = min(2 * delay, LONGEST_DELAY)

    def _pause(self, seconds: float) -> None:
        """Wait before another try; less long when somebody begins to wait for it, or while somebody does."""
        with self._changed:
            hurried = self._hurry
            self._changed.wait_for(
                lambda: self._closing or self._hurry and not hurried, min(seconds, FIRST_DELAY) if hurried else seconds
            )

    def _step(self) -> None:
        """Deliver the oldest file of an earlier process, or the next records of this one's."""
        if self._earlier:
            path, file, _ = self._earlier[0]
            position = 0
            while batch := _read(path, position):
                self._deliver(batch.records)
                position = batch.end
            with self._changed:
                del self._earlier[0]
                self._changed.notify_all()
            _remove(path, file)
        elif batch := _read(self.path, self._position):
            self._deliver(batch.records)
            with self._changed:
                self._position, self._delivered = batch.end, self._delivered + len(batch.records)
                self._changed.notify_all()

    def _left(self) -> list[tuple[Path, IO[bytes], int]]:
        """The files that no living process holds, locked, with the number of their records."""
        found = []
        for path in sorted(self.folder.glob("*.jsonl")):
            try:
                file = path.open("rb+")
            except FileNotFoundError:  # delivered meanwhile
                continue
            if _lock(file) and path.exists():
                found.append((path, file, file.read().count(b"\n")))
            else:
                file.close()
        return found


class _Batch(NamedTuple):
    records: list[dict[str, Any]]
    end: int


def _read(path: Path, position: int) -> _Batch | None:
    """The next whole lines of a file; None at its end. What a process that died left half-written is no line."""
    with path.open("rb") as file:
        file.seek(position)
        lines = [line for line in islice(file, BATCH) if line.endswith(b"\n")]
    return _Batch([json.loads(line) for line in lines], position + sum(map(len, lines))) if lines else None


def _create(path: Path) -> IO[bytes]:
    """A new file, locked before anyone can see it by its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".new")
    file = partial.open("ab")
    _lock(file)
    partial.rename(path)
    return file


def _lock(file: IO[bytes]) -> bool:
    """Whether the file is ours now; the lock goes with the process, or when the file is closed."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a filesystem without locks
        pass
    return True


def _remove(path: Path, file: IO[bytes]) -> None:
    path.unlink(missing_ok=True)
    shutil.rmtree(path.with_suffix(".files"), ignore_errors=True)
    file.close()
