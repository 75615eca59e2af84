"""SPoT: its library is K prompt tunings, its retrieval finds what it should, its similarities are those of the paper."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
import tiny_run
import torch
from sklearn.metrics.pairwise import cosine_similarity
from torch import Tensor

from bpt_dist.config import RunConfig
from bpt_dist.errors import ConfigError
from bpt_dist.methods.spot import mixture_weights, similarities
from bpt_dist.storage.checkpoint import read_tensors

PLAIN = {"optimizer": "sgd", "lr": 0.3, "batch_size": 3, "clip": 0.05, "schedule": "constant"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.world(tmp_path_factory.mktemp("world"))


def configured(
    world: Path, folder: Path, method: str = "spot", options: dict[str, Any] | None = None, **sections: Any
) -> RunConfig:
    plain = tiny_run.settings(world, {"name": method, **(options or {})}, output=str(folder / "runs"), **sections)
    return tiny_run.load(folder, plain)


def posterior(run: Path) -> dict[str, Tensor]:
    return read_tensors(run / "source" / "posterior" / "posterior.safetensors")[0]


# --- the library --------------------------------------------------------------------------------------------------------------


def test_k_prompts_in_one_run_are_k_prompt_tunings(world: Path, tmp_path: Path) -> None:
    """Also where gradients are clipped, each prompt by its own norm; 4 steps behind the 3 of the keys read on, as 7 steps do."""
    source = {"steps": 4, **PLAIN}
    found = posterior(tiny_run.trained(configured(world, tmp_path, options={"probe_steps": 3}, source=source)))
    numpy.save(tmp_path / "start.npy", found["start"].numpy())
    for k, task in enumerate(("colour", "truth")):
        for stage, steps in (("keys", 3), ("prompts", 7)):
            alone = configured(
                world,
                tmp_path,
                "prompt_tuning",
                {"init": "file", "init_file": str(tmp_path / "start.npy")},
                name=f"{task}-{stage}",
                data={"target_tasks": [task]},
                target={"steps": steps, "eval_every": None, **PLAIN},
            )
            adapter = tiny_run.trained(alone) / "target" / task / "adapter" / "adapter_model.safetensors"
            prompt = read_tensors(adapter)[0]["prompt_embeddings"]
            assert not torch.equal(prompt, found["start"])
            torch.testing.assert_close(found[stage][k], prompt, rtol=1e-5, atol=1e-6)


def test_a_target_compared_after_other_steps_than_the_keys_is_refused(world: Path, tmp_path: Path) -> None:
    """A cosine of prompts of 3 and of 5 steps would compare how long they were trained."""
    first = tiny_run.trained(configured(world, tmp_path, options={"probe_steps": 3}))
    again = configured(world, tmp_path, options={"probe_steps": 5}, source={"posterior": str(first)}, name="again")
    with pytest.raises(
        ConfigError, match=r"method\.probe_steps: is 5, the keys of the source posterior had 3 steps .*; set it to 3"
    ):
        tiny_run.trained(again)


# --- similarity ---------------------------------------------------------------------------------------------------------------


def test_similarities_are_those_of_the_paper() -> None:
    """Vu et al. (2022), section 4.1, by loops over scikit-learn's cosine."""
    generator = torch.Generator().manual_seed(0)
    prompt, others = torch.randn(4, 6, generator=generator) + 1, torch.randn(3, 5, 6, generator=generator) + 1
    averaged = [float(cosine_similarity(prompt.mean(0)[None], other.mean(0)[None])[0, 0]) for other in others]
    per_token = [float(cosine_similarity(prompt, other).mean()) for other in others]
    torch.testing.assert_close(similarities(prompt, others, "average_tokens"), torch.tensor(averaged))
    torch.testing.assert_close(similarities(prompt, others, "per_token"), torch.tensor(per_token))


@pytest.mark.parametrize(("similarity", "top_k", "expected"), [
    ([0.1, 0.6, 0.2], 2, [0.0, 0.75, 0.25]),
    ([0.1, 0.6, 0.2], 9, [1 / 9, 6 / 9, 2 / 9]),
    ([0.1, 0.6, 0.2], 1, [0.0, 1.0, 0.0]),
    ([-0.2, 0.6, -0.1], 3, [0.0, 1.0, 0.0]),
    ([-0.2, -0.6, -0.1], 3, [0.0, 0.0, 1.0]),
    ([0.0, 0.0], 2, [1.0, 0.0]),
])  # fmt: skip
def test_a_mixture_weighs_by_similarity(similarity: list[float], top_k: int, expected: list[float]) -> None:
    torch.testing.assert_close(mixture_weights(torch.tensor(similarity), top_k), torch.tensor(expected))


# --- retrieval ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("similarity", ["average_tokens", "per_token"])
def test_a_target_that_is_in_the_library_retrieves_its_own_prompt(
    similarity: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its embedding then is its key: the same start, texts and steps."""
    data = {"source_tasks": ["colour", "mood", "truth"], "target_tasks": ["mood"]}
    config = configured(world, tmp_path, options={"similarity": similarity}, data=data, source={"batch_size": 3})
    with tiny_run.stage_of(monkeypatch, config, 3) as stage:
        assert stage.name == "target/mood"
        said = stage.method.diagnostics()
        library = posterior(config.directory)
        torch.testing.assert_close(stage.method.particles.detach()[0], library["prompts"][1], rtol=0, atol=0)
        # The embedding is its key; every entry of the picture is the similarity of two keys.
        between = [similarities(key, library["keys"], similarity).tolist() for key in library["keys"]]
        assert said["similarity"]["between"] == between
        assert said["similarity"]["target"] == pytest.approx(between[1], abs=1e-4)
        assert said["similarity"]["weights"] == [0, 1, 0]
        assert said["metrics"]["spot/similarity/mood"] == said["similarity"]["target"][1] == max(said["similarity"]["target"])


def test_a_mixture_is_the_weighted_mean_of_the_library(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured(world, tmp_path, options={"retrieval": "mixture", "top_k": 2})
    with tiny_run.stage_of(monkeypatch, config, 3) as stage:
        found, weights = stage.method.particles.detach()[0], stage.method.diagnostics()["similarity"]["weights"]
        prompts = posterior(config.directory)["prompts"]
    assert min(weights) > 0
    assert sum(weights) == pytest.approx(1)
    torch.testing.assert_close(found, weights[0] * prompts[0] + weights[1] * prompts[1])


def test_a_run_records_what_it_retrieved_and_draws_it(world: Path, tmp_path: Path) -> None:
    """Under the names of the source tasks, also where they are known from a stored posterior only."""
    first = tiny_run.trained(configured(world, tmp_path, figures=True))
    assert (first / "figures" / "task_similarity.png").is_file()
    stored = {"data": {"source_tasks": []}, "source": {"posterior": str(first)}, "name": "second"}
    second = tiny_run.trained(configured(world, tmp_path, **stored))
    assert not (second / "figures").exists()
    said = [
        [(line["stage"], line["similarity"]) for line in map(json.loads, (run / "metrics.jsonl").open()) if "similarity" in line]
        for run in (first, second)
    ]
    assert said[0] == said[1]
    assert {stage for stage, _ in said[0]} == {"target/mood", "target/count"}
    assert said[0][0][1]["tasks"] == ["colour", "truth"]
    shutil.rmtree(first)
