"""A converted folder is the model that was written into the GGUF: every weight by its bits, every logit, every piece of a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed: pip install 'bpt_dist[convert]'")
import tiny_gguf  # noqa: E402

from bpt_dist.commands.convert import tokenizer as tokenizers  # noqa: E402
from bpt_dist.commands.convert.header import can_dequantize  # noqa: E402
from bpt_dist.commands.convert.tensors import halves_from_pairs  # noqa: E402
from bpt_dist.commands.main import main  # noqa: E402

TYPES = gguf.GGMLQuantizationType
READ_BY_TRANSFORMERS = ("llama", "llama, own head", "qwen2", "gemma3")
TEXTS = ("the thin  12 3.5", " in\n\tthe", "a  1", "café 日本 🙂", "<|start|>the<|end|>")


def converted(source: Path, out: Path) -> Path:
    assert main(["convert", str(source), str(out)]) == 0
    return out


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, 260, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", tiny_gguf.FAMILIES)
def test_weights_and_logits_are_those_of_the_model(family: str, tmp_path: Path, ids: torch.Tensor) -> None:
    model = tiny_gguf.write(tmp_path / "m.gguf", family)
    out = converted(tmp_path / "m.gguf", tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(out).eval()
    assert type(again) is type(model)
    wanted, found = model.state_dict(), again.state_dict()
    assert wanted.keys() == found.keys()
    # Adding and taking away the 1 of Gemma's norms rounds; everything else is exact.
    exact = [name for name in wanted if not (family == "gemma3" and name.endswith("norm.weight"))]
    assert all(torch.equal(wanted[name], found[name]) for name in exact)
    torch.testing.assert_close(logits(again, ids), logits(model, ids), rtol=0, atol=1e-5 if family == "gemma3" else 0)


@pytest.mark.parametrize("family", READ_BY_TRANSFORMERS)
def test_transformers_reads_the_same_model_from_the_gguf(family: str, tmp_path: Path, ids: torch.Tensor) -> None:
    tiny_gguf.write(tmp_path / "m.gguf", family, kind=TYPES.Q8_0)
    out = converted(tmp_path / "m.gguf", tmp_path / "out")
    direct = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).eval()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out).eval(), ids), logits(direct, ids))


@pytest.mark.parametrize(
    "kind",
    [TYPES.F32, TYPES.F16, TYPES.BF16, TYPES.Q8_0, TYPES.Q4_0, TYPES.Q4_1, TYPES.Q5_0, TYPES.Q5_1],
    ids=lambda kind: kind.name,
)
def test_numbers_are_what_gguf_dequantises(kind: Any, tmp_path: Path) -> None:
    tiny_gguf.write(tmp_path / "m.gguf", "qwen2", kind=kind)  # a family whose rows keep their order
    weights = load_file(converted(tmp_path / "m.gguf", tmp_path / "out") / "model.safetensors")
    stored = {
        tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors
    }
    for theirs, ours in (("token_embd.weight", "model.embed_tokens.weight"),
                         ("blk.1.attn_q.weight", "model.layers.1.self_attn.q_proj.weight"),
                         ("blk.0.ffn_down.weight", "model.layers.0.mlp.down_proj.weight")):  # fmt: skip
        np.testing.assert_array_equal(weights[ours].view(np.uint32), np.ascontiguousarray(stored[theirs]).view(np.uint32))
    assert json.loads((tmp_path / "out" / "provenance.json").read_text())["tensors"][kind.name] >= 15


@pytest.mark.parametrize("kind", [TYPES.Q4_K, TYPES.Q6_K], ids=lambda kind: kind.name)
def test_blocks_of_256_are_read(kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`gguf` does not write these types: random blocks with finite scales."""

    def blocks(array: np.ndarray, stored: Any) -> np.ndarray:
        count = array.shape[-1] // 256
        raw = np.random.default_rng(0).integers(
            0, 256, (*array.shape[:-1], count, gguf.GGML_QUANT_SIZES[stored][1]), dtype=np.uint8
        )
        scales = np.full((*array.shape[:-1], count, 1), 0.01, dtype=np.float16).view(np.uint8)
        for start in {TYPES.Q4_K: (0, 2), TYPES.Q6_K: (208,)}[stored]:
            raw[..., start : start + 2] = scales
        return raw.reshape(*array.shape[:-1], -1)

    monkeypatch.setattr(gguf, "quantize", blocks)
    wide = tiny_gguf.model_of("qwen2", 256)
    monkeypatch.setattr(tiny_gguf, "model_of", lambda family: wide)
    tiny_gguf.write(tmp_path / "m.gguf", "qwen2", kind=kind)
    weights = load_file(converted(tmp_path / "m.gguf", tmp_path / "out") / "model.safetensors")
    (stored,) = [tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors if tensor.name == "blk.1.ffn_up.weight"]
    np.testing.assert_array_equal(weights["model.layers.1.mlp.up_proj.weight"], gguf.dequantize(stored.data, kind))
    assert np.ptp(weights["model.layers.1.mlp.up_proj.weight"]) > 0


