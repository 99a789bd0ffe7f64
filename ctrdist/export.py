"""What serving needs, and nothing else: click models as safetensors and JSON, and a release that scores rows."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from torch import Tensor, nn

from ctrdist.batch import collate
from ctrdist.config import from_dict, to_dict
from ctrdist.encode import encode
from ctrdist.errors import UserError
from ctrdist.fields import load_encoders
from ctrdist.items import Catalog
from ctrdist.schema import HISTORY, ITEM_ID, LABEL, NUMERIC, Schema
from ctrdist.shards import read_state, save_whole
from ctrdist.tasks.click import ClickConfig, ClickModel
from ctrdist.text_field import FuseConfig
from ctrdist.text_table import load_text_table

WEIGHTS, DESCRIPTION = "model.safetensors", "model.json"
SERVES = "release.json"


def save_click_model(model: ClickModel, folder: Path, optimizer_state: bool = True) -> None:
    """Write a click model: `model.safetensors`, and `model.json` from which it is built again.

    Every worker calls it if the model's tables are spread over workers; the first one writes.

    Args:
        optimizer_state: with the state of the tables' optimizer, so that training can go on another day.
    """
    for table in model.tables.values():
        table.settle()
    save_whole(folder / WEIGHTS, model, model.group, () if optimizer_state else _optimizer_state(model))
    if model.group.rank:
        return
    description = {
        "config": to_dict(model.config),
        "fuse": to_dict(model.fuse) if model.fuse else None,
        "text_dim": model.text_dim,
        "vector_dim": model.vector_dim,
        "sizes": {name: table.rows for name, table in model.tables.items()},
    }
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=1))


def load_click_model(
    folder: Path,
    schema: Schema,
    config: ClickConfig | None = None,
    fuse: FuseConfig | None = None,
    seed: int = 0,
    networks: int = 1,
) -> ClickModel:
    """A click model as `save_click_model` wrote it, to score with or to train on.

    Args:
        config: replaces how it is trained on; what it is must agree. Without it the tables are whole, to score with;
            with another optimizer, they begin without the state of the old one.
        fuse: must agree, if given.
        seed: decides the rows that it grows by.
        networks: how many like this one a worker has (`ClickModel`).

    Raises:
        UserError: `config` or `fuse` describes another model.
    """
    description = json.loads((folder / DESCRIPTION).read_text())
    saved = from_dict(ClickConfig(), description["config"], str(folder / DESCRIPTION))
    saved_fuse = description["fuse"] and from_dict(FuseConfig(), description["fuse"], str(folder / DESCRIPTION))
    wanted = [(f"--ctr.{name}", saved, config, name) for name in ("backbone", "dim", "widths", "networks")]
    wanted += [(f"--fuse.{name}", saved_fuse, fuse, name) for name in ("hidden", "whiten", "source", "on")]
    for option, mine, other, name in wanted:
        if mine and other and to_dict(getattr(mine, name)) != to_dict(getattr(other, name)):
            raise UserError(
                f"{option}: the model in {folder} has {to_dict(getattr(mine, name))!r}, not "
                f"{to_dict(getattr(other, name))!r}; use the same, --from-scratch, or another --state"
            )
    fuse = fuse or saved_fuse
    store = None if config else "replicated"
    about = {"text_dim": description["text_dim"], "vector_dim": description.get("vector_dim", 0), "networks": networks}
    model = ClickModel(schema, description["sizes"], config or saved, fuse=fuse, seed=seed, store=store, **about)
    missing, unexpected = model.load_state_dict(read_state(folder / WEIGHTS, model), strict=False)
    if wrong := [*unexpected, *sorted(set(missing) - _optimizer_state(model))]:
        raise UserError(f"{folder}: a model of another version ({wrong[0]}); use --from-scratch, or another --state")
    return model.eval()


def _optimizer_state(model: ClickModel) -> set[str]:
    return {
        f"tables.{model.tables.key(name)}.{state}"
        for name, table in model.tables.items()
        for state in table.state_names
    }


class DensePart(nn.Module):
    """What a click model computes after its look-ups: backbone, head and, of a gain network, the layer that joins.

    What comes before, tables, their projections and a text field, can be stored by id.

    Args:
        model: whose layers it takes; both have the same ones.
    """

    def __init__(self, model: ClickModel) -> None:
        super().__init__()
        self.backbone, self.layout = model.backbone, model.layout
        self.join = model.join if model.vector_dim else None

    def forward(
        self, rows: Tensor, items: Tensor, history: Tensor, mask: Tensor, vector: Tensor | None = None
    ) -> Tensor:
        """Click probabilities, float32 [B], of what `ClickModel.look_up` gives and, for a gain network, of
        `Batch.vector`."""
        representation, direct, _ = self.backbone.represent(self.layout(rows, items, history, mask))
        if self.join is not None:
            representation = self.join(representation, vector)
        return torch.sigmoid((self.backbone.head(representation) + direct).float())


@torch.no_grad()
def export_dense(model: ClickModel, history_length: int, one_user: bool = False) -> torch.export.ExportedProgram:
    """The dense part of a click model (`DensePart`) as a graph of PyTorch's operators, for any number of rows.

    Args:
        model: in evaluation mode.
        history_length: of the schema.
        one_user: for rows of one user: row fields, history and mask have one row.
    """
    assert not model.training
    users, items = 1 if one_user else 2, len(model.item_names) + (model.text_dim > 0)
    inputs = (
        torch.zeros(users, len(model.row_names), model.columns),
        torch.zeros(2, items, model.columns),
        torch.zeros(users, history_length, items, model.columns),
        torch.ones(users, history_length, dtype=torch.bool),
        *([torch.zeros(2, model.vector_dim)] if model.vector_dim else []),
    )
    rows = torch.export.Dim("rows")
    shapes = tuple({} if len(value) == 1 else {0: rows} for value in inputs)
    return torch.export.export(DensePart(model).eval(), inputs, dynamic_shapes=shapes)


class Release:
    """A released day: vocabularies, catalog, text table and models that belong together, ready to score.

    It scores with the model that `release.json` names; one with text reads the text table beside it, which must be of
    this catalog and of the language model that `release.json` names.

    Args:
        folder: local folder of a release.
    """

    def __init__(self, folder: Path) -> None:
        self.schema = Schema.load(folder / "schema.yaml")
        self.vocabularies = load_encoders(folder / "vocabulary")
        self.catalog = Catalog.load(folder / "catalog", self.schema)
        served = json.loads((folder / SERVES).read_text())
        self.model = load_click_model(folder / served["serves"], self.schema)
        expected = {"rows": self.catalog.size, "catalog": self.catalog.ids.fingerprint(), "model": served["text_model"]}
        self.text_table = load_text_table(folder, **expected) if self.model.text_dim else None

    @torch.no_grad()
    def predict(self, rows: pa.Table) -> np.ndarray:
        """Click probabilities, float32 [n], of rows with the log's columns; label and timestamp are not needed.

        An item that is not in the catalog is scored as an unknown one.

        Raises:
            UserError: a column that the schema names is missing.
        """
        for column in self.columns:
            if column not in rows.column_names:
                raise UserError(f"the rows to score have no column '{column}'; needed: {', '.join(self.columns)}")
        if not rows.num_rows:
            return np.empty(0, np.float32)
        rows = (
            rows.append_column(LABEL, pa.array(np.zeros(rows.num_rows, np.float32)))
            if LABEL not in rows.column_names
            else rows
        )
        table = encode(rows, self.schema, self.vocabularies, self.catalog)
        return self.model.predict(collate(table, self.schema, self.catalog, self.text_table)).numpy()

    @property
    def columns(self) -> list[str]:
        """The columns that a row to score needs."""
        names = [field.name for field in self.schema.row_fields] + [ITEM_ID]
        return names + ([HISTORY] if self.schema.history_length else [])

    def predict_frame(self, frame: pd.DataFrame) -> np.ndarray:
        """`predict` for a DataFrame. Whole floats are integer ids: pandas makes them of integers beside a null."""
        ids = [f.name for f in self.schema.row_fields if f.kind != NUMERIC] + [ITEM_ID]
        floats = [name for name in ids if name in frame and pd.api.types.is_float_dtype(frame[name])]
        frame = frame.astype({name: "Int64" for name in floats})
        return self.predict(pa.Table.from_pandas(frame, preserve_index=False))
