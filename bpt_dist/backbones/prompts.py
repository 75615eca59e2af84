"""How a soft prompt starts, and how it is put before the text, whatever a method does with it."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bpt_dist.backbones.base import Backbone
from bpt_dist.backbones.shared_prompts import note_shared_prompts
from bpt_dist.backbones.transfer import send
from bpt_dist.config.prompt_options import PromptOptions
from bpt_dist.errors import ConfigError

ROWS_AT_ONCE = 1 << 14  # of the word-embedding table
COMMON_PIECES = 5000  # Lester et al. (2021) sample from the most common pieces; vocabularies are roughly sorted by frequency
log = logging.getLogger(__name__)
TENSOR_NAMES = (
    "prompt",
    "prompt_embeddings",
    "mean",
)  # ours and ATTEMPT's conversions, PEFT's, a source posterior's
FORMS = "give a PEFT folder, a .npy file or a .safetensors file"


def initial_prompt(options: PromptOptions, backbone: Backbone, generator: torch.Generator) -> Float[Tensor, "P D"]:
    """Return the prompt training starts from, in float32.

    `vocabulary`: distinct rows of the word-embedding table, drawn from its 5,000 most common ordinary pieces (Lester et al. 2021).
    `normal`: N(0, scale^2). `uniform`: U(-scale, scale). `text`: the rows of a text's pieces, repeated to the length.
    `file`: a stored prompt.
    """
    length, width = options.length, backbone.width
    if options.init == "normal":
        return (options.init_scale or 1.0) * torch.randn(length, width, generator=generator)
    if options.init == "uniform":
        return (options.init_scale or 0.5) * (2 * torch.rand(length, width, generator=generator) - 1)
    if options.init == "file":
        assert options.init_file is not None
        return read_prompt(options.init_file, width, task_type=backbone.task_type)
    return backbone.vocabulary_rows(_pieces(options.init, length, backbone, generator, options.init_text)).cpu()


def _pieces(kind: str, length: int, backbone: Backbone, generator: torch.Generator, text: str | None) -> Tensor:
    if kind == "text":
        ids = backbone.tokenizer(text or "", add_special_tokens=False).input_ids
        if not ids:
            raise ConfigError("method.init_text: the text has no pieces; method.init=text needs some words")
        return torch.tensor((ids * (length // len(ids) + 1))[:length])
    special = set(backbone.tokenizer.all_special_ids)
    ordinary = [piece for piece in range(min(len(backbone.tokenizer), COMMON_PIECES)) if piece not in special]
    if length > len(ordinary):
        raise ConfigError(f"method.length: {length} exceeds the {len(ordinary)} ordinary pieces of the vocabulary; use init=normal")
    return torch.tensor(ordinary)[torch.randperm(len(ordinary), generator=generator)[:length]]


def embedding_rms(backbone: Backbone) -> float:
    """Return the root mean square of all numbers of the word-embedding table: the unit of relative learning rates.

    Tables differ 50-fold between backbones, so an absolute rate means little. Summed in float64; collective where the backbone is
    partitioned.
    """
    rows, total = backbone.vocabulary_size, 0.0
    for first in range(0, rows, ROWS_AT_ONCE):
        part = backbone.vocabulary_rows(torch.arange(first, min(first + ROWS_AT_ONCE, rows)))
        total += float(part.double().square().sum())
    return math.sqrt(total / (rows * backbone.width))


def rows_of(tensor: Float[Tensor, "M ..."], rows: slice) -> Float[Tensor, "m ..."]:
    """Return `tensor[rows]` of a trained tensor; the backward pass touches those rows of its gradient and no others.

    Plain indexing would write a gradient as large as the tensor in every pass: of many particles in many passes, the square.
    """
    if rows.indices(len(tensor)) == (0, len(tensor), 1):
        return tensor
    if not (tensor.requires_grad and tensor.is_leaf and torch.is_grad_enabled()):
        return tensor[rows]
    chosen: Tensor = _Rows.apply(tensor, rows)
    return chosen


class _Rows(torch.autograd.Function):
    """Some rows of a leaf, whose gradient is added to the leaf's in place."""

    @staticmethod
    def forward(context: Any, tensor: Tensor, rows: slice) -> Tensor:
        context.tensor, context.rows = tensor, rows
        return tensor.detach()[rows]

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[None, None]:
        tensor = context.tensor
        if tensor.grad is None:
            tensor.grad = torch.zeros_like(tensor)
        tensor.grad[context.rows] += gradient
        return None, None


