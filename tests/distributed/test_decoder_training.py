"""A whole run on a decoder-only model that two ranks hold by halves gives the prompts and predictions of one process."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import ranks
import tiny_decoder
import tiny_run
import torch
from safetensors.torch import load_file

from bpt_dist.config import RunConfig
from bpt_dist.distributed.mesh import World
from bpt_dist.storage import layout

SGD = {"optimizer": "sgd", "lr": 0.05}  # whose steps do not blow up rounding, as AdamW's do


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed  # noqa: F401 - once, before the ranks are forked

    found = tmp_path_factory.mktemp("world")
    tiny_decoder.make(found / "decoder", "gemma3_text")
    tiny_run.write_tasks(found / "tasks")
    return found


def configured(folder: Path, name: str, shard: str) -> RunConfig:
    sections: dict[str, Any] = {"backbone": {"path": str(folder / "decoder")}, "distribution": {"shard": shard}}
    return tiny_run.load(
        folder, tiny_run.settings(folder, {"name": "bpt"}, name=name, source=SGD, target={"optimizer": "sgd"}, **sections)
    )


def trained(world: World, config: RunConfig) -> None:
    tiny_run.trained(config, world)


def predictions(run: Path) -> list[str]:
    lines = (run / "target" / "mood" / layout.predictions("test", "map")).read_text().splitlines()
    return [json.loads(line)["prediction"] for line in lines]


def test_two_ranks_learn_what_one_process_learns(folder: Path) -> None:
    alone = configured(folder, "alone", "none")
    tiny_run.trained(alone)
    expected = load_file(alone.directory / "source" / "posterior" / "posterior.safetensors")
    for shard in ("deepspeed", "fsdp2"):
        config = configured(folder, shard, shard)
        ranks.run(trained, 2, config)
        found = load_file(config.directory / "source" / "posterior" / "posterior.safetensors")
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=f"{shard}: {name}")
        adapters = [
            load_file(run.directory / "target" / "mood" / "adapter" / "adapter_model.safetensors") for run in (config, alone)
        ]
        torch.testing.assert_close(*(each["prompt_embeddings"] for each in adapters), rtol=1e-4, atol=1e-5)
        assert predictions(config.directory) == predictions(alone.directory)
