"""Our pass through a partitioned decoder-only model, recomputed or with insertions, gives the answers of the whole one."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import ranks
import tiny_decoder
import torch
from inserted import begun_on
from plain_t5 import shake
from torch import Tensor

from bpt_dist.backbones.base import Backbone
from bpt_dist.backbones.loading import load
from bpt_dist.backbones.prompts import prepend
from bpt_dist.config import DistributionConfig
from bpt_dist.data.batches import Batch
from bpt_dist.distributed.mesh import World
from bpt_dist.training.sharding import placement
from bpt_dist.training.sharding.memory import gathered

STEPS = 3  # ZeRO learns the order of the layers first and keeps things only then
CANDIDATES = torch.tensor([[9, 12, 1], [9, 1, -100], [30, 1, -100]])
# None: prompts alone. Of several targets each has an adapter of its own; nothing is before the first block in any but the first.
INSERTED: list[tuple[str, str | None, dict[str, Any]]] = [
    ("gemma3_text", None, {}),
    ("gemma3_text", "lora", {"targets": ("q", "v", "wo")}),
    ("gemma3_text", "bitfit", {}),
    ("gemma3_text", "adapters", {}),
    ("llama", "lora", {"targets": ("q", "v")}),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("decoders")
    return {family: str(tiny_decoder.make(root / family, family)) for family in ("gemma3_text", "llama")}


def texts(rank: int, step: int) -> Batch:
    """Other texts of other lengths, and another number of them, on every rank and step."""
    draw, number = torch.Generator().manual_seed(10 * step + rank), 3 + rank
    sources = torch.randint(2, 9 + 4 * rank + step, (number,), generator=draw)
    targets = torch.randint(1, 6, (number,), generator=draw)
    mask = (torch.arange(int(sources.max())) < sources[:, None]).long()
    ids = torch.randint(4, tiny_decoder.NUM_PIECES, mask.shape, generator=draw) * mask
    target_ids = torch.randint(4, tiny_decoder.NUM_PIECES, (number, int(targets.max())), generator=draw)
    target_ids[torch.arange(target_ids.shape[1]) >= targets[:, None]] = -100
    names = tuple(f"t/{row}" for row in range(number))
    return Batch(0, ids, mask, target_ids, torch.arange(number) % 2, names, torch.ones(number))


def prompted(backbone: Backbone, rank: int) -> dict[str, list[Tensor]]:
    """Return log-likelihoods and prompt gradients of some steps, and rankings."""
    found: dict[str, list[Tensor]] = {"log_likelihood": [], "gradient": [], "ranked": []}
    start = torch.randn(2, 4, backbone.width, generator=torch.Generator().manual_seed(rank))
    for step in range(STEPS):
        theta, batch = start.clone().requires_grad_(), texts(rank, step)
        passed = backbone.log_likelihood(batch, partial(prepend, theta), "token_mean")
        passed.log_likelihood.sum().backward()
        assert theta.grad is not None
        found["log_likelihood"].append(passed.log_likelihood.detach())
        found["gradient"].append(theta.grad)
        found["ranked"].append(backbone.rank(batch, CANDIDATES, partial(prepend, start)))
    return found


def begun(backbone: Backbone, name: str, options: dict[str, Any]) -> Any:
    """Return a method that adapts the backbone to two targets together, moved away from its start."""
    method = begun_on(backbone, name, ("mood", "count"), **options)
    shake(method, std=0.1)
    return method


def adapted(method: Any, rank: int) -> dict[str, list[Tensor]]:
    """Return the same of a method that inserts something."""
    found: dict[str, list[Tensor]] = {"log_likelihood": [], "gradient": [], "ranked": []}
    for step in range(STEPS):
        batch = texts(rank, step)
        method.zero_grad(set_to_none=True)
        passed = method(batch)
        method.loss(passed, batch).backward()
        found["log_likelihood"].append(passed.log_likelihood.detach())
        found["gradient"].append(torch.cat([tensor.grad.flatten() for tensor in method.parameters()]))
        found["ranked"].append(method.rank(batch, CANDIDATES, "map"))
    return found


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def cases(world: World, folders: dict[str, str], shard: Any) -> list[dict[str, Any]]:
    found = []
    for family, name, options in INSERTED:
        whole = load(folders[family])  # read by transformers' modules
        expected = prompted(whole, world.rank) if name is None else adapted(begun(whole, name, options), world.rank)
        for recomputed in (False, True):
            parts: Any = load(folders[family])
            placement.place(parts, DistributionConfig(shard=shard, activation_checkpointing=recomputed), world)
            parts.use_packed_pass("sdpa")
            if name is None:
                ours = prompted(parts, world.rank)
            else:
                method = begun(parts, name, options)
                ours = adapted(method, world.rank)
                method.end()
            assert parts.packed_pass() is parts.packed
            left = gathered(parts)
            parts.verify_unchanged()
            placement.release(parts)
            errors = {key: max(map(error, ours[key], expected[key])) for key in expected}
            found.append({"case": (family, name, recomputed), "errors": errors, "gathered": left})
    return found


@pytest.mark.parametrize("shard", ["deepspeed", "fsdp2"])
def test_parts_give_the_answers_of_the_whole(shard: str, folders: dict[str, str]) -> None:
    for rank in ranks.run(cases, 2, folders, shard):
        assert len(rank) == 2 * len(INSERTED)
        for each in rank:
            assert max(each["errors"].values()) <= 1e-5, each
            assert each["gathered"] == 0, each


def kept_for_backward(parts: Backbone, rank: int) -> tuple[list[str], int]:
    """Return which gathered matrices a forward pass keeps for the backward pass, and the bytes gathered in between."""
    kept: list[str] = []

    def note(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        for name, weight in parts.model.named_parameters():
            is_whole = weight.shape == getattr(weight, "ds_shape", None)
            if is_whole and weight.dim() > 1 and place == weight.untyped_storage().data_ptr():
                kept.append(name)
        return tensor

    theta = torch.randn(2, 4, parts.width, generator=torch.Generator().manual_seed(rank)).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        passed = parts.log_likelihood(texts(rank, 0), partial(prepend, theta), "token_mean")
    waiting = gathered(parts)
    passed.log_likelihood.sum().backward()
    return kept, waiting


def after_forward(world: World, folders: dict[str, str]) -> list[tuple[list[str], int]]:
    found = []
    for folder in folders.values():
        for recomputed in (False, True):
            parts: Any = load(folder)
            placement.place(parts, DistributionConfig(shard="deepspeed", activation_checkpointing=recomputed), world)
            parts.use_packed_pass("sdpa")
            found.append(kept_for_backward(parts, world.rank))
            placement.release(parts)
    return found


def test_between_the_passes_no_weight_is_whole(folders: dict[str, str]) -> None:
    """FSDP2 frees the storage of a weight itself, whatever refers to it; ZeRO only drops its own reference."""
    for rank in ranks.run(after_forward, 2, folders):
        assert rank == [([], 0)] * 2 * len(folders)


def after_backward(world: World, folder: str, shard: Any) -> list[tuple[str, bool, bool, int]]:
    """Return whether the first block's input asked for a gradient, and the bytes gathered right after a backward pass."""
    found = []
    for recomputed in (False, True):
        for form in ("packed", "stock"):
            parts: Any = load(folder)
            placement.place(parts, DistributionConfig(shard=shard, activation_checkpointing=recomputed), world)
            if form == "packed":
                parts.use_packed_pass("sdpa")
            method, asked = begun(parts, "lora", {}), []
            parts.blocks[0].register_forward_pre_hook(lambda _module, args, asked=asked: asked.append(args[0].requires_grad))
            for step in range(STEPS):
                method.loss(method(texts(world.rank, step)), texts(world.rank, step)).backward()
            found.append((form, recomputed, any(asked), gathered(parts)))
            placement.release(parts)
    return found


@pytest.mark.parametrize("shard", ["deepspeed", "fsdp2"])
def test_a_first_block_whose_input_needs_no_gradient_is_released_after_the_backward_pass(
    shard: str, folders: dict[str, str]
) -> None:
    """The hook that releases a block after its backward pass waits for gradients of its inputs, and there may be none."""
    for rank in ranks.run(after_backward, 2, folders["llama"], shard):
        assert len(rank) == 4
        for form, recomputed, asked, left in rank:
            # ZeRO would keep such a block, so word embeddings ask for a gradient there; FSDP2 releases it in the end.
            assert asked is (shard == "deepspeed"), (form, recomputed)
            assert left == 0, (form, recomputed, left)
