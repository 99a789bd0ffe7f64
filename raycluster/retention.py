"""What a state forgets: releases that are old, and runs that no release refers to."""

from ctrdist.storage import State
from raycluster.day import day_releases, say


def prune(state: State, keep: int) -> list[str]:
    """Remove all but the newest `keep` releases, then the outputs of earlier runs that these do not name.

    A run of today is never touched, and neither are reports, which stay under `releases/<date>/`.

    Args:
        keep: releases to keep; 0 keeps everything.

    Returns:
        Names of the releases removed.
    """
    releases = day_releases(state)
    removed, kept = (releases[:-keep], releases[-keep:]) if keep else ([], releases)
    if not removed:
        return []
    for name in removed:
        state.remove(name)
    needed = {value for name in kept for value in state.find(name).facts.values() if isinstance(value, str)}
    oldest = kept[0].rsplit("/", 1)[1]
    for date in state.folders("runs"):
        if date < oldest:
            for name in state.names(f"runs/{date}"):
                if name not in needed:
                    state.remove(name)
    say(f"removed    {len(removed)} releases before {oldest}, and what only they needed")
    return removed
