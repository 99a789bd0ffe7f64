"""What each worker runs, with tables spread over the workers; no cluster, plain gloo processes."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file

from ctrdist.export import load_click_model, save_click_model
from ctrdist.group import Group
from ctrdist.loop import LoopConfig
from ctrdist.storage import State
from ctrdist.tasks.click import ClickModel
from raycluster import trainer
from raycluster.trainer import Training
from tests.ctrdist.test_loop import SCHEMA, SIZES, click_model, train_batches

LOOP = LoopConfig(5, epochs=2, precision="float64")
OPTIONS = {"table_store": "sharded", "table_optimizer": "adamw"}


def task(uri: str, start: str | None) -> ClickModel:
    """A new model, or one that goes on from another: with more rows, of which some have other ids now."""
    if not start:
        return click_model("din", text=0, **OPTIONS)
    config = click_model("din", text=0, **OPTIONS).config
    model = load_click_model(State(uri).local(start), SCHEMA, config, seed=7)
    model.grow({name: rows + 5000 for name, rows in SIZES.items()})
    model.renew({"user_id": torch.tensor([3, 4]).numpy()})
    return model


def work(group: Group, uri: str) -> dict[str, list[str]]:
    """Two trainings, the second from the first's model, as the trainer's workers run them."""
    files = {}
    for output, start in (("first", None), ("second", "first")):
        training = Training(
            state=uri, output=output, inputs="x", task=partial(task, uri, start), save=save_click_model, loop=LOOP,
            batch_size=12, batches=train_batches, facts={"rows": 53},
        )  # fmt: skip
        context = SimpleNamespace(get_world_size=lambda: group.size)
        with (
            patch.object(trainer.ray.train, "get_context", lambda context=context: context),
            patch.object(trainer.ray.train, "report", lambda metrics: None),
            patch.object(trainer, "get_device", lambda: torch.device("cpu")),
        ):
            trainer._work({"training": training})
        for name in (output, f"{output}.checkpoint"):
            files[name] = sorted(State(uri).find(name).files)
    return files


@pytest.mark.parametrize("size", [2])
def test_spread_tables_end_as_those_of_one_worker(workers, tmp_path: Path, size: int):
    alone, states = work(Group(), str(tmp_path / "one")), [State(tmp_path / name) for name in ("one", "several")]
    found = workers(size, work, states[1].uri)
    assert found[0] == found[1]
    for output in ("first", "second"):
        assert found[0][output] == alone[output] == ["model.json", "model.safetensors"]
        shards = [f"last-tables-{rank:05d}-of-{size:05d}.safetensors" for rank in range(size)]
        assert found[0][f"{output}.checkpoint"] == [
            *shards,
            "last.safetensors",
            "optimizer.safetensors",
            "progress.json",
        ]
        one, several = (load_file(state.local(output) / "model.safetensors") for state in states)
        assert one.keys() == several.keys()
        for name, value in one.items():
            torch.testing.assert_close(several[name], value, rtol=1e-6, atol=1e-9, msg=f"{output} {name}")
        assert states[1].find(output).facts["workers"] == size
    assert len(several["tables.field_user_id.weight"]) == SIZES["user_id"] + 5000
