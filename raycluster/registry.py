"""Releases: a day's vocabulary, catalog, text table, models, schema and metrics as one thing, and its registration."""

import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

import ctrdist
from ctrdist.export import Release, load_click_model, save_click_model
from ctrdist.log import read_row_group
from ctrdist.report import write_report
from ctrdist.schema import HISTORY
from ctrdist.storage import Manifest, fingerprint
from raycluster.day import Day
from raycluster.tracking import mlflow_quiet

CODE = [str(Path(ctrdist.__file__).parent)]
SERVING = ("torch", "pyarrow", "pandas", "numpy", "safetensors", "pyyaml", "transformers")


def write_release(
    day: Day, read: Manifest, text: Manifest, models: dict[str, Manifest], report: dict[str, Any], facts: dict[str, Any]
) -> Manifest:
    """Write the day's release: everything that serving and the next day need, and the report.

    Args:
        read: output with schema, vocabularies and catalog.
        text: output with the text table.
        models: click models by name, `id` and `cela`.
        facts: what the next day starts from.
    """
    state = day.state
    with state.create(day.release, read.identity, facts) as folder:
        source = state.local(read.name)
        shutil.copy(source / "schema.yaml", folder)
        for part in ("vocabulary", "catalog"):
            shutil.copytree(source / part, folder / part)
        shutil.copy(state.local(text.name) / "text_table.npy", folder)
        for name, output in models.items():
            (folder / name).mkdir()
            save_click_model(
                load_click_model(state.local(output.name), day.schema), folder / name, optimizer_state=False
            )
        write_report(report, folder)
    publish(day)
    return state.find(day.release)


def publish(day: Day) -> None:
    """Put `report.json` and `report.html` where people look for them, beside the release's manifest."""
    from pyarrow import fs

    from ctrdist.storage import filesystem

    filesystem_, root = filesystem(day.state.uri)
    manifest = day.state.find(day.release)
    folder = f"{root}/{day.release}"
    filesystem_.create_dir(folder, recursive=True)
    for name in ("report.json", "report.html"):
        fs.copy_files(f"{root}/{manifest.folder}/{name}", f"{folder}/{name}", filesystem_, filesystem_)


def register(day: Day, release: Manifest) -> str:
    """Log the release as an MLflow model with signature and input example, and register it; returns name and version.

    A release whose models and tables are registered already keeps its version.
    """
    client, name = day.tracker.client, day.options.experiment
    content = fingerprint({path: facts for path, facts in release.files.items() if not path.startswith("report.")})
    known = [v for v in client.search_model_versions(f"name = '{name}'") if v.tags.get("release") == content]
    if known:
        return f"{name} version {known[0].version}"
    folder = day.state.local(release.name)
    loaded = Release(folder)
    example = example_rows(day, loaded)
    with mlflow_quiet() as mlflow:
        mlflow.set_tracking_uri(day.tracker.uri)
        with mlflow.start_run(run_id=day.run_id):
            info = mlflow.pyfunc.log_model(
                name="model",
                python_model=str(Path(__file__).with_name("serving_model.py")),
                artifacts={"release": str(folder)},
                code_paths=CODE,
                signature=signature(day, loaded),
                input_example=example,
                pip_requirements=[f"{package}=={version(package)}" for package in SERVING],
            )
        labels = {"release": content, "date": str(day.date)}
        if not client.search_registered_models(f"name = '{name}'"):
            client.create_registered_model(name)
        made = client.create_model_version(name, info.model_uri, day.run_id, labels, model_id=info.model_id)
    return f"{name} version {made.version}"


def signature(day: Day, release: Release) -> Any:
    """MLflow's signature: the columns that scoring needs, with the log's own types; one column comes back."""
    from mlflow.models import ModelSignature
    from mlflow.types.schema import Array, ColSpec, DataType
    from mlflow.types.schema import Schema as Columns

    found = _first_rows(day).schema

    def kind(type_: pa.DataType) -> Any:
        if pa.types.is_list(type_) or pa.types.is_large_list(type_):
            return Array(kind(type_.value_type))
        type_ = type_.value_type if pa.types.is_dictionary(type_) else type_
        if pa.types.is_floating(type_):
            return DataType.double
        return DataType.long if pa.types.is_integer(type_) else DataType.string

    inputs = [ColSpec(kind(found.field(name).type), name) for name in release.columns]
    return ModelSignature(Columns(inputs), Columns([ColSpec(DataType.float, "probability")]))


def example_rows(day: Day, release: Release, rows: int = 5) -> pd.DataFrame:
    """A few test rows without nulls, with the columns that scoring needs; those with a history first."""
    table = _first_rows(day).select(release.columns)
    frame = table.to_pandas().dropna()
    if HISTORY in frame:
        frame = frame.loc[frame[HISTORY].str.len().sort_values(ascending=False, kind="stable").index]
    return frame.head(rows).reset_index(drop=True)


def _first_rows(day: Day) -> pa.Table:
    return read_row_group(day.options.data, day.groups(day.window.test)[0], day.schema).slice(0, 1000)
