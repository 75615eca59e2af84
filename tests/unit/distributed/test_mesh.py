"""Which ranks share a host."""

from __future__ import annotations

from bpt_dist.distributed.mesh import host_groups


def test_hosts_are_those_of_the_names_in_the_order_of_their_first_ranks() -> None:
    assert host_groups(["b", "a", "b", "c", "a"]) == [[0, 2], [1, 4], [3]]
