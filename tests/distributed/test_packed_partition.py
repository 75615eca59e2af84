"""Our pass through a partitioned T5 gives what it gives through the whole one, keeps no weight, and reads what is inserted."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ranks
import tiny_run
import tiny_t5
import torch
from inserted import begun_on
from plain_t5 import shake
from torch import Tensor

from bpt_dist.backbones.base import Texts, local_shard
from bpt_dist.backbones.loading import load
from bpt_dist.backbones.prompts import prepend
from bpt_dist.backbones.t5.model import T5Backbone
from bpt_dist.config import DistributionConfig, RunConfig
from bpt_dist.data.batches import Batch
from bpt_dist.distributed.mesh import World
from bpt_dist.training.sharding import placement
from bpt_dist.training.sharding.memory import gathered, measure

SHARDS = ("deepspeed", "fsdp2")
FAMILIES: dict[str, dict[str, Any]] = {
    "1.0": {},
    "1.1": {"gated": True, "tied": False},
    "mt5": {"mt5": True, "tied": False},
}
STEPS = 3  # ZeRO learns the order of the layers first and keeps things only then
WIDTH = 64  # heads are 16 wide
CANDIDATES = torch.tensor([[10, 12, 1], [10, 1, -100], [11, 1, -100]])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("t5")
    return {name: str(tiny_t5.make(root / name, width=WIDTH, **kind)) for name, kind in FAMILIES.items()}


def texts(rank: int, step: int, longest_target: int = 5) -> Batch:
    """Texts of unequal lengths, another number of them on every rank: ranks have other groups, and as many passes."""
    draw = torch.Generator().manual_seed(10 * step + rank)
    sources = torch.randint(2, 9 + 4 * rank + step, (3 + rank,), generator=draw).tolist()
    targets = torch.randint(1, longest_target + 1, (3 + rank,), generator=draw).tolist()
    targets[0] = longest_target
    ids, target_ids = torch.zeros(len(sources), max(sources), dtype=torch.long), torch.full((len(sources), longest_target), -100)
    mask = torch.zeros_like(ids)
    for row, (num_source, num_target) in enumerate(zip(sources, targets, strict=True)):
        ids[row, :num_source] = torch.randint(3, 128, (num_source,), generator=draw)
        mask[row, :num_source] = 1
        target_ids[row, :num_target] = torch.randint(3, 128, (num_target,), generator=draw)
    names = tuple(f"t/{row}" for row in range(len(sources)))
    return Batch(0, ids, mask, target_ids, torch.zeros(len(sources), dtype=torch.long), names, torch.ones(len(sources)))


def prompts(rank: int) -> Tensor:
    return torch.randn(2, 4, WIDTH, generator=torch.Generator().manual_seed(rank))


def answers(backbone: T5Backbone, rank: int, longest_target: int = 5) -> dict[str, list[Tensor]]:
    """Return log-likelihoods and prompt gradients of some steps, and rankings."""
    found: dict[str, list[Tensor]] = {"log_likelihood": [], "gradient": [], "ranked": []}
    for step in range(STEPS):
        theta, batch = prompts(rank).requires_grad_(), texts(rank, step, longest_target)
        forward = backbone.log_likelihood(batch, partial(prepend, theta), "token_mean")
        forward.log_likelihood.sum().backward()
        assert theta.grad is not None
        found["log_likelihood"].append(forward.log_likelihood.detach())
        found["gradient"].append(theta.grad)
    batch = texts(rank, 0)
    found["ranked"].append(backbone.rank(batch, CANDIDATES, partial(prepend, prompts(rank))))
    own = [prompts(rank)[:, : 2 + row % 3] for row in range(len(batch))]
    found["ranked"] += backbone.rank_each(
        Texts(batch.source_ids, batch.source_mask), own, [CANDIDATES[: 2 + row % 2] for row in range(len(batch))]
    )
    return found


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def errors(found: dict[str, list[Tensor]], expected: dict[str, list[Tensor]]) -> dict[str, float]:
    return {name: max(error(*pair) for pair in zip(found[name], expected[name], strict=True)) for name in expected}


def kept_for_backward(parts: T5Backbone, rank: int) -> tuple[list[str], int]:
    """Return which gathered weights a forward pass keeps for the backward pass, and the bytes gathered in between."""
    kept: list[str] = []

    def note(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        for name, weight in parts.model.named_parameters():
            plain = weight.to_local() if hasattr(weight, "to_local") else weight
            is_whole = plain.shape == getattr(weight, "ds_shape", None) or not hasattr(weight, "ds_tensor")
            if is_whole and weight.dim() > 1 and place == plain.untyped_storage().data_ptr():
                kept.append(name)
        return tensor

    # Between forward and backward ZeRO has begun to gather what it expects next.
    theta = prompts(rank).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        passed = parts.log_likelihood(texts(rank, 0), partial(prepend, theta), "token_mean")
    waiting = gathered(parts)
    passed.log_likelihood.sum().backward()
    return kept, waiting


def all_written(backbone: T5Backbone, rank: int) -> list[list[str]]:
    """What a rank generates for each hypothesis, and for all together."""
    batch, inputs, limit = texts(rank, 0), partial(prepend, prompts(1)), 3 + 4 * rank
    return backbone.generate(batch, inputs, limit) + backbone.generate(batch, inputs, limit, average=True)


def packed(folder: str, **options: Any) -> T5Backbone:
    found: Any = load(folder, **options)
    found.use_packed_pass("sdpa")
    return found


def partitioned(folder: str, world: World, distribution: DistributionConfig) -> T5Backbone:
    found: Any = load(folder)
    placement.place(found, distribution, world)
    found.use_packed_pass("sdpa")
    assert found.packed_pass_for(3) is found.packed
    return found


def cases(world: World, folders: list[str], shard: Any, recomputed: bool, longest_target: int) -> list[dict[str, Any]]:
    found = []
    for folder in folders:
        whole = packed(folder)
        # Between parts and whole longer targets than a head is wide are compared with the stock pass.
        expected = answers(whole, world.rank, longest_target)
        parts = partitioned(folder, world, DistributionConfig(shard=shard, activation_checkpointing=recomputed))
        differences = errors(answers(parts, world.rank, longest_target), expected)
        # Ranks write other numbers of tokens: the first that are done keep step with the others.
        written = [all_written(each, world.rank) for each in (parts, whole)]
        kept, waiting = kept_for_backward(parts, world.rank)
        left = gathered(parts)
        parts.verify_unchanged()
        placement.release(parts)
        # The head, and with FSDP2 the last block, with ZeRO what it expects next: two blocks.
        blocks = max(sum(weight.nbytes for weight in block.parameters()) for block in whole.blocks)
        most = (2 if shard == "deepspeed" else 1) * blocks + whole.model.lm_head.weight.nbytes
        found.append(
            {
                "expected_next": most,
                "errors": differences,
                "written": written[0] == written[1],
                "kept": kept,
                "gathered": [waiting, left],
            }
        )
    return found


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("shard", SHARDS)
def test_parts_give_the_answers_of_the_whole(shard: str, recomputed: bool, folders: dict[str, str]) -> None:
    for rank in ranks.run(cases, 2, [*folders.values()], shard, recomputed, 5):
        assert len(rank) == len(FAMILIES)
        for each in rank:
            assert max(each["errors"].values()) <= 2e-6, each
            assert each["written"], each
            assert each["kept"] == [], each
            assert each["gathered"][0] <= each["expected_next"], each
            assert each["gathered"][1] == 0, each


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("shard", SHARDS)
def test_four_ranks_and_targets_longer_than_a_head_is_wide(shard: str, recomputed: bool, folders: dict[str, str]) -> None:
    for rank in ranks.run(cases, 4, [*folders.values()], shard, recomputed, WIDTH // 4 + 3):
        assert len(rank) == len(FAMILIES)
        for each in rank:
            assert max(each["errors"].values()) <= 2e-6, each
            assert each["kept"] == [], each
            assert each["gathered"][1] == 0, each


def shares(world: World, folder: str, shard: Any, recomputed: bool) -> Any:
    backbone: Any = load(folder)
    placed = placement.place

    def place_and_pack(*arguments: Any, **options: Any) -> None:
        placed(*arguments, **options)
        backbone.use_packed_pass("sdpa")

    placement.place = place_and_pack
    return measure(backbone, DistributionConfig(shard=shard, activation_checkpointing=recomputed), world)


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("shard", SHARDS)
def test_a_rank_holds_its_share_after_our_passes(shard: str, recomputed: bool, tmp_path: Path) -> None:
    folder = str(tiny_t5.make(tmp_path, width=128, tied=False, gated=True))
    for share in ranks.run(shares, 2, folder, shard, recomputed):
        assert share.kept, share


def dtypes(world: World, folder: str, shard: Any) -> tuple[float, float, torch.dtype]:
    truth, whole = (packed(folder, dtype=dtype) for dtype in ("fp32", "bf16"))
    parts: Any = load(folder, dtype="bf16")
    placement.place(parts, DistributionConfig(shard=shard), world)
    parts.use_packed_pass("eager")
    flat = [torch.cat(answers(each, world.rank)["gradient"]).double() for each in (truth, whole, parts)]
    distances = [float((each - flat[0]).norm() / flat[0].norm()) for each in flat[1:]]
    return distances[0], distances[1], local_shard(parts.model.shared.weight).dtype


@pytest.mark.parametrize("shard", SHARDS)
def test_bf16_parts_are_no_further_from_the_truth_than_the_whole(shard: str, folders: dict[str, str]) -> None:
    for whole, parts, dtype in ranks.run(dtypes, 2, folders["1.0"], shard):
        assert dtype == torch.bfloat16
        assert 1e-3 < whole < 0.1
        assert parts <= 1.2 * whole


# --- what methods insert --------------------------------------------------------------------------------------------------------

INSERTED: list[tuple[str, dict[str, Any]]] = [
    ("lora", {"targets": ("q", "k", "v", "wo")}),
    ("adapters", {}),
    ("bitfit", {}),
    ("hyperformer", {}),
    ("hyperdecoder", {"adapter_input": "raw"}),
]


def begun(backbone: T5Backbone, name: str, options: dict[str, Any]) -> Any:
    """Return a method that adapts the backbone to two targets together, moved away from its start."""
    method = begun_on(backbone, name, ("mood", "count"), **options)
    shake(method, std=0.1)
    return method


def inserted_answers(method: Any, rank: int) -> dict[str, list[Tensor]]:
    found: dict[str, list[Tensor]] = {"log_likelihood": [], "gradient": [], "ranked": [], "written": []}
    for step in range(STEPS):
        batch = texts(rank, step)
        batch = replace(batch, task_index=torch.arange(len(batch)) % 2)
        method.zero_grad(set_to_none=True)
        passed = method(batch)
        method.loss(passed, batch).backward()
        found["log_likelihood"].append(passed.log_likelihood.detach())
        found["gradient"].append(torch.cat([tensor.grad.flatten() for tensor in method.parameters()]))
        found["ranked"].append(method.rank(batch, CANDIDATES, "map"))
        written = method.backbone.tokenizer(method.generate(batch, 2 + 3 * rank, "map"), padding="max_length", max_length=12)
        found["written"].append(torch.tensor(written.input_ids) + 1.0)
    return found


def inserted_cases(world: World, folder: str, shard: Any) -> list[dict[str, Any]]:
    found = []
    for name, options in INSERTED:
        expected = inserted_answers(begun(packed(folder), name, options), world.rank)
        for recomputed in (False, True):
            parts = partitioned(folder, world, DistributionConfig(shard=shard, activation_checkpointing=recomputed))
            method = begun(parts, name, options)
            differences, left = errors(inserted_answers(method, world.rank), expected), gathered(parts)
            method.end()
            parts.verify_unchanged()
            placement.release(parts)
            found.append({"case": (name, recomputed), "errors": differences, "gathered": left})
    return found


@pytest.mark.parametrize("shard", SHARDS)
def test_what_is_inserted_into_parts_acts_as_in_the_whole(shard: str, folders: dict[str, str]) -> None:
    for rank in ranks.run(inserted_cases, 2, folders["1.1"], shard):
        for each in rank:
            assert max(each["errors"].values()) <= 5e-6, each
            assert each["gathered"] == 0, each


# --- which pass a run takes -----------------------------------------------------------------------------------------------------


def chosen(world: World, configs: list[RunConfig]) -> list[bool]:
    found = []
    for config in configs:
        backbone: Any = placement.load_backbone(config, world)
        found.append(backbone.packed is not None)
        placement.release(backbone)
    return found


def test_runs_pack_texts_however_the_t5_is_held_unless_they_train_it_in_parts_or_are_told_not_to(tmp_path: Path) -> None:
    data, configs, expected = tiny_run.world(tmp_path / "world"), [], []
    cases: list[tuple[str, str, dict[str, Any], bool]] = [
        ("lora", "deepspeed", {"activation_checkpointing": True}, True),
        ("prompt_tuning", "fsdp2", {"activation_checkpointing": True}, True),
        ("prompt_tuning", "none", {"activation_checkpointing": True}, True),
        ("fine_tuning", "fsdp2", {}, False),
        ("fine_tuning", "none", {}, True),
    ]
    for number, (name, shard, options, packs) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        plain = tiny_run.settings(data, {"name": name}, distribution={"shard": shard, **options})
        plain["target"]["lr"] = 0.01
        configs.append(tiny_run.load(folder, plain))
        expected.append(packs)
    for found in ranks.run(chosen, 2, configs):
        assert found == expected
