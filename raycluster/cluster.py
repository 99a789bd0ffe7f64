"""Ray as the jobs use it: to connect, to run many calls, to tell errors, and what a run takes of memory."""

import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import psutil

from ctrdist.errors import UserError
from ctrdist.storage import masked


def connect(object_store_bytes: int | None = None) -> None:
    """Connect to the cluster that `RAY_ADDRESS` names (a submitted job has it), else start a local Ray.

    Args:
        object_store_bytes: memory of a local Ray's object store; Ray's own choice if None.
    """
    import ray

    address = os.environ.get("RAY_ADDRESS", "")
    if address.startswith("http"):  # for `ray job submit`; no cluster to connect to
        address = ""
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "error")
    # Ray Train looks every two seconds whether its workers have ended, several times at the end of each stage.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    if not address:  # nobody takes this machine away, and the watcher is one more process to start
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    ray.init(
        address=address or "local",
        include_dashboard=None if address else False,
        log_to_driver=False,
        logging_level="ERROR",
        ignore_reinit_error=True,
        object_store_memory=None if address else object_store_bytes,
    )
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    # A short stream has fewer blocks than there may be tasks; nobody can do anything about it.
    warnings.filterwarnings("ignore", "The (max|min)imum number of concurrent", UserWarning)


def spilled_bytes() -> int:
    """What all nodes have moved from Ray's object store to disk so far, for want of memory."""
    import ray
    from ray._private.internal_api import node_stats

    nodes = [(node["NodeManagerAddress"], node["NodeManagerPort"]) for node in ray.nodes() if node["Alive"]]
    return sum(node_stats(*node).store_stats.spilled_bytes_total for node in nodes)


def numbers(count: int) -> Any:
    """The numbers from 0 to `count`, column `id`, a block each, as a dataset of Ray Data. No task makes them: those of
    Ray's own `range` would ask for a CPU each, and wait for ever where training has left less on every node."""
    import ray

    return ray.data.from_items([{"id": number} for number in range(count)], override_num_blocks=count)


def in_parallel(
    function: Callable[..., Any], calls: list[tuple], at_once: int = 64, **resources: float
) -> Iterator[Any]:
    """What `function` returns for each of `calls`, run as Ray tasks, in the order in which they end.

    Args:
        calls: arguments of each call.
        at_once: at most this many are under way or waiting for a place: `Plan.readers` of tasks that read the log.
        resources: what a task reserves, as Ray's options call it: `Plan.reader_resources` of these; else a CPU.

    Raises:
        UserError: the first that a task raises.
    """
    import ray

    # Said outright, or a caller in a placement group (a trial of Ray Tune) would have its tasks wait within it.
    task = ray.remote(scheduling_strategy="DEFAULT", **({"num_cpus": 1.0} | resources))(function)
    waiting, running = list(reversed(calls)), []
    while waiting or running:
        while waiting and len(running) < at_once:
            running.append(task.remote(*waiting.pop()))
        done, running = ray.wait(running)
        try:
            result = ray.get(done[0])
        except ray.exceptions.RayTaskError as error:
            raise user_error(error) or error from None
        yield result


def user_error(error: BaseException) -> UserError | None:
    """The UserError that an error of Ray Train, Ray Data, a task or an actor stands for, if there is one within."""
    if type(error) is UserError:
        return error
    inner = [getattr(error, "cause", None), error.__cause__, *getattr(error, "worker_failures", {}).values()]
    return next((found for e in inner if isinstance(e, BaseException) and (found := user_error(e))), None)


def has_dashboard() -> bool:
    """Whether the connected Ray has one, which answers questions about its actors."""
    from ray._private.services import get_webui_url_from_internal_kv

    return bool(get_webui_url_from_internal_kv())


def in_submitted_job() -> bool:
    """Whether this process was started by `ray job submit`."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def check_path(option: str, value: str) -> None:
    """Raise a UserError for a relative path in a submitted job, or an address with keys in it."""
    if urlsplit(value).username is not None:
        raise UserError(
            f"{option} {masked(value)}: keys in an address would end up in logs and reports; give them to all machines "
            "by the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) or by their role"
        )
    if in_submitted_job() and "://" not in value and not os.path.isabs(value):
        raise UserError(
            f"{option} {value}: a submitted job runs in a copy of its working folder that is thrown away "
            "afterwards, so a relative path would lose its files; give an absolute path or a URI"
        )


def absolute(path: str) -> str:
    """A path as all processes understand it, wherever they run; a URI stays as it is."""
    return path if "://" in path else os.path.abspath(path)


class PeakMemory:
    """The largest memory of this process and of Ray's processes on this machine, sampled in a thread.

    Shared pages count once (proportional set size), so the object store is not counted again for each reader.
    """

    def __init__(self, every: float = 3.0) -> None:
        self.bytes = 0
        self._stop = threading.Event()
        self._every = every
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def close(self) -> int:
        """Stop sampling; returns the peak in bytes."""
        self._stop.set()
        self._thread.join(timeout=10)
        return self.bytes

    def _sample(self) -> None:
        while not self._stop.wait(self._every):
            self.bytes = max(self.bytes, sum(_memory(process) for process in _processes()))


def _processes() -> list[psutil.Process]:
    own = psutil.Process()
    found = [own]
    for process in psutil.process_iter(["name", "cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if process.pid != own.pid and (line.startswith("ray::") or "/ray/" in line):
            found.append(process)
    return found


def _memory(process: psutil.Process) -> int:
    try:
        return (
            process.memory_footprint().pss if hasattr(process, "memory_footprint") else process.memory_full_info().pss
        )
    except (psutil.Error, AttributeError):
        return 0
