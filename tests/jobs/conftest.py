"""A daily job in one process: loops in place of Ray and MLflow, for what depends on neither."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cloudpickle
import pyarrow as pa
import pytest

from ctrdist.gate import refused
from ctrdist.language.encode import ShardEncoder
from ctrdist.language.tokenizer import tokens_to_arrow
from ctrdist.storage import State
from raycluster import cluster, planning, trainer
from raycluster.tokens import tokens_of

ROOT = Path(__file__).parents[2]


class Stream:
    """What `raycluster.ingest.stream` gives, read as it is asked for."""

    def __init__(
        self, reader: Any, chunks: list, block_rows: int = 0, keep: tuple[str, ...] = (), plan: Any = None
    ) -> None:
        self.tables = lambda: _cut((reader.read(chunk, keep) for chunk in chunks), block_rows)

    def map_batches(self, actor: type, fn_constructor_kwargs: dict[str, Any], **_options: Any) -> "Stream":
        """The same through an actor."""
        out, own, before = Stream(None, []), actor(**fn_constructor_kwargs), self.tables
        out.tables = lambda: map(own, before())
        return out

    def iter_batches(self, **_options: Any) -> Iterator[pa.Table]:
        """Its blocks."""
        return self.tables()


def _cut(tables: Iterator[pa.Table], rows: int) -> Iterator[pa.Table]:
    for table in tables:
        for start in range(0, table.num_rows, rows or table.num_rows):
            yield table.slice(start, rows or None)


class NoTracker:
    """Follows nothing."""

    @contextmanager
    def run(self, *_about: Any, **_more: Any) -> Iterator[str]:
        """A run without a name."""
        yield ""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


def assert_names_no_path_of_ours(sent: Any) -> None:
    """What goes to workers on other machines names neither this checkout nor this Python's libraries."""
    pickled = cloudpickle.dumps(sent)
    for folder in (str(ROOT), sys.prefix):
        assert folder.encode() not in pickled, folder


def _train(training: trainer.Training, _plan: planning.Plan) -> SimpleNamespace:
    """A trainer whose worker is this process."""
    assert_names_no_path_of_ours(training)
    shards = {}
    if training.train_stream:
        shards = {"train": training.train_stream(0), "valid": training.valid_stream and training.valid_stream()}

    def fit() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("ray.train.get_context", lambda: SimpleNamespace(get_world_size=lambda: 1))
            patch.setattr("ray.train.get_dataset_shard", shards.get)
            patch.setattr("ray.train.report", lambda _metrics: None)
            patch.setattr(trainer, "get_device", lambda: "cpu")
            trainer._work({"training": training})

    return SimpleNamespace(fit=fit)


def _encode(work: Any, state: Any, shards: str, model: Any, config: Any, plan: planning.Plan) -> Iterator:
    assert_names_no_path_of_ours((work, model, config))
    encoder = ShardEncoder(model, config, state.uri, shards, plan.threads)
    done = encoder(tokens_to_arrow(work.hashes, tokens_of(state.uri, work.texts, work.tokenizer, work.rows)))
    yield {name: value[0] for name, value in done.items()}


@contextmanager
def one_process(registered: bool = False) -> Iterator[None]:
    """For a while jobs run here, without Ray, and nothing is tracked or registered, unless that is asked for."""

    def in_order(function: Callable, calls: list[tuple], *_at_once: int, **_resources: Any) -> Iterator:
        return (function(*call) for call in calls)

    with pytest.MonkeyPatch.context() as patch:
        for module in ("ingest", "stages.clickprompt", "stages.elec", "tokens"):
            patch.setattr(f"raycluster.{module}.in_parallel", in_order)
        patch.setattr("raycluster.ingest.stream", Stream)
        patch.setattr("raycluster.encoder._encode", _encode)
        patch.setattr(trainer, "_trainer", _train)
        patch.setattr("raycluster.reporting.write_plots", lambda *_: None)
        if not registered:
            patch.setattr("raycluster.day.Tracker.open", lambda *_: NoTracker())
            patch.setattr("raycluster.registry.write_artifact", lambda *_: None)
            patch.setattr("raycluster.registry.register", lambda *_: "nowhere")
            patch.setattr("raycluster.registry.pass_gate", lambda *_: refused("not asked"))
        patch.setattr(cluster, "connect", lambda: None)
        patch.setattr(planning, "make_plan", lambda *_, **__: planning.Plan(1, 0, 1.0, 1))
        patch.setattr(planning.Plan, "wait_for_places", lambda _: None)
        yield


@pytest.fixture
def registered_here() -> Iterator[None]:
    """`one_process` for a test, with tracking and registry."""
    with one_process(registered=True):
        yield


@pytest.fixture
def in_one_process() -> Iterator[None]:
    """`one_process` for a test."""
    with one_process():
        yield


@pytest.fixture(scope="module")
def run_here() -> Callable[..., None]:
    """`run_here(run, options)`: a job in one process, for fixtures of a module."""

    def run(job: Callable[[Any], None], options: Any) -> None:
        with one_process():
            job(options)

    return run


@pytest.fixture
def killed_in_turn(capsys: pytest.CaptureFixture) -> Callable[..., None]:
    """`killed_in_turn(run, options, outputs)`: try a job again and again. Each try dies in the next of `outputs`, by
    name or by what it begins with before a `-`, when all that is in it is written and it does not exist yet, the
    release's last; then one is whole, with nothing left to do but the release."""

    def run(job: Callable[[Any], None], options: Any, outputs: list[str]) -> None:
        real = State.create
        for name in outputs:

            @contextmanager
            def create(self: State, made: str, *arguments: Any, name: str = name, **more: Any) -> Iterator[Path]:
                with real(self, made, *arguments, **more) as folder:
                    yield folder
                    if made == name or made.startswith(f"{name}-"):
                        raise KeyboardInterrupt(name)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(State, "create", create)
                with pytest.raises(KeyboardInterrupt, match=name):
                    job(options)
        capsys.readouterr()
        job(options)
        out = capsys.readouterr().out
        for stage in (name.split("/")[2] for name in outputs if name.startswith("runs/") and "." not in name):
            assert f"{stage:10} done before" in out, stage

    return run