def prepend(prompts: Float[Tensor, "m P D"], embeds: Float[Tensor, "N T D"]) -> Float[Tensor, "m N L D"]:
    """Put each of the m prompts before each of the N texts; L = P + T."""
    joined = prepend_own(prompts[:, None].expand(-1, len(embeds), -1, -1), embeds)
    choice = torch.zeros(len(embeds), dtype=torch.long)
    return note_shared_prompts(joined, prompts[:, None].to(embeds), choice)


def prepend_chosen(
    prompts: Float[Tensor, "m S P D"], choice: Int[Tensor, " N"], embeds: Float[Tensor, "N T D"]
) -> Float[Tensor, "m N L D"]:
    """Put before the n-th text the `choice[n]`-th of the S prompts that each particle has."""
    rows = send(choice, prompts.device)
    # With one particle the same operation as for prompts without particles, so that gradients have the same bits.
    own = prompts[0][rows][None] if len(prompts) == 1 else prompts[:, rows]
    return note_shared_prompts(prepend_own(own, embeds), prompts.to(embeds), choice)


def prepend_own(prompts: Float[Tensor, "m N P D"], embeds: Float[Tensor, "N T D"]) -> Float[Tensor, "m N L D"]:
    """Put before the n-th text the n-th of each particle's prompts."""
    return torch.cat([prompts.to(embeds), embeds[None].expand(len(prompts), -1, -1, -1)], dim=2)


def read_prompt(path: Path, width: int, *, task: int | None = None, task_type: str | None = None) -> Float[Tensor, "P D"]:
    """Read a prompt of a backbone `width` wide, as float32, from a PEFT folder, `.npy` or `.safetensors`.

    A safetensors file may name its tensor `prompt`, `prompt_embeddings` or `mean`, or hold one tensor under any name.
    `task` chooses a row of a multi-task PEFT folder that has several; `task_type` is PEFT's name of the backbone's kind. Raises
    ConfigError for a file that is not there, is no prompt, holds NaN or infinity, or was trained for another width or kind.
    """
    if task_type is not None and Path(path).is_dir():
        _refuse_another_kind(Path(path), task_type)
    return _checked(read_stored(path, task=task), Path(path), width)


def _refuse_another_kind(folder: Path, task_type: str) -> None:
    stored = peft_config(folder).get("task_type")
    if stored not in (None, task_type):
        kinds = {"SEQ_2_SEQ_LM": "an encoder-decoder", "CAUSAL_LM": "a decoder-only model"}
        raise ConfigError(
            f"{folder}: task_type is {stored}, so its prompt was trained for {kinds.get(stored, 'another kind of model')}, and the "
            f"backbone is {kinds[task_type]}; give a prompt of {task_type}, or set backbone.path to the model it was trained for"
        )


def read_stored(path: Path, *, task: int | None = None) -> Tensor:
    """Read the tensor that `read_prompt` checks. Raises ConfigError for a file that is not there or holds no tensor."""
    path = Path(path)
    if not path.exists():
        raise ConfigError(f"{path}: no such file or folder; {FORMS}")
    if path.is_dir():
        return _from_peft(path, task)
    if path.suffix == ".npy":
        return _from_npy(path)
    if path.suffix == ".safetensors":
        return _only_prompt(stored_tensors(path), path)
    raise ConfigError(f"{path}: files of type '{path.suffix}' are not read (they may hold code); {FORMS}")


