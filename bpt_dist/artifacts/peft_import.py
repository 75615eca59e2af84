"""Read a PEFT folder of a low-rank change back as our method, also one that PEFT trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from bpt_dist.artifacts.peft_export import CONFIG, WEIGHTS
from bpt_dist.backbones.base import Backbone
from bpt_dist.backbones.prompts import peft_config, stored_tensors
from bpt_dist.config import EvaluationConfig
from bpt_dist.distributed.mesh import Mesh
from bpt_dist.errors import ConfigError
from bpt_dist.methods.base import Method
from bpt_dist.methods.lora import Config, Lora
from bpt_dist.objective import Reduction
from bpt_dist.tasks.spec import TaskSpec

PREFIX = "base_model.model."
# What PEFT's LoRA has beside the paper's; at these values it does nothing.
PLAIN: dict[str, Any] = {
    "bias": "none", "fan_in_fan_out": False, "modules_to_save": None, "use_dora": False, "use_rslora": False, "lora_bias": False,
    "layers_to_transform": None, "layer_replication": None, "rank_pattern": {}, "alpha_pattern": {}, "target_parameters": None,
}  # fmt: skip


def is_low_rank(folder: Path) -> bool:
    """Return whether `folder` is a PEFT folder of type LORA."""
    return (folder / CONFIG).is_file() and peft_config(folder).get("peft_type") == "LORA"


def read_low_rank(folder: Path, backbone: Backbone, spec: TaskSpec, evaluation: EvaluationConfig, reduction: Reduction) -> Method:
    """Return the low-rank change of `folder` on `backbone`, ready to be evaluated on `spec`.

    Raises ConfigError for an adapter of another backbone, or one that is more than a low-rank change of linear layers.
    """
    facts, tensors = peft_config(folder), stored_tensors(folder / WEIGHTS)
    more = [f"{key}={facts[key]}" for key, plain in PLAIN.items() if facts.get(key, plain) not in (plain, None, [], {})]
    if more or not isinstance(facts.get("target_modules"), list):
        what = ", ".join(more) or f"target_modules={facts.get('target_modules')}"
        raise ConfigError(
            f"{folder}: has {what}, which is not evaluated here; merge the adapter into the backbone and evaluate that"
        )
    try:
        given = {"rank": facts.get("r"), "alpha": facts.get("lora_alpha"), "targets": sorted(facts["target_modules"])}
        options = Config.model_validate(given)
    except ValidationError as error:
        names = {"rank": "r", "alpha": "lora_alpha", "targets": "target_modules"}
        problem = error.errors()[0]
        place = f"{folder / CONFIG}: {names[str(problem['loc'][0])]}"
        raise ConfigError(f"{place}: {problem['msg']}; export the adapter again") from error
    method = Lora(options, backbone, seed=0, reduction=reduction, evaluation=evaluation)
    method.begin_target(None, [spec], [1], Mesh())
    own = {name: _stored_name(name) for name, _ in method.named_parameters()}
    strangers, missing = sorted(tensors.keys() - set(own.values())), sorted(set(own.values()) - tensors.keys())
    unequal = [
        f"{own[name]} {list(tensors[own[name]].shape)} instead of {list(parameter.shape)}"
        for name, parameter in method.named_parameters()
        if own[name] in tensors and tensors[own[name]].shape != parameter.shape
    ]
    if strangers or missing or unequal:
        first = (strangers or missing or unequal)[0]
        raise ConfigError(f"{folder}: does not fit {backbone.path} (first difference: {first}); set backbone.path to its backbone")
    with torch.no_grad():
        method.restore({name: tensors[stored].to(torch.float32) for name, stored in own.items()})
    return method


def _stored_name(name: str) -> str:
    """Return PEFT's name of our parameter `a.<layer>` or `b.<layer>`, whose layer is written with slashes."""
    pair, _, layer = name.partition(".")
    return f"{PREFIX}{layer.replace('/', '.')}.lora_{pair.upper()}.weight"
