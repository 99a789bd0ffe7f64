"""A click model that goes on from another day's."""

import dataclasses
from pathlib import Path

import numpy as np
import torch

from ctrdist.datasets.synthetic import SyntheticConfig, prepare
from ctrdist.export import save_click_model
from ctrdist.fields import save_encoders
from ctrdist.items import build_catalog, grow_catalog_ids, read_items
from ctrdist.schema import Schema
from ctrdist.storage import State
from ctrdist.tasks.click import ClickConfig, ClickModel, table_sizes
from ctrdist.vocabulary import Vocabulary
from raycluster.ingest import LogReader
from raycluster.stages.click import _click_task


def test_rows_given_to_other_ids_start_anew(tmp_path: Path):
    data, state = str(tmp_path / "data"), State(str(tmp_path / "state"))
    prepare(SyntheticConfig(users=10, items=10, days=2, rows_per_day=20), data)
    schema, items = Schema.load(f"{data}/schema.yaml"), read_items(data, Schema.load(f"{data}/schema.yaml"))
    ids = grow_catalog_ids(items, Vocabulary())
    three = Vocabulary().grow(np.array([b"a", b"b", b"c"]), np.ones(3, np.int64), day=1)
    old = {f.name: three for f in schema.row_fields + schema.item}
    # `b` expires, `d` takes its row 3, and `e` a new one.
    seen = three.grow(np.array([b"a", b"c"]), np.ones(2, np.int64), day=5).expire(before=2, day=5)
    grown = seen.grow(np.array([b"d", b"e"]), np.ones(2, np.int64), day=6, reuse_until=5)
    new = old | {"user_id": grown}
    for name, encoders in (("old", old), ("new", new)):
        with state.create(name) as folder:
            schema.save(folder / "schema.yaml")
            save_encoders(encoders, folder / "vocabulary")
            build_catalog(items, ids, schema, encoders).save(folder / "catalog")
    config = ClickConfig(dim=4)
    trained = ClickModel(schema, table_sizes(old, schema), config)
    for table in trained.tables.values():
        for value in dict(table.named_buffers()).values():
            value.fill_(7.0)
    with state.create("model", facts={"read": "old"}) as folder:
        save_click_model(trained, folder)

    model = _click_task(LogReader(data, state.uri, "new"), config, None, None, state.find("model"), seed=1)
    users, others = model.tables["user_id"], model.tables["item_id"]
    assert users.rows == 6 and others.rows == 5
    kept, fresh = torch.tensor([0, 1, 2, 4]), torch.tensor([3, 5])
    for name in ("weight", *users.optimizer.state_names):
        value = getattr(users, name)
        assert (value[kept] == 7).all() and (value[fresh] != 7).all(), name
        assert (getattr(others, name) == 7).all()
    assert users.weight[fresh].abs().max() < 0.1 and not users.steps[fresh].any()
    assert dataclasses.asdict(model.config) == dataclasses.asdict(config)
