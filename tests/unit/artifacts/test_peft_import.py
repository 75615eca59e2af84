"""The PEFT folder of a low-rank change is evaluated alone; what it does not fit, or holds beside, is refused by name."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import tiny_t5
import torch
from peft import LoraConfig, get_peft_model
from transformers import T5ForConditionalGeneration
from typer.testing import CliRunner

from bpt_dist.artifacts.peft_import import read_low_rank
from bpt_dist.backbones import loading
from bpt_dist.commands.eval import evaluate_stored
from bpt_dist.commands.main import app
from bpt_dist.config import RunConfig
from bpt_dist.data.prepare import specs
from bpt_dist.errors import ConfigError
from bpt_dist.tasks import catalogue


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Train LoRA on one target."""
    folder = tiny_run.world(tmp_path_factory.mktemp("world"))
    plain = tiny_run.settings(folder, {"name": "lora", "rank": 4, "alpha": 6}, data={"target_tasks": ["mood"]})
    config = tiny_run.load(folder, plain)
    tiny_run.trained(config)
    return config


@pytest.fixture
def adapter(config: RunConfig, tmp_path: Path) -> Path:
    """Copy the adapter to another place: it is all that an engineer gets."""
    return Path(shutil.copytree(config.directory / "target" / "mood" / "adapter", tmp_path / "copy"))


def test_the_folder_alone_gives_the_results_of_the_run(config: RunConfig, adapter: Path) -> None:
    results = json.loads((config.directory / "results.json").read_text())
    found, _ = evaluate_stored(adapter, config, "mood", "test")
    assert found.metrics == {entry["metric"]: entry["value"] for entry in results}
    shown = CliRunner().invoke(app, ["eval", str(config.directory / "target" / "mood" / "adapter")])
    assert shown.exit_code == 0, shown.output
    assert "accuracy" in shown.output


@pytest.mark.parametrize(("targets", "rank", "alpha"), [(["q", "v"], 3, 5), (["wi", "wo", "k", "o"], 2, 7)])
@torch.no_grad()
def test_what_peft_trained_gives_pefts_logits(targets: list[str], rank: int, alpha: int, config: RunConfig, tmp_path: Path) -> None:
    options = LoraConfig(task_type="SEQ_2_SEQ_LM", r=rank, lora_alpha=alpha, target_modules=targets, init_lora_weights=False)
    theirs = get_peft_model(T5ForConditionalGeneration.from_pretrained(config.backbone.path), options).eval()
    theirs.save_pretrained(str(tmp_path))
    backbone = loading.load(config.backbone.path)
    ids = torch.randint(3, 128, (2, 6), generator=torch.Generator().manual_seed(1))
    target = ids[:, :4].contiguous()
    untouched = backbone.model(input_ids=ids, labels=target).logits
    spec = catalogue.get("mood", specs(config.data))
    read_low_rank(tmp_path, backbone, spec, config.evaluation, config.reduction)
    ours = backbone.model(input_ids=ids, labels=target).logits
    expected = theirs(input_ids=ids, labels=target).logits
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    assert (ours - untouched).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"use_dora": True}, "has use_dora=True, which is not evaluated here; merge the adapter"),
        ({"rank_pattern": {"q": 2}}, "has rank_pattern={'q': 2}"),
        ({"target_modules": "all-linear"}, "has target_modules=all-linear"),
        ({"target_modules": ["q"]}, "does not fit"),
        ({"r": 3}, "does not fit"),
        ({"r": "four"}, "r: Input should be a valid integer"),
    ],
    ids=str,
)
def test_an_adapter_that_is_more_or_other_than_ours_is_refused_by_name(
    changes: dict[str, Any], problem: str, config: RunConfig, adapter: Path
) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ConfigError, match=re.escape(problem)):
        evaluate_stored(adapter, config, "mood", "test")


def test_an_adapter_of_another_backbone_is_refused(config: RunConfig, adapter: Path, tmp_path: Path) -> None:
    tiny_t5.make(tmp_path / "deeper", layers=3)
    other = config.model_copy(update={"backbone": config.backbone.model_copy(update={"path": str(tmp_path / "deeper")})})
    with pytest.raises(ConfigError, match="does not fit"):
        evaluate_stored(adapter, other, "mood", "test")


@pytest.mark.parametrize("content", [b"", b"{", b"[]"])
def test_a_damaged_folder_is_one_line(content: bytes, config: RunConfig, adapter: Path) -> None:
    (adapter / "adapter_config.json").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        evaluate_stored(adapter, config, "mood", "test")
    assert len(str(caught.value).splitlines()) == 1
