"""Releases: a day's vocabulary, catalog, text table, models, schema and metrics as one thing, and its registration."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from ctrdist import serving
from ctrdist.export import SERVES, load_click_model, save_click_model
from ctrdist.log import read_row_group
from ctrdist.report import write_report
from ctrdist.schema import HISTORY
from ctrdist.served import write_served
from ctrdist.serving.model import SERVING, ServedModel
from ctrdist.storage import Manifest, fingerprint
from ctrdist.tasks.click import ClickModel
from ctrdist.text_table import FACTS, TABLE, load_text_table
from raycluster import ingest, reporting
from raycluster.day import Day, say
from raycluster.ingest import LogReader
from raycluster.retention import prune
from raycluster.tracking import mlflow_quiet

Scored = tuple[Manifest, Manifest | None]
REQUIRED = ("torch", "pyarrow", "pandas", "numpy")
PACKAGE = '''"""What a served model needs of this project; where all of it is installed, the rest is found there."""

import pkgutil

__path__ = pkgutil.extend_path(__path__, __name__)
'''


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
            model = load_click_model(state.local(output.name), day.schema)
            save_click_model(model, folder / name, optimizer_state=False)
            if name == served:
                write_artifact(day, read, model, text, folder / SERVING)
                for part in (TABLE, FACTS) if text else ():
                    shutil.copy(state.local(text.name) / part, folder)
        text = models[served][1]
        (folder / SERVES).write_text(json.dumps({"serves": served, "text_model": text and text.facts["model"]}))
        write_report(report, folder)
    publish(day)
    return state.find(day.release)


def write_artifact(day: Day, read: Manifest, model: ClickModel, text: Manifest | None, folder: Path) -> None:
    """Write what is served of a click model and its text table's output (`ctrdist.served`)."""
    reader = LogReader(day.options.data, day.state.uri, read.name)
    schema, encoders, catalog = reader.open()
    vectors = load_text_table(text and day.state.local(text.name), rows=catalog.size, catalog=catalog.ids.fingerprint())
    users = ingest.latest_users(reader, day.groups(day.window.train + day.window.valid + day.window.test))
    write_served(folder, model, schema, encoders, catalog, vectors, users, day.options.compile_release)


@contextmanager
def serving_code() -> Iterator[str]:
    """A folder `ctrdist` with the code that serves alone, which goes with a registered model."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "ctrdist"
        source, ignored = Path(serving.__file__).parent, shutil.ignore_patterns("__pycache__")
        shutil.copytree(source, package / "serving", ignore=ignored)
        (package / "__init__.py").write_text(PACKAGE)
        yield str(package)


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


def register(day: Day, written: Manifest) -> str:
    """Log the release as an MLflow model with signature and input example, and register it; returns name and version.

    A release whose models and tables are registered already keeps its version.
    """
    client, name = day.tracker.client, day.options.experiment
    content = fingerprint({path: facts for path, facts in written.files.items() if not path.startswith("report.")})
    known = [v for v in client.search_model_versions(f"name = '{name}'") if v.tags.get("release") == content]
    if known:
        return f"{name} version {known[0].version}"
    folder = day.state.local(written.name) / SERVING
    loaded = ServedModel(folder)
    example = example_rows(day, loaded)
    with mlflow_quiet() as mlflow, serving_code() as code:
        mlflow.set_tracking_uri(day.tracker.uri)
        with mlflow.start_run(run_id=day.run_id):
            info = mlflow.pyfunc.log_model(
                name="model", signature=signature(day, loaded), input_example=example, **pyfunc_parts(folder, code)
            )
        labels = {"release": content, "date": str(day.date)}
        if not client.search_registered_models(f"name = '{name}'"):
            client.create_registered_model(name)
        made = client.create_model_version(name, info.model_uri, day.run_id, labels, model_id=info.model_id)
    return f"{name} version {made.version}"


def pyfunc_parts(artifact: Path, code: str) -> dict[str, Any]:
    """What MLflow's pyfunc flavor is given of a served artifact: a file of code, and no object to pickle.

    Args:
        code: what `serving_code` gives.
    """
    return {
        "python_model": str(Path(__file__).with_name("serving_model.py")),
        "artifacts": {SERVING: str(artifact)},
        "code_paths": [code],
        "pip_requirements": [f"{package}=={version(package)}" for package in REQUIRED],
    }


def signature(day: Day, release: ServedModel) -> Any:
    """MLflow's signature: the columns that scoring takes, with the log's own types; one column comes back."""
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

    inputs = [
        ColSpec(kind(found.field(name).type), name, required=name not in release.optional) for name in release.columns
    ]
    return ModelSignature(Columns(inputs), Columns([ColSpec(DataType.float, "probability")]))


def example_rows(day: Day, release: ServedModel, rows: int = 5) -> pd.DataFrame:
    """A few test rows without nulls, with the columns that scoring needs; those with a history first."""
    table = _first_rows(day).select(release.columns)
    frame = table.to_pandas().dropna()
    if HISTORY in frame:
        frame = frame.loc[frame[HISTORY].str.len().sort_values(ascending=False, kind="stable").index]
    return frame.head(rows).reset_index(drop=True)


def _first_rows(day: Day) -> pa.Table:
    return read_row_group(day.options.data, day.groups(day.window.test)[0], day.schema).slice(0, 1000)
