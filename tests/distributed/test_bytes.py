"""The bytes of a step: as `bpt-dist plan` states them and as the collectives of a training move them, on 2 ranks."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ranks
import tiny_run
import tiny_t5
import torch
from torch.distributed.fsdp import FSDPModule

from bpt_dist.backbones.loading import load
from bpt_dist.backbones.prompts import prepend
from bpt_dist.backbones.t5.shapes import shape_of
from bpt_dist.commands.plan.collectives import ROWS
from bpt_dist.commands.plan.estimate import estimate
from bpt_dist.config import DistributionConfig, RunConfig
from bpt_dist.distributed import device
from bpt_dist.distributed.mesh import World
from bpt_dist.distributed.traffic import WEIGHTS, Traffic
from bpt_dist.training.sharding import passes, placement
from bpt_dist.training.stage import TrainingStage

SHARDS = ("deepspeed", "fsdp2")
FAMILIES: dict[str, dict[str, Any]] = {"1.0": {}, "1.1": {"gated": True, "tied": False}, "mt5": {"mt5": True, "tied": False}}
MINI = "mini"
STEPS = 6
# What the plan calls what functions of ours send.
PLANNED = {
    "gather_rows": "all-gather of flags and losses",
    "start_gather_particles": "all-gather of particles and of scores",
    "sum_over_data_": "all-reduce of gradients over data",
    "gather_over_data": "all-gather of gradients over data, pass by pass",
    "look_up": ROWS,
    WEIGHTS: "all-gather of T5 blocks, forward and backward",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bytes")
    found = {"1.0": tiny_run.world(root / "1.0", width=64)}
    for name in ("1.1", "mt5"):
        found[name] = tiny_run.world(root / name, width=64)
        tiny_t5.make(root / name / "t5", width=64, **FAMILIES[name])
    return found | {MINI: root / "1.0"}


def configured(folders: dict[str, Path], output: Path, backbone: str, **sections: Any) -> RunConfig:
    every = {"steps": STEPS, "log_every": 100, "checkpoint_every": 100}
    plain = tiny_run.settings(folders[backbone], {"name": "bpt", "num_particles": 2}, output=str(output / "runs"))
    plain["source"] |= {**every, "batch_size": 2}
    plain["target"] |= {**every, "batch_size": 4, "eval_every": None}
    plain["data"]["target_tasks"] = ["mood"]
    if backbone == MINI:
        plain["backbone"]["path"] = MINI
        plain["data"] = {"source_tasks": ["mini_agreement", "mini_review"], "target_tasks": ["mini_review"], "max_eval_rows": 6}
    for section, values in sections.items():
        plain[section] = {**plain.get(section, {}), **values}
    return tiny_run.load(output, plain)


def counted(world: World, config: RunConfig) -> dict[str, list[Counter[str]]]:
    """Train, and return the bytes of each step of each stage, from one agreement on losses to the next."""
    marks: list[tuple[str, Counter[str]]] = []
    agree = TrainingStage.agree

    def marked(stage: TrainingStage, *arguments: Any) -> Any:
        marks.append((stage.name, Counter(traffic.bytes)))
        return agree(stage, *arguments)

    TrainingStage.agree = marked  # type: ignore[method-assign, assignment]
    with Traffic() as traffic:
        tiny_run.trained(config, world)
    found: dict[str, list[Counter[str]]] = {}
    for (name, before), (following, after) in itertools.pairwise(marks):
        if name == following:
            found.setdefault(name, []).append(after - before)
    return found


def assert_as_planned(config: RunConfig, size: int = 2) -> None:
    """Assert it for the steps that record nothing and that ZeRO knows the order of: from the fourth on."""
    planned = {stage.name: {each.name: each.bytes for each in stage.collectives} for stage in estimate(config, size).stages}
    for rank in ranks.run(counted, size, config):
        assert rank.keys() == planned.keys()
        for stage, steps in rank.items():
            for step in steps[3:]:
                found = {PLANNED[purpose]: number for purpose, number in step.items()}
                # The plan does not know which words come again.
                assert 0 <= found.pop(ROWS, 0) <= planned[stage].get(ROWS, 0)
                assert found == pytest.approx({k: v for k, v in planned[stage].items() if k != ROWS}, rel=0.02), stage


@pytest.mark.parametrize("shard", SHARDS)
@pytest.mark.parametrize(
    ("backbone", "recomputed"), [(MINI, False), (MINI, True), ("1.0", True), ("1.1", False), ("1.1", True), ("mt5", False)]
)
def test_a_step_moves_the_bytes_of_the_plan(
    backbone: str, shard: str, recomputed: bool, folders: dict[str, Path], tmp_path: Path
) -> None:
    options = {"shard": shard, "activation_checkpointing": recomputed}
    assert_as_planned(configured(folders, tmp_path, backbone, distribution=options))


@pytest.mark.parametrize(
    "sections",
    [
        {"distribution": {"shard": "fsdp2", "exact": True}},
        {"source": {"pass_size": 2}, "distribution": {"shard": "deepspeed", "mesh": {"particle": 1, "data": 2}}},
        {"source": {"shared_texts": False}, "distribution": {"shard": "deepspeed"}},
        {"distribution": {"mesh": {"particle": 1, "data": 2}}},
    ],
)
def test_so_do_steps_of_other_passes(sections: dict[str, Any], folders: dict[str, Path], tmp_path: Path) -> None:
    assert_as_planned(configured(folders, tmp_path, "1.0", **sections))


def test_passes_are_as_large_as_the_memory_allows(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three sequences fit where a rank has eight: the same particles, in as many passes and with as many bytes as planned."""
    sections: dict[str, Any] = {
        "data": {"max_source_length": 8},
        "distribution": {"shard": "deepspeed", "mesh": {"particle": 1, "data": 2}},
    }
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole, cut = (configured(folders, tmp_path / name, "1.0", **sections) for name in ("whole", "cut"))
    machine = device.machine_memory() // 2
    ranks.run(counted, 2, whole)
    planned = estimate(whole, 2).stages[0]
    shape = shape_of(whole.backbone.path)
    monkeypatch.setattr(passes, "SHARE", 0.02)  # the rest is enough for an evaluation
    free = 3.5 * shape.row_cost(3, 8, 3).activation_bytes / passes.SHARE
    memory = passes.RUNTIME_BYTES + shape.weight_bytes // 2 + shape.gathered_bytes + free
    (tmp_path / "memory.max").write_text(f"{int(2 * memory)}\n")
    monkeypatch.setattr(device, "CGROUP_LIMIT", tmp_path / "memory.max")
    assert_as_planned(cut)
    smaller = estimate(cut, 2).stages[0]
    assert (planned.passes_per_step, planned.rows_at_once) == (1, 4)
    assert (smaller.passes_per_step, smaller.rows_at_once) == (2, 2)
    choices = [json.loads((config.directory / "run.json").read_text())["choices"]["memory"] for config in (whole, cut)]
    assert choices == [str(machine), str(int(2 * memory) // 2)]
    states = [tiny_run.newest_states(config) for config in (whole, cut)]
    for stage, tensors in states[0].items():
        for name, tensor in tensors.items():
            assert torch.allclose(states[1][stage][name], tensor, rtol=0, atol=1e-5 * float(tensor.abs().max())), name


# --- the next block is gathered while one computes ------------------------------------------------------------------------------


def gathered_numbers(backbone: Any) -> int:
    """Return how many numbers of weights are whole on this rank or on their way, without those ZeRO keeps whole on purpose."""
    total = 0
    for weight in backbone.model.parameters():
        if hasattr(weight, "ds_status"):
            total += 0 if weight.ds_persist or weight.ds_status.name == "NOT_AVAILABLE" else weight.ds_numel
    for module in backbone.core.modules():
        for group in module._get_fsdp_state()._fsdp_param_groups if isinstance(module, FSDPModule) else ():
            if group._all_gather_result is not None or group.is_unsharded:
                total += sum(each._orig_size.numel() for each in group.fsdp_params)
    return total


def one_pass(backbone: Any, *, learn: bool) -> None:
    ids = torch.arange(3, 15)[None]
    texts = SimpleNamespace(source_ids=ids, source_mask=torch.ones_like(ids), target_ids=ids[:, :3])
    prompt = torch.zeros(1, 4, backbone.width, requires_grad=learn)
    with torch.set_grad_enabled(learn):
        found = backbone.log_likelihood(texts, partial(prepend, prompt), "token_mean").log_likelihood.sum()
    if learn:
        found.backward()


def prefetching(world: World, folder: str, shard: Any, recomputed: bool) -> dict[str, Any]:
    """Return the numbers gathered while each block and the head compute, forward and backward, and after passes of both kinds."""
    backbone: Any = load(folder)
    largest = max(sum(weight.numel() for weight in block.parameters()) for block in backbone.blocks)
    placement.place(backbone, DistributionConfig(shard=shard, activation_checkpointing=recomputed), world)
    backbone.use_packed_pass("sdpa")
    forward: list[int] = []
    backward: list[int] = []

    def note_gradient(_module: Any, _args: Any, output: Any) -> None:
        # The gradient has come: what is gathered now was gathered while the block behind computed.
        if output.requires_grad:
            output.register_hook(lambda _: backward.append(gathered_numbers(backbone)))

    for module in (*backbone.blocks, backbone.model.lm_head):
        module.register_forward_pre_hook(lambda *_: forward.append(gathered_numbers(backbone)))
        module.register_forward_hook(note_gradient)
    for _ in range(STEPS):
        forward.clear()
        backward.clear()
        one_pass(backbone, learn=True)
    left = [gathered_numbers(backbone)]
    one_pass(backbone, learn=False)
    left.append(gathered_numbers(backbone))
    return {"largest": largest, "forward": forward[: len(backbone.blocks) + 1], "backward": backward, "left": left}


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("shard", SHARDS)
def test_the_next_block_is_gathered_while_one_computes(shard: str, recomputed: bool, tmp_path: Path) -> None:
    """And nothing is left after a step or after a pass that learns nothing."""
    folder = str(tiny_t5.make(tmp_path, width=64, layers=3))
    for rank in ranks.run(prefetching, 2, folder, shard, recomputed):
        assert rank["left"] == [0, 0]
        one = rank["largest"] // 2  # an encoder block has two thirds of a decoder block's weights
        assert [number > one for number in rank["forward"]].count(True) >= 4, rank
        # FSDP2 begins to gather a block for the backward pass a moment before it releases the last one.
        assert max(rank["forward"] + rank["backward"]) <= (3 if shard == "fsdp2" else 2) * rank["largest"] + 128 * 64
        assert sum(number > 0 for number in rank["backward"]) >= 5, rank
