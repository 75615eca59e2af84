"""Whole runs of every method on the make-believe GPU: no operator meets tensors of two devices, and a step waits for it once."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_decoder
import tiny_run
from counted_steps import PARTICLES, Steps, noted_steps, source_lengths, step_of
from make_believe_gpu import GPU, MakeBelieveGpu

from bpt_dist import train
from bpt_dist.config import RunConfig
from bpt_dist.config.method_source import METHODS, method_names, method_options
from bpt_dist.distributed.mesh import World
from bpt_dist.errors import Stopped
from bpt_dist.methods.base import method_class
from bpt_dist.storage.files import read_json

NAMES = method_names(METHODS)
WITHOUT_ENCODER = [name for name in NAMES if method_class(name).needs_encoder is None]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def decoder_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a model whose layers have windows."""
    return tiny_decoder.world(tmp_path_factory.mktemp("world"), "gemma3_text")


def run_of(world: Path, folder: Path, name: str, method: dict[str, object] | None = None, **sections: object) -> RunConfig:
    folder.mkdir(exist_ok=True)
    quiet = {"steps": 5, "log_every": 100, "checkpoint_every": 100}
    given = {"source": quiet, "target": {**quiet, "eval_every": 100}, "output": str(folder / "runs"), **sections}
    if not method_options(name).HAS_SOURCE_STAGE:
        del given["source"]
    if (world / "decoder").exists():
        given["backbone"] = {"path": str(world / "decoder")}
    plain = tiny_run.settings(world, {"name": name, **(method or {})}, **given)
    if "lr" in plain["target"]:
        plain["target"]["lr"] = 0.01
    return tiny_run.load(folder, plain)


def train_on_gpu(gpu: MakeBelieveGpu, config: RunConfig, stop_at: tuple[str, int] | None = None) -> Steps:
    with gpu, noted_steps(gpu, stop_at) as steps, tiny_run.session(config, World(device=GPU)) as run:
        train.train(run)
    return steps


@pytest.mark.parametrize("name", NAMES)
def test_a_run_is_stopped_resumed_ranked_and_generates_without_mixing_devices(world: Path, tmp_path: Path, name: str) -> None:
    config, gpu = run_of(world, tmp_path, name), MakeBelieveGpu()
    with pytest.raises(Stopped):
        train_on_gpu(gpu, config, stop_at=("source" if method_options(name).HAS_SOURCE_STAGE else "target/mood", 1))
    stages = train_on_gpu(gpu, config)
    assert not gpu.notes.mismatches
    assert {"target/mood", "target/count"} <= set(stages)  # the one is ranked, the other generated
    # The stock pass waits for two masks of transformers as well: whether anything is padded.
    assert_waits_at_most(3 if method_options(name).TRAINS_BACKBONE else 1, stages)
    # What was computed there is what is computed on the CPU.
    expected = tiny_run.trained(run_of(world, tmp_path / "cpu", name))
    for entry, same in zip(read_json(config.directory / "results.json"), read_json(expected / "results.json"), strict=True):
        assert entry["value"] == pytest.approx(same["value"], abs=1e-3)


def assert_waits_at_most(most: int, stages: Steps) -> None:
    for stage, steps in stages.items():
        for step in steps[1:]:  # the first one is recorded
            assert sum(step.waits.values()) <= most, (stage, step.waits)


@pytest.mark.parametrize("name", WITHOUT_ENCODER)
def test_a_decoder_only_model_is_waited_for_once_a_step(decoder_world: Path, tmp_path: Path, name: str) -> None:
    config, gpu = run_of(decoder_world, tmp_path, name), MakeBelieveGpu()
    stages = train_on_gpu(gpu, config)
    assert not gpu.notes.mismatches
    assert_waits_at_most(3 if method_options(name).TRAINS_BACKBONE else 1, stages)
    expected = tiny_run.trained(run_of(decoder_world, tmp_path / "cpu", name))
    for entry, same in zip(read_json(config.directory / "results.json"), read_json(expected / "results.json"), strict=True):
        assert entry["value"] == pytest.approx(same["value"], abs=1e-3)


@pytest.mark.parametrize(("texts", "most"), [(1, 1200), (4, 1500)])
def test_a_source_step_at_the_depth_of_t5_base_launches_few_kernels(tmp_path: Path, texts: int, most: int) -> None:
    step = step_of(tmp_path, {"name": "bpt", "num_particles": PARTICLES}, "source", source_lengths(texts))
    assert sum(step.waits.values()) <= 1, step.waits
    assert step.launches <= most, step.lines.most_common(20)
