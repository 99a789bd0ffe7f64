"""Encoding through Ray: every item one row, whatever was there before and whatever dies."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from ctrdist.errors import UserError
from ctrdist.items import ItemTexts, build_catalog, grow_catalog_ids
from ctrdist.language.encode import EncodeConfig, Encoder, ShardEncoder, Source
from ctrdist.language.tokenizer import tokens_to_arrow
from ctrdist.schema import Field, Schema
from ctrdist.storage import Manifest, State
from ctrdist.text_table import HASHES, TABLE, load_text_hashes, load_text_table
from ctrdist.vocabulary import Vocabulary
from raycluster import encoder
from raycluster.encoder import encode_items
from raycluster.planning import Plan
from raycluster.tokens import Work

ROOT = Path(__file__).parents[2]
SCHEMA = Schema(user=(Field("user_id"),), item=(Field("item_id"),), text=("{text}",))
CONFIG = EncodeConfig(max_length=16, shard_items=8, precision="float32", table="float32", tokens_per_batch=64)
PLAN = Plan(workers=2, gpus=0, worker_cpus=0.25, threads=1, encoders=2)
WORDS = "red blue old new long short funny sad film book story of the a and with war love dog cat".split()


def world(count: int) -> dict[str, str]:
    """Texts by item id, some equal, one empty."""
    draw = np.random.default_rng(0)
    texts = {f"i{n:03d}": " ".join(draw.choice(WORDS, draw.integers(1, 30))) for n in range(count)}
    return texts | {"i003": "red dog", "i007": "red dog", "i005": ""}


def write(state: State, name: str, texts: dict[str, str], known: Vocabulary | None = None) -> Vocabulary:
    """An output with a catalog, rows of `known` staying as they are, and texts."""
    table = pa.table({"item_id": list(texts), "text": list(texts.values())})
    ids = grow_catalog_ids(table, known or Vocabulary())
    with state.create(name) as folder:
        build_catalog(table, ids, SCHEMA, {"item_id": Vocabulary()}).save(folder / "catalog")
        ItemTexts.write(folder / "texts.arrow", table, ids, SCHEMA)
    return ids


def check(state: State, made: Manifest, tiny_lm: Path, texts: dict[str, str], ids: Vocabulary) -> None:
    """Every item has its own vector in its own row, others zeros."""
    folder = state.local(made.name)
    table = load_text_table(folder, rows=ids.size, catalog=ids.fingerprint(), model=made.facts["model"])
    source, own = Source(str(tiny_lm)), np.zeros((ids.size, 16), np.float32)
    plain = Encoder(source.load(), CONFIG)
    rows = ids.lookup(pa.array(list(texts)))
    for row, text in zip(rows, texts.values(), strict=True):
        own[row] = plain.encode(source.tokenizer(16)([text]))[0]
    np.testing.assert_allclose(table, own, atol=2e-6)
    assert np.flatnonzero(load_text_hashes(folder)).tolist() == sorted(rows.tolist())
    assert made.facts["items"] == len(texts) == made.facts["copied"] + made.facts["encoded"]
    assert not state.names(f"{made.name}.shards")


def in_process(work: Work, state: State, shards: str, model: Source, config: EncodeConfig, plan: Plan):
    """What Ray's tasks and actors do, one shard after another."""
    texts, actor = ItemTexts(state.local(work.texts) / "texts.arrow"), ShardEncoder(model, config, state.uri, shards)
    for start in range(0, len(work), config.shard_items):
        part = slice(start, start + config.shard_items)
        said = actor(tokens_to_arrow(work.hashes[part], work.tokenizer(texts.take(work.rows[part]))))
        yield {name: value[0] for name, value in said.items()}


@pytest.fixture
def call(tiny_lm, tmp_path) -> Callable[..., tuple[Manifest, list]]:
    """Encode output `texts` of a state into `output`; the manifest, and what progress said."""
    state = State(tmp_path)

    def encode(output: str = "table", texts: str = "texts", **arguments) -> tuple[Manifest, list]:
        said = []
        arguments = {"config": CONFIG, "inputs": "x", "model": Source(str(tiny_lm)), "plan": PLAN} | arguments
        note = lambda *counts: said.append(counts)
        return encode_items(state, output, texts=texts, progress=note, **arguments), said

    return encode


