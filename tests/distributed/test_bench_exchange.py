"""The measurement of the exchanges: its numbers are about the same phi, its bytes the wire's, and no process outlives it."""

from __future__ import annotations

import multiprocessing

import pytest

from bpt_dist.commands.bench.parallel.exchange import measure
from bpt_dist.errors import ConfigError
from bpt_dist.svgd import KernelOptions


def test_both_exchanges_are_timed_on_the_same_work() -> None:
    found = measure(2, 4, num_positions=5, width=8, rounds=2)
    assert found["relative_difference"] <= 4e-7
    for exchange in ("all_gather", "coordinates"):
        assert all(found[exchange][f"{kind}_seconds"] > 0 for kind in ("cpu", "wall", "score"))
    # Two particles of 5 x 8 float32 numbers come twice from the other rank; or their slice of 3 positions twice, 2 positions of
    # the own particles' direction, and a ring's share of 16 float64 distances.
    assert found["all_gather"]["received_bytes"] == 2 * 2 * 5 * 8 * 4
    assert found["coordinates"]["received_bytes"] == 2 * 2 * 3 * 8 * 4 + 2 * 2 * 8 * 4 + 2 * 16 * 8 // 2
    for ratio in (found["ratio_cpu"], found["ratio_wall"]):
        assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
    assert not multiprocessing.active_children()


def test_a_process_that_fails_ends_the_measurement() -> None:
    with pytest.raises(RuntimeError, match=r"2 processes did not finish timing their exchanges.*exit codes \[(1|-6|None)"):
        measure(2, 4, num_positions=5, width=8, rule=KernelOptions(bandwidth=-1.0))
    assert not multiprocessing.active_children()


def test_what_cannot_be_shared_is_refused_before_a_process_starts() -> None:
    with pytest.raises(ValueError, match=r"5 particles on 2 process\(es\)"):
        measure(2, 5)
    with pytest.raises(ConfigError, match="a slice of 3 prompt position"):
        measure(4, 4, num_positions=3)
