"""How long a decision of the gate holds, and what a release is known by. Whole days: `tests/jobs/test_release.py`."""

import json
from types import SimpleNamespace

import pytest

from ctrdist.storage import Manifest
from raycluster.gate import content, stands
from raycluster.versions import Version


def test_a_release_is_known_by_what_its_scores_depend_on():
    def of(**files: str) -> str:
        about = {name.replace("_", "."): {"bytes": 1, "sha256": digest} for name, digest in files.items()}
        return content(Manifest("releases/a", "folder", "", about, {}))

    one = of(items_npy="1", request_pt2="2", request_compiled_pt2="3", compiled_json="4")
    assert one == of(items_npy="1", request_pt2="2", request_compiled_pt2="5", compiled_json="6")
    assert one == of(items_npy="1", request_pt2="2") != of(items_npy="1", request_pt2="3")


PROMOTED = {"promoted": True, "reasons": [], "version": "6", "champion_version": "5"}


@pytest.mark.parametrize(
    ("decision", "tags", "champion", "holds"),
    [
        (None, {}, "5", False),
        ({"promoted": False, "reasons": ["worse"], "champion_version": "5"}, {}, "5", True),
        ({"promoted": False, "reasons": ["worse"], "champion_version": "5"}, {}, "7", True),
        ({"promoted": False, "reasons": ["not asked"], "skipped": True}, {}, "5", False),
        (PROMOTED, {}, "5", True),  # killed before it was promoted
        (PROMOTED, {}, "6", True),  # while it was
        (PROMOTED, {}, "7", False),  # another one is champion since: judge again, against that one
        (PROMOTED, {"champion_since": "2024"}, "7", True),  # it was champion, and is not any more
        (PROMOTED | {"champion_version": None}, {}, None, True),
        (PROMOTED | {"champion_version": None}, {}, "7", False),
    ],
)
def test_a_decision_holds_for_the_champion_that_it_was_made_against(decision, tags, champion, holds):
    versions = SimpleNamespace(aliases=lambda: {"champion": champion} if champion else {})
    assert stands(versions, Version("6", tags | ({"gate": json.dumps(decision)} if decision else {}))) == holds