def _from_npy(path: Path) -> Tensor:
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ConfigError(f"{path}: not a plain NumPy array ({error}); save it with numpy.save from a float array") from error
    if not isinstance(array, np.ndarray) or not np.issubdtype(array.dtype, np.floating):
        kind = getattr(array, "dtype", type(array).__name__)
        raise ConfigError(f"{path}: holds {kind}, expected floating-point numbers; save it with numpy.save from a float array")
    return torch.from_numpy(array.astype(np.float32))


def _from_peft(folder: Path, task: int | None) -> Tensor:
    config = peft_config(folder)
    kind = config.get("peft_type")
    if kind not in ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING"):
        raise ConfigError(f"{folder}: peft_type is {kind}; only PROMPT_TUNING and MULTITASK_PROMPT_TUNING hold a soft prompt")
    weights = folder / "adapter_model.safetensors"
    if not weights.exists():
        raise ConfigError(f"{folder}: no adapter_model.safetensors; save the adapter again with safe_serialization=True")
    tensors = stored_tensors(weights)
    if "prompt_embeddings" not in tensors:
        raise ConfigError(f"{weights}: no tensor 'prompt_embeddings' (it holds {', '.join(tensors)}); export the adapter again")
    prompt = tensors["prompt_embeddings"].float()
    if kind == "MULTITASK_PROMPT_TUNING":
        prompt = prompt * _task_factor(tensors, weights, task)
    length = config.get("num_virtual_tokens", len(prompt))
    if len(prompt) > length:
        # With two submodules PEFT stores twice the rows and feeds the encoder the first half.
        log.warning("%s: %d rows stored, the first %d (the encoder's) are used", weights, len(prompt), length)
    return prompt[:length]


def peft_config(folder: Path) -> dict[str, Any]:
    """Return the `adapter_config.json` of a PEFT folder. Raises ConfigError where there is none or it is no object."""
    file = folder / "adapter_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read ({error}); {FORMS}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{file}: holds {type(config).__name__}, expected an object; export the adapter again")
    return config


def _task_factor(tensors: dict[str, Tensor], path: Path, task: int | None) -> Tensor:
    if not {"prefix_task_cols", "prefix_task_rows"} <= tensors.keys():
        raise ConfigError(f"{path}: no 'prefix_task_cols' and 'prefix_task_rows'; export the adapter again")
    cols, rows = tensors["prefix_task_cols"].float(), tensors["prefix_task_rows"].float()
    if task is None and len(cols) > 1:
        raise ConfigError(
            f"{path}: holds prompts of {len(cols)} tasks; choose one with `bpt-dist eval --task-id`, 0 to {len(cols) - 1}, or, for "
            "method.init_file, export it as a prompt of its own"
        )
    if task is not None and not 0 <= task < len(cols):
        raise ConfigError(f"{path}: task {task} asked for, it holds tasks 0 to {len(cols) - 1}; choose one of those")
    return cols[task or 0] @ rows[task or 0]


def stored_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file. Raises ConfigError for anything else."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path}: not a safetensors file ({error}); copy or export it again") from error


def _only_prompt(tensors: dict[str, Tensor], path: Path) -> Tensor:
    for name in TENSOR_NAMES:
        if name in tensors:
            return tensors[name].float()
    if len(tensors) != 1:
        raise ConfigError(f"{path}: holds tensors {', '.join(sorted(tensors))}; call the prompt's 'prompt'")
    return next(iter(tensors.values())).float()


def _checked(prompt: Tensor, path: Path, width: int) -> Tensor:
    shape, matrix = list(prompt.shape), 2
    if len(shape) != matrix or 0 in shape:
        raise ConfigError(f"{path}: shape {shape}, expected [positions, {width}]; store one prompt as a matrix")
    if shape[1] != width:
        remedy = "transpose it" if shape[0] == width else f"choose a backbone of width {shape[1]} or another prompt"
        raise ConfigError(f"{path}: the prompt is {shape[1]} wide, the backbone {width}; {remedy}")
    if not torch.isfinite(prompt).all():
        raise ConfigError(f"{path}: holds NaN or infinity; take an earlier checkpoint of that prompt")
    return prompt.contiguous()
