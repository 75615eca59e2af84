"""Whether the tensors of a checkpoint are those of a model, whatever its family; and what usually went wrong where they are not."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from bpt_dist.backbones.checkpoint import CONFIG, FLOATS, Checkpoint, Weights, some_of
from bpt_dist.errors import ConfigError

# The usual cause, with its remedy, of weights that are missing and of others that a model has no place for.
Cause = Callable[[Collection[str], Collection[str]], str]
# What names show that no plain model has, and the usual cause of that with its remedy.
SIGNS = {
    ("lora_", "adapter", "prompt_embeddings", "base_layer"): (
        "adapter layers were saved with it; merge them (`merge_and_unload`) and save the whole model"
    ),
    (".SCB", ".absmax", ".quant_", "_scale", ".scales", "qweight", "qzeros", "_packed", "weight_format"): (
        "its weights are quantised; give the checkpoint they were made from"
    ),
}


def count_of(names: Collection[str]) -> str:
    """Return how many weights there are, in words."""
    return f"{len(names)} weights" if len(names) > 1 else "a weight"


def cause_in_names(missing: Collection[str], unexpected: Collection[str], family: str) -> str | None:
    """Return the usual cause of such weights with its remedy, where their names show it; `family` is what is called for."""
    prefixes = {other.removesuffix(name) for name in missing for other in unexpected if other.endswith(f".{name}")}
    if prefixes:
        inner = f"all names begin with {min(prefixes)!r}" if len(prefixes) == 1 else f"names begin with {some_of(prefixes)}"
        return f"{inner}: a wrapper was saved; save the {family} inside it with `save_pretrained`"
    signs = [cause for parts, cause in SIGNS.items() if any(part in name for part in parts for name in unexpected)]
    return signs[0] if signs else None


def lacking(checkpoint: Checkpoint, missing: Collection[str], unexpected: Collection[str], cause: Cause) -> ConfigError:
    """Return the error for a checkpoint without some weights of its model."""
    beside = f" and holds {count_of(unexpected)} it has no place for ({some_of(unexpected)})" if unexpected else ""
    return checkpoint.error(f"lacks {count_of(missing)} of the model ({some_of(missing)}){beside}; {cause(missing, unexpected)}")


def fill(
    model: nn.Module,
    checkpoint: Checkpoint,
    weights: Weights,
    dtype: torch.dtype,
    *,
    mapped: bool,
    missing: Collection[str],
    unexpected: Collection[str],
    cause: Cause,
) -> None:
    """Give a model on the meta device the weights of the files, converted to `dtype`, frozen; `mapped` as in `Weights.read`.

    Raises ConfigError where weights are `missing` or `unexpected`, or have another type or shape than the model's.
    """
    if missing:
        raise lacking(checkpoint, missing, unexpected, cause)
    if unexpected:
        raise checkpoint.error(
            f"holds {count_of(unexpected)} that the model of its {CONFIG} has no place for ({some_of(unexpected)}); "
            f"{cause(missing, unexpected)}"
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    check_tensors(checkpoint, weights, shapes)
    for name, tensor in weights.read(shapes.keys() & weights.tensors.keys(), dtype, mapped=mapped):
        assign(model, name, nn.Parameter(tensor, requires_grad=False))


def check_tensors(checkpoint: Checkpoint, weights: Weights, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise ConfigError for a tensor of the wrong type or shape; `shapes` are those of the model."""
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


def assign(model: nn.Module, name: str, parameter: Tensor) -> None:
    """Let `name` be `parameter` in a model."""
    owner, _, last = name.rpartition(".")
    setattr(model.get_submodule(owner), last, parameter)
