"""A T5 in parts gives the gradients of the whole one, holds its share of it, and leaves nothing gathered."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ranks
import tiny_t5
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from bpt_dist.backbones.base import Backbone, local_shard
from bpt_dist.backbones.loading import load
from bpt_dist.backbones.prompts import prepend
from bpt_dist.commands import main
from bpt_dist.config import DistributionConfig
from bpt_dist.distributed.mesh import World
from bpt_dist.training.sharding import placement
from bpt_dist.training.sharding.memory import measure

SHARDS = ("deepspeed", "fsdp2")
STEPS = 3  # ZeRO learns the order of the layers first and keeps things only then


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, str]:
    """A T5 whose head is its word embeddings, and one that has a head of its own."""
    root = tmp_path_factory.mktemp("t5")
    return {tied: str(tiny_t5.make(root / str(tied), tied=tied)) for tied in (True, False)}


def texts(rank: int, step: int) -> SimpleNamespace:
    """Other texts of other lengths on every rank and step; T5 gathers its weights for all of them alike."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    source = torch.randint(3, 128, (2, 5 + 2 * rank + step), generator=generator)
    target = torch.randint(3, 128, (2, 3 + rank), generator=generator)
    return SimpleNamespace(source_ids=source, source_mask=torch.ones_like(source), target_ids=target)


def prompt_gradient(backbone: Backbone, rank: int, step: int) -> Tensor:
    """Of two particles, by the float32 prompt."""
    prompts = torch.randn(2, 4, backbone.width, generator=torch.Generator().manual_seed(rank)).requires_grad_()
    found = backbone.log_likelihood(texts(rank, step), lambda embeds: prepend(prompts, embeds), "token_mean")
    (-found.log_likelihood.sum()).backward()
    assert prompts.grad is not None
    return prompts.grad


class Inserted:
    """Trainable tensors that sit in hooks inside the blocks; the encoder's inputs are plain word embeddings."""

    def __init__(self, backbone: Backbone, stack: str | None, low: int) -> None:
        self.tensors: list[Tensor] = []
        generator = torch.Generator().manual_seed(5)

        def make(place: Any) -> Callable[[Tensor, Tensor], Tensor]:
            down = (0.2 * torch.randn(32, low, generator=generator)).requires_grad_()
            up = (0.2 * torch.randn(low, 32, generator=generator)).requires_grad_()
            self.tensors += [down, up]
            return lambda _x, y: y + (y @ down).relu() @ up

        backbone.wrap_sublayer(make, ["feed_forward", "self_attention"], stack=stack)

    def gradient(self, backbone: Backbone, rank: int, step: int) -> Tensor:
        found = backbone.log_likelihood(texts(rank, step), lambda embeds: embeds[None], "token_mean")
        (-found.log_likelihood.sum()).backward()
        gradients = [tensor.grad for tensor in self.tensors]
        for tensor in self.tensors:
            tensor.grad = None
        return torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def gathered(model: nn.Module) -> list[str]:
    """Names of weights that lie whole on this rank although they are worth a message."""
    from torch.distributed.tensor import DTensor

    return [
        name
        for name, weight in model.named_parameters()
        if (weight.numel() and not weight.ds_persist if hasattr(weight, "ds_id") else not isinstance(weight, DTensor))
    ]


def reserved(model: nn.Module) -> int:
    """Bytes of memory in which FSDP2's weights arrive, also of those that no weight refers to now."""
    states = [module._get_fsdp_state() for module in model.modules() if isinstance(module, FSDPModule)]
    groups: list[Any] = [group for state in states for group in state._fsdp_param_groups]
    return sum(memory.untyped_storage().nbytes() for group in groups for memory in group.memory)


