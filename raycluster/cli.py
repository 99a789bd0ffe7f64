"""Command lines: generated from typed dataclasses, with `ctr.yaml` underneath, and errors a user can act on."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import tyro

from ctrdist.config import load_yaml
from raycluster.cluster import user_error

T = TypeVar("T")


def parse(default: T, description: str, arguments: list[str] | None = None, file: str = "ctr.yaml") -> T:
    """Options from, in this order: `default`, the YAML file of `--config` (or `file` if there), the command line.

    Exits with status 1 on an unknown option.

    Raises:
        UserError: the YAML file is missing or says something unknown.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    path = Path(file) if Path(file).exists() else None
    for i, argument in enumerate(arguments):
        if argument.startswith("--config="):
            path = Path(argument.removeprefix("--config="))
        elif argument == "--config" and i + 1 < len(arguments):
            path = Path(arguments[i + 1])
    if path is not None:
        default = load_yaml(default, path)
    try:
        return tyro.cli(type(default), default=default, description=description, args=arguments)
    except SystemExit as stop:
        raise SystemExit(1 if stop.code else 0) from None


def main(job: Callable[[], None]) -> None:
    """Run a job; a UserError is printed without a stack trace and becomes exit status 1."""
    try:
        job()
    except Exception as error:
        wrong = user_error(error)
        if wrong is None:
            raise
        print(f"error: {wrong}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
