"""The network as a graph: exported, which any machine runs, or compiled, which machines of one kind do."""

import json
import logging
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

Graph = Callable[..., Tensor]
"""Row fields [R, F_row, columns], items [B, F_item, columns], histories [R, T, F_item, columns] and their mask, bool
[R, T] -> click probabilities, float32 [B]; R is B, or 1 where a graph is for one user."""

EXPORTED, COMPILED, BUILT_FOR = "{}.pt2", "{}.compiled.pt2", "compiled.json"
"""File names; `{}` is the graph's."""


def is_compiled(path: str | Path) -> bool:
    """Whether a file is of a compiled graph: made from the exported one, of other bytes each time, and no part of what
    scores depend on."""
    return Path(path).name == BUILT_FOR or Path(path).match(COMPILED.format("*"))


def machine() -> dict[str, Any]:
    """What a compiled graph depends on: PyTorch's version, the platform, and what instructions the processor has."""
    flags: list[str] = []
    if Path("/proc/cpuinfo").exists():
        lines = (line.split(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
        flags = next((rest[0].split() for name, *rest in lines if name.strip() in ("flags", "Features")), [])
    versions = {"torch": torch.__version__, "platform": sys.platform, "machine": platform.machine()}
    return versions | {"instructions": sorted(flags)}


def misfit(built_for: dict[str, Any]) -> str:
    """Why this machine does not run what was compiled for another (`machine`); "" where it does."""
    here = machine()
    for name in ("torch", "platform", "machine"):
        if built_for[name] != here[name]:
            return f"for {name} {built_for[name]}, this is {here[name]}"
    missing = sorted(set(built_for["instructions"]) - set(here["instructions"]))
    return f"for a processor with {', '.join(missing)}" if missing else ""


def load_graph(folder: Path, name: str) -> Graph:
    """The compiled graph of a folder, if it is there and runs here; else the exported one."""
    path = folder / COMPILED.format(name)
    if path.exists():
        wrong = misfit(json.loads((folder / BUILT_FOR).read_text()))
        try:
            if not wrong:
                return _load_compiled(path)
        except Exception as error:  # of the dynamic linker, of the archive: whatever it is, there is another graph
            wrong = f"but does not load: {str(error).strip().splitlines()[0]}"
        log.warning("%s: compiled %s. The exported graph serves in its place, at about half the speed", path, wrong)
    return torch.export.load(folder / EXPORTED.format(name)).module()


def _load_compiled(path: Path) -> Graph:
    run = torch._inductor.aoti_load_package(str(path)).loader.boxed_run

    def graph(*inputs: Tensor) -> Tensor:
        return run(list(inputs))[0]

    return graph
