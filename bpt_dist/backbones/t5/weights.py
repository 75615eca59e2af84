"""A T5 from the tensors of a checkpoint: every weight comes from its files, or the checkpoint is refused."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from bpt_dist.backbones.checkpoint import CONFIG, FLOATS, Checkpoint, Weights, some_of

TABLE, HEAD = "shared.weight", "lm_head.weight"
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")  # the same table under other names
# T5 1.0 was published with a position bias that no T5 reads.
IGNORED_WEIGHTS = frozenset({"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"})
# What names show that no T5 has, and the usual cause of that with its remedy.
SIGNS = {
    ("lora_", "adapter", "prompt_embeddings", "base_layer"): (
        "adapter layers were saved with it; merge them (`merge_and_unload`) and save the whole model"
    ),
    (".SCB", ".absmax", ".quant_", "_scale", ".scales", "qweight", "qzeros", "_packed", "weight_format"): (
        "its weights are quantised; give the checkpoint they were made from"
    ),
}


def build_t5(
    config: T5Config, checkpoint: Checkpoint, weights: Weights, dtype: torch.dtype, *, mapped: bool = False
) -> T5ForConditionalGeneration:
    """Return the T5 of `config` with the weights of the files, converted to `dtype`; `mapped` as in `Weights.read`.

    Raises ConfigError, naming weights and the usual cause, when files and config.json do not describe one model.
    """
    if config.num_layers + (config.num_decoder_layers or 0) > len(weights.tensors):  # before a network of that depth is built
        raise _lacking(checkpoint, weights, {f"encoder.block.{config.num_layers - 1}.layer.0.layer_norm.weight"}, set())
    with torch.device("meta"):
        model: Any = T5ForConditionalGeneration(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    _check_names(config, checkpoint, weights, shapes.keys())
    _check_tensors(checkpoint, weights, shapes)
    for name, tensor in weights.read(shapes.keys() & weights.tensors.keys(), dtype, mapped=mapped):
        _assign(model, name, nn.Parameter(tensor, requires_grad=False))
    _tie(model, config, checkpoint, weights)
    config.dtype, config.name_or_path = dtype, checkpoint.path
    result: T5ForConditionalGeneration = model.eval()
    return result


def _check_names(config: T5Config, checkpoint: Checkpoint, weights: Weights, expected: Collection[str]) -> None:
    stored = weights.tensors.keys()
    missing = {name for name in expected if name not in stored and name not in (TABLE, *COPIES, HEAD)}
    if not stored & {TABLE, *COPIES}:
        missing.add(TABLE)
    if HEAD not in stored and not config.scale_decoder_outputs:
        missing.add(HEAD)
    unexpected = stored - set(expected) - IGNORED_WEIGHTS
    if missing:
        raise _lacking(checkpoint, weights, missing, unexpected)
    if unexpected:
        raise checkpoint.error(
            f"holds {_count(unexpected)} that the model of its {CONFIG} has no place for ({some_of(unexpected)}); "
            f"{_cause(missing, unexpected)}"
        )


def _lacking(checkpoint: Checkpoint, weights: Weights, missing: Collection[str], unexpected: Collection[str]) -> Exception:
    beside = f" and holds {_count(unexpected)} it has no place for ({some_of(unexpected)})" if unexpected else ""
    return checkpoint.error(
        f"lacks {_count(missing)} of the model ({some_of(missing)}){beside}; {_cause(missing, unexpected, weights)}"
    )


def _count(names: Collection[str]) -> str:
    return f"{len(names)} weights" if len(names) > 1 else "a weight"


def _cause(missing: Collection[str], unexpected: Collection[str], weights: Weights | None = None) -> str:
    """Return the usual cause of such weights, with its remedy."""
    prefixes = {other.removesuffix(name) for name in missing for other in unexpected if other.endswith(f".{name}")}
    if prefixes:
        inner = f"all names begin with {min(prefixes)!r}" if len(prefixes) == 1 else f"names begin with {some_of(prefixes)}"
        return f"{inner}: a wrapper was saved; save the T5 inside it with `save_pretrained`"
    signs = [cause for parts, cause in SIGNS.items() if any(part in name for part in parts for name in unexpected)]
    if signs:
        return signs[0]
    if set(missing) == {HEAD}:
        return "its head is not the table of word embeddings and was not saved; save the whole model"
    if weights is not None and not any(name.startswith("decoder.") for name in weights.tensors):
        return "it holds the encoder only (a text or sentence encoder); give the whole T5 it was taken from"
    return f"its {CONFIG} is that of another model, or it was saved in part; give weights and {CONFIG} of one whole model"


def _check_tensors(checkpoint: Checkpoint, weights: Weights, shapes: dict[str, tuple[int, ...]]) -> None:
    stored = {name: weights.tensors[name] for name in sorted(shapes.keys() & weights.tensors.keys())}
    for name, tensor in stored.items():
        if tensor.dtype not in FLOATS:
            raise checkpoint.error(
                f"holds {name} as {tensor.dtype}, expected one of {', '.join(sorted(FLOATS))}; "
                "quantised weights are not read: give the checkpoint they were made from"
            )
    wrong = [name for name, tensor in stored.items() if tensor.shape != shapes[name]]
    if wrong:
        name = wrong[0]
        more = f" and {len(wrong) - 1} more like it" if len(wrong) > 1 else ""
        raise checkpoint.error(
            f"holds {name} with shape {list(stored[name].shape)}, its {CONFIG} says {list(shapes[name])}{more}; "
            f"give weights and {CONFIG} of one model, or fix the size in {CONFIG} (vocab_size counts rows of the word embeddings)"
        )


def _tie(model: Any, config: T5Config, checkpoint: Checkpoint, weights: Weights) -> None:
    """Let all names of the table of word embeddings be one parameter; so is a head that was not stored, or is equal."""
    tables = {name: model.get_parameter(name) for name in (TABLE, *COPIES) if name in weights.tensors}
    first, table = next(iter(tables.items()))
    for name, other in tables.items():
        if not torch.equal(other, table):
            raise checkpoint.error(
                f"holds {first} and {name} with different values, in a T5 they are one table; save the model again"
            )
    for name in (TABLE, *COPIES):
        _assign(model, name, table)
    if HEAD not in weights.tensors or torch.equal(model.get_parameter(HEAD), table):
        _assign(model, HEAD, table)
    elif config.scale_decoder_outputs:
        raise checkpoint.error(
            f"holds a head of its own ({HEAD}), its {CONFIG} says the head is {TABLE} (tie_word_embeddings); "
            f"give weights and {CONFIG} of one model, or set tie_word_embeddings to false for a T5 1.1"
        )


def _assign(model: nn.Module, name: str, parameter: Tensor) -> None:
    owner, _, last = name.rpartition(".")
    setattr(model.get_submodule(owner), last, parameter)
