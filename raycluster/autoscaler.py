"""A cluster that grows by itself: ask its autoscaler for nodes, and wait for them."""

import time
from collections import Counter


def resources_for(wanted: list[dict[str, float]], seconds: float, every: float = 5.0) -> dict[str, float]:
    """The cluster's resources, once it has what is wanted or `seconds` have passed.

    The autoscaler is asked only while this waits, and at every look: the request is one for the whole cluster, and what
    Ray Data leaves running there overwrites it every twenty seconds.

    Args:
        wanted: pieces, each of which fits on a node, by resource.
        every: seconds between two looks.
    """
    import ray
    from ray.autoscaler.sdk import request_resources

    needs = Counter()
    for piece in wanted:
        needs.update(piece)
    began, asked, told = time.monotonic(), False, ""
    try:
        while True:
            resources = ray.cluster_resources()
            missing = {name: need - resources.get(name, 0) for name, need in needs.items()}
            missing = {name: number for name, number in missing.items() if number > 0}
            if not missing:
                return resources
            asked = True
            request_resources(bundles=wanted)
            says = ", ".join(f"{number:g} {name}" for name, number in missing.items())
            if time.monotonic() - began >= seconds:
                print(f"warning: {says} have not come within {seconds / 60:g} minutes; going on without", flush=True)
                return resources
            if says != told:
                print(f"waiting at most {seconds / 60:g} minutes for {says}", flush=True)
                told = says
            time.sleep(every)
    finally:
        if asked:
            request_resources(bundles=[])
