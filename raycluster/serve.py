"""A released model behind HTTP, by Ray Serve: requests in batches, and a new champion without a request dropped.

One request is a user, a context and the candidates; its answer has a probability for each of them, in their order:

    {"user": {"user_id": "u1"}, "context": {"hour": 9}, "history": ["i3", "i7"], "candidates": ["i1", "i2"]}
    {"probabilities": [0.12, 0.07], "version": "4"}

A replica looks every few seconds which version the registry's alias names. A new one is loaded beside the one that
serves, which then gives way: requests that came before are answered by it, those that come after by the new one.
"""

import asyncio
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from ray import serve
from ray.util.metrics import Counter, Gauge, Histogram
from starlette.requests import Request
from starlette.responses import JSONResponse

from ctrdist.allocator import keep_freed_memory
from ctrdist.errors import UserError
from ctrdist.schema import HISTORY, ITEM_ID
from ctrdist.serving.model import A_REQUEST, ServedModel
from raycluster.model_source import ModelSource, find_model, remember, remembered

log = logging.getLogger("ray.serve")

PARTS = ("user", "context", "history", "candidates")
SECONDS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0]


WRONG_REQUEST = (UserError, TypeError, OverflowError, pa.ArrowException)
"""What scoring raises for what is wrong with a request; anything else is the server's fault."""


class Model(Protocol):
    """What scores rows: a release (`ServedModel`)."""

    columns: list[str]

    def predict(self, rows: pa.Table) -> np.ndarray:
        """Click probabilities, float32 [n]."""

    def predict_request(self, request: pa.Table, items: pa.Array) -> np.ndarray:
        """The same of one row without `item_id`, and each of the items."""


@dataclass(frozen=True)
class Asked:
    """A request.

    Args:
        one: user and context, a row.
        items: ids of the candidates.
    """

    one: pa.Table
    items: pa.Array

    @property
    def rows(self) -> pa.Table:
        """A row for each candidate."""
        repeated = self.one.take(pa.array(np.zeros(len(self.items), np.int32)))
        return repeated.append_column(ITEM_ID, self.items)


@dataclass(frozen=True)
class Loaded:
    """A model that serves.

    Args:
        source: where it is from.
        model: the release.
    """

    source: ModelSource
    model: Model

    def read(self, request: dict[str, Any]) -> Asked:
        """What a request asks.

        Raises:
            UserError: a part that is unknown or missing, or a field that the model needs.
        """
        unknown = sorted(set(request) - set(PARTS))
        if unknown:
            raise UserError(f"{', '.join(unknown)}: unknown; a request has {', '.join(PARTS)}")
        candidates = request.get("candidates")
        if not isinstance(candidates, list) or not candidates:
            raise UserError("candidates: expected a list of item ids")
        given = {**(request.get("user") or {}), **(request.get("context") or {}), HISTORY: request.get("history") or []}
        optional = getattr(self.model, "optional", ())
        columns, items = {}, pa.array(candidates)
        for name in (name for name in self.model.columns if name != ITEM_ID):
            if name in given:
                # An empty history has no type of its own: that of the items' ids.
                columns[name] = pa.array([given[name]], pa.list_(items.type) if name == HISTORY else None)
            elif name not in optional:
                raise UserError(f"{name}: missing; the model needs it of the user or the context")
        return Asked(pa.table(columns), items)

    def score(self, requests: list[Asked]) -> list[np.ndarray | Exception]:
        """Probabilities of each request's candidates, or why there are none. Requests of few candidates and like
        columns are scored in one go; one of many by itself, its user and context looked up once."""
        alike: dict[str, list[int]] = {}
        for number, asked in enumerate(requests):
            many = f"{number} " if len(asked.items) >= A_REQUEST else ""
            alike.setdefault(f"{many}{asked.one.schema} {asked.items.type}", []).append(number)
        scores: list[np.ndarray | Exception] = [ValueError()] * len(requests)
        for numbers in alike.values():
            for number, one in zip(numbers, self._together([requests[n] for n in numbers]), strict=True):
                scores[number] = one
        return scores

    def _together(self, requests: list[Asked]) -> list[np.ndarray | Exception]:
        try:
            if len(requests) == 1:
                return [self.model.predict_request(requests[0].one, requests[0].items)]
            together = self.model.predict(pa.concat_tables([asked.rows for asked in requests]))
            return np.split(together, np.cumsum([len(asked.items) for asked in requests])[:-1])
        except Exception as error:
            if len(requests) == 1:
                return [error]
            return [self._together([asked])[0] for asked in requests]  # one of them is to blame


