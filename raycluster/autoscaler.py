"""Nodes: what they have room for; and a cluster that grows by itself, whose autoscaler is asked for more."""

import time
from collections import Counter


def alive_nodes() -> list[dict[str, float]]:
    """The resources of each node that is there, by Ray's names (CPU, GPU, memory in bytes), whatever runs on it."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def without_place(pieces: list[dict[str, float]], nodes: list[dict[str, float]]) -> str:
    """What finds no place when each piece is put on the first node that has room: for people, such as "2 GPU, 2 train";
    "" if everything does.

    Args:
        pieces: each of which fits on a node, by resource.
        nodes: resources of each.
    """
    free, missing = [Counter(node) for node in nodes], Counter()
    for piece in pieces:
        node = next((node for node in free if all(node[name] > need - 1e-6 for name, need in piece.items())), None)
        if node is None:
            missing.update(piece)
        else:
            node.subtract(piece)
    return in_words(missing)


def in_words(resources: dict[str, float]) -> str:
    """Resources by Ray's names, for people: "2 GPU, 0.5 GiB of memory"."""
    gib = {"GiB of memory": resources["memory"] / 2**30} if resources.get("memory") else {}
    rest = {name: number for name, number in resources.items() if name != "memory"}
    return ", ".join(f"{number:g} {name}" for name, number in (rest | gib).items())


def wait_for(pieces: list[dict[str, float]], seconds: float, every: float = 5.0) -> str:
    """Returns when the cluster's nodes have a place for each piece, or `seconds` have passed.

    The autoscaler is asked only while this waits, and at every look: the request is one for the whole cluster, and what
    Ray Data leaves running there overwrites it every twenty seconds.

    Args:
        pieces: as of `without_place`.
        every: seconds between two looks.

    Returns:
        What there is no place for by then (`without_place`).
    """
    from ray.autoscaler.sdk import request_resources

    began, asked, told = time.monotonic(), False, ""
    try:
        while missing := without_place(pieces, alive_nodes()):
            asked = True
            request_resources(bundles=pieces)
            left = seconds - (time.monotonic() - began)
            if left <= 0:
                return missing
            if missing != told:
                print(f"waiting at most {left / 60:.1f} minutes for {missing}", flush=True)
                told = missing
            time.sleep(every)
        return ""
    finally:
        if asked:
            request_resources(bundles=[])
