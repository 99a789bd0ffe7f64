"""Run benchmarks and keep what they print in RESULTS.md, with command, date, machine and versions."""

import datetime as dt
import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import psutil
import tyro

HERE = Path(__file__).parent
RESULTS = HERE / "RESULTS.md"
HEAD = "Each section by the command that it names; `make bench` runs all of them (hours)."
PACKAGES = ("ray", "torch", "transformers", "numpy", "scikit-learn")


@dataclass(frozen=True)
class Options:
    """What to run.

    Args:
        only: names of the benchmarks; all if none is given.
        machine: what to call this machine in the results.
    """

    only: tuple[str, ...] = ()
    machine: str = ""


def run(name: str) -> str:
    """Run one benchmark to its end; returns its section of the results."""
    command = [sys.executable, str(HERE / f"{name}.py")]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"COLUMNS": "100"})
    if done.returncode:
        raise SystemExit(f"{name} failed; its section of {RESULTS} stays as it was")
    *lines, last = done.stdout.rstrip().splitlines()
    assert json.loads(last)["benchmark"] == name
    return "\n".join([f"## {name}", "", f"`python benchmarks/{name}.py`", "", "```", *lines, last, "```", ""])


def main(options: Options) -> None:
    """Run the benchmarks; sections of RESULTS.md that are not run stay."""
    names = options.only or sorted(path.stem for path in HERE.glob("*.py") if path.stem != "run")
    old = RESULTS.read_text().split("\n## ") if RESULTS.exists() else []
    sections = {part.split("\n", 1)[0]: "## " + part.rstrip() + "\n" for part in old[1:]}
    machine = options.machine or f"{os.cpu_count()} CPUs ({platform.machine()}), "
    machine += "" if options.machine else f"{psutil.virtual_memory().total / 2**30:.0f} GiB"
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    for name in names:
        made = f"{dt.date.today()}, {machine}, Python {platform.python_version()}, {versions}"
        sections[name] = run(name).replace("\n\n```\n", f"\n\n{made}\n\n```\n", 1)
        text = ["# Results", "", HEAD, "", *(sections[key] for key in sorted(sections))]
        RESULTS.write_text("\n".join(text))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
