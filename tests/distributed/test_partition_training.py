"""A method that trains the backbone itself: partitioned, with ZeRO's or FSDP2's optimizer, it takes the steps of the whole T5."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import ranks
import tiny_run
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bpt_dist.config import RunConfig
from bpt_dist.distributed.mesh import World
from bpt_dist.storage.checkpoint import read_tensors
from bpt_dist.storage.files import read_json
from bpt_dist.train import run_all

STEPS = 20
TARGET = {
    "steps": STEPS, "lr": 1e-3, "batch_size": 4, "warmup": 0.1, "clip": 0.5, "weight_decay": 0.01,
    "eval_every": STEPS // 2, "checkpoint_every": STEPS // 2, "log_every": 5,
}  # fmt: skip

ONE = {"target_tasks": ["mood"]}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed  # noqa: F401 - once, before the ranks are forked

    return tiny_run.world(tmp_path_factory.mktemp("world"), tied=False, layers=1)


def configured(world: Path, folder: Path, **sections: Any) -> RunConfig:
    folder.mkdir(parents=True, exist_ok=True)
    target = {**TARGET, **sections.pop("target", {})}
    plain = tiny_run.settings(world, {"name": "fine_tuning"}, output=str(folder / "runs"), target=target, **sections)
    return tiny_run.load(folder, plain)


def trained(world: World, config: RunConfig) -> None:
    tiny_run.trained(config, world)


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    config = configured(world, tmp_path_factory.mktemp("whole") / "run")
    tiny_run.trained(config)
    return config


def state(config: RunConfig, task: str, step: int = STEPS) -> dict[str, Tensor]:
    folder = config.directory / "target" / task / "checkpoints" / f"step-{step:08d}"
    return read_tensors(folder / "state.safetensors")[0]


def kind(name: str) -> str:
    """`trained/value`, `trained/exp_avg`, ..., `best`."""
    return "best" if name.startswith("best/") else f"trained/{name.rsplit('/', 1)[1]}"


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Weights, the best of them, each moment and the step counters."""
    assert {name: tensor.shape for name, tensor in found.items()} == {name: tensor.shape for name, tensor in expected.items()}
    for each in {kind(name) for name in expected}:
        names = [name for name in expected if kind(name) == each]
        pair = [torch.cat([tensors[name].double().flatten() for name in names]) for tensors in (found, expected)]
        assert float((pair[0] - pair[1]).norm() / pair[1].norm()) <= 1e-5, each


def assert_same_course(found: RunConfig, expected: RunConfig) -> None:
    for task in found.data.target_tasks:
        assert_close(state(found, task), state(expected, task))
        folders = [config.directory / "target" / task for config in (found, expected)]
        lines = [[json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()] for folder in folders]
        assert [line["prediction"] for line in lines[0]] == [line["prediction"] for line in lines[1]]
        results = [read_json(folder / "result.json") for folder in folders]
        assert results[0]["selected_step"] == results[1]["selected_step"]
        counts = [result["results"][0]["trainable_parameters"] for result in results]
        assert counts[0] == counts[1]


@pytest.mark.parametrize(("shard", "size"), [("deepspeed", 1), ("deepspeed", 2), ("fsdp2", 1), ("fsdp2", 2)])
def test_weights_partitioned_take_the_steps_of_the_whole_backbone(
    shard: str, size: int, world: Path, whole: RunConfig, tmp_path: Path
) -> None:
    """Two targets one after the other: the second starts from the pretrained weights and a fresh optimizer."""
    config = configured(world, tmp_path, distribution={"shard": shard}, data=ONE if size == 1 else {})
    ranks.run(trained, size, config)
    assert_same_course(config, whole)


@pytest.mark.parametrize(
    ("first", "then"), [(("deepspeed", 2), ("deepspeed", 1)), (("fsdp2", 2), ("none", 1)), (("none", 1), ("deepspeed", 2))]
)
def test_training_resumes_on_other_ranks_and_in_other_parts(
    first: tuple[str, int], then: tuple[str, int], world: Path, whole: RunConfig, tmp_path: Path
) -> None:
    """Checkpoints hold whole weights and moments of all ranks; the best weights so far are among them."""
    before, after = (configured(world, tmp_path, data=ONE, distribution={"shard": shard}) for shard, _ in (first, then))
    stop = f"step.after_update,stage=target/mood,step={STEPS // 2 + 3},term"
    assert ranks.launch(lambda: run_all(before), first[1], BPT_FAULT=stop) == [75] * first[1]
    ranks.run(trained, then[1], after)
    assert_same_course(after, whole)


@pytest.mark.parametrize("shard", ["deepspeed", "fsdp2"])
def test_passes_of_a_step_add_up_and_blocks_may_be_computed_again(
    shard: str, world: Path, whole: RunConfig, tmp_path: Path
) -> None:
    distribution = {"shard": shard, "activation_checkpointing": True}
    config = configured(world, tmp_path, data=ONE, distribution=distribution, target={"pass_size": 1})
    ranks.run(trained, 2, config)
    assert_same_course(config, whole)


@pytest.mark.parametrize("shard", ["deepspeed", "fsdp2"])
def test_a_step_that_is_left_out_leaves_no_gradient_behind(shard: str, world: Path, tmp_path: Path) -> None:
    """ZeRO adds a pass to the gradients of the last one until it is told that a step is over."""
    found = []
    for each, size in (("none", 1), (shard, 2)):
        sections = {"distribution": {"shard": each}, "target": {"steps": 6, "on_non_finite": "skip"}, "data": ONE}
        config = configured(world, tmp_path / each, **sections)
        os.environ["BPT_FAULT"] = "step.after_backward,step=3,nan"
        try:
            ranks.run(trained, size, config)
        finally:
            del os.environ["BPT_FAULT"]
        found.append(state(config, "mood", 6))
    assert_close(*found)


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 whose weights are bf16 numbers, so that both types start at the same place."""
    made = tiny_run.world(tmp_path_factory.mktemp("rounded"), tied=False, layers=1)
    file = made / "t5" / "model.safetensors"
    save_file({name: weight.bfloat16().float() for name, weight in load_file(file).items()}, file, metadata={"format": "pt"})
    return made


@pytest.mark.parametrize(("shard", "size"), [("none", 1), ("none", 2), ("deepspeed", 2), ("fsdp2", 2)])
def test_weights_in_bf16_take_the_steps_of_float32(shard: str, size: int, rounded: Path, tmp_path: Path) -> None:
    """Masters, moments and sums of gradients are float32 wherever they are; one text a pass, so that gradients add up."""
    steps, start = 5, load_file(rounded / "t5" / "model.safetensors")
    target = {"steps": steps, "pass_size": 1, "clip": None, "weight_decay": 0.0, "eval_every": None}
    found = []
    for dtype, each, ranked in (("fp32", "none", 1), ("bf16", shard, size)):
        sections = {"backbone": {"dtype": dtype}, "distribution": {"shard": each}, "target": target, "data": ONE}
        config = configured(rounded, tmp_path / dtype, **sections)
        ranks.run(trained, ranked, config)
        tensors = state(config, "mood", steps)
        assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
        ends = {name.split("/", 1)[1].removesuffix("/value"): tensor for name, tensor in tensors.items() if name.endswith("/value")}
        found.append(
            torch.cat([(tensor - start[name.replace("/", ".")]).double().flatten() for name, tensor in sorted(ends.items())])
        )
    assert float(found[0] @ found[1] / found[0].norm() / found[1].norm()) > 0.99
    assert float(found[1].norm() / found[0].norm()) == pytest.approx(1.0, rel=0.05)
