"""A log in memory is the log on disk, and a cell is scored on all of its test rows."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

from benchmarks.cells.click import score, train_click
from benchmarks.cells.log import Log, last_fifth, open_log
from ctrdist.datasets.synthetic import SyntheticConfig, prepare
from ctrdist.log import Window
from ctrdist.tasks.click import ClickConfig


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Log, Window]:
    folder = tmp_path_factory.mktemp("cells")
    prepare(SyntheticConfig(users=60, items=40, days=5, rows_per_day=300), str(folder / "data"))
    window = last_fifth(str(folder / "data"), valid_days=1)
    return folder / "data", open_log(str(folder / "data"), window, folder / "bad"), window


def test_a_log_in_memory_is_the_log_on_disk(world):
    data, log, window = world
    assert [len(window.train), len(window.valid), len(window.test)] == [2, 1, 2]
    assert (log.train.num_rows, log.valid.num_rows, log.test.num_rows) == (600, 300, 600)
    frames = [pq.read_table(data / "interactions" / f"dt={day}").to_pandas() for day in window.train]
    counts = {}
    for item in [item for frame in frames for item in frame["item_id"]]:
        counts[item] = counts.get(item, 0) + 1
    items = pq.read_table(data / "items").to_pandas().set_index("item_id")
    rows = dict(zip(items.index, log.catalog.ids.lookup(pq.read_table(data / "items")["item_id"]), strict=True))
    assert all(log.counts[rows[item]] == count for item, count in counts.items()) and log.counts.sum() == 600
    assert all(items.loc[item, "title"] in log.texts[int(row)].as_py() for item, row in rows.items())


def test_a_cell_is_scored_on_the_test_rows(world):
    _, log, _ = world
    table = np.random.default_rng(0).normal(size=(log.catalog.size, 6)).astype(np.float16)
    model, facts = train_click(log, ClickConfig(backbone="dnn", dim=4, epochs=2, batch_size=128), 0, table)
    (batch,) = log.batches(log.test, 1000, text_table=table)
    expected = roc_auc_score(batch.label.numpy(), model.eval().predict(batch).detach().numpy())
    found = score(log, model, table)
    assert found["auc"] == pytest.approx(expected, abs=1e-4) and found["log_loss"] > 0
    assert facts["ms_a_step"] > 0 and facts["parameters"] > 100
