"""PEFT reads what a decoder-only backbone exports, and its logits are ours; prompts of PEFT are read back."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_decoder
import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model

from bpt_dist.artifacts.model_card import AUTO_CLASSES, CardFacts
from bpt_dist.artifacts.peft_export import export_low_rank, export_multitask, export_prompt
from bpt_dist.backbones import loading
from bpt_dist.backbones.base import Backbone
from bpt_dist.backbones.prompts import prepend, read_prompt
from bpt_dist.config import EvaluationConfig
from bpt_dist.distributed.mesh import Mesh
from bpt_dist.errors import ConfigError
from bpt_dist.methods.lora import Config, Lora
from bpt_dist.tasks.spec import TaskSpec

LENGTH = 4
CARD = CardFacts(title="A prompt", method="bpt", backbone_hash="ab" * 32, tokenizer_hash="cd" * 32, protocol="fixed")
SOURCE, TARGET = torch.tensor([[9, 30, 55, 2]]), torch.tensor([[17, 40, 1]])


@pytest.fixture(params=["llama", "gemma3_text"])
def backbone(request: pytest.FixtureRequest, tmp_path: Path) -> Backbone:
    found = loading.load(str(tiny_decoder.make(tmp_path / "model", request.param)))
    found.use_packed_pass("eager")
    return found


def batch() -> SimpleNamespace:
    return SimpleNamespace(source_ids=SOURCE, source_mask=torch.ones_like(SOURCE), target_ids=TARGET)


def places(backbone: Backbone) -> dict[str, object]:
    return {"base_model": backbone.path, "revision": None, "config_facts": backbone.facts, "card": CARD}


def of_targets(logits: torch.Tensor) -> torch.Tensor:
    """Return the logits that predict the target where a model has read prompt, source and target."""
    return logits[0, -TARGET.shape[1] - 1 : -1]


@pytest.mark.filterwarnings("ignore:Position ids are not supported")  # of PEFT, which counts them itself
def test_a_prompt_has_the_same_logits_under_peft(backbone: Backbone, tmp_path: Path) -> None:
    prompt = torch.randn(LENGTH, backbone.width, generator=torch.Generator().manual_seed(2))
    folder = export_prompt(prompt, tmp_path / "adapter", **places(backbone))
    model = PeftModel.from_pretrained(tiny_decoder.stock(Path(backbone.path)), folder).eval()
    ids = torch.cat([SOURCE, TARGET], dim=1)
    ours = backbone.log_likelihood(batch(), lambda embeds: prepend(prompt[None], embeds), "token_sum").logits[0, 0]
    torch.testing.assert_close(of_targets(model(input_ids=ids).logits), ours, rtol=1e-5, atol=1e-5)
    written = model.generate(input_ids=SOURCE, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, SOURCE.shape[1] :]
    expected = backbone.generate(batch(), lambda embeds: prepend(prompt[None], embeds), 6)[0][0]
    assert backbone.tokenizer.decode(written, skip_special_tokens=True) == expected
    facts = json.loads((folder / "adapter_config.json").read_text())
    assert (facts["peft_type"], facts["task_type"]) == ("PROMPT_TUNING", "CAUSAL_LM")
    page = (folder / "README.md").read_text()
    assert AUTO_CLASSES["CAUSAL_LM"] in page
    assert "Seq2Seq" not in page
    assert "pipeline_tag: text-generation" in page
    assert torch.equal(read_prompt(folder, backbone.width, task_type="CAUSAL_LM"), prompt)


def test_prompts_trained_together_have_the_same_logits_under_peft(backbone: Backbone, tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(2)
    shared, cols = torch.randn(LENGTH, backbone.width, generator=draw), torch.randn(2, LENGTH, 1, generator=draw)
    rows = torch.randn(2, 1, backbone.width, generator=draw)
    folder = export_multitask(shared, cols, rows, tmp_path / "adapter", tasks=("a", "b"), **places(backbone))
    model = PeftModel.from_pretrained(tiny_decoder.stock(Path(backbone.path)), folder).eval()
    for task in (0, 1):
        prompt = shared * (cols[task] @ rows[task])
        logits = model(input_ids=torch.cat([SOURCE, TARGET], dim=1), task_ids=torch.tensor([task])).logits
        ours = backbone.log_likelihood(batch(), lambda embeds, p=prompt: prepend(p[None], embeds), "token_sum").logits[0, 0]
        torch.testing.assert_close(of_targets(logits), ours, rtol=1e-5, atol=1e-5)


def test_low_rank_changes_have_the_same_logits_under_peft(backbone: Backbone, tmp_path: Path) -> None:
    """`q` and `v` of the configuration are q_proj and v_proj here."""
    method = Lora(Config(rank=2), backbone, seed=0, reduction="token_sum", evaluation=EvaluationConfig())
    method.begin_target(None, [TaskSpec(name="a", summary="", kind="text", metrics=())], [1], Mesh())
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(0.3)
    pairs = method.low_rank_pairs()
    assert {name.rsplit(".", 1)[-1] for name in pairs.pairs} == {"q_proj", "v_proj"}
    folder = export_low_rank(pairs.pairs, pairs.alpha, tmp_path / "adapter", **places(backbone))
    model = PeftModel.from_pretrained(tiny_decoder.stock(Path(backbone.path)), folder).eval()
    ours = backbone.log_likelihood(batch(), lambda embeds: embeds[None], "token_sum").logits[0, 0]
    logits = model(input_ids=torch.cat([SOURCE, TARGET], dim=1)).logits
    torch.testing.assert_close(of_targets(logits), ours, rtol=1e-5, atol=1e-5)
    method.end()
    plain = backbone.log_likelihood(batch(), lambda embeds: embeds[None], "token_sum").logits[0, 0]
    assert not torch.allclose(plain, ours, atol=1e-3)


def test_a_prompt_that_peft_trained_is_read(backbone: Backbone, tmp_path: Path) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH)
    trained = get_peft_model(tiny_decoder.stock(Path(backbone.path)), config)
    trained.save_pretrained(tmp_path / "theirs")
    found = read_prompt(tmp_path / "theirs", backbone.width, task_type=backbone.task_type)
    assert torch.equal(found, trained.prompt_encoder["default"].embedding.weight.detach())


def test_a_prompt_of_another_kind_of_model_is_refused(backbone: Backbone, tmp_path: Path) -> None:
    facts = {**backbone.facts, "task_type": "SEQ_2_SEQ_LM"}
    folder = export_prompt(torch.ones(LENGTH, backbone.width), tmp_path / "adapter", **{**places(backbone), "config_facts": facts})
    with pytest.raises(ConfigError, match=r"task_type is SEQ_2_SEQ_LM.*an encoder-decoder.*a decoder-only model; give a"):
        read_prompt(folder, backbone.width, task_type=backbone.task_type)
    with pytest.raises(ConfigError, match="is 32 wide, the backbone 48; choose a backbone of width 32"):
        read_prompt(folder, 48)
