"""Read soft prompts that others trained: PEFT folders, `.npy` and `.safetensors` files. Never unpickles anything."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bpt_dist.errors import ConfigError

log = logging.getLogger(__name__)
TENSOR_NAMES = (
    "prompt",
    "prompt_embeddings",
    "mean",
)  # ours and ATTEMPT's conversions, PEFT's, a source posterior's
FORMS = "give a PEFT folder, a .npy file or a .safetensors file"


def read_prompt(path: Path, width: int, *, task: int | None = None) -> Float[Tensor, "P D"]:
    """Read a prompt of a backbone `width` wide, as float32, from a PEFT folder, `.npy` or `.safetensors`.

    A safetensors file may name its tensor `prompt`, `prompt_embeddings` or `mean`, or hold one tensor under any name.
    `task` chooses a row of a multi-task PEFT folder that has several. Raises ConfigError for a file that is not
    there, is no prompt, holds NaN or infinity, or was trained for another width.
    """
    path = Path(path)
    if not path.exists():
        raise ConfigError(f"{path}: no such file or folder; {FORMS}")
    if path.is_dir():
        prompt = _from_peft(path, task)
    elif path.suffix == ".npy":
        prompt = _from_npy(path)
    elif path.suffix == ".safetensors":
        prompt = _only_prompt(_tensors(path), path)
    else:
        raise ConfigError(f"{path}: files of type '{path.suffix}' are not read (they may hold code); {FORMS}")
    return _checked(prompt, path, width)


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
    config = _peft_config(folder)
    kind = config.get("peft_type")
    if kind not in ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING"):
        raise ConfigError(f"{folder}: peft_type is {kind}; only PROMPT_TUNING and MULTITASK_PROMPT_TUNING hold a soft prompt")
    weights = folder / "adapter_model.safetensors"
    if not weights.exists():
        raise ConfigError(f"{folder}: no adapter_model.safetensors; save the adapter again with safe_serialization=True")
    tensors = _tensors(weights)
    if "prompt_embeddings" not in tensors:
        raise ConfigError(f"{weights}: no tensor 'prompt_embeddings' (found {', '.join(tensors)}); export the adapter again")
    prompt = tensors["prompt_embeddings"].float()
    if kind == "MULTITASK_PROMPT_TUNING":
        prompt = prompt * _task_factor(tensors, weights, task)
    length = config.get("num_virtual_tokens", len(prompt))
    if len(prompt) > length:
        # With two submodules PEFT stores twice the rows and feeds the encoder the first half.
        log.warning("%s: %d rows stored, the first %d (the encoder's) are used", weights, len(prompt), length)
    return prompt[:length]


def _peft_config(folder: Path) -> dict[str, Any]:
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
        raise ConfigError(f"{path}: holds prompts of {len(cols)} tasks; export the wanted one as a prompt of its own")
    if task is not None and not 0 <= task < len(cols):
        raise ConfigError(f"{path}: task {task} asked for, it holds tasks 0 to {len(cols) - 1}; choose one of those")
    return cols[task or 0] @ rows[task or 0]


def _tensors(path: Path) -> dict[str, Tensor]:
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