def predictions(parts: Backbone, whole: Backbone, rank: int) -> dict[str, Any]:
    """Ranking and word embeddings from parts, and what is gathered after them.

    And what waits gathered between a forward pass and its backward, but for the last block and the head, which come first there.
    """
    candidates, prompts = torch.tensor([[10, 1], [11, 1]]), torch.randn(1, 4, 32).requires_grad_()
    ranked = [each.rank(texts(rank, 0), candidates, lambda e: prepend(prompts, e)) for each in (parts, whole)]
    rows = [each.vocabulary_rows(torch.arange(3, 9)) for each in (parts, whole)]
    left = gathered(parts.model)
    passed = parts.log_likelihood(texts(rank, 0), lambda e: prepend(prompts, e), "token_mean")
    first = ("lm_head.", f"decoder.block.{parts.num_blocks['decoder'] - 1}.")
    waiting = [name for name in gathered(parts.model) if not name.startswith(first)]
    passed.log_likelihood.sum().backward()
    return {
        "ranked": float((ranked[0] - ranked[1]).abs().max()),
        "rows": torch.equal(*rows),
        "left": left,
        "waiting": waiting,
    }


def prompt_cases(world: World, folders: dict[bool, str], shard: Any, options: dict[str, Any]) -> list[dict[str, Any]]:
    """What one rank finds out about T5s in parts, with both kinds of heads, with and without activation checkpointing."""
    torch.manual_seed(0)
    found = []
    for tied, folder in folders.items():
        whole = load(folder)
        assert (whole.model.lm_head.weight is whole.model.shared.weight) == tied
        expected = [prompt_gradient(whole, world.rank, step) for step in range(STEPS)]
        for recomputed in (False, True):
            parts = load(folder)
            placement.place(parts, DistributionConfig(shard=shard, activation_checkpointing=recomputed, **options), world)
            gradients = [prompt_gradient(parts, world.rank, step) for step in range(STEPS)]
            found.append({
                "case": (tied, recomputed),
                "errors": [error(*pair) for pair in zip(gradients, expected, strict=True)],
                "gathered": gathered(parts.model),
            })  # fmt: skip
            found[-1] |= predictions(parts, whole, world.rank)
            parts.verify_unchanged()
    return found


@pytest.mark.parametrize("shard", SHARDS)
@pytest.mark.parametrize("size", [2, 4])
def test_prompts_get_the_gradients_of_the_whole_t5(size: int, shard: str, folders: dict[bool, str]) -> None:
    for rank in ranks.run(prompt_cases, size, folders, shard, {}):
        assert len(rank) == 4
        for each in rank:
            assert max(each["errors"]) <= 2e-6, each
            assert each["gathered"] == each["left"] == each["waiting"] == [], each
            assert each["ranked"] < 1e-4
            assert each["rows"]


def all_written(backbone: Any, rank: int) -> list[list[str]]:
    """What a rank generates: alone, and two hypotheses together; ranks write different lengths."""
    limit = 3 + 4 * rank
    together = backbone.generate(texts(rank, 0), lambda e: torch.stack([e, -e]), limit, average=True)
    return backbone.generate(texts(rank, 0), lambda e: e[None], limit) + together


def inserted_cases(world: World, folder: str, shard: Any) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    found = []
    for stack in ("encoder", "decoder"):
        whole = load(folder)
        reference = Inserted(whole, stack, 3)
        expected = [reference.gradient(whole, world.rank, step) for step in range(STEPS)]
        for recomputed in (False, True):
            parts = load(folder)
            placement.place(parts, DistributionConfig(shard=shard, activation_checkpointing=recomputed), world)
            inserted = Inserted(parts, stack, 3)
            gradients = [inserted.gradient(parts, world.rank, step) for step in range(STEPS)]
            # Where only the decoder learns, FSDP2 gathers the encoder's last block for a backward pass in which it has no part.
            left = gathered(parts.model) + ["reserved"] * (reserved(parts.model) > 0)
            # Unequal lengths: rank 0 is done earlier and has to go on for the sake of the others.
            written = [all_written(each, world.rank) for each in (parts, whole)]
            found.append({
                "case": (stack, recomputed),
                "errors": [error(*pair) for pair in zip(gradients, expected, strict=True)],
                "gathered": left + gathered(parts.model),
                "written": written[0] == written[1],
            })  # fmt: skip
    return found


@pytest.mark.parametrize("shard", SHARDS)
def test_tensors_inside_the_blocks_get_the_gradients_of_the_whole_t5(shard: str, folders: dict[bool, str]) -> None:
    """Where no input of a block asked for a gradient, ZeRO never released it."""
    for rank in ranks.run(inserted_cases, 2, folders[False], shard):
        for each in rank:
            assert max(each["errors"]) <= 2e-6, each
            assert each["gathered"] == [], each
            assert each["written"], each


