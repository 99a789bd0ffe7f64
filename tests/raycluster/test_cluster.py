"""What jobs ask of the Ray that they are connected to, and of the paths that they are given."""

import pytest

from ctrdist.errors import UserError
from raycluster.cluster import check_path, has_dashboard


def test_keys_in_an_address_are_refused():
    with pytest.raises(UserError, match=r"--state s3://\*\*\*@bucket/state: keys in an address"):
        check_path("--state", "s3://KEY:SECRET@bucket/state")
    check_path("--state", "hdfs://namenode:9000/user@x/state")


def test_a_local_ray_has_no_dashboard(ray_cluster):
    assert not has_dashboard()
