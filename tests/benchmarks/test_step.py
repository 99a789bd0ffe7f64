"""What the benchmark of a training step compares is the same network on the same rows."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.step.ours import Dense, Ours
from benchmarks.step.world import World
from benchmarks.train_step import ratios
from ctrdist import backbones

ROOT = Path(__file__).parents[2]
WORLD = World.of(1000)


@pytest.mark.parametrize("network", backbones.NAMES)
def test_dense_tables_with_the_same_weights_give_the_same_loss(network):
    ours, dense = Ours(network, WORLD, "cpu"), Dense(network, WORLD, "cpu")
    dense.model.backbone.load_state_dict(ours.task.backbone.state_dict())
    for mine, theirs in (("user_id", "user"), ("hour", "hour"), ("item_id", "item"), ("category", "category")):
        dense.model.tables[theirs].weight.data.copy_(ours.task.tables[mine].weight)
    rows = WORLD.draw(32, 1)
    losses = []
    for model, batch in ((ours.task, ours.batch(rows)), (dense.model, dense.prepare(rows))):
        model.eval()
        torch.manual_seed(0)  # negatives that a network may draw
        loss = model(batch)
        losses.append((loss["loss"] if isinstance(loss, dict) else loss).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_rows_of_the_world():
    rows = WORLD.draw(500, 3)
    assert rows.user.max() < WORLD.users and rows.item.max() < WORLD.items and rows.user.min() >= 2
    assert (rows.history_category == WORLD.category_of[rows.history]).all()
    lengths = (rows.history > 0).sum(1)
    assert ((rows.history > 0) == (np.arange(20) < lengths[:, None])).all(), "padding stands at the end"
    assert lengths.min() == 0 and 0.55 < (lengths == 20).mean() < 0.75


def test_a_contestant_alone():
    command = [sys.executable, "-m", "benchmarks.step", "--users", "1000", "--batch", "16", "--steps", "1"]
    done = subprocess.run([*command, "--floor", "--profile"], cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.rstrip().splitlines()[-1])
    assert found["ms"] > 0 and found["floor_ms"] > 0 and found["gflop"] > 0
    assert "find distinct ids" in found["profile"] and len(found["profile"]) > 5


def test_ratios_compare_like_with_like():
    def row(vocab, ours, dense, kept, fused):
        return {"network": "din", "vocab": vocab, "batch": 8, "ours_ms": ours, "dense_ms": dense,
                "ours_kept_ms": kept, "fused_ms": fused, "peers": {"x": 30.0}}  # fmt: skip

    assert ratios([row(10, 4.0, 8.0, 3.0, 6.0), row(1000, 5.0, 100.0, 4.0, 20.0)], []) == {
        "din_8_flatness": 1.25, "din_8_vs_dense_10": 2.0, "din_8_vs_fused_10": 2.0, "din_8_vs_x_10": 10.0,
        "din_8_vs_dense_1000": 20.0, "din_8_vs_fused_1000": 5.0, "din_8_vs_x_1000": 7.5,
        "din_8_vs_dense_as_trained_10": 8 / 3, "din_8_vs_dense_as_trained_1000": 25.0,
    }  # fmt: skip
