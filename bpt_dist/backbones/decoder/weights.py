"""A decoder-only model from the tensors of a checkpoint: every weight comes from its files, or the checkpoint is refused."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import torch

from bpt_dist.backbones.checkpoint import CONFIG, Checkpoint, Weights
from bpt_dist.backbones.decoder.config import model_class
from bpt_dist.backbones.fitting import assign, cause_in_names, fill, lacking

TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
COMPUTED = "rotary_emb.inv_freq"  # older checkpoints store it; it follows from config.json


def build_decoder(config: Any, checkpoint: Checkpoint, weights: Weights, dtype: torch.dtype, *, mapped: bool = False) -> Any:
    """Return the model of `config` with the weights of the files, converted to `dtype`; `mapped` as in `Weights.read`.

    Raises ConfigError, naming weights and the usual cause, when files and config.json do not describe one model.
    """
    cause = partial(_cause, config)
    if config.num_hidden_layers > len(weights.tensors):  # before a network of that depth is built
        raise lacking(checkpoint, {f"model.layers.{config.num_hidden_layers - 1}.input_layernorm.weight"}, set(), cause)
    with torch.device("meta"):
        model: Any = model_class(config)(config)
    expected, stored = model.state_dict().keys(), {name for name in weights.tensors if not name.endswith(COMPUTED)}
    missing = set(expected) - stored - ({HEAD} if config.tie_word_embeddings else set())
    fill(
        model, checkpoint, weights, dtype, mapped=mapped, missing=missing, unexpected=stored - set(expected), cause=cause
    )  # fmt: skip
    _tie(model, config, checkpoint, weights)
    _fill_buffers(model, config)
    config.dtype, config.name_or_path = dtype, checkpoint.path
    return model.eval()


def _cause(config: Any, missing: Collection[str], unexpected: Collection[str]) -> str:
    """Return the usual cause of such weights, with its remedy."""
    cause = cause_in_names(missing, unexpected, f"{config.model_type} model")
    if cause is not None:
        return cause
    if set(missing) == {HEAD}:
        return (
            f"its {CONFIG} says the head is not the table of word embeddings (tie_word_embeddings: false), and it was not saved; "
            "save the whole model, or set tie_word_embeddings to true for a model without a head of its own"
        )
    return f"its {CONFIG} is that of another model, or it was saved in part; give weights and {CONFIG} of one whole model"


def _tie(model: Any, config: Any, checkpoint: Checkpoint, weights: Weights) -> None:
    """Let the head be the table of word embeddings where config.json says so."""
    if not config.tie_word_embeddings:
        return
    table = model.get_parameter(TABLE)
    if HEAD in weights.tensors and not torch.equal(model.get_parameter(HEAD), table):
        raise checkpoint.error(
            f"holds a head of its own ({HEAD}), its {CONFIG} says the head is {TABLE} (tie_word_embeddings); "
            f"give weights and {CONFIG} of one model, or set tie_word_embeddings to false"
        )
    assign(model, HEAD, table)


def _fill_buffers(model: Any, config: Any) -> None:
    """Compute what is no weight and in no file: the frequencies of rotary positions, and the scale of word embeddings."""
    for name, module in list(model.named_modules()):
        if not any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            continue
        if hasattr(module, "scalar_embed_scale"):
            module.register_buffer("embed_scale", torch.tensor(module.scalar_embed_scale), persistent=False)
        else:
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, type(module)(config))
