"""`deepspeed launcher/train.py` with a decoder-only model in parts gives the prompts and predictions of one process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_decoder
import tiny_run
import torch
import yaml
from safetensors.torch import load_file

from bpt_dist.storage import layout

ROOT = Path(__file__).parents[2]
SGD = {"optimizer": "sgd", "lr": 0.05}  # whose steps do not blow up rounding, as AdamW's do


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def predictions(run: Path, task: str) -> list[str]:
    lines = (run / "target" / task / layout.predictions("test", "map")).read_text().splitlines()
    return [json.loads(line)["prediction"] for line in lines]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train on the whole model, in one process, and return the folder of the run."""
    world = tiny_decoder.world(tmp_path_factory.mktemp("world"), "gemma3_text")
    config = tiny_run.load(
        world, tiny_decoder.settings(world, {"name": "bpt"}, name="alone", source=SGD, target={"optimizer": "sgd"})
    )
    return tiny_run.trained(config)


@pytest.mark.parametrize("shard", ["deepspeed", "fsdp2"])
def test_two_processes_of_the_launcher_learn_what_one_learns(alone: Path, shard: str) -> None:
    world = alone.parents[1]
    plain = tiny_decoder.settings(world, {"name": "bpt"}, name=shard, source=SGD, target={"optimizer": "sgd"})
    file = world / f"{shard}.yaml"
    file.write_text(yaml.safe_dump(plain | {"distribution": {"shard": shard}}))
    found = subprocess.run(
        [Path(sys.executable).with_name("deepspeed"), "--num_gpus", "2", "--master_port", str(free_port()), "launcher/train.py",
         "--config", str(file)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}, capture_output=True, text=True, timeout=500,
        check=False,
    )  # fmt: skip
    assert found.returncode == 0, (found.stdout + found.stderr)[-3000:]
    run = alone.with_name(shard)
    assert (run / "logs" / "rank-1.log").is_file(), "two ranks ran"
    posteriors = [load_file(each / "source" / "posterior" / "posterior.safetensors") for each in (run, alone)]
    for name, tensor in posteriors[1].items():
        torch.testing.assert_close(posteriors[0][name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    for task in ("mood", "count"):
        prompts = [load_file(each / "target" / task / "adapter" / "adapter_model.safetensors") for each in (run, alone)]
        torch.testing.assert_close(*(each["prompt_embeddings"] for each in prompts), rtol=1e-4, atol=1e-5)
        assert predictions(run, task) == predictions(alone, task)
