import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import scaling
from benchmarks.scaling import Options, Step, fit, predict, run, steps_of, work

SMALL = Options(users=3000, batch=128, steps=2, items=4, tokens=8, network="dnn")
U, D = 20_000.0, 16
REPLICATED = Step(False, 0.04, {w: 0.004 * w**0.5 for w in range(1, 129)}, U * (8 + 4 * D), 80_000.0, 12.0)
SHARDED = Step(True, 0.05, {w: 0.004 for w in range(1, 129)}, U / 2 * (8 + 8 * D), 80_000.0, 12.0)
UPDATES = {"train replicated": REPLICATED.update, "train sharded": SHARDED.update}


@pytest.mark.parametrize(("step", "workers", "megabytes"), [
    (REPLICATED, 8, 10.1), (REPLICATED, 32, 44.6), (REPLICATED, 128, 182.9),
    (SHARDED, 8, 2.4), (SHARDED, 32, 2.6), (SHARDED, 128, 2.7),
])  # fmt: skip
def test_bytes_of_the_tables_are_those_of_the_documentation(step, workers, megabytes):
    assert replace(step, dense_bytes=0.0).bytes(workers) / 1e6 == pytest.approx(megabytes, abs=0.06)


def test_dense_gradients_go_round_a_ring():
    for workers in (2, 8, 128):
        alone = replace(SHARDED, table_bytes=0.0, dense_bytes=2 * 1 / 2 * 7e6)
        assert alone.bytes(workers) == pytest.approx(2 * (workers - 1) / workers * 7e6)


def planted(latency: float, bandwidth: float) -> list[dict]:
    rows = []
    for stage, step in (("train replicated", REPLICATED), ("train sharded", SHARDED)):
        for workers in (1, 2, 3):
            beyond = sum(list(step.seconds(workers, latency, bandwidth).values())[1:])
            ms = {"ms": (step.compute + beyond) * 1e3, "apart_ms": step.compute * 1e3}
            costs = {"table_bytes": step.table_bytes, "dense_bytes": step.dense_bytes, "hops": step.hops}
            rows.append({"stage": stage, "workers": workers, **ms, **costs})
    return rows


def test_the_fit_finds_what_was_planted():
    rows = planted(2e-4, 5e8)
    steps = steps_of(rows, UPDATES)
    assert steps == {"train replicated": REPLICATED, "train sharded": SHARDED}
    latency, bandwidth, error = fit(rows, steps)
    assert (latency, bandwidth) == pytest.approx((2e-4, 5e8)) and error < 1e-9


def test_a_prediction_adds_its_terms_up_and_names_the_largest():
    options = Options(predict=(8,), gigabits=(25.0,), latency_us=(10.0,), gpu_step_ms=3.0)
    ours, gpu = predict({"train replicated": REPLICATED}, options)
    terms = {"update": 0.004 * (8**0.5 - 1), "latency": 12 * 7 * 1e-5}
    terms["bandwidth"] = (U * 72 * 7 + 80_000 * 1.75) / 3.125e9
    assert ours["limit"] == "compute" and gpu["limit"] == "update" and terms["update"] == max(terms.values()) > 0.003
    assert ours["rows_per_s"] == pytest.approx(8 * 1024 / (0.04 + sum(terms.values())))
    assert gpu["efficiency"] == pytest.approx(0.003 / (0.003 + sum(terms.values())))


def test_what_a_worker_receives_of_a_batch():
    rows = scaling.World.of(3000).draw(128, 1)
    whole, part = scaling.received(rows, 1), scaling.received(rows, 3)
    assert set(whole["item"]) == {*rows.item, *rows.history.ravel()} and set(whole["user"]) == {*rows.user}
    assert set(part["user"]) == {user for user in rows.user if user % 3 == 0}


def test_a_replica_updates_the_distinct_rows_of_all_workers(monkeypatch):
    """More workers draw more rows, but many are the same; of shards each owner has a few."""
    real, touched = scaling.EmbeddingTable._descend, []

    def count(table, ids, gradients, distinct, lr_scale):
        real(table, ids, gradients, distinct, lr_scale)
        touched.append(table.rows_touched)

    monkeypatch.setattr(scaling.EmbeddingTable, "_descend", count)
    for stage, share in (("train replicated", 1), ("train sharded", 3)):
        touched.clear()
        found = scaling.update_seconds(SMALL, stage, {3})
        draws = [scaling.World.of(SMALL.users).draw(SMALL.batch, seed) for seed in range(3)]
        users = {user for rows in draws for user in rows.user if user % share == 0}
        assert touched[0] == len(users) and found[3] > 0


def test_two_workers_are_counted(tmp_path):
    """Of sharded tables, as the documentation has it: each distinct id's number, its row and its gradient."""
    found = run("train sharded", 2, True, SMALL)
    rows = [scaling.World.of(SMALL.users).draw(SMALL.batch, 1000 * rank + 3) for rank in range(2)]
    distinct = sum(len(set(r.user)) + len(set(r.hour)) + 2 * len({*r.item, *r.history.ravel()}) for r in rows) / 2
    assert 0.3 < found["table_bytes"] / (distinct / 2 * (8 + 8 * 16)) < 1.3
    assert found["rows"] == SMALL.batch and found["hops"] > 0 and found["dense_bytes"] > 0


@pytest.mark.parametrize("stage", scaling.STEPS)
def test_one_worker_of_each_stage(stage, tiny_lm, tmp_path: Path):
    work(0, 1, False, stage, replace(SMALL, lm=str(tiny_lm)), str(tmp_path))
    found = json.loads((tmp_path / "0.json").read_text())
    assert found["ms"] > 0 and found["table_bytes"] == found["hops"] == found["dense_bytes"] == 0


def test_a_whole_run_prints_tables_and_one_json_line(monkeypatch, capsys):
    steps = {"train replicated": REPLICATED, "train sharded": SHARDED}
    ms = {(row["stage"], row["workers"]): row for row in planted(1e-4, 1e9)}

    def made(stage: str, size: int, together: bool, options: Options) -> dict:
        row = ms[stage, size]
        return {"ms": row["ms"] if together else row["apart_ms"], "rows": options.batch} | {
            name: row[name] for name in ("table_bytes", "dense_bytes", "hops")
        }

    monkeypatch.setattr(scaling, "run", made)
    monkeypatch.setattr(scaling, "update_seconds", lambda options, stage, counts: UPDATES[stage])
    scaling.main(Options(stages=tuple(steps)))
    *table, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert result["benchmark"] == "scaling" and len(result["rows"]) == 6 and len(result["predicted"]) == 24
    assert result["fitted"]["latency_us"] == pytest.approx(100) and result["fitted"]["error"] < 1e-6
    assert result["ratios"]["efficiency_train_sharded_1"] == 1.0 > result["ratios"]["efficiency_train_sharded_3"]
    assert any("train replicated" in line for line in table)