@serve.deployment(health_check_period_s=10)
class Ranker:
    """A replica: scores batches of requests with the version that it has, and gets the next one beside that.

    Args:
        model: `models:/NAME@ALIAS`, as the alias moves, `models:/NAME/VERSION`, or the folder of a release.
        tracking_uri: MLflow's server or database.
        load: a release's folder -> the model.
        poll_seconds: between two looks at the alias.
        batch_requests: most requests that are scored in one go.
        batch_wait_ms: how long the first of them waits for others.
        threads: of PyTorch.
    """

    def __init__(
        self,
        model: str,
        tracking_uri: str = "",
        load: Callable[[Path], Model] = ServedModel,
        poll_seconds: float = 10.0,
        batch_requests: int = 16,
        batch_wait_ms: float = 2.0,
        threads: int = 1,
    ) -> None:
        import torch

        torch.set_num_threads(threads)
        keep_freed_memory()
        self.model, self.tracking_uri, self.load, self.poll_seconds = model, tracking_uri, load, poll_seconds
        self.score.set_max_batch_size(batch_requests)
        self.score.set_batch_wait_timeout_s(batch_wait_ms / 1000)
        self.latency = Histogram("ctr_request_seconds", "From a request's arrival to its answer.", SECONDS)
        self.candidates = Counter("ctr_candidates", "Candidates scored.")
        self.version = Gauge("ctr_model_version", "Version of the registered model that serves.")
        self.failures = Counter("ctr_swap_failures", "Versions that could not be loaded, and looks that failed.")
        self.loaded = self.first()
        self.watcher = threading.Thread(target=self.watch, name="champion", daemon=True)
        self.watcher.start()

    def first(self) -> Loaded:
        """The version to begin with. Where the registry is away, or its version broken, it is the one that served here
        last."""
        try:
            return self.get(find_model(self.model, self.tracking_uri, ""))
        except Exception as error:
            source = remembered(self.model, self.tracking_uri)
            if source is None:
                raise
            self.failures.inc()
            log.warning("version %s serves again: %s", source.version, error)
            return self.get(source)

    def get(self, source: ModelSource) -> Loaded:
        """A version, loaded."""
        loaded = Loaded(source, self.load(source.local()))
        remember(self.model, source)
        if source.version.isdigit():
            self.version.set(int(source.version))
        return loaded

    def watch(self) -> None:
        """Follows the alias; what serves goes on serving while the next version is loaded, or cannot be."""
        while True:
            time.sleep(self.poll_seconds)
            try:
                source = find_model(self.model, self.tracking_uri, "")
                if source != self.loaded.source:
                    began, before = time.monotonic(), self.loaded.source.version
                    self.loaded = self.get(source)
                    seconds = time.monotonic() - began
                    log.info("version %s serves in place of %s, loaded in %.1f s", source.version, before, seconds)
            except Exception as error:  # the registry is away, or a version is broken: look again
                self.failures.inc()
                log.warning("version %s goes on serving: %s", self.loaded.source.version, error)

    def check_health(self) -> None:
        """Raises where nothing follows the alias any more: Ray Serve then starts another replica."""
        if not self.watcher.is_alive():
            raise RuntimeError("the thread that follows the alias has ended")

    async def __call__(self, request: Request) -> JSONResponse:
        """Answers a request; a GET tells what serves."""
        began = time.monotonic()
        if request.method == "GET":
            return JSONResponse({"model": self.model, "version": self.loaded.source.version})
        try:
            content = await request.json()
            if not isinstance(content, dict):
                raise UserError(f"expected an object with {', '.join(PARTS)}")
            loaded = self.loaded
            asked = loaded.read(content)
        except (ValueError, *WRONG_REQUEST) as error:  # not JSON, or not what it should hold
            return JSONResponse({"error": str(error)}, status_code=400)
        scores, version = await self.score((loaded, asked))
        if isinstance(scores, WRONG_REQUEST):
            return JSONResponse({"error": str(scores) or type(scores).__name__}, status_code=400)
        if isinstance(scores, Exception):
            log.error("version %s does not score a request", version, exc_info=scores)
            return JSONResponse({"error": "the model failed; its log says how"}, status_code=500)
        self.candidates.inc(len(asked.items))
        self.latency.observe(time.monotonic() - began)
        return JSONResponse({"probabilities": scores.tolist(), "version": version})

    @serve.batch
    async def score(self, requests: list[tuple[Loaded, Asked]]) -> list[tuple[np.ndarray | Exception, str]]:
        """Scores of each request, or why there are none, by the version that served when it came, and that version.

        A thread computes, so that the next batch can gather meanwhile.
        """
        answers: list[tuple[np.ndarray | Exception, str]] = [(ValueError(), "")] * len(requests)
        for version in dict.fromkeys(loaded for loaded, _ in requests):
            numbers = [number for number, (loaded, _) in enumerate(requests) if loaded is version]
            scores = await asyncio.to_thread(version.score, [requests[number][1] for number in numbers])
            for number, score in zip(numbers, scores, strict=True):
                answers[number] = score, version.source.version
        return answers


