"""Runs a user would start: an untrained prompt as a reference, and the published set-up on real text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_run
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

from bpt_dist import config as configuration
from bpt_dist.train import run_all

REPOSITORY = Path(__file__).parents[2]


def test_an_untrained_prompt_is_evaluated_without_a_learning_rate(tmp_path: Path) -> None:
    world = tiny_run.world(tmp_path / "world")
    plain = tiny_run.settings(world, {"name": "prompt_tuning", "init": "normal"}, output=str(tmp_path / "runs"))
    plain["target"] = {"steps": 0}
    folder = tiny_run.trained(tiny_run.load(tmp_path, plain))
    results = json.loads((folder / "results.json").read_text())
    assert {(entry["task"], entry["steps"]) for entry in results} == {("mood", 0), ("count", 0)}
    # Not a gradient has touched it: the exported prompt is the initial one of this seed and task.
    prompt = load_file(folder / "target" / "mood" / "adapter" / "adapter_model.safetensors")["prompt_embeddings"]
    assert abs(float(prompt.std()) - 1) < 0.3


def test_a_mistyped_backbone_is_fixed_under_the_same_name(tmp_path: Path) -> None:
    world = tiny_run.world(tmp_path / "world")
    plain = tiny_run.settings(world, {"name": "prompt_tuning"}, output=str(tmp_path / "runs"))
    wrong = tiny_run.load(tmp_path, {**plain, "backbone": {"path": str(tmp_path / "nowhere")}})
    assert run_all(wrong) == 2
    right = tiny_run.load(tmp_path, plain)
    assert run_all(right) == 0
    # What was trained is not overwritten by a third configuration, failed or not.
    assert run_all(tiny_run.load(tmp_path, {**plain, "seed": 1})) == 2
    assert json.loads((right.directory / "status.json").read_text())["state"] == "finished"


@pytest.fixture(scope="module")
def random_t5(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t5")
    AutoTokenizer.from_pretrained(data_root / "t5-tokenizer").save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"d_model": 16, "d_kv": 4, "num_heads": 4, "d_ff": 32, "num_layers": 1, "num_decoder_layers": 1}
    T5ForConditionalGeneration(T5Config(vocab_size=32128, decoder_start_token_id=0, **shape)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("shipped", ["bpt/t5_base_6.yaml", "multi_target/bpt_t5_base_6.yaml"])
def test_the_published_set_up_runs_on_all_tasks_of_the_data_pack(
    shipped: str, data_root: Path, random_t5: Path, tmp_path: Path
) -> None:
    few = ["source.steps=2", "target.steps=2", "max_train_rows=24", "max_eval_rows=4", "max_source_length=32", "length=4"]
    places = [f"data.root={data_root}", f"backbone={random_t5}", f"output={tmp_path}", "seeds=0", "tracking.mlflow=false"]
    config = configuration.load(REPOSITORY / "configs" / shipped, [*few, *places, "figures=false", "max_new_tokens=4"])
    assert run_all(config) == 0
    (folder,) = [one.directory for one in configuration.expand(config)]
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    results = json.loads((folder / "results.json").read_text())
    assert {entry["task"] for entry in results} == set(config.data.target_tasks)
    losses = [json.loads(line)["metrics"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {f"source/loss/{task}" for task in config.data.source_tasks} <= set(losses[0])
    for entry in results:
        if entry["headline"]:
            predictions = (folder / "target" / entry["task"] / "predictions.jsonl").read_text().splitlines()
            assert len(predictions) == entry["n"] > 0
