"""Studies whose cells this process computes."""

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from types import ModuleType

import pytest

from benchmarks.cells import study
from benchmarks.cells.log import Log


class Here(Executor):
    """A pool that is this process."""

    def submit(self, function, *arguments) -> Future:
        done: Future = Future()
        done.set_result(function(*arguments))
        return done


@pytest.fixture
def cells_here(monkeypatch: pytest.MonkeyPatch) -> Callable[[ModuleType], None]:
    """`cells_here(benchmark)`: a benchmark's cells are computed without further processes."""

    @contextmanager
    def here(log: Log, _count: int) -> Iterator[Here]:
        study.LOG = log
        yield Here()

    def use(benchmark: ModuleType) -> None:
        monkeypatch.setattr(study, "LOG", None, raising=False)
        monkeypatch.setattr(benchmark, "processes", here)

    return use
