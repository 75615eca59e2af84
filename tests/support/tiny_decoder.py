"""Tiny random decoder-only models of every family with a word-level tokenizer; and transformers itself as the measure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tiny_run
import tiny_t5
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from bpt_dist.data.batches import Batch

NUM_PIECES, NUM_BYTE_LEVEL, WIDTH, END = 128, 400, 32, 1
COMMON = {
    "vocab_size": NUM_PIECES, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "eos_token_id": END, "bos_token_id": 3, "pad_token_id": None,
}  # fmt: skip
# What each family has of its own: windows shorter than the texts, heads of another width, layers without positions, soft caps.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {"tie_word_embeddings": False}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 6,
                                                  "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"tie_word_embeddings": True, "head_dim": 16}),
    "gemma3_text": ("Gemma3TextConfig", "Gemma3ForCausalLM", {
        "tie_word_embeddings": True, "head_dim": 16, "sliding_window": 7, "query_pre_attn_scalar": 16,
        "final_logit_softcapping": 3.0,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    }),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", {"tie_word_embeddings": True, "no_rope_layers": [1, 0, 1]}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"tie_word_embeddings": False, "sliding_window": 9}),
}  # fmt: skip


def tokenizer(*, starts: bool = False) -> PreTrainedTokenizerFast:
    """Return a tokenizer without a pad token that knows the words of the tiny T5; it puts `<s>` first where asked to."""
    pieces = ["<unk>", "</s>", "<0>", "<s>", *tiny_t5.WORDS]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    vocabulary |= {f"w{index}": index for index in range(len(vocabulary), NUM_PIECES)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.normalizer, raw.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    if starts:
        raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 3)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def byte_level(texts: Sequence[str] = ()) -> Tokenizer:
    """Return an engine as GPT-2, Llama 3, Qwen and SmolLM have it, trained on `texts`: a blank belongs to the word behind it.

    `<|begin|>` is 0, `<|end|>` 1.
    """
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_BYTE_LEVEL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|begin|>", "<|end|>"]
    )
    raw.train_from_iterator([" ".join([*texts, *tiny_t5.WORDS])] * 3, trainer)
    return raw


def world(folder: Path, family: str) -> Path:
    """Write a model called `decoder` and tasks into `folder` and return it.

    The Llama reads whole words, and an answer as it is; the Gemma has the byte-level tokenizer, so that its texts have a token they
    begin with, and answers a blank before them.
    """
    if family == "gemma3_text":
        make(folder / "decoder", family, vocab_size=NUM_BYTE_LEVEL, bos_token_id=0)
        own = PreTrainedTokenizerFast(tokenizer_object=byte_level(), bos_token="<|begin|>", eos_token="<|end|>")
        own.save_pretrained(folder / "decoder")
    else:
        make(folder / "decoder", family)
    tiny_run.write_tasks(folder / "tasks")
    return folder


def settings(world_folder: Path, method: Mapping[str, Any], **sections: Any) -> dict[str, Any]:
    """Return plain settings of a short run on the model of `world`."""
    backbone = {"path": str(world_folder / "decoder"), **sections.pop("backbone", {})}
    return tiny_run.settings(world_folder, method, backbone=backbone, **sections)


def make(folder: Path, family: str = "llama", *, seed: int = 0, starts: bool = False, **changes: Any) -> Path:
    """Write config, weights and tokenizer of a tiny model into `folder` and return it."""
    config_name, model_name, own = FAMILIES[family]
    torch.manual_seed(seed)
    model = getattr(transformers, model_name)(getattr(transformers, config_name)(**{**COMMON, **own, **changes}))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # Larger than a start for training, so that a wrong norm, position or neighbour is seen in the results.
            weight.add_(torch.randn_like(weight) * (0.3 if "norm" in name or name.endswith("bias") else 0.15))
    model.save_pretrained(folder)
    tokenizer(starts=starts).save_pretrained(folder)
    return folder


def stock(folder: Path) -> Any:
    """Return the model as transformers loads it."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval().requires_grad_(False)


def random_batch(seed: int) -> tuple[Batch, Tensor]:
    """Return texts of unequal lengths and prompts [m, P, D]; the first seeds have one-token texts and targets, and long ones."""
    draw = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=draw))

    num_texts, num_particles, length = number(1, 6), number(1, 3), number(1, 12)
    sources = [{0: 1, 1: 40}.get(seed, number(1, 20)) for _ in range(num_texts)]
    targets = [{0: 1, 2: 12}.get(seed, number(1, 5)) for _ in range(num_texts)]
    ids = torch.zeros(num_texts, max(sources), dtype=torch.long)
    mask, target_ids = ids.clone(), torch.full((num_texts, max(targets)), -100)
    for n, (num_source, num_target) in enumerate(zip(sources, targets, strict=True)):
        ids[n, :num_source] = torch.randint(4, NUM_PIECES, (num_source,), generator=draw)
        mask[n, :num_source] = 1
        target_ids[n, :num_target] = torch.randint(1, NUM_PIECES, (num_target,), generator=draw)
    names = tuple(f"t/{n}" for n in range(num_texts))
    tasks = torch.randint(0, 3, (num_texts,), generator=draw)
    batch = Batch(0, ids, mask, target_ids, tasks, names, torch.rand(num_texts, generator=draw))
    return batch, torch.randn(num_particles, length, WIDTH, generator=draw)


def of_row(batch: Batch, n: int) -> tuple[Tensor, Tensor]:
    """Return source and target of a text without padding."""
    return batch.source_ids[n][batch.source_mask[n].bool()], batch.target_ids[n][batch.target_ids[n] >= 0]


def truth(model: Any, prompt: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Return the log-likelihood of one target by transformers' own forward over one sequence, without cache and mask."""
    words = model.get_input_embeddings()(torch.cat([source, target]))
    logits = model(inputs_embeds=torch.cat([prompt, words])[None].to(model.dtype), use_cache=False).logits[0]
    logs = logits.float().log_softmax(-1)[len(prompt) + len(source) - 1 : -1]
    return logs[torch.arange(len(target)), target].sum()


def written(model: Any, prompt: Tensor, source: Tensor, num_tokens: int) -> list[int]:
    """Return what follows when the likeliest token is taken each time, every one by a forward over the whole sequence."""
    found: list[int] = []
    while len(found) < num_tokens and found[-1:] != [END]:
        words = model.get_input_embeddings()(torch.cat([source, torch.tensor(found, dtype=torch.long)]))
        found.append(int(model(inputs_embeds=torch.cat([prompt, words])[None], use_cache=False).logits[0, -1].argmax()))
    return found
