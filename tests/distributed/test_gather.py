"""Weights that are made whole in place are the weights, to the bit, and lie where one product reads them."""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import gc
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ranks
import tiny_t5
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from bpt_dist.backbones.base import Backbone, local_shard
from bpt_dist.backbones.loading import load
from bpt_dist.backbones.prompts import prepend
from bpt_dist.backbones.t5.frozen import side_by_side
from bpt_dist.config import DistributionConfig
from bpt_dist.distributed.mesh import World
from bpt_dist.distributed.traffic import WEIGHTS, Traffic
from bpt_dist.training.sharding import placement
from bpt_dist.training.sharding.fsdp_gather import gather_modules_in_place
from bpt_dist.training.sharding.gather import Parts, Place

SHARDS = ("deepspeed", "fsdp2")
STEPS = 4  # ZeRO learns the order of the layers first, and gathers ahead only then
# Of ranks: all on one host, each on its own, and both.
HOSTS = [("a", "a"), ("a", "b"), ("a", "b", "a"), ("a", "b", "b", "a"), ("a", "a", "a", "a")]


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


def seen_in_blocks(world: World, folder: str, shard: Any, hosts: tuple[str, ...]) -> dict[str, Any]:
    """What the weights of the blocks are while the blocks compute, and whether those of one product lie side by side."""
    whole, backbone = load(folder), load(folder)
    expected = {name: weight.detach().clone() for name, weight in whole.core.named_parameters()}
    placement.place(backbone, DistributionConfig(shard=shard), dataclasses.replace(world, hosts=hosts))
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
    with Traffic() as traffic:
        pairs = [(gradient(backbone, step), gradient(whole, step)) for step in range(STEPS)]
    apart = max(float((found - wanted).norm() / wanted.norm()) for found, wanted in pairs)
    read = sum(traffic.reads) / traffic.bytes[WEIGHTS]
    return {"wrong": wrong, "together": together, "apart": apart, "read": read}


@pytest.mark.parametrize("shard", SHARDS)
@pytest.mark.parametrize("hosts", HOSTS, ids="".join)
def test_a_block_computes_with_the_weights_of_the_whole(hosts: tuple[str, ...], shard: str, folder: str) -> None:
    """On three ranks no weight has equal parts."""
    for rank, found in enumerate(ranks.run(seen_in_blocks, len(hosts), folder, shard, hosts)):
        others = [host == hosts[rank] for number, host in enumerate(hosts) if number != rank]
        assert found["read"] == pytest.approx(sum(others) / len(others), abs=0.1)  # last parts are shorter
        assert found["wrong"] == []
        assert len(found["together"]) == STEPS * (2 * 2 + 2)  # two encoder and two decoder blocks
        assert all(found["together"])
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


