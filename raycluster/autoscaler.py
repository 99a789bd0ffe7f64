"""A cluster that grows by itself: ask its autoscaler for nodes, and wait for them."""

import time
from collections import Counter


def wait_for(wanted: list[dict[str, float]], seconds: float, every: float = 5.0) -> str:
    """Returns when the cluster's nodes have a place for each piece that is wanted, or `seconds` have passed.

    The autoscaler is asked only while this waits, and at every look: the request is one for the whole cluster, and what
    Ray Data leaves running there overwrites it every twenty seconds.

    Args:
        wanted: pieces, each of which fits on a node, by resource.
        every: seconds between two looks.

    Returns:
        What there is no place for by then, for people: "2 GPU, 2 train"; "" if there is one for everything.
    """
    from ray.autoscaler.sdk import request_resources

    began, asked, told = time.monotonic(), False, ""
    try:
        while missing := _without_place(wanted):
            asked = True
            request_resources(bundles=wanted)
            if time.monotonic() - began >= seconds:
                return missing
            if missing != told:
                print(f"waiting at most {seconds / 60:g} minutes for {missing}", flush=True)
                told = missing
            time.sleep(every)
        return ""
    finally:
        if asked:
            request_resources(bundles=[])


def _without_place(wanted: list[dict[str, float]]) -> str:
    """What finds no place on any node, whatever runs there; pieces are put one by one where the first place is."""
    import ray

    free = [Counter(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    missing = Counter()
    for piece in wanted:
        node = next((node for node in free if all(node[name] > need - 1e-6 for name, need in piece.items())), None)
        (missing if node is None else node).update({name: -need for name, need in piece.items()})
    return ", ".join(f"{-number:g} {name}" for name, number in missing.items())
