"""Weights that are made whole by messages in place are the weights, to the bit, and lie where one product reads them."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ranks
import tiny_t5
import torch
import torch.distributed as dist
from torch import Tensor, nn

from bpt_dist.backbones.base import Backbone
from bpt_dist.backbones.loading import load
from bpt_dist.backbones.prompts import prepend
from bpt_dist.backbones.t5.frozen import side_by_side
from bpt_dist.config import DistributionConfig
from bpt_dist.distributed.mesh import World
from bpt_dist.training.sharding import placement
from bpt_dist.training.sharding.gather import Exchange, exchange

SHARDS = ("deepspeed", "fsdp2")
STEPS = 4  # ZeRO learns the order of the layers first, and gathers ahead only then


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A T5 of version 1.1, whose feed-forward layers have two inner halves, with a head of its own."""
    return str(tiny_t5.make(tmp_path_factory.mktemp("t5") / "t5", width=64, gated=True, tied=False))


def gradient(backbone: Backbone, seed: int) -> Tensor:
    """Of the prompts of two particles."""
    draw = torch.Generator().manual_seed(seed)
    source, target = torch.randint(3, 128, (2, 6), generator=draw), torch.randint(3, 128, (2, 3), generator=draw)
    texts = SimpleNamespace(source_ids=source, source_mask=torch.ones_like(source), target_ids=target)
    prompts = torch.randn(2, 4, backbone.width, generator=draw).requires_grad_()
    found = backbone.log_likelihood(texts, lambda embeds: prepend(prompts, embeds), "token_mean")
    (-found.log_likelihood.sum()).backward()
    assert prompts.grad is not None
    return prompts.grad


def seen_in_blocks(world: World, folder: str, shard: Any) -> dict[str, Any]:
    """What the weights of the blocks are while the blocks compute, and whether those of one product lie side by side."""
    whole, backbone = load(folder), load(folder)
    expected = {name: weight.detach().clone() for name, weight in whole.core.named_parameters()}
    placement.place(backbone, DistributionConfig(shard=shard), world)
    names = {module: name for name, module in backbone.core.named_modules()}
    wrong: list[str] = []
    together: list[bool] = []

    def look(block: nn.Module, *_: Any) -> None:
        for name, weight in block.named_parameters():
            if not torch.equal(weight.detach(), expected[f"{names[block]}.{name}"]):
                wrong.append(f"{names[block]}.{name}")
        attend, feed = block.layer[0].SelfAttention, block.layer[-1].DenseReluDense  # type: ignore[index, union-attr]
        # Ahead of time ZeRO asks for as much as the smallest block has, so the two halves of a decoder's layer come separately.
        for layers in ((attend.q, attend.k, attend.v), (feed.wi_0, feed.wi_1))[: 2 - block.is_decoder]:  # type: ignore[operator]
            weights = [layer.weight for layer in layers]
            joined = side_by_side(weights)
            together.append(joined is not None and torch.equal(joined, torch.cat(weights)))

    for block in backbone.blocks:
        block.register_forward_pre_hook(look)
    pairs = [(gradient(backbone, step), gradient(whole, step)) for step in range(STEPS)]
    apart = max(float((found - wanted).norm() / wanted.norm()) for found, wanted in pairs)
    return {"wrong": wrong, "together": together, "apart": apart}


@pytest.mark.parametrize("shard", SHARDS)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_block_computes_with_the_weights_of_the_whole(size: int, shard: str, folder: str) -> None:
    """On three ranks no weight has equal parts."""
    for found in ranks.run(seen_in_blocks, size, folder, shard):
        assert found["wrong"] == []
        assert len(found["together"]) == STEPS * (2 * 2 + 2)  # two encoder and two decoder blocks
        assert all(found["together"]) == (shard == "deepspeed")  # FSDP2 gives each weight memory of its own
        assert found["apart"] <= 2e-6


def gradients_by(world: World, folder: str, settings: dict[str, Any] | None, file: str) -> tuple[list[Tensor], bool]:
    """The gradients of some steps, and whether the gather was ours."""
    if settings is not None:
        Path(file).write_text(json.dumps({"zero_optimization": {"stage": 3, **settings}}))
    backbone = load(folder)
    distribution = DistributionConfig(shard="deepspeed", zero_config=None if settings is None else Path(file))
    placement.place(backbone, distribution, world)
    gather: Any = next(backbone.core.parameters()).all_gather_coalesced  # type: ignore[attr-defined]
    return [gradient(backbone, world.rank + step) for step in range(STEPS)], isinstance(gather, partial)


@pytest.mark.parametrize(
    ("settings", "is_ours"),
    [
        ({}, True),
        ({"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 3000}, True),
        ({"stage3_allgather_sequential": False}, False),
        ({"allgather_sequential": True}, False),
        ({"stage3_use_all_reduce_for_fetch_params": True}, False),
    ],
    ids=str,
)
def test_a_file_that_says_how_to_gather_is_followed_and_changes_no_bit(
    settings: dict[str, Any], is_ours: bool, folder: str, tmp_path: Path
) -> None:
    """DeepSpeed's own gathers are what ours is compared with."""
    expected = ranks.run(gradients_by, 2, folder, None, "")
    for (default, direct), (chosen, ours) in zip(
        expected, ranks.run(gradients_by, 2, folder, settings, str(tmp_path / "zero.json")), strict=True
    ):
        assert direct
        assert ours == is_ours
        assert all(torch.equal(*pair) for pair in zip(default, chosen, strict=True))


def exchanged(world: World, lengths: list[int], dtype: torch.dtype) -> list[bool]:
    """Three exchanges under way at once, waited for in another order; some ranks hold nothing."""
    draw = [torch.Generator().manual_seed(number) for number in range(3)]
    wholes = [[torch.randn(length, generator=each).to(dtype) for length in lengths] for each in draw]
    found = [[torch.full_like(part, torch.nan) for part in parts] for parts in wholes]
    under_way = []
    for expected, parts in zip(wholes, found, strict=True):
        parts[world.rank].copy_(expected[world.rank])
        under_way.append(Exchange(exchange(parts, expected[world.rank], dist.group.WORLD)))
    for each in under_way[::-1]:
        assert each.wait()
        assert each.wait()  # again, at once
    return [all(map(torch.equal, *pair)) for pair in zip(wholes, found, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_part_arrives_in_its_place(dtype: torch.dtype) -> None:
    for rank in ranks.run(exchanged, 4, [5, 70_000, 0, 1], dtype):
        assert rank == [True, True, True]