def passes_in_other_orders(world: World, folder: str, shard: Any) -> list[tuple[float, list[str]]]:
    """Passes without a gradient between a pass and its backward, and two passes before one backward."""
    candidates, whole, parts = torch.tensor([[10, 1], [11, 1]]), load(folder), load(folder)
    placement.place(parts, DistributionConfig(shard=shard), world)

    def between(backbone: Backbone) -> Tensor:
        prompts = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(world.rank)).requires_grad_()
        passed = backbone.log_likelihood(texts(world.rank, 0), lambda e: prepend(prompts, e), "token_mean")
        backbone.rank(texts(world.rank, 1), candidates, lambda e: prepend(prompts.detach(), e))
        passed.log_likelihood.sum().backward()
        assert prompts.grad is not None
        return prompts.grad

    def two(backbone: Backbone) -> Tensor:
        prompts = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(world.rank)).requires_grad_()
        passed = [backbone.log_likelihood(texts(world.rank, n), lambda e: prepend(prompts, e), "token_mean") for n in range(2)]
        sum(each.log_likelihood.sum() for each in passed).backward()  # type: ignore[union-attr]
        assert prompts.grad is not None
        return prompts.grad

    found = []
    for run in (between, two, between):
        apart = error(run(parts), run(whole))
        found.append((apart, gathered(parts.model) + ["reserved"] * (reserved(parts.model) > 0)))
    return found


def test_fsdp2_keeps_step_with_passes_in_other_orders(folders: dict[bool, str]) -> None:
    """The last block and the head wait gathered for a backward pass, and a pass without a gradient releases them."""
    for rank in ranks.run(passes_in_other_orders, 2, folders[True], "fsdp2"):
        for apart, left in rank:
            assert apart <= 2e-6
            assert left == []


# --- scope, offload, bf16 -------------------------------------------------------------------------------------------------------


def on_hosts(world: World, folder: str, shard: Any, hosts: tuple[str, ...]) -> dict[str, Any]:
    whole, parts = load(folder), load(folder)
    world = replace(world, hosts=hosts)
    share = measure(parts, DistributionConfig(shard=shard, scope="node"), world)
    # Hosts do not wait for each other: rank 0's makes three passes where the other makes one.
    steps = 3 if hosts[world.rank] == hosts[0] else 1
    expected = [prompt_gradient(whole, world.rank, step) for step in range(steps)]
    errors = [error(prompt_gradient(parts, world.rank, step), expected[step]) for step in range(steps)]
    written = [all_written(each, world.rank) for each in (parts, whole)]
    return {"share": share, "errors": errors, "written": written[0] == written[1]}


@pytest.mark.parametrize("shard", SHARDS)
def test_within_a_host_no_weights_cross_the_network(shard: str, tmp_path: Path) -> None:
    """Ranks dealt to hosts in turns, one host with a single rank, which then holds the whole T5."""
    hosts = ("a", "b", "a")
    for rank, found in enumerate(ranks.run(on_hosts, 3, str(tiny_t5.make(tmp_path, width=64)), shard, hosts)):
        assert found["share"].sharers == hosts.count(hosts[rank])
        assert found["share"].kept, found["share"]
        assert max(found["errors"]) <= 2e-6
        assert found["written"]


def offloaded(world: World, folder: str, shard: Any) -> list[float]:
    whole, parts = load(folder), load(folder)
    expected = [prompt_gradient(whole, world.rank, step) for step in range(STEPS)]
    placement.place(parts, DistributionConfig(shard=shard, offload="cpu"), world)
    return [error(prompt_gradient(parts, world.rank, step), expected[step]) for step in range(STEPS)]


@pytest.mark.parametrize("shard", SHARDS)
def test_offloaded_parts_give_the_gradients_of_the_whole_t5(shard: str, folders: dict[bool, str]) -> None:
    for errors in ranks.run(offloaded, 2, folders[True], shard):
        assert max(errors) <= 2e-6


