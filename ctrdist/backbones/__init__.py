"""One file a published network. A file here with a `Config` and a `Network` is a backbone, found by its file's name."""

import importlib
import pkgutil
from dataclasses import field, make_dataclass
from typing import Any

from ctrdist.backbones.base import Backbone, Inputs, Shape
from ctrdist.errors import UserError, nearest

NAMES = tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in ("base", "layers")))

BackboneConfigs = make_dataclass(
    "BackboneConfigs",
    [
        (
            name,
            importlib.import_module(f"{__name__}.{name}").Config,
            field(default_factory=importlib.import_module(f"{__name__}.{name}").Config),
        )
        for name in NAMES
    ],
    frozen=True,
)
BackboneConfigs.__module__ = __name__  # so that it pickles by name, and is one class in every process
BackboneConfigs.__doc__ = "Hyper-parameters of every backbone; those of the one that is chosen are used."


def check(name: str) -> None:
    """Raise a UserError if there is no backbone `name`."""
    if name not in NAMES:
        raise UserError(f"--ctr.backbone {name}: no such backbone; {nearest(name, NAMES)}")


def network(name: str) -> type[Backbone]:
    """The class of the backbone `name`.

    Raises:
        UserError: there is no such backbone.
    """
    check(name)
    return importlib.import_module(f"{__name__}.{name}").Network


def build(name: str, shape: Shape, configs: Any = None) -> Backbone:
    """The backbone `name` with its part of `configs` (a BackboneConfigs; the papers' values if None).

    Raises:
        UserError: there is no such backbone.
    """
    made = network(name)
    return made(shape, getattr(BackboneConfigs() if configs is None else configs, name))


__all__ = ["NAMES", "Backbone", "BackboneConfigs", "Inputs", "Shape", "build", "check", "network"]
