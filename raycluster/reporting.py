"""What a day was, as the report's dictionary (`ctrdist.report`)."""

import platform
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ctrdist.report import write_plots
from ctrdist.storage import Manifest
from raycluster.day import Day
from raycluster.stages.read import Days, Read

PACKAGES = ("ray", "torch", "transformers", "pyarrow", "numpy", "mlflow")


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
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }


def _stage(day: Day, name: str, manifest: Manifest) -> dict[str, Any]:
    facts = manifest.facts
    return {
        "seconds": facts["seconds"],
        "rows": facts["rows"],
        "skipped": name in day.skipped,
        "losses": facts.get("losses", []),
        "valid_auc": facts.get("valid_auc", []),
        "valid_loss": facts.get("valid_loss", []),
        "data_wait": facts.get("data_wait"),
    }


def log(day: Day, report: dict[str, Any], release: Manifest) -> None:
    """Log the day's metrics (`cela.auc`, `gain.auc`, ...) the report and its plots to its MLflow run."""
    numbers = {f"{model}.{name}": value for model, values in report["models"].items() for name, value in values.items()}
    numbers |= {f"gain.{name}": value for name, value in report["gain"].items()}
    numbers |= {f"rows.{name}": value for name, value in report["rows"].items()}
    day.tracker.log_metrics(day.run_id, {name: v for name, v in numbers.items() if isinstance(v, int | float)})
    with tempfile.TemporaryDirectory() as folder:
        for name in ("report.json", "report.html"):
            shutil.copy(day.state.local(release.name) / name, folder)
        write_plots(report, Path(folder) / "plots")
        day.tracker.log_artifacts(day.run_id, folder)