def in_bf16(world: World, folder: str, shard: Any) -> tuple[float, float, torch.dtype]:
    truth, whole, parts = load(folder), *(load(folder, dtype="bf16") for _ in range(2))
    placement.place(parts, DistributionConfig(shard=shard), world)
    assert parts.model.dtype == torch.bfloat16
    flat = [torch.cat([prompt_gradient(each, world.rank, step) for step in range(6)]).double() for each in (truth, whole, parts)]
    distances = [float((each - flat[0]).norm() / flat[0].norm()) for each in flat[1:]]
    return distances[0], distances[1], local_shard(parts.model.shared.weight).dtype


@pytest.mark.parametrize("shard", SHARDS)
def test_bf16_parts_are_no_further_from_the_truth_than_the_whole_bf16_t5(shard: str, folders: dict[bool, str]) -> None:
    for whole, parts, dtype in ranks.run(in_bf16, 2, folders[False], shard):
        assert dtype == torch.bfloat16
        assert 1e-3 < whole < 0.1
        assert parts <= 1.05 * whole


# --- bytes ----------------------------------------------------------------------------------------------------------------------


def live_bytes() -> int:
    """Bytes of all tensors of this process, each storage once: independent of how a partition keeps its books."""
    gc.collect()
    storages = {}
    for each in gc.get_objects():
        if isinstance(each, Tensor):
            local = getattr(each, "_local_tensor", each)
            storages[local.untyped_storage().data_ptr()] = local.untyped_storage().nbytes()
    return sum(storages.values())


def shares(world: World, folder: str, shard: Any, recomputed: bool) -> dict[str, Any]:
    before = live_bytes()
    backbone = load(folder)
    share = measure(backbone, DistributionConfig(shard=shard, activation_checkpointing=recomputed), world)
    file = next(Path(folder).glob("*.safetensors"))
    return {"share": share, "live": live_bytes() - before, "gathered": gathered(backbone.model), "file": file.stat().st_size}


@pytest.mark.parametrize("shard", SHARDS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_rank_holds_its_share_of_the_bytes_and_nothing_else(size: int, shard: str, tmp_path: Path) -> None:
    folder = str(tiny_t5.make(tmp_path, width=128, tied=False))
    for found in ranks.run(shares, size, folder, shard, size == 2):
        assert found["share"].kept, found["share"]
        assert found["share"].whole == pytest.approx(found["file"], rel=0.02)
        # Everything alive in the process, masks and lengths of the step included.
        assert found["live"] <= found["file"] / size * 1.02 + 4096
        assert found["gathered"] == []


def test_the_memory_command_prints_shares_and_says_when_they_are_exceeded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("CUDA_VISIBLE_DEVICES", ""), ("DS_ACCELERATOR", "cpu"), ("OMP_NUM_THREADS", "1")):
        monkeypatch.setenv(name, value)
    tiny_t5.make(tmp_path / "t5", width=64)
    file = tmp_path / "run.yaml"
    file.write_text(f"method: prompt_tuning\nbackbone: {tmp_path / 't5'}\n"
                    "data: {target_tasks: [mini_review]}\ntarget: {steps: 1, lr: 0.3}\n")  # fmt: skip
    assert main.main(["memory", "-c", str(file), "--ranks", "2", "--shard", "none,deepspeed,fsdp2"]) == 0
    lines = [line.split() for line in capfd.readouterr().out.splitlines()[-3:]]
    assert [(line[0], line[2], line[-1]) for line in lines] == [(kind, "2", "ok") for kind in ("none", *SHARDS)]
    assert [line[lines[0].index("%") - 1] for line in lines] == ["100.0", "50.6", "50.0"]
    greedy = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 10**9}}
    (tmp_path / "zero.json").write_text(json.dumps(greedy))
    options = ["distribution.shard=deepspeed", f"distribution.zero_config={tmp_path / 'zero.json'}"]
    assert main.main(["memory", "-c", str(file), "--ranks", "2", *options]) == 1
    assert "TOO MUCH" in capfd.readouterr().out
    assert main.main(["memory", "-c", str(file), "--ranks", "two"]) == 2
    assert "--ranks two: is no list of numbers of processes" in capfd.readouterr().err
