"""Which weights are gathered in one piece of memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from bpt_dist.backbones.t5.frozen import side_by_side
from bpt_dist.training.sharding.zero_gather import neighbours

BLOCK = object()


def weight(number: int, *shape: int, persists: bool = False, dtype: torch.dtype = torch.float32, leaf: object = BLOCK) -> Any:
    found: Any = SimpleNamespace(ds_id=number, ds_shape=torch.Size(shape), ds_persist=persists)
    found.ds_tensor, found.ds_z3_leaf_module = torch.zeros(2, dtype=dtype), leaf
    return found


def ids(weights: list[Any]) -> list[list[int]]:
    return [[each.ds_id for each in run] for run in neighbours(weights)]


def test_weights_of_the_same_inputs_lie_in_one_piece() -> None:
    query, key, value, out = (weight(number, 6, 4) for number in range(4))
    gate, linear, outer = weight(5, 9, 4), weight(6, 9, 4), weight(7, 4, 9)
    assert ids([query, key, value, out, gate, linear, outer]) == [[0, 1, 2, 3], [5, 6], [7]]


def test_what_stays_whole_shares_no_memory_with_what_is_released() -> None:
    assert ids([weight(0, 4, persists=True), weight(1, 4, persists=True)]) == [[0], [1]]
    assert ids([weight(0, 6, 4), weight(1, 2, 4, persists=True), weight(2, 6, 4)]) == [[0], [1], [2]]
    assert ids([weight(0, 4), weight(1, 4)]) == [[0], [1]]  # vectors are read by no product


def test_weights_that_are_released_at_other_moments_share_no_memory() -> None:
    assert ids([weight(0, 6, 4), weight(1, 6, 4, leaf=object())]) == [[0], [1]]
    assert ids([weight(0, 6, 4, leaf=None), weight(1, 6, 4, leaf=None)]) == [[0], [1]]  # of a backbone that is trained
    alone = [weight(number, 6, 4) for number in range(2)]
    del alone[0].ds_z3_leaf_module
    assert ids(alone) == [[0], [1]]


def test_weights_of_other_types_or_from_elsewhere_lie_apart() -> None:
    assert ids([weight(0, 6, 4), weight(1, 6, 4, dtype=torch.bfloat16)]) == [[0], [1]]
    assert ids([weight(0, 6, 4), weight(2, 6, 4)]) == [[0], [2]]
    assert ids([]) == []


def test_weights_are_seen_as_one_only_where_they_are_one_behind_the_other() -> None:
    together = torch.arange(40.0).view(10, 4)
    parts = list(together.split([3, 5, 2]))
    found = side_by_side(parts)
    assert found is not None
    assert torch.equal(found, together)
    assert found.data_ptr() == together.data_ptr()
    assert side_by_side(parts[::-1]) is None
    assert side_by_side([parts[0], parts[2]]) is None
    assert side_by_side([parts[0], parts[1].clone()]) is None
    assert side_by_side([together[:, :2], together[:, 2:]]) is None  # rows with gaps
    later = side_by_side(parts[1:])
    assert later is not None
    assert torch.equal(later, together[3:])