def start(
    model: str,
    tracking_uri: str = "",
    host: str = "127.0.0.1",
    port: int = 8000,
    replicas: int = 1,
    threads: int = 1,
    poll_seconds: float = 10.0,
    batch_requests: int = 16,
    batch_wait_ms: float = 2.0,
    load: Callable[[Path], Model] = ServedModel,
) -> None:
    """Start Ray Serve on the connected cluster; returns when all replicas answer. Arguments as `Ranker`'s."""
    serve.start(http_options={"host": host, "port": port}, logging_config={"enable_access_log": False})
    log.setLevel(logging.WARNING)  # of this process: the job says itself what serves
    ranker = Ranker.options(
        num_replicas=replicas,
        ray_actor_options={"num_cpus": threads},
        max_ongoing_requests=4 * batch_requests,  # of which one batch is scored while the next one gathers
    )
    bound = ranker.bind(model, tracking_uri, load, poll_seconds, batch_requests, batch_wait_ms, threads)
    serve.run(bound, name="ctr", route_prefix="/")


class _Stopped(BaseException):
    """A signal came."""


@contextmanager
def alone() -> Iterator[None]:
    """Ray Serve on the connected cluster for a block, which Ctrl-C and SIGTERM end without an error. Whatever ends it,
    Ray Serve is shut down then.

    Raises:
        UserError: the cluster serves something already: Ray Serve has one address, and `/` one application.
    """
    status = serve.status()
    if served := sorted(status.applications):
        raise UserError(
            f"this Ray cluster serves already ({', '.join(served)}): stop that first (its job, or `serve shutdown`), "
            "or serve from another cluster"
        )
    if status.proxies:
        serve.shutdown()  # it serves nothing, and may have another address

    def stop(*_: Any) -> None:
        raise _Stopped

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except _Stopped:
        pass
    finally:
        for number in before:
            signal.signal(number, signal.SIG_IGN)  # a second one would leave replicas behind
        serve.shutdown()
        for number, handler in before.items():
            signal.signal(number, handler)
