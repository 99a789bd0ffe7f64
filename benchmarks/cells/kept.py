"""What was computed once is not computed again: outputs of a state, named by what they depend on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ctrdist.storage import Manifest, State, fingerprint


def find(state: State, kind: str, *inputs: Any) -> Manifest | None:
    """The output of a kind that was made of `inputs`, if it is there."""
    key = fingerprint(*inputs)
    return state.find(f"{kind}/{key}", key)


def once(state: State, kind: str, *inputs: Any, make: Callable[[Path], dict[str, Any]]) -> Manifest:
    """The same, made if it is not there; a process that dies leaves nothing half-made.

    Args:
        inputs: anything that JSON can write and that the output depends on.
        make: writes the output's files to a folder; returns its facts.
    """
    found = find(state, kind, *inputs)
    if found is None:
        key, facts = fingerprint(*inputs), {}
        with state.create(f"{kind}/{key}", key, facts) as folder:
            facts |= make(folder)
        found = state.find(f"{kind}/{key}", key)
    return found
