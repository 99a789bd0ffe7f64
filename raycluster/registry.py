"""Releases: a day's vocabulary, catalog, text table, models and schema as one thing; its registration, and the gate."""

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
from ctrdist.errors import UserError
from ctrdist.export import SERVES, load_click_model, save_click_model
from ctrdist.gate import refused
from ctrdist.log import read_row_group
from ctrdist.schema import HISTORY
from ctrdist.served import write_served
from ctrdist.serving.model import SERVING, ServedModel
from ctrdist.storage import Manifest
from ctrdist.tasks.click import ClickModel
from ctrdist.text_table import FACTS, TABLE, load_text_table
from raycluster import ingest, reporting
from raycluster.day import Day, say
from raycluster.gate import CLICK_RATE, Gate, act, content, lines, stands
from raycluster.ingest import LogReader
from raycluster.mlflow_server import PATIENCE, mlflow_quiet
from raycluster.retention import prune
from raycluster.stages.read import Read
from raycluster.versions import ARTIFACT, DATE, RELEASE, Unfit, Versions, artifact_digest

Scored = tuple[Manifest, Manifest | None]
REQUIRED = ("torch", "pyarrow", "pandas", "numpy")
PACKAGE = '''"""What a served model needs of this project; where all of it is installed, the rest is found there."""

import pkgutil

__path__ = pkgutil.extend_path(__path__, __name__)
'''
SAMPLE = 200
"""Test rows whose scores must be the same after the registered version is loaded."""


def release(day: Day, read: Read, models: dict[str, Scored], report: dict[str, Any], facts: dict[str, Any]) -> None:
    """Write the day's release, register it, let the gate decide on it, log it, and let go of what is old.

    Args:
        read: schema, vocabularies, catalog and the test rows.
        models: by name, a click model's output and its text table's; the last one serves.
        report: the day's report; `gate` is added to it.
        facts: what the next day starts from, besides the models.
    """
    facts = facts | {"model_name": day.options.model_name}
    written = write_release(day, read.output, models, facts)
    versions = Versions(day.tracker.server, day.options.model_name)
    version = register(day, versions, written, labels(read, report))
    say(f"registered as {versions.name} version {version}")
    decision = pass_gate(day, read, versions, version, written)
    report["gate"] = decision
    reporting.publish(day, report)
    day.tracker.set_tags(day.run_id, {"version": version, "promoted": decision["promoted"]})
    day.state.annotate(day.release, {"registered": f"{versions.name} version {version}", "gate": decision})
    prune(day.state, day.options.keep_releases, str(day.date))


def labels(read: Read, report: dict[str, Any]) -> dict[str, str]:
    """What a version's tags say of it, besides what it is: of the model that serves, the last one of the report."""
    served = [model for name, model in report["models"].items() if name != "best"][-1]
    return {CLICK_RATE: str(read.click_rate), "auc": str(served["auc"]), "log_loss": str(served["log_loss"])}


def pass_gate(day: Day, read: Read, versions: Versions, version: str, written: Manifest) -> dict[str, Any]:
    """Check that a version is whole and call it challenger, then decide whether it takes over, and let it.

    What was decided of it before stays decided, unless another version has become champion before this one could.
    """
    known = versions.get(version)
    decision = known.decision
    if not stands(versions, known):
        decision = {"version": version} | _judge(day, read, versions, version, written)
    act(versions, version, decision)
    for line in lines(versions.name, decision):
        say(f"gate       {line}")
    return decision


def _judge(day: Day, read: Read, versions: Versions, version: str, written: Manifest) -> dict[str, Any]:
    options, release_ = day.options, ServedModel(day.state.local(written.name))
    sample = example_rows(day, release_, rows=SAMPLE)
    try:
        versions.require_whole(version, sample, release_.predict_frame(sample))
    except Unfit as error:
        return {"skipped": True} | refused(str(error))
    versions.challenge(version)
    if not options.promote:
        return {"skipped": True} | refused("the gate was not asked (--no-promote)")
    groups, reader = read.groups(day.window.test), LogReader(options.data, day.state.uri, read.output.name)
    return Gate(day.state, day.plan, versions, reader, groups, options.gate, options.seed).judge(version)


def write_release(day: Day, read: Manifest, models: dict[str, Scored], facts: dict[str, Any]) -> Manifest:
    """Write everything that serving and the next day need as one output. Arguments as `release`."""
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
    return state.find(day.release)


def write_artifact(day: Day, read: Manifest, model: ClickModel, text: Manifest | None, folder: Path) -> None:
    """Write what is served of a click model and its text table's output (`ctrdist.served`)."""
    reader = LogReader(day.options.data, day.state.uri, read.name)
    schema, encoders, catalog = reader.open()
    vectors = load_text_table(text and day.state.local(text.name), rows=catalog.size, catalog=catalog.ids.fingerprint())
    groups = day.groups(day.window.train + day.window.valid + day.window.test)
    users = ingest.latest_users(reader, groups, day.plan)
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


def register(day: Day, versions: Versions, written: Manifest, about: dict[str, str]) -> str:
    """Log the release as an MLflow model with signature and input example, and register it; returns the version.

    A release whose models and tables are registered already keeps its version.

    Args:
        about: tags of the version.
    """
    release_ = content(written)
    if known := versions.find(release_):
        return known.number
    folder = day.state.local(written.name) / SERVING
    loaded = ServedModel(folder)
    example = example_rows(day, loaded)
    run_id = day.tracker.id_of(day.run_id, PATIENCE)

    def log_model() -> Any:
        with mlflow_quiet() as mlflow, serving_code() as code:
            mlflow.set_tracking_uri(day.tracker.uri)
            with mlflow.start_run(run_id=run_id):
                return mlflow.pyfunc.log_model(
                    name="model", signature=signature(day, loaded), input_example=example, **pyfunc_parts(folder, code)
                )

    info = versions.server.patiently(log_model)
    tags = {RELEASE: release_, ARTIFACT: artifact_digest(folder), DATE: str(day.date)}
    return versions.create(info.model_uri, run_id, info.model_id, about | tags)


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
    """A few test rows without nulls, with the columns that scoring needs; those with a history first.

    Raises:
        UserError: no test row is without nulls.
    """
    for group in day.groups(day.window.test):
        table = read_row_group(day.options.data, group, day.schema).slice(0, 1000).select(release.columns)
        frame = table.to_pandas().dropna()
        if len(frame):
            break
    else:
        raise UserError(
            f"{day.options.data}: every test row lacks a value in one of {', '.join(release.columns)}, so that no row "
            "can show that the released model scores as it should; fill the column, or leave it out of schema.yaml"
        )
    if HISTORY in frame:
        frame = frame.loc[frame[HISTORY].str.len().sort_values(ascending=False, kind="stable").index]
    return frame.head(rows).reset_index(drop=True)


def _first_rows(day: Day) -> pa.Table:
    return read_row_group(day.options.data, day.groups(day.window.test)[0], day.schema).slice(0, 1000)
