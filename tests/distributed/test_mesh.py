"""The mesh: who owns what, and collectives against their definition on one process."""

from __future__ import annotations

import pytest
import ranks
import torch

from bpt_dist.distributed.mesh import World
from bpt_dist.errors import ConfigError
from bpt_dist.training.microbatches import deal

SHAPES = [(m, w) for m in (1, 2, 3, 4, 5, 6, 8) for w in (1, 2, 3, 4)]


def particles(num_particles: int) -> torch.Tensor:
    return torch.arange(num_particles * 6, dtype=torch.float32).view(num_particles, 2, 3)


def gathered(world: World) -> list[torch.Tensor]:
    """Gather every (M, W) of the table; each rank contributes its own block only."""
    results = []
    for num_particles in (1, 2, 3, 4, 5, 6, 8):
        mesh = world.mesh(num_particles)
        results.append(mesh.gather_particles(particles(num_particles)[mesh.rows(num_particles)]))
    return results


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_gather_returns_all_particles_in_order_on_every_rank(size: int) -> None:
    for found in ranks.run(gathered, size):
        for num_particles, tensor in zip((1, 2, 3, 4, 5, 6, 8), found, strict=True):
            assert torch.equal(tensor, particles(num_particles))


def summed(world: World) -> tuple[torch.Tensor, torch.Tensor, list[list[float]], bool, list[int], int]:
    mesh = world.mesh(2)  # on 4 ranks: 2 x 2
    a, b = torch.full((3,), float(world.rank)), torch.full((2, 2), 10.0 * world.rank)
    mesh.sum_over_data_([a, b])
    any_flag = world.any(world.rank == world.size - 1)
    return a, b, world.gather_numbers([world.rank, 0.5]), any_flag, world.gather_objects(world.rank), world.broadcast(world.rank)


def test_sums_run_over_the_data_axis_only() -> None:
    for rank, (a, b, total, any_flag, everyone, first) in enumerate(ranks.run(summed, 4)):
        expected = [0 + 1, 2 + 3][rank // 2]  # ranks a*C + c: the data axis joins 0,1 and 2,3
        assert torch.equal(a, torch.full((3,), float(expected)))
        assert torch.equal(b, torch.full((2, 2), 10.0 * expected))
        assert total == [[rank, 0.5] for rank in range(4)]
        assert any_flag
        assert everyone == [0, 1, 2, 3]
        assert first == 0


def test_impossible_shapes_are_refused_with_the_possible_ones() -> None:
    with pytest.raises(ConfigError, match=r"possible \(particle x data\): 1 x 1"):
        World().mesh(5, (2, 1))


def test_a_smaller_job_than_expected_is_refused() -> None:
    with pytest.raises(ConfigError, match="expect_world_size is 8, but 1 process"):
        World.start(1.0, expected_size=8)


@pytest.mark.parametrize("num_shares", [1, 2, 3, 5])
def test_dealing_gives_every_text_once_and_balances_cost(num_shares: int) -> None:
    costs = [28, 40, 48, 62, 190, 256, 61, 12, 12, 12]
    shares = deal(costs, num_shares)
    assert sorted(index for share in shares for index in share) == list(range(len(costs)))
    loads = [sum(costs[index] for index in share) for share in shares]
    # Graham (1969): largest first is within 4/3 of the best possible, which is at least the mean and the largest text.
    assert max(loads) <= 4 / 3 * max(sum(costs) / num_shares, max(costs))