def gathered(world: World, lengths: list[int], dtype: torch.dtype, hosts: tuple[str, ...], trained: bool) -> list[bool]:
    """Three weights, of each of which two exchanges are under way at once, waited for in another order; some ranks hold nothing."""
    draw = [torch.Generator().manual_seed(number) for number in range(3)]
    wholes = [[torch.randn(length, generator=each).to(dtype) for length in lengths] for each in draw]
    padded = [torch.nn.functional.pad(parts[world.rank], (0, max(lengths) - lengths[world.rank])) for parts in wholes]
    given = Parts(padded, None, hosts, trained=trained)
    found, under_way = [], []
    for _ in range(2):
        empty = [[torch.full_like(part, torch.nan) for part in parts] for parts in wholes]
        under_way.append(given.gather(Place(number, given.held[number], parts) for number, parts in enumerate(empty)))
        found += empty
    for each in under_way[::-1]:
        assert each.wait()
        assert each.wait()  # again, at once
    return [all(map(torch.equal, *pair)) for pair in zip(wholes * 2, found, strict=True)]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("hosts", [("a", "a", "a", "a"), ("a", "b", "c", "d"), ("a", "b", "a", "b")], ids="".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_part_arrives_in_its_place(dtype: torch.dtype, hosts: tuple[str, ...], trained: bool) -> None:
    for rank in ranks.run(gathered, 4, [5, 70_000, 0, 1], dtype, hosts, trained):
        assert rank == [True] * 6


def updated(world: World) -> Tensor:
    """A weight of which every rank updates its part after it was first made whole."""
    held = [torch.full((3,), float(world.rank))]
    given = Parts(held, None, world.hosts, trained=True)
    whole = torch.zeros(3 * world.size)
    for _ in range(2):
        given.gather([Place.within(whole, 0, given.held[0], world.size)]).wait()
        held[0] += 10
    return whole


def test_parts_that_are_trained_arrive_as_they_are_now() -> None:
    for whole in ranks.run(updated, 2):
        assert whole.tolist() == [10, 10, 10, 11, 11, 11]


def refuse(number: int) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


def with_trouble(world: World, trouble: str, rank: int, folder: Path) -> tuple[bool, float]:
    """Whether a weight is right, and the share of it that was read, where one rank cannot do what the other can."""
    really_open = os.open
    if world.rank == rank:
        if trouble == "no such files":
            del os.memfd_create
        elif trouble == "no room":
            os.posix_fallocate = refuse(errno.ENOMEM)
        elif trouble == "not permitted":
            os.open = refuse(errno.EACCES)  # type: ignore[assignment]
        elif trouble == "a pipe of another process":
            os.mkfifo(pipe := f"{folder}/pipe")
            os.open = lambda _path, flags: really_open(pipe, flags)  # type: ignore[assignment, misc]
        elif trouble == "of another process":
            os.open = lambda _path, flags: really_open("/dev/zero", flags)  # type: ignore[assignment, misc]
    expected = torch.arange(12.0 * world.size)
    given = Parts([expected.chunk(world.size)[world.rank].clone()], None, world.hosts, trained=False)
    whole = torch.zeros_like(expected)
    with Traffic() as traffic:
        given.gather([Place.within(whole, 0, given.held[0], world.size)]).wait()
    return torch.equal(whole, expected), sum(traffic.reads) / traffic.bytes[WEIGHTS]


@pytest.mark.parametrize(
    ("trouble", "reads"),
    [
        ("none", [1, 1]),
        ("no such files", [0, 1]),
        ("no room", [0, 1]),
        ("not permitted", [1, 0]),
        ("of another process", [1, 0]),
        ("a pipe of another process", [1, 0]),
    ],
)
def test_what_cannot_be_read_is_sent(trouble: str, reads: list[float], tmp_path: Path) -> None:
    assert ranks.run(with_trouble, 2, trouble, 1, tmp_path) == [(True, share) for share in reads]


def of_two_types(world: World) -> list[bool]:
    """A module of FSDP2 with weights of two types, through two passes."""
    torch.manual_seed(0)
    layers = [nn.Linear(6, 5, bias=False).bfloat16(), nn.Linear(4, 3), nn.Linear(6, 7, bias=False).bfloat16()]
    module = nn.Sequential(*layers).requires_grad_(requires_grad=False)
    expected = [weight.clone() for weight in module.parameters()]
    seen: list[list[Tensor]] = []
    fully_shard(module, mesh=init_device_mesh("cpu", (world.size,)))
    gather_modules_in_place([module], None, world.hosts, trained=False)
    module.forward = lambda _: seen.append([weight.clone() for weight in module.parameters()])  # type: ignore[method-assign, assignment]
    for _ in range(2):
        module(None)
        module.reshard()  # type: ignore[operator]
    return [
        weight.dtype == wanted.dtype and torch.equal(weight, wanted)
        for run in seen
        for weight, wanted in zip(run, expected, strict=True)
    ]


def test_weights_of_several_types_arrive() -> None:
    for rank in ranks.run(of_two_types, 2):
        assert rank == [True] * 8


def placed_again(world: World, folder: str, shard: Any) -> list[int]:
    """The open files of this process after each of several backbones was placed, used and released."""
    found = []
    for seed in range(4):
        backbone = load(folder)
        placement.place(backbone, DistributionConfig(shard=shard), world)
        gradient(backbone, seed)
        placement.release(backbone)
        del backbone
        gc.collect()
        found.append(len(os.listdir("/proc/self/fd")))
        world.barrier()
    return found


@pytest.mark.parametrize("shard", SHARDS)
def test_a_released_backbone_leaves_no_file_open(shard: str, folder: str) -> None:
    for first, *later in ranks.run(placed_again, 2, folder, shard):
        assert set(later) == {first}


def held_once(world: World, folder: str, shard: Any) -> bool:
    """Whether what a rank holds is what the others read, after steps."""
    backbone = load(folder)
    placement.place(backbone, DistributionConfig(shard=shard), world)
    for seed in range(2):
        gradient(backbone, seed)
    maps = Path("/proc/self/maps").read_text().splitlines()
    (mapping,) = [line for line in maps if "memfd:bpt_dist" in line]
    begin, end = (int(number, 16) for number in mapping.split()[0].split("-"))
    table = backbone.word_embeddings.weight  # never made whole
    parts = [local_shard(weight) for weight in backbone.core.parameters() if weight is not table]
    return all(begin <= part.data_ptr() < end for part in parts if part.numel())


@pytest.mark.parametrize("shard", SHARDS)
def test_there_is_no_second_copy_of_what_the_others_read(shard: str, folder: str) -> None:
    assert all(ranks.run(held_once, 2, folder, shard))


def memory_of_process() -> int:
    """In bytes, without files that are only mapped."""
    status = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in status if line.startswith(("RssAnon", "RssShmem")))


def taken_by(world: World, folder: str, shard: Any) -> float:
    """The memory that this process takes for a backbone in parts, as a share of the whole backbone."""
    ctypes.CDLL(None).malloc_trim(0)  # free memory of the tests before
    before = memory_of_process()
    backbone = load(folder)
    whole = sum(weight.nbytes for weight in backbone.core.parameters())
    placement.place(backbone, DistributionConfig(shard=shard), world)
    return (memory_of_process() - before) / whole


@pytest.mark.parametrize("shard", SHARDS)
def test_the_process_keeps_one_share(shard: str, tmp_path: Path) -> None:
    """Also of what was loaded and copied on the way nothing is left."""
    folder = str(tiny_t5.make(tmp_path / "t5", width=768))
    assert max(ranks.run(taken_by, 2, folder, shard)) < 0.6
