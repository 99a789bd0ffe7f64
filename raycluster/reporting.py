"""What a day was, as the report's dictionary (`ctrdist.report`)."""

import platform
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pyarrow import fs

from ctrdist.report import write_plots, write_report
from ctrdist.storage import Manifest, filesystem
from raycluster.code_version import code_version
from raycluster.day import Day
from raycluster.stages.read import Days, Read

PACKAGES = ("ray", "torch", "transformers", "pyarrow", "numpy", "mlflow")
COST = ("seconds", "cpu_seconds", "gpu_seconds")
"""What a stage cost: how long it took, and that times the CPUs, or GPUs, that the cluster had."""


def assemble(
    day: Day, read: Read, result: dict[str, Any], text: Manifest | None = None, days: Days | None = None
) -> dict[str, Any]:
    """The report of a day that has been evaluated.

    Args:
        result: what `stages.evaluate` gave.
        text: output with the text table, if there is one.
        days: that were trained on, if not those of `read`.
    """
    days = read.train if days is None else days
    window = {
        name: [str(part[0]), str(part[-1])]
        for name in ("train", "valid", "test")
        if (part := getattr(day.window, name))
    }
    counts = {name: read.total(getattr(day.window, name)) for name in ("valid", "test")}
    stages = {name: _stage(day, name, manifest) for name, manifest in day.stages.items() if name != "read"}
    return {
        "date": str(day.date),
        "release": day.state.path(day.release),
        "rows": {
            "train": read.total(days),
            "cold": result["rows"]["cold"],
            "quarantined": sum(read.faults.values()),
            **counts,
        },
        "window": window | {"trained": [str(days[0]), str(days[-1])]},
        "quarantine": {"folder": read.quarantine, "reasons": read.faults, "strangers": read.strangers},
        "models": result["models"],
        "gain": result["gain"],
        "groups": result["groups"],
        "stages": stages,
        "text_table": {"items": text.facts["items"], "dim": text.facts["dim"]} if text else None,
        "peak_memory_bytes": day.memory.bytes if day.memory else None,
        "config": day.options.shown(),
        "versions": {"code": code_version(), "python": platform.python_version()}
        | {name: version(name) for name in PACKAGES},
    }


def _stage(day: Day, name: str, manifest: Manifest) -> dict[str, Any]:
    facts = manifest.facts
    return {
        **{name: facts.get(name) for name in COST},
        "rows": facts["rows"],
        "skipped": name in day.skipped,
        "losses": facts.get("losses", []),
        "valid_auc": facts.get("valid_auc", []),
        "valid_loss": facts.get("valid_loss", []),
        "data_wait": facts.get("data_wait"),
    }


def publish(day: Day, report: dict[str, Any]) -> None:
    """Put `report.json` and `report.html` where people look for them, beside the release's manifest, and log them, the
    plots and the day's metrics (`cela.auc`, `gain.auc`, ...) to its MLflow run."""
    numbers = {f"{model}.{name}": value for model, values in report["models"].items() for name, value in values.items()}
    numbers |= {f"gain.{name}": value for name, value in report["gain"].items()}
    numbers |= {f"rows.{name}": value for name, value in report["rows"].items()}
    for stage, facts in report["stages"].items():
        numbers |= {f"cost.{stage}.{name}": facts[name] for name in COST if facts[name] is not None}
    day.tracker.log_metrics(day.run_id, {name: v for name, v in numbers.items() if isinstance(v, int | float)})
    filesystem_, root = filesystem(day.state.uri)
    with tempfile.TemporaryDirectory() as folder:
        write_report(report, Path(folder))
        filesystem_.create_dir(f"{root}/{day.release}", recursive=True)
        fs.copy_files(folder, f"{root}/{day.release}", destination_filesystem=filesystem_)
        write_plots(report, Path(folder) / "plots")
        day.tracker.log_artifacts(day.run_id, folder)