@pytest.fixture
def run(call, monkeypatch) -> Callable[..., tuple[Manifest, list]]:
    """`call` in this process."""
    monkeypatch.setattr(encoder, "_encode", in_process)
    return call


@pytest.fixture
def through_ray(call, ray_cluster) -> Callable[..., tuple[Manifest, list]]:
    """`call` through Ray."""
    return call


def test_every_item_has_its_row(through_ray, tiny_lm, tmp_path):
    state, texts = State(tmp_path), world(60)
    ids = write(state, "texts", texts)
    made, said = through_ray()
    check(state, made, tiny_lm, texts, ids)
    assert made.facts["copied"] == 0 and made.facts["device"] == "cpu" and made.facts["dim"] == 16
    assert 0 < made.facts["encoders_seconds"] < made.facts["encode_seconds"]
    distinct = len(set(texts.values()))
    assert made.facts["texts_encoded"] == distinct < made.facts["encoded"] == len(texts)
    assert said[-1] == (distinct, distinct) and len(said) >= 8
    assert sorted(done for done, _ in said) == [done for done, _ in said]


def test_only_what_changed_is_encoded(run, tiny_lm, tmp_path):
    state, texts = State(tmp_path), world(60)
    ids = write(state, "texts", texts)
    first, _ = run()
    later = {name: text for name, text in texts.items() if name != "i011"}
    later |= {"i004": "a new war", "i900": "the new old", "a00": texts["i020"]}
    grown = write(state, "later", later, ids)
    made, said = run("table_2", "later", previous=[first])
    check(state, made, tiny_lm, later, grown)
    assert made.facts["encoded"] == made.facts["texts_encoded"] == 2 and made.facts["copied"] == len(later) - 2
    distinct = len(set(later.values()))
    assert said == [(distinct, distinct)]
    again, said = run("table_3", "later", previous=[made])
    assert again.facts["encoded"] == again.facts["texts_encoded"] == again.facts["encoders_seconds"] == 0 and not said
    check(state, again, tiny_lm, later, grown)
    other, _ = run("table_4", "later", previous=[made], config=replace(CONFIG, max_length=8))
    assert other.facts["copied"] == 0 and other.facts["model"] != made.facts["model"]


def test_of_many_earlier_tables_those_are_opened_that_have_what_is_missing(run, tiny_lm, tmp_path, monkeypatch):
    state, texts, opened = State(tmp_path), world(20), []
    ids = write(state, "texts", {name: texts[name] for name in list(texts)[:12]})
    first, _ = run("first")
    write(state, "texts", texts, ids)
    second, _ = run("second", previous=[first])
    load = encoder.load_text_table
    monkeypatch.setattr(
        encoder, "load_text_table", lambda folder, **rest: opened.append(folder) or load(folder, **rest)
    )
    grown = write(state, "texts", texts | {"i900": "the new old"}, ids)
    made, _ = run("third", previous=iter([second, first, second]))
    assert opened == [state.local("second")] and made.facts["texts_encoded"] == 1
    check(state, made, tiny_lm, texts | {"i900": "the new old"}, grown)


@pytest.mark.parametrize("damage", ["other vectors", "no hashes", "half of the hashes"])
def test_a_damaged_table_is_not_copied_from(damage, run, tiny_lm, tmp_path, capsys):
    state, texts = State(tmp_path), world(8)
    ids = write(state, "texts", texts)
    first, _ = run()
    if damage == "other vectors":
        np.save(state.local("table") / TABLE, np.ones((10, 16), np.float32))
    else:
        file = state.local("table") / HASHES
        file.write_bytes(b"" if damage == "no hashes" else file.read_bytes()[:-24])
    made, _ = run("table_2", previous=[first])
    assert made.facts["copied"] == 0 and "checksum does not match" in capsys.readouterr().out
    check(state, made, tiny_lm, texts, ids)


