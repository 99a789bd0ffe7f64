"""Releases: a day's vocabulary, catalog, text table, models, schema and metrics as one thing, and its registration."""

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

import ctrdist
from ctrdist.export import SERVES, Release, load_click_model, save_click_model
from ctrdist.log import read_row_group
from ctrdist.report import write_report
from ctrdist.schema import HISTORY
from ctrdist.storage import Manifest, fingerprint
from ctrdist.text_table import FACTS, TABLE
from raycluster import reporting
from raycluster.day import Day, say
from raycluster.retention import prune
from raycluster.tracking import mlflow_quiet

Scored = tuple[Manifest, Manifest | None]
CODE = [str(Path(ctrdist.__file__).parent)]
SERVING = ("torch", "pyarrow", "pandas", "numpy", "safetensors", "pyyaml", "transformers")


def release(day: Day, read: Manifest, models: dict[str, Scored], report: dict[str, Any], facts: dict[str, Any]) -> None:
    """Write the day's release, log it, register it, and let go of what is old.

    Args:
        read: output with schema, vocabularies and catalog.
        models: by name, a click model's output and its text table's; the last one serves.
        report: the day's report.
        facts: what the next day starts from, besides the models.
    """
    written = write_release(day, read, models, report, facts)
    reporting.log(day, report, written)
    version_ = register(day, written)
    day.state.annotate(day.release, {"registered": version_})
    say(f"registered as {version_}")
    prune(day.state, day.options.keep_releases, str(day.date))


def write_release(
    day: Day, read: Manifest, models: dict[str, Scored], report: dict[str, Any], facts: dict[str, Any]
) -> Manifest:
    """Write everything that serving and the next day need, and the report, as one output. Arguments as `release`."""
    state, served = day.state, list(models)[-1]
    facts = facts | {"read": read.name, "options": day.options.result(), "trained_days": day.trained_days}
    facts |= {name: output.name for name, (output, _) in models.items()}
    with state.create(day.release, read.identity, facts) as folder:
        source = state.local(read.name)
        shutil.copy(source / "schema.yaml", folder)
        for part in ("vocabulary", "catalog"):
            shutil.copytree(source / part, folder / part)
        for name, (output, text) in models.items():
            (folder / name).mkdir()
            save_click_model(
                load_click_model(state.local(output.name), day.schema), folder / name, optimizer_state=False
            )
            if text and name == served:
                for part in (TABLE, FACTS):
                    shutil.copy(state.local(text.name) / part, folder)
        text = models[served][1]
        (folder / SERVES).write_text(json.dumps({"serves": served, "text_model": text and text.facts["model"]}))
        write_report(report, folder)
    publish(day)
    return state.find(day.release)


def publish(day: Day) -> None:
    """Put `report.json` and `report.html` where people look for them, beside the release's manifest."""
    day.state.publish(day.release, ("report.json", "report.html"), day.release)


def register(day: Day, written: Manifest) -> str:
    """Log the release as an MLflow model with signature and input example, and register it; returns name and version.

    A release whose models and tables are registered already keeps its version.
    """
    client, name = day.tracker.client, day.options.experiment
    content = fingerprint({path: facts for path, facts in written.files.items() if not path.startswith("report.")})
    known = [v for v in client.search_model_versions(f"name = '{name}'") if v.tags.get("release") == content]
    if known:
        return f"{name} version {known[0].version}"
    folder = day.state.local(written.name)
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
