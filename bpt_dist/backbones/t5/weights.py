"""A T5 from the tensors of a checkpoint: every weight comes from its files, or the checkpoint is refused."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from transformers import T5Config, T5ForConditionalGeneration

from bpt_dist.backbones.checkpoint import CONFIG, Checkpoint, Weights
from bpt_dist.backbones.fitting import assign, cause_in_names, fill, lacking

TABLE, HEAD = "shared.weight", "lm_head.weight"
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")  # the same table under other names
# T5 1.0 was published with a position bias that no T5 reads.
IGNORED_WEIGHTS = frozenset({"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"})


def build_t5(
    config: T5Config, checkpoint: Checkpoint, weights: Weights, dtype: torch.dtype, *, mapped: bool = False
) -> T5ForConditionalGeneration:
    """Return the T5 of `config` with the weights of the files, converted to `dtype`; `mapped` as in `Weights.read`.

    Raises ConfigError, naming weights and the usual cause, when files and config.json do not describe one model.
    """
    cause = partial(_cause, weights)
    if config.num_layers + (config.num_decoder_layers or 0) > len(weights.tensors):  # before a network of that depth is built
        raise lacking(checkpoint, {f"encoder.block.{config.num_layers - 1}.layer.0.layer_norm.weight"}, set(), cause)
    with torch.device("meta"):
        model: Any = T5ForConditionalGeneration(config)
    missing, unexpected = _differences(config, weights, model.state_dict().keys())
    fill(model, checkpoint, weights, dtype, mapped=mapped, missing=missing, unexpected=unexpected, cause=cause)
    _tie(model, config, checkpoint, weights)
    config.dtype, config.name_or_path = dtype, checkpoint.path
    result: T5ForConditionalGeneration = model.eval()
    return result


def _differences(config: T5Config, weights: Weights, expected: Collection[str]) -> tuple[set[str], set[str]]:
    """Return the weights that the files lack, and those that the model has no place for."""
    stored = weights.tensors.keys()
    missing = {name for name in expected if name not in stored and name not in (TABLE, *COPIES, HEAD)}
    if not stored & {TABLE, *COPIES}:
        missing.add(TABLE)
    if HEAD not in stored and not config.scale_decoder_outputs:
        missing.add(HEAD)
    return missing, stored - set(expected) - IGNORED_WEIGHTS


def _cause(weights: Weights, missing: Collection[str], unexpected: Collection[str]) -> str:
    """Return the usual cause of such weights, with its remedy."""
    cause = cause_in_names(missing, unexpected, "T5")
    if cause is not None:
        return cause
    if set(missing) == {HEAD}:
        return "its head is not the table of word embeddings and was not saved; save the whole model"
    if not any(name.startswith("decoder.") for name in weights.tensors):
        return "it holds the encoder only (a text or sentence encoder); give the whole T5 it was taken from"
    return f"its {CONFIG} is that of another model, or it was saved in part; give weights and {CONFIG} of one whole model"


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
        assign(model, name, table)
    if HEAD not in weights.tensors or torch.equal(model.get_parameter(HEAD), table):
        assign(model, HEAD, table)
    elif config.scale_decoder_outputs:
        raise checkpoint.error(
            f"holds a head of its own ({HEAD}), its {CONFIG} says the head is {TABLE} (tie_word_embeddings); "
            f"give weights and {CONFIG} of one model, or set tie_word_embeddings to false for a T5 1.1"
        )
