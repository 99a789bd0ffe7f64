"""Every benchmark says what it measures and documents every option."""

import importlib
from dataclasses import fields
from pathlib import Path

import pytest
import tyro

SCRIPTS = sorted(path.stem for path in (Path(__file__).parents[2] / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_is_complete(name, capsys):
    module = importlib.import_module(f"benchmarks.{name}")
    with pytest.raises(SystemExit) as stop:
        tyro.cli(module.Options, args=["--help"], description=module.__doc__)
    text = capsys.readouterr().out
    assert stop.value.code == 0 and module.__doc__.split(".")[0].split()[0] in text
    for field in fields(module.Options):
        assert f"--{field.name.replace('_', '-')}" in text
        assert f"        {field.name}: " in module.Options.__doc__
