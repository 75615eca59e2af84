"""What is no soft prompt is stored with all it takes to use it again, by tensors and by `bpt-dist eval`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import tiny_t5
import torch
from transformers import T5ForConditionalGeneration
from typer.testing import CliRunner

from bpt_dist import train
from bpt_dist.artifacts.weights import read_facts, read_weights, write_weights
from bpt_dist.backbones import loading
from bpt_dist.commands.eval import evaluate_stored
from bpt_dist.commands.main import app
from bpt_dist.config import EvaluationConfig, RunConfig
from bpt_dist.config.method_source import method_names
from bpt_dist.data.batches import Batches
from bpt_dist.data.prepare import prepare
from bpt_dist.errors import ConfigError, NonFinite
from bpt_dist.methods.base import Method

LORA = "lora"
NAMES = [name for name in method_names() if name not in ("bpt", "prompt_tuning", "vanilla_transfer")]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.world(tmp_path_factory.mktemp("world"))


def run(world: Path, folder: Path, name: str, **sections: Any) -> tuple[RunConfig, Method]:
    """Train a whole run and return its configuration with the method as it was when the run finished."""
    kept: list[Method] = []
    finish = train.TrainingRun.finish
    plain = tiny_run.settings(world, {"name": name}, output=str(folder / "runs"), **sections)
    config = tiny_run.load(folder, plain)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.TrainingRun, "finish", lambda run: (kept.append(run.method), finish(run))[1])
        tiny_run.trained(config)
    return config, kept[0]


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_eval_of_a_run_reproduces_its_metrics_for_every_target(world: Path, tmp_path: Path, name: str, joint: bool) -> None:
    config, method = run(world, tmp_path, name, target={"joint": joint, "steps": 4})
    if method.prompts() is not None:
        pytest.skip("a soft prompt; test_cli.py and the contract tests read it back")
    results = json.loads((config.directory / "results.json").read_text())
    for task in config.data.target_tasks:
        stored = config.directory / "target" / ("joint" if joint else task) / "weights"
        found, _ = evaluate_stored(stored, config, task, "test")
        assert found.metrics == {entry["metric"]: entry["value"] for entry in results if entry["task"] == task}
    facts = read_facts(stored)
    assert facts["method"] == name
    assert facts["trainable_parameters"] // len(facts["target_tasks"]) == results[-1]["trainable_parameters"]
    shown = CliRunner().invoke(app, ["eval", str(config.directory), "--task", "mood"])
    assert shown.exit_code == 0, shown.output
    assert "accuracy" in shown.output


def test_an_exported_folder_is_evaluated_away_from_its_run(world: Path, tmp_path: Path) -> None:
    config, _ = run(world, tmp_path, "adapters", data={"target_tasks": ["mood"]})
    written = CliRunner().invoke(app, ["export", str(config.directory), "--out", str(tmp_path / "out")])
    assert written.exit_code == 0, written.output
    assert "bpt-dist eval" in written.output
    shutil.move(config.directory, tmp_path / "elsewhere")
    arguments = ["eval", str(tmp_path / "out" / "mood"), "--task", "mood", "-c", str(tmp_path / "elsewhere" / "config.yaml")]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    # One of a single target is also judged on a task it was not trained on.
    assert CliRunner().invoke(app, [*arguments[:3], "count", *arguments[4:]]).exit_code == 0


def test_low_rank_changes_give_peft_the_bits_of_the_run(world: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    config, method = run(world, tmp_path, LORA, data={"target_tasks": ["mood"]}, target={"steps": 5, "lr": 0.05})
    folder = config.directory / "target" / "mood" / "adapter"
    stock = T5ForConditionalGeneration.from_pretrained(world / "t5").eval()
    theirs = PeftModel.from_pretrained(stock, folder).eval()
    backbone = loading.load(str(world / "t5"))
    (data,) = prepare(("mood",), config.data, backbone.tokenizer, splits=("train",), seed=0)
    batch = Batches([data.train.tokens], 4, 0).at(0)
    ours = read_weights(folder.parent / "weights", backbone, data.spec, EvaluationConfig())
    with torch.no_grad():
        expected = ours(batch).logits[0]
        found = theirs(input_ids=batch.source_ids, attention_mask=batch.source_mask, labels=batch.target_ids).logits
        before = loading.load(str(world / "t5")).log_likelihood(batch, lambda embeds: embeds[None], "token_sum").logits[0]
    assert torch.equal(found, expected)
    assert not torch.equal(expected, before)
    tiny_run.assert_same(ours.snapshot(), method.snapshot())
    card = (folder / "README.md").read_text()
    assert "a change of rank 8 of 12 linear layers" in card
    assert "| mood | test | accuracy |" in card


def test_another_backbone_and_unknown_methods_and_options_are_refused(world: Path, tmp_path: Path) -> None:
    config, method = run(world, tmp_path, "bitfit", data={"target_tasks": ["mood"]})
    stored = config.directory / "target" / "mood" / "weights"
    backbone = loading.load(str(world / "t5"))
    (data,) = prepare(("mood",), config.data, backbone.tokenizer, splits=("train",), seed=0)
    other = loading.load(str(tiny_t5.make(tmp_path / "other", seed=5)))
    with pytest.raises(ConfigError, match=r"weights: was made with another backbone .*; set backbone\.path to that one"):
        read_weights(stored, other, data.spec, EvaluationConfig())
    for key, value, message in (
        ("method", "os", r"is of method 'os'; this version has adapters, "),
        ("options", {"name": "bitfit", "depth": 3}, r"weights\.json: options are not those of this version"),
    ):
        spoilt = Path(shutil.copytree(stored, tmp_path / key))
        (spoilt / "weights.json").write_text(json.dumps({**read_facts(stored), key: value}))
        with pytest.raises(ConfigError, match=message):
            read_weights(spoilt, backbone, data.spec, EvaluationConfig())
    method.begin_target(None, [data.spec], [32], None)  # type: ignore[arg-type]
    bad = {name: tensor / 0 for name, tensor in method.snapshot().items()}
    with pytest.raises(NonFinite, match="holds NaN or infinity"):
        write_weights(method, bad, None, ["mood"], [32], tmp_path / "bad")
    assert not (tmp_path / "bad" / "weights.json").exists()
