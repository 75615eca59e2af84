"""A checkpoint that loads is one model: packed, stock, in parts of ZeRO and FSDP2, in a run and in `eval` of what it exported."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mutated_t5
import pytest
import ranks
import tiny_run
import torch
from stored_t5 import StoredT5
from torch import Tensor

from bpt_dist.backbones import loading
from bpt_dist.backbones.base import Backbone
from bpt_dist.backbones.prompts import prepend
from bpt_dist.commands.eval import evaluate_stored
from bpt_dist.config import DistributionConfig
from bpt_dist.distributed.mesh import World
from bpt_dist.storage import layout
from bpt_dist.storage.files import read_json
from bpt_dist.training.sharding import placement

KINDS = [
    mutated_t5.other_dtype, mutated_t5.known_extra, mutated_t5.copies_of_the_table, mutated_t5.other_tie, mutated_t5.shards,
    mutated_t5.generation_beside,
]  # fmt: skip


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write two changed checkpoints of each kind that loads: of a tied T5 and of one with a head of its own."""
    root, written = tmp_path_factory.mktemp("checkpoints"), {}
    for tied in (True, False):
        original = StoredT5.make(root / f"original-{tied}", tied=tied)
        for kind in KINDS:
            changed, name = original.copy(), f"{kind.__name__}, {'tied' if tied else 'untied'}"
            if kind(changed, random.Random(name)) is None:
                written[name] = changed.write(root / name.replace(", ", "-"))
    return written


@torch.no_grad()
def answers(backbone: Backbone) -> tuple[Tensor, Any, list[list[str]]]:
    """Log-likelihoods, ranked label words, and generated text of two rows under one prompt."""
    ids = torch.randint(3, 128, (2, 5), generator=torch.Generator().manual_seed(1))
    batch = SimpleNamespace(source_ids=ids, source_mask=torch.ones_like(ids), target_ids=ids[:, :3])
    prompt = torch.randn(1, 2, backbone.width, generator=torch.Generator().manual_seed(2))

    def inputs(embeds: Tensor) -> Tensor:
        return prepend(prompt, embeds)

    ranked = backbone.rank(batch, torch.tensor([[10, 1], [11, 1]]), inputs)
    return backbone.log_likelihood(batch, inputs, "token_sum").log_likelihood, ranked, backbone.generate(batch, inputs, 4)


def deviations(world: World, checkpoints: dict[str, Path]) -> dict[str, Any]:
    """Return the largest difference from the packed pass of every way to hold each checkpoint."""
    found = {}
    for name, folder in checkpoints.items():
        packed = loading.load(str(folder))
        packed.use_packed_pass("sdpa")
        expected = answers(packed)
        for shard in ("none", "deepspeed", "fsdp2"):
            backbone = loading.load(str(folder))
            placement.place(backbone, DistributionConfig(shard=shard), world)
            likelihood, ranked, texts = answers(backbone)
            differences = [float((likelihood - expected[0]).abs().max()), float((ranked - expected[1]).abs().max())]
            found[f"{name}, {shard}"] = (max(differences), texts == expected[2])
    return found


def test_every_way_to_hold_a_checkpoint_gives_one_model(checkpoints: dict[str, Path]) -> None:
    assert len(checkpoints) >= 8
    for found in ranks.run(deviations, 2, checkpoints):
        assert {name: deviation for name, deviation in found.items() if not (deviation[0] < 1e-4 and deviation[1])} == {}


def test_a_run_and_the_evaluation_of_its_export_agree(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    tiny_run.write_tasks(tmp_path / "tasks")
    for number, folder in enumerate(checkpoints.values()):
        metrics = []
        for forward in ("auto", "stock"):
            place = tmp_path / f"{number}-{forward}"
            plain = tiny_run.settings(
                tmp_path,
                {"name": "prompt_tuning"},
                output=str(place),
                backbone={"path": str(folder), "forward": forward},
                evaluation={"decode": "generate", "max_new_tokens": 4},
            )
            place.mkdir()
            config = tiny_run.load(place, plain)
            tiny_run.trained(config)
            found, _ = evaluate_stored(config.directory / "target" / "mood" / "adapter", config, "mood", "test")
            results = read_json(config.directory / layout.RESULTS)
            assert found.metrics == {entry["metric"]: entry["value"] for entry in results if entry["task"] == "mood"}
            metrics.append(found.metrics)
        assert metrics[0] == pytest.approx(metrics[1], abs=1e-4)