def test_types_that_the_issue_names_can_be_dequantised_and_integers_cannot() -> None:
    assert all(can_dequantize(TYPES[name]) for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K"))
    assert not any(can_dequantize(TYPES[name]) for name in ("I8", "I32", "F64", "Q8_K"))


def test_rows_of_pairs_become_rows_of_halves() -> None:
    rows = np.arange(8)[:, None] * np.ones(3)  # two heads of four rows
    assert halves_from_pairs(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_texts_become_the_pieces_of_the_file_and_come_back(tmp_path: Path) -> None:
    tiny_gguf.write(tmp_path / "m.gguf", keys={"tokenizer.chat_template": "{{ messages[0].content }}!"})
    tokenizer = AutoTokenizer.from_pretrained(converted(tmp_path / "m.gguf", tmp_path / "out"))
    tokens, _, _ = tiny_gguf.pieces()
    assert tokenizer.convert_ids_to_tokens(range(len(tokens))) == tokens
    assert tokenizer.tokenize("the thin  12") == ["the", "Ġth", "in", "ĠĠ", "1", "2"]  # digits are cut before blanks are
    assert [tokenizer.decode(tokenizer(text).input_ids) for text in TEXTS] == list(TEXTS)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|start|>", "<|end|>", "<|end|>")
    assert tokenizer.model_max_length == tiny_gguf.CONTEXT
    assert tokenizer.apply_chat_template([{"role": "user", "content": "the"}], tokenize=False) == "the!"


@pytest.mark.parametrize(
    ("keys", "begins"), [({}, True), ({"tokenizer.ggml.add_bos_token": False}, False)], ids=["not said", "said no"]
)
def test_llama_3_begins_texts_where_the_file_does_not_say(keys: dict[str, Any], begins: bool, tmp_path: Path) -> None:
    silent = {"tokenizer.ggml.add_bos_token": None, "tokenizer.ggml.pre": "llama-bpe"}
    tiny_gguf.write(tmp_path / "m.gguf", keys=silent | keys)
    tokenizer = AutoTokenizer.from_pretrained(converted(tmp_path / "m.gguf", tmp_path / "out"))
    assert (tokenizer("the").input_ids[0] == tokenizer.bos_token_id) == begins
    assert tokenizer.tokenize("12") == ["12"]
    assert tokenizer.backend_tokenizer.model.ignore_merges


def test_ways_to_cut_texts_are_those_that_transformers_knows() -> None:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    assert set(tokenizers.SPLITS) - set(GGUF_PRE_TOKENIZER_SPLITS) == {"gpt-2", "smollm"}


def test_a_file_in_several_parts_is_one_model(tmp_path: Path, ids: torch.Tensor) -> None:
    model = tiny_gguf.write(tmp_path / "m.gguf", split_max_tensors=8)
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert len(parts) == 3
    out = converted(parts[1], tmp_path / "out")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out).eval(), ids), logits(model, ids))
    assert [file["name"] for file in json.loads((out / "provenance.json").read_text())["source"]["files"]] == [
        part.name for part in parts
    ]


def test_where_it_comes_from_is_written_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import hashlib

    model = tiny_gguf.write(tmp_path / "m.gguf", kind=TYPES.Q8_0)
    out = converted(tmp_path / "m.gguf", tmp_path / "made" / "out")
    facts = json.loads((out / "provenance.json").read_text())
    assert facts["source"]["sha256"] == hashlib.sha256((tmp_path / "m.gguf").read_bytes()).hexdigest()
    assert facts["licence"]["file"] == "apache-2.0"
    assert facts["tensors"] == {"F32": 5, "Q8_0": 15}
    assert facts["model"]["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert facts["model"]["embedding_rms"] == pytest.approx(
        model.get_input_embeddings().weight.square().mean().sqrt().item(), rel=1e-2
    )
    assert set(facts["versions"]) >= {"gguf", "transformers"}
    said = capsys.readouterr().out.splitlines()
    assert said[-3:] == [
        f"LlamaForCausalLM, {facts['model']['parameters']:,} numbers from tensors of 5 F32, 15 Q8_0",
        "licence: apache-2.0",
        str(out),
    ]
    assert {path.name for path in (tmp_path / "made").iterdir()} == {"out"}
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "model.safetensors",
        "provenance.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