def test_a_run_cut_off_leaves_no_gap_and_no_double(run, tiny_lm, tmp_path, monkeypatch):
    state, texts = State(tmp_path), world(60)
    ids = write(state, "texts", texts)

    def cut_off(*arguments):
        for number, shard in enumerate(in_process(*arguments)):
            yield shard
            if number == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(encoder, "_encode", cut_off)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert len(state.names("table.shards")) == 3 and state.find("table") is None
    (state.uri / Path("table.shards") / "half-written.0123").mkdir()
    monkeypatch.setattr(encoder, "_encode", in_process)
    # A text changes in between, and shards are cut another way; what an earlier actor has encoded twice does no harm.
    texts |= {"i030": "a funny cat"}
    ids = write(state, "texts", texts, ids)
    source = Source(str(tiny_lm))
    made_by, some = source.fingerprint(CONFIG), ItemTexts(state.local("texts") / "texts.arrow")
    actor = ShardEncoder(source, CONFIG, state.uri, f"table.shards/{made_by}")
    actor(tokens_to_arrow(some.hashes(np.arange(10, 20)), source.tokenizer(16)(some.take(np.arange(10, 20)))))
    made, said = run(config=replace(CONFIG, shard_items=5))
    check(state, made, tiny_lm, texts, ids)
    assert said[0][0] > 5 and len(said) < len(texts) / 5
    assert not list((Path(state.uri) / "table.shards").glob("*"))


@pytest.mark.parametrize(("encoders", "moment"), [(1, "written"), (2, "half-written")])
def test_actors_that_die_are_replaced(through_ray, tiny_lm, tmp_path, monkeypatch, encoders, moment):
    state, texts = State(tmp_path), world(40)
    ids = write(state, "texts", texts)
    (tmp_path / "alive").write_text(moment)
    monkeypatch.setattr(encoder, "ShardEncoder", Mortal)
    made, _ = through_ray(plan=replace(PLAN, encoders=encoders))
    assert not (tmp_path / "alive").exists()
    check(state, made, tiny_lm, texts, ids)


class Mortal:
    """A ShardEncoder of which one process dies once: with a shard half-written, or written but not reported."""

    def __init__(self, **arguments) -> None:
        from ctrdist.language.encode import ShardEncoder as Whole

        self.inner, self.alive = Whole(**arguments), Path(arguments["state"]) / "alive"

    def __call__(self, batch):
        if self.dies("half-written"):  # the hashes are there by then, the vectors are not
            self.inner.encoder.encode = lambda _tokens: os._exit(1)
        said = self.inner(batch)
        if self.dies("written"):
            os._exit(1)
        return said

    def dies(self, moment: str) -> bool:
        """Whether it is this process's turn: who takes the file away."""
        try:
            return self.alive.read_text() == moment and self.alive.rename(self.alive.with_name("dead")) is not None
        except FileNotFoundError:
            return False


def test_no_items_are_an_error(run, tmp_path):
    write(State(tmp_path), "texts", world(8))
    folder = State(tmp_path).local("texts")
    np.save(folder / "catalog" / "present.npy", np.zeros(10, bool))
    with pytest.raises(UserError, match="no items to encode"):
        run()


def test_what_an_actor_complains_of_reaches_the_user(through_ray, tiny_lm, tmp_path):
    write(State(tmp_path), "texts", world(8))
    model = Source(str(tiny_lm)).load()
    model.base.encoder.layer[-1].output.LayerNorm.bias.data.fill_(1e6)
    model.save(tmp_path / "large")
    with pytest.raises(UserError, match="not finite in float16"):
        through_ray(model=Source(str(tmp_path / "large")), config=replace(CONFIG, table="float16"))


def test_fractions_of_logical_gpus(tiny_lm, tmp_path):
    """A GPU that Ray counts but no chip is behind: two actors of half a GPU each."""
    code = f"""
import ray
ray.init(num_cpus=2, num_gpus=1, address="local", include_dashboard=False, logging_level="ERROR", log_to_driver=False,
         object_store_memory=100_000_000, _memory=2**31)
from ctrdist.language.encode import Source
from ctrdist.storage import State
from raycluster import cluster
from raycluster.encoder import encode_items
from raycluster.planning import make_plan
from tests.raycluster.test_encoder import CONFIG, check, world, write
cluster.connect()
state, texts = State({str(tmp_path)!r}), world(30)
ids = write(state, "texts", texts)
plan = make_plan(gpu_share=0.5)
assert (plan.workers, plan.gpus, plan.encoders, plan.encoder_gpus) == (1, 1, 2, 0.5)
made = encode_items(state, "table", Source({str(tiny_lm)!r}), "texts", CONFIG, plan, "x")
check(state, made, {str(tiny_lm)!r}, texts, ids)
print("whole")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.stdout.endswith("whole\n"), done.stderr[-3000:]
