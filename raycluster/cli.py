"""Command lines: generated from typed dataclasses, with `ctr.yaml` underneath, and errors a user can act on."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union

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
    if path := _config(arguments, file):
        default = load_yaml(default, path)
    return _cli(type(default), arguments, default=default, description=description)


def parse_command(
    defaults: dict[str, Any], description: str, arguments: list[str] | None = None, file: str = "ctr.yaml"
) -> Any:
    """`parse` for a job of several commands: the options of the one that the command line names first.

    The YAML file is one for all jobs: what a command has no option for is left aside.

    Args:
        defaults: of each command's options, by its name.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if path := _config(arguments, file):
        defaults = {name: load_yaml(default, path, others=True) for name, default in defaults.items()}
    commands = tuple(
        Annotated[type(default), tyro.conf.subcommand(name, default=default)] for name, default in defaults.items()
    )
    return _cli(Union[commands], arguments, description=description)  # noqa: UP007


def _config(arguments: list[str], file: str) -> Path | None:
    """The YAML file of options: that of `--config`, or `file` if it is there."""
    path = Path(file) if Path(file).exists() else None
    for i, argument in enumerate(arguments):
        if argument.startswith("--config="):
            path = Path(argument.removeprefix("--config="))
        elif argument == "--config" and i + 1 < len(arguments):
            path = Path(arguments[i + 1])
    return path


def _cli(type_: Any, arguments: list[str], **options: Any) -> Any:
    try:
        return tyro.cli(type_, args=arguments, **options)
    except SystemExit as stop:
        raise SystemExit(1 if stop.code else 0) from None


def main(job: Callable[[], None], stopped: str = "what is done stays, and the same command goes on from there") -> None:
    """Run a job; a UserError is printed without a stack trace and becomes exit status 1, Ctrl-C likewise and 130.

    Args:
        stopped: what to know after Ctrl-C.
    """
    try:
        job()
    except KeyboardInterrupt:
        print(f"stopped: {stopped}", file=sys.stderr, flush=True)
        raise SystemExit(130) from None
    except Exception as error:
        wrong = user_error(error)
        if wrong is None:
            raise
        print(f"error: {wrong}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
