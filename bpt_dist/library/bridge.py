"""Our prompts in PEFT's models: a prompt is put into a model, and found in one."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bpt_dist.errors import ConfigError


def width_of(model: Any) -> int:
    """Return the width of a model's word embeddings. Raises ConfigError for what is no language model of transformers."""
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    weight = getattr(embeddings, "weight", None)
    if weight is None:
        raise ConfigError(f"init_peft: needs a language model of transformers (got {type(model).__name__})")
    return int(weight.shape[1])


def add_prompt(model: Any, prompt: Float[Tensor, "P D"]) -> Any:
    """Return a PEFT prompt-tuning model that starts at `prompt`, on the device of the model.

    A model of transformers is wrapped, and frozen by PEFT; of a PEFT model the active prompt is set. Raises ConfigError for another
    width or length.
    """
    from peft import PeftModel, PromptTuningConfig, get_peft_model

    length, width = prompt.shape
    if (here := width_of(model)) != width:
        raise ConfigError(f"init_peft: the prompt is {width} wide, the model {here}; load the model the prompt belongs to")
    if not isinstance(model, PeftModel):
        kind = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
        # PEFT's default of 2 submodules for encoder-decoders would store twice the rows.
        settings = PromptTuningConfig(task_type=kind, num_virtual_tokens=length, token_dim=width, num_transformer_submodules=1)
        with torch.random.fork_rng(devices=[]):  # PEFT initialises the prompt at random before it is replaced here
            model = get_peft_model(model, settings)
    own = prompt_of(model)
    if own.shape != prompt.shape:
        raise ConfigError(
            f"init_peft: the prompt of the PEFT model is {list(own.shape)}, this one {list(prompt.shape)}; make it as long"
        )
    with torch.no_grad():
        own.copy_(prompt)
    return model


def prompt_of(model: Any) -> Float[Tensor, "P D"]:
    """Return the trainable prompt of a PEFT prompt-tuning model. Raises ConfigError for any other object."""
    encoders = getattr(model, "prompt_encoder", None)
    active = getattr(model, "active_adapter", None)
    embedding = getattr(encoders[active] if encoders is not None and active in encoders else None, "embedding", None)
    if embedding is None:
        raise ConfigError(
            f"the model has no soft prompt of PEFT (got {type(model).__name__}); make it with posterior.init_peft(model)"
        )
    weight: Tensor = embedding.weight
    return weight
