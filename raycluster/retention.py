"""What a state forgets: releases that are old, and runs that no release refers to."""

from ctrdist.storage import State
from raycluster.day import day_releases, say


def prune(state: State, keep: int, today: str = "") -> list[str]:
    """Remove all but the newest `keep` releases, then what their runs made, except what a release that is kept names.

    Reports stay, under `releases/<date>/`. A run that has not been released is left alone: it may be under way.

    Args:
        keep: releases to keep; 0 keeps everything.
        today: date of a release that is kept, however old.

    Returns:
        Names of the releases removed.
    """
    releases = day_releases(state)
    removed = [name for name in releases[:-keep] if name != f"releases/{today}"] if keep else []
    if not removed:
        return []
    for name in removed:
        state.remove(name)
    kept = [state.find(name) for name in day_releases(state)]
    needed = {value for release in kept for value in release.facts.values() if isinstance(value, str)}
    dates = {release.name.rsplit("/", 1)[1] for release in kept}
    for date in state.folders("runs"):
        if date in state.folders("releases") and date not in dates:  # released once, and no longer
            state.sweep(f"runs/{date}", needed)
    say(f"removed    {len(removed)} releases up to {removed[-1].rsplit('/', 1)[1]}, and what only they needed")
    return removed
