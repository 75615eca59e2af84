"""A decoder-only checkpoint is loaded as transformers loads it, or refused in one line that says what it is and what to do."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_decoder
import torch
from safetensors.torch import load_file, save_file

from bpt_dist.backbones import loading
from bpt_dist.backbones.decoder.config import rotates_by_length
from bpt_dist.backbones.prompts import embedding_rms
from bpt_dist.errors import ConfigError

IDS = torch.tensor([[4, 9, 30, 55, 2, 17]])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_decoder.make(tmp_path / "model")


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("family", tiny_decoder.FAMILIES)
def test_logits_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    """Frequencies of positions and scales of embeddings are in no file, and are there all the same."""
    folder = tiny_decoder.make(tmp_path, family)
    backbone = loading.load(str(folder))
    torch.testing.assert_close(backbone.model(IDS).logits, tiny_decoder.stock(folder)(IDS).logits, rtol=1e-5, atol=1e-5)
    assert backbone.num_blocks == {"model": 3}
    assert (backbone.width, backbone.vocabulary_size) == (tiny_decoder.WIDTH, tiny_decoder.NUM_PIECES)
    backbone.verify_unchanged()


def test_rows_of_the_vocabulary_are_what_enters_the_model(tmp_path: Path) -> None:
    """Gemma multiplies its table by the root of the width: a prompt that starts from words must have that size."""
    folder = tiny_decoder.make(tmp_path, "gemma3_text")
    backbone, table = loading.load(str(folder)), load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    expected = table[[5, 7]] * torch.tensor(tiny_decoder.WIDTH**0.5)
    torch.testing.assert_close(backbone.vocabulary_rows(torch.tensor([5, 7])), expected)
    assert embedding_rms(backbone) == pytest.approx(float(table.square().mean()) ** 0.5 * tiny_decoder.WIDTH**0.5, rel=1e-5)


def test_a_start_token_comes_from_the_tokenizer_or_the_family(tmp_path: Path) -> None:
    starts = {
        name: loading.load(str(tiny_decoder.make(tmp_path / name, family, starts=put))).text_form.start
        for name, family, put in (("plain", "llama", False), ("put", "llama", True), ("gemma", "gemma3_text", False))
    }
    assert starts == {"plain": None, "put": 3, "gemma": 3}


def test_weights_in_bf16_are_rounded_once(folder: Path) -> None:
    backbone, stored = loading.load(str(folder), dtype="bf16"), load_file(folder / "model.safetensors")
    for name, weight in backbone.model.state_dict().items():
        assert torch.equal(weight, stored[name].bfloat16()), name
    assert backbone.model.model.rotary_emb.inv_freq.dtype is torch.float32


@pytest.mark.parametrize("kind", ["dynamic", "yarn"])
def test_rotations_that_depend_on_the_length_are_left_to_the_stock_pass(tmp_path: Path, kind: str) -> None:
    rotation = {"rope_type": kind, "factor": 2.0, "rope_theta": 1e4}
    backbone = loading.load(str(tiny_decoder.make(tmp_path, rope_parameters=rotation)))
    backbone.use_packed_pass("sdpa")
    assert rotates_by_length(backbone.model.config) == (kind == "dynamic")
    assert backbone.reads_prompts_once == (kind != "dynamic")


def test_a_special_piece_of_the_tokenizer_needs_no_row(tmp_path: Path) -> None:
    """The tokenizer of Gemma 3 has a piece for pictures behind the last row of its text models."""
    folder = tiny_decoder.make(tmp_path)
    pieces = tiny_decoder.tokenizer()
    pieces.add_special_tokens({"additional_special_tokens": ["<picture>"]})
    pieces.save_pretrained(folder)
    assert len(loading.load(str(folder)).tokenizer) == tiny_decoder.NUM_PIECES + 1


def test_the_weights_that_tokens_pass_are_those_of_the_linear_layers(tmp_path: Path) -> None:
    backbone = loading.load(str(tiny_decoder.make(tmp_path, "gemma3_text")))
    weights = load_file(tmp_path / "model.safetensors")
    of_layers = sum(weight.numel() for name, weight in weights.items() if name.endswith("_proj.weight"))
    assert backbone.matmul_weights() == (of_layers, of_layers + tiny_decoder.WIDTH * tiny_decoder.NUM_PIECES)


def remove_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def other_tokenizer(folder: Path) -> None:
    pieces = tiny_decoder.tokenizer()
    pieces.add_tokens(["another", "word"])
    pieces.save_pretrained(folder)


def edit_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return edit


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "encoder only": (
        lambda folder: change_config(folder, model_type="bert", architectures=["BertForMaskedLM"]),
        r"is a 'bert' model, an encoder without a decoder; .*model_type t5, mt5, llama, .* or mistral",
    ),
    "both directions": (
        lambda folder: change_config(folder, use_bidirectional_attention=True),
        "reads a text in both directions .* give a model that generates text",
    ),
    "multimodal": (
        lambda folder: change_config(folder, model_type="gemma3", vision_config={"hidden_size": 8}),
        "is a 'gemma3' model, which reads more than text; .* choose one",
    ),
    "mixture of experts": (
        lambda folder: change_config(folder, model_type="mixtral", num_local_experts=8),
        "is a 'mixtral' model, a mixture of experts; .* choose one",
    ),
    "quantised": (
        lambda folder: change_config(folder, quantization_config={"quant_method": "gptq"}),
        "has quantised weights .* give the checkpoint they were made from",
    ),
    "no tokenizer": (remove_tokenizer, "tokenizer"),
    "tokenizer of another model": (other_tokenizer, "has 130 pieces, the model only 128 rows; they do not belong together"),
    "depth of another model": (
        lambda folder: change_config(folder, num_hidden_layers=5),
        r"lacks .* weights of the model \(model.layers.3.*; its config.json is that of another model",
    ),
    "width of another model": (lambda folder: change_config(folder, intermediate_size=40), "with shape .* its config.json says"),
    "no head": (edit_weights(lambda tensors: tensors.pop("lm_head.weight")), "tie_word_embeddings: false.* was not saved"),
    "tied by mistake": (
        lambda folder: change_config(folder, tie_word_embeddings=True),
        "holds a head of its own .* set tie_word_embeddings to false",
    ),
    "a wrapper": (
        edit_weights(lambda tensors: [tensors.update({f"base.{name}": tensors.pop(name)}) for name in list(tensors)]),
        "all names begin with 'base.': a wrapper was saved; save the llama model inside it",
    ),
    "no size": (lambda folder: change_config(folder, num_hidden_layers=0), "num_hidden_layers: 0, expected 1 or more"),
    "an end outside": (lambda folder: change_config(folder, eos_token_id=500), r"has eos_token_id \[1, 500\] of 128 tokens"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_prompted_is_refused(folder: Path, case: str) -> None:
    change, message = REFUSED[case]
    change(folder)
    with pytest.raises(ConfigError) as refused:
        loading.load(str(folder))
    text = str(refused.value)
    assert re.search(message, text), text
    assert text.startswith("backbone.path: ")
    assert "\n" not in text
