"""A decoder-only model in parts gives what the whole one gives, through our pass as well, and holds its share."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import ranks
import tiny_decoder
import torch
from torch import Tensor

from bpt_dist.backbones.base import Backbone, local_shard
from bpt_dist.backbones.loading import load
from bpt_dist.backbones.prompts import prepend
from bpt_dist.config import DistributionConfig
from bpt_dist.distributed.mesh import World
from bpt_dist.training.sharding import placement

CANDIDATES = torch.tensor([[9, 12, 1], [9, 1, -100], [30, 1, -100]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_decoder.make(tmp_path_factory.mktemp("decoder"), "gemma3_text"))


def texts(rank: int, step: int) -> SimpleNamespace:
    """Other texts of other lengths on every rank and step."""
    draw = torch.Generator().manual_seed(10 * step + rank)
    source = torch.randint(4, 128, (2, 5 + 2 * rank + step), generator=draw)
    target = torch.randint(4, 128, (2, 3 + rank), generator=draw)
    return SimpleNamespace(source_ids=source, source_mask=torch.ones_like(source), target_ids=target)


def answers(backbone: Backbone, rank: int) -> list[Tensor]:
    """Return log-likelihoods and prompt gradients of three steps, and a ranking."""
    found: list[Tensor] = []
    prompts = torch.randn(2, 4, backbone.width, generator=torch.Generator().manual_seed(rank))
    for step in range(3):
        theta = prompts.clone().requires_grad_()
        forward = backbone.log_likelihood(texts(rank, step), lambda embeds, theta=theta: prepend(theta, embeds), "token_mean")
        forward.log_likelihood.sum().backward()
        assert theta.grad is not None
        found += [forward.log_likelihood.detach(), theta.grad]
    return [*found, backbone.rank(texts(rank, 0), CANDIDATES, lambda embeds: prepend(prompts, embeds))]


def compare(world: World, folder: str, shard: str, forward: str) -> tuple[list[float], float, bool]:
    """Return distances from the whole model, this rank's share of the weights, and whether generated texts are equal."""
    whole, parts = load(folder), load(folder)
    placement.place(parts, DistributionConfig(shard=shard), world)
    if forward == "auto":
        parts.use_packed_pass("eager")
    pairs = zip(answers(parts, world.rank), answers(whole, world.rank), strict=True)
    distances = [float((ours - theirs).abs().max() / theirs.abs().max()) for ours, theirs in pairs]
    weights = list(parts.model.parameters())
    held = sum(local_shard(weight).numel() for weight in weights)
    prompts = torch.randn(2, 4, parts.width, generator=torch.Generator().manual_seed(1))
    written = [each.generate(texts(world.rank, 0), lambda embeds: prepend(prompts, embeds), 5) for each in (parts, whole)]
    parts.verify_unchanged()
    placement.release(parts)
    return distances, held / sum(weight.numel() for weight in whole.model.parameters()), written[0] == written[1]


@pytest.mark.parametrize(
    ("shard", "forward", "size"),
    [("deepspeed", "auto", 2), ("deepspeed", "stock", 2), ("fsdp2", "auto", 2), ("fsdp2", "stock", 2), ("deepspeed", "auto", 4)],
)
def test_ranks_hold_a_part_each_and_compute_as_one(folder: str, shard: str, forward: str, size: int) -> None:
    for distances, share, is_equal in ranks.run(compare, size, folder, shard, forward):
        assert max(distances) < 1e-5
        # ZeRO keeps what is smaller than its threshold, such as norms, on every rank.
        assert share < 1 / size + 0.1
        assert is_equal
