"""A checkpoint is loaded whole, from exactly the files that are hashed, or refused in one line that names what is wrong."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save
from stored_t5 import StoredT5
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, T5ForConditionalGeneration

from bpt_dist.backbones import loading
from bpt_dist.backbones.prompts import prepend
from bpt_dist.backbones.t5.shapes import shape_of
from bpt_dist.errors import ConfigError

Change = Callable[[StoredT5], None]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> StoredT5:
    return StoredT5.make(tmp_path_factory.mktemp("tied"))


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> StoredT5:
    return StoredT5.make(tmp_path_factory.mktemp("untied"), tied=False)


def texts() -> SimpleNamespace:
    ids = torch.randint(3, 128, (3, 6), generator=torch.Generator().manual_seed(3))
    return SimpleNamespace(source_ids=ids, source_mask=torch.ones_like(ids), target_ids=ids[:, :4].contiguous())


def inputs(embeds: Tensor) -> Tensor:
    return prepend(torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(5)), embeds)


@torch.no_grad()
def log_likelihoods(folder: Path) -> tuple[Tensor, Tensor]:
    """Return what the stock and the packed pass compute."""
    backbone = loading.load(str(folder))
    stock = backbone.log_likelihood(texts(), inputs, "token_sum").log_likelihood
    backbone.use_packed_pass("sdpa")
    return stock, backbone.log_likelihood(texts(), inputs, "token_sum").log_likelihood


# --- refusals ----------------------------------------------------------------------------------------------------------


def encoder_only(t5: StoredT5) -> None:
    t5.tensors = {name: tensor for name, tensor in t5.tensors.items() if not name.startswith("decoder.")}


def wrapped(t5: StoredT5) -> None:
    t5.tensors = {f"model.{name}": tensor for name, tensor in t5.tensors.items()}


def one_layer_norm_dropped(t5: StoredT5) -> None:
    del t5.tensors["decoder.block.1.layer.2.layer_norm.weight"]


def no_word_embeddings(t5: StoredT5) -> None:
    del t5.tensors["shared.weight"]


def deeper_config(t5: StoredT5) -> None:
    t5.config["num_layers"] = 3


def absurdly_deep_config(t5: StoredT5) -> None:
    t5.config["num_layers"] = 10**9


def shallower_config(t5: StoredT5) -> None:
    t5.config["num_decoder_layers"] = 1


def gated_config(t5: StoredT5) -> None:
    t5.config |= {"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu_new", "is_gated_act": True}


def larger_vocabulary(t5: StoredT5) -> None:
    t5.config["vocab_size"] = 148


def other_heads(t5: StoredT5) -> None:
    t5.config |= {"num_heads": 2, "d_kv": 16}


def unmerged_lora(t5: StoredT5) -> None:
    t5.tensors["encoder.block.0.layer.0.SelfAttention.q.lora_A.weight"] = torch.zeros(2, 32)


def quantised_tensors(t5: StoredT5) -> None:
    name = "encoder.block.0.layer.0.SelfAttention.q.weight"
    t5.tensors |= {name: t5.tensors[name].to(torch.int8), f"{name.removesuffix('weight')}SCB": torch.ones(32)}


def integer_tensor(t5: StoredT5) -> None:
    name = "encoder.block.0.layer.0.SelfAttention.q.weight"
    t5.tensors[name] = t5.tensors[name].to(torch.int8)


def quantised_config(t5: StoredT5) -> None:
    t5.config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}


def head_of_another_model(t5: StoredT5) -> None:
    t5.tensors["lm_head.weight"] = t5.tensors["shared.weight"] + 1


def two_tables(t5: StoredT5) -> None:
    t5.tensors["decoder.embed_tokens.weight"] = t5.tensors["shared.weight"] + 1


def an_adapter_beside(t5: StoredT5) -> None:
    t5.files["adapter_config.json"] = b'{"peft_type": "LORA"}'


def stale_index(t5: StoredT5) -> None:
    locations = dict.fromkeys(t5.tensors, "model-00001-of-00002.safetensors")
    t5.files[INDEX] = json.dumps({"weight_map": locations}).encode()


def shards_and_one_file(t5: StoredT5) -> None:
    t5.files[SINGLE] = save(t5.tensors)
    t5.split(2)


def stray_shard(t5: StoredT5) -> None:
    t5.split(2)
    t5.files["model-00003-of-00003.safetensors"] = save(t5.tensors)


def shard_of_another_save(t5: StoredT5) -> None:
    t5.split(2)
    first, second = sorted(t5.shards)
    t5.files[second] = save({name: t5.tensors[name] for name in t5.shards[first]})


def index_that_leaves_the_folder(t5: StoredT5) -> None:
    stale_index(t5)
    t5.files[INDEX] = t5.files[INDEX].replace(b"model-00001", b"../model-00001")


def no_json_index(t5: StoredT5) -> None:
    t5.split(2)
    t5.files[INDEX] = b"{"


def torn_weights(t5: StoredT5) -> None:
    data = save(t5.tensors)
    t5.files[SINGLE] = data[: len(data) // 2]


def empty_weights(t5: StoredT5) -> None:
    t5.files[SINGLE] = b""


def torn_config(t5: StoredT5) -> None:
    t5.files["config.json"] = b'{"model_type": "t5", '


def list_config(t5: StoredT5) -> None:
    t5.files["config.json"] = b"[1]"


def word_for_a_number(t5: StoredT5) -> None:
    t5.config["d_model"] = "thirty-two"


def no_width(t5: StoredT5) -> None:
    t5.config["d_model"] = 0


def unknown_activation(t5: StoredT5) -> None:
    t5.config |= {"feed_forward_proj": "gated-nothing", "dense_act_fn": "nothing", "is_gated_act": True}


def end_token_outside(t5: StoredT5) -> None:
    t5.config["eos_token_id"] = 5000


def another_architecture(t5: StoredT5) -> None:
    t5.config |= {"model_type": "bart", "architectures": ["BartModel"]}


def other_weight_file(t5: StoredT5) -> None:
    t5.config["transformers_weights"] = "other.safetensors"


def larger_tokenizer(t5: StoredT5) -> None:
    tokenizer = json.loads((t5.tokenizer / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {f"more{n}": 128 + n for n in range(3)}
    t5.files["tokenizer.json"] = json.dumps(tokenizer).encode()


def torn_tokenizer(t5: StoredT5) -> None:
    t5.files["tokenizer.json"] = b'{"model": 1'


REFUSALS = {
    encoder_only: r"lacks 28 weights of the model \(decoder\.block\.0.*and 25 more\); it holds the encoder only",
    wrapped: r"lacks \d+ weights .* and holds \d+ weights it has no place for \(model\..*begin with 'model\.': a wrapper",
    one_layer_norm_dropped: r"lacks a weight of the model \(decoder\.block\.1\.layer\.2\.layer_norm\.weight\); .*saved in part",
    no_word_embeddings: r"lacks a weight of the model \(shared\.weight\)",
    deeper_config: r"lacks 8 weights of .*\(encoder\.block\.2\..*config\.json is that of another model",
    absurdly_deep_config: r"lacks a weight .*encoder\.block\.999999999\..*config\.json is that of another model",
    shallower_config: r"holds 13 weights that .* no place for \(decoder\.block\.1\..*config\.json is that of another model",
    gated_config: r"DenseReluDense\.wi_0\.weight.* no place for .*DenseReluDense\.wi\.weight",
    larger_vocabulary: r"holds shared\.weight with shape \[128, 32\], its config\.json says \[148, 32\].*vocab_size",
    other_heads: r"relative_attention_bias\.weight with shape \[32, 4\], its config\.json says \[32, 2\] and 1 more like it",
    unmerged_lora: r"no place for \(.*lora_A\.weight\); adapter layers were saved with it; merge them",
    quantised_tensors: r"\(encoder.*SCB\); its weights are quantised; give the checkpoint they were made from",
    integer_tensor: r"SelfAttention\.q\.weight as I8, expected one of BF16, F16, F32, F64; quantised",
    quantised_config: r"has quantised weights \(quantization_config in config\.json\).*give the checkpoint they were made from",
    head_of_another_model: r"holds a head of its own \(lm_head\.weight\), its config\.json says the head is shared\.weight",
    two_tables: r"holds shared\.weight and decoder\.embed_tokens\.weight with different values",
    an_adapter_beside: r"has an adapter beside the weights \(adapter_config\.json\).*move the adapter to a folder of its own",
    stale_index: r"two sets of weights: model\.safetensors, and .*index\.json of an earlier save.*remove the index",
    shards_and_one_file: r"two sets of weights: model\.safetensors, and .*index\.json with its shards; remove",
    stray_shard: r"two sets of weights, those model\.safetensors\.index\.json names and model-00003-of-00003\.safetensors; remove",
    shard_of_another_save: r"has \S+ in both model-00001-of-00002\.safetensors and model-00002",
    index_that_leaves_the_folder: r"without a weight_map from weights to files of this folder",
    no_json_index: r"has a model\.safetensors\.index\.json that cannot be read",
    torn_weights: r"has a model\.safetensors that cannot be read .*; copy or download it again",
    empty_weights: r"has a model\.safetensors that cannot be read .*; copy or download it again",
    torn_config: r"has a config\.json that cannot be read .*; copy or save it again",
    list_config: r"has a config\.json with list in it, not an object",
    word_for_a_number: r"has a config\.json that describes no T5 \(.*d_model",
    no_width: r"has a config\.json with d_model: 0, expected 1 or more",
    unknown_activation: r"has a config\.json that describes no T5 \(.*nothing",
    end_token_outside: r"has eos_token_id \[1, 5000\] of 128 tokens; fix it in config\.json",
    another_architecture: r"is a 'bart' model; this project prompts text models of certain families only",
    other_weight_file: r"names other weights in config\.json \(transformers_weights: other\.safetensors\)",
    larger_tokenizer: r"tokenizer in .* has 131 pieces, the model only 128 rows",
    torn_tokenizer: r"has no usable tokenizer \(",
}


@pytest.mark.parametrize("change", REFUSALS, ids=lambda change: change.__name__)
def test_what_is_no_whole_t5_is_refused_in_one_line(change: Change, tied: StoredT5, tmp_path: Path) -> None:
    t5 = tied.copy()
    change(t5)
    folder = t5.write(tmp_path / "t5")
    with pytest.raises(ConfigError, match=REFUSALS[change]) as refused:
        loading.load(str(folder))
    message = str(refused.value)
    assert message.startswith("backbone.path: ")
    assert str(folder) in message
    assert len(message.splitlines()) == 1
    assert refused.value.exit_code == 2


@pytest.mark.parametrize("change", [an_adapter_beside, quantised_config, torn_config, word_for_a_number, another_architecture])
def test_planning_refuses_what_loading_refuses_for_its_config(change: Change, tied: StoredT5, tmp_path: Path) -> None:
    t5 = tied.copy()
    change(t5)
    folder = t5.write(tmp_path / "t5")
    messages = []
    for read in (loading.load, shape_of):
        with pytest.raises(ConfigError) as refused:
            read(str(folder))
        messages.append(str(refused.value))
    assert messages[0] == messages[1]


def test_missing_files_are_refused_by_name(tied: StoredT5, tmp_path: Path) -> None:
    for number, (name, message) in enumerate(
        {
            "config.json": r"has no config\.json; give a folder",
            SINGLE: r"has no \.safetensors weights \(pickled weights are never read\).*; convert",
            "tokenizer.json": r"tokenizer",
        }.items()
    ):
        folder = tied.write(tmp_path / str(number))
        (folder / name).unlink()
        (folder / "tokenizer_config.json").unlink()
        with pytest.raises(ConfigError, match=message):
            loading.load(str(folder))
    with pytest.raises(ConfigError, match="there is no folder /nowhere/t5; give one"):
        loading.load("/nowhere/t5")


def test_a_shard_that_is_not_there_is_named(tied: StoredT5, tmp_path: Path) -> None:
    t5 = tied.copy()
    t5.split(3)
    folder = t5.write(tmp_path / "t5")
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"lacks weight files .*\(model-00002-of-00003\.safetensors\); copy"):
        loading.load(str(folder))
    (folder / INDEX).unlink()
    with pytest.raises(ConfigError, match=r"has shards \(model-00001.*\) but no model\.safetensors\.index\.json; copy the index"):
        loading.load(str(folder))


def test_a_missing_head_is_refused_unless_it_is_the_word_embeddings(untied: StoredT5, tmp_path: Path) -> None:
    for kind, number in {"t5": 0, "mt5": 1}.items():
        t5 = untied.copy()
        t5.config |= {"model_type": kind, "tie_word_embeddings": kind == "mt5"}
        del t5.tensors["lm_head.weight"]
        with pytest.raises(ConfigError, match=r"lacks a weight of the model \(lm_head\.weight\); its head is not the table"):
            loading.load(str(t5.write(tmp_path / str(number))))


# --- identity ----------------------------------------------------------------------------------------------------------


def test_identity_is_the_hash_of_the_files_read(tied: StoredT5, tmp_path: Path) -> None:
    single, sharded = tied.write(tmp_path / "single"), tied.copy()
    sharded.split(2)
    parts = sharded.write(tmp_path / "sharded")
    assert loading.load(str(single)).identity == hashlib.sha256((single / SINGLE).read_bytes()).hexdigest()
    both = b"".join(file.read_bytes() for file in sorted(parts.glob("*.safetensors")))
    assert loading.load(str(parts)).identity == hashlib.sha256(both).hexdigest()
    assert torch.equal(log_likelihoods(single)[0], log_likelihoods(parts)[0])


def test_an_index_of_the_one_file_is_no_second_set(tied: StoredT5, tmp_path: Path) -> None:
    t5 = tied.copy()
    t5.files[INDEX] = json.dumps({"weight_map": dict.fromkeys(t5.tensors, SINGLE)}).encode()
    folder = t5.write(tmp_path / "t5")
    assert loading.load(str(folder)).identity == hashlib.sha256((folder / SINGLE).read_bytes()).hexdigest()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_the_model_is_the_one_transformers_loads(kind: str, dtype: str, request: Any, tmp_path: Path) -> None:
    folder = request.getfixturevalue(kind).write(tmp_path / "t5")
    ours = loading.load(str(folder), dtype=dtype).model
    theirs = T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32 if dtype == "fp32" else torch.bfloat16)
    pairs = zip(ours.named_parameters(), theirs.named_parameters(), strict=True)
    assert all(a == b and x.dtype == y.dtype and torch.equal(x, y) for (a, x), (b, y) in pairs)
    assert not ours.training


def test_a_hub_id_in_the_local_cache_is_read_like_a_folder(tied: StoredT5, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    repository, commit = tmp_path / "models--somebody--tiny", "a" * 40
    folder = tied.write(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert loading.load("somebody/tiny").identity == loading.load(str(folder)).identity
    assert shape_of("somebody/tiny").num_parameters == sum(tensor.numel() for tensor in tied.tensors.values())
    (folder / SINGLE).unlink()
    with pytest.raises(ConfigError, match=r"somebody/tiny has no \.safetensors weights .* that this machine can reach"):
        loading.load("somebody/tiny")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"backbone\.path: somebody/tiny has an adapter beside the weights"):
        loading.load("somebody/tiny")


# --- mT5 ---------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_an_mt5_has_the_same_logits_whoever_saved_its_config(untied: StoredT5, tmp_path: Path) -> None:
    folders = {}
    for tie in (False, True):  # as on the hub, as transformers 5 writes
        t5 = untied.copy()
        t5.config |= {"model_type": "mt5", "tie_word_embeddings": tie, "architectures": ["MT5ForConditionalGeneration"]}
        t5.config.pop("scale_decoder_outputs", None)
        folders[tie] = t5.write(tmp_path / str(tie))
    values = {tie: log_likelihoods(folder) for tie, folder in folders.items()}
    assert torch.equal(values[True][0], values[False][0])
    torch.testing.assert_close(*values[True], rtol=1e-5, atol=1e-5)
    # What a user of an export computes.
    recipe, batch = AutoModelForSeq2SeqLM.from_pretrained(folders[True]).eval(), texts()
    assert type(recipe).__name__ == "MT5ForConditionalGeneration"
    ours = loading.load(str(folders[True])).model(input_ids=batch.source_ids, labels=batch.target_ids).logits
    assert torch.equal(recipe(input_ids=batch.source_ids, labels=batch.target_ids).logits, ours)
    shapes = {tie: shape_of(str(folder)) for tie, folder in folders.items()}
    stored = sum(tensor.numel() for tensor in untied.tensors.values())
    assert shapes[True].num_parameters == shapes[False].num_parameters == stored


def test_the_shape_of_a_published_mt5_needs_no_download() -> None:
    assert shape_of("google/mt5-small").num_parameters == 300_176_768
    assert shape_of("google/mt5-base").num_parameters == 582_401_280


def test_a_t5_1_1_saved_by_transformers_5_is_not_scaled(untied: StoredT5, tmp_path: Path) -> None:
    again = tmp_path / "again"
    T5ForConditionalGeneration.from_pretrained(untied.write(tmp_path / "first")).save_pretrained(again)
    t5 = untied.copy()
    t5.config = json.loads((again / "config.json").read_text())
    assert t5.config["tie_word_embeddings"], "else this tests nothing"
    assert torch.equal(log_likelihoods(t5.write(tmp_path / "second"))[0], log_likelihoods(tmp_path / "first")[0])


# --- decoding ----------------------------------------------------------------------------------------------------------

SETTINGS = {
    "min_length": 6, "no_repeat_ngram_size": 2, "repetition_penalty": 1.3, "num_beams": 4, "do_sample": True, "top_k": 3,
    "forced_bos_token_id": 7, "forced_eos_token_id": 9, "bad_words_ids": [[20]], "suppress_tokens": [21], "length_penalty": 2.0,
}  # fmt: skip


def greedy(folder: Path, ends: list[int], steps: int) -> list[list[list[int]]]:
    """Decode by argmax over transformers' logits, a text at a time."""
    model, batch, texts_of_particles = T5ForConditionalGeneration.from_pretrained(folder).eval(), texts(), []
    for rows in inputs(model.shared(batch.source_ids)):
        texts_of_particles.append([])
        for row in rows:
            ids = [0]
            while len(ids) <= steps and (len(ids) == 1 or ids[-1] not in ends):
                ids.append(int(model(inputs_embeds=row[None], decoder_input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            texts_of_particles[-1].append(ids)
    return texts_of_particles


@torch.no_grad()
@pytest.mark.parametrize("where", ["generation_config.json", "config.json", "list of end tokens"])
def test_both_passes_decode_greedily_whatever_the_checkpoint_says(where: str, tied: StoredT5, tmp_path: Path) -> None:
    plain = tied.write(tmp_path / "plain")
    free, ends = greedy(plain, [], 6), [1]
    t5 = tied.copy()
    if where == "generation_config.json":
        t5.files[where] = json.dumps({"eos_token_id": [5, 6], "decoder_start_token_id": 3, **SETTINGS}).encode()
    elif where == "config.json":
        t5.config |= SETTINGS
    else:
        ends = [1, free[0][0][3], free[1][1][2]]
        t5.config["eos_token_id"] = ends
    backbone = loading.load(str(t5.write(tmp_path / "t5")))
    expected = [[backbone.tokenizer.decode(ids, skip_special_tokens=True) for ids in rows] for rows in greedy(plain, ends, 6)]
    assert backbone.generate(texts(), inputs, 6) == expected
    backbone.use_packed_pass("sdpa")
    assert backbone.generate(texts(), inputs, 6) == expected
