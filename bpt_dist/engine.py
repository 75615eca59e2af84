"""Partition the frozen T5 and update what a method trains; the only file that imports deepspeed.

DeepSpeed holds the frozen T5 in ZeRO stage 3 without an optimizer. The prompts never belong to the DeepSpeed engine: it would
average their gradients over the ranks, and SVGD needs each particle's own.
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bpt_dist.backbone import Backbone
from bpt_dist.config import Distribution, Stage
from bpt_dist.errors import ConfigError
from bpt_dist.mesh import Mesh, World
from bpt_dist.methods.base import Method

ZERO_INFERENCE_STAGE = 3
# The leanest settings: T5-large has fewer parameters than the default of `stage3_max_live_parameters` (1e9), so with the defaults
# nothing would ever be released between forward and backward. `distribution.zero_config` replaces them.
ZERO_INFERENCE = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {
        "stage": 3,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
        "stage3_param_persistence_threshold": 1000,
    },
}


def place(backbone: Backbone, distribution: Distribution, world: World) -> None:
    """Move the T5 to this rank's device, whole (`none`) or partitioned over all ranks (`deepspeed`, `fsdp2`).

    Collective: every rank. Raises ConfigError when there is no process group to partition over.
    """
    backbone.core.to(world.device)
    if distribution.shard == "none":
        return
    if not torch.distributed.is_initialized():
        raise ConfigError(
            f"distribution.shard: {distribution.shard} needs a process group; start with `deepspeed launcher/train.py` or torchrun"
        )
    if distribution.shard == "fsdp2":
        _partition_with_fsdp2(backbone, world)
    else:
        given = distribution.zero_config
        backbone.call = _partition_with_deepspeed(backbone, None if given is None else _read_zero_config(given))
    backbone.synced = world.size > 1
    backbone.remember_partition()


def _read_zero_config(path: Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON; only stage 3 without an optimizer makes sense for a T5 that is not trained."""
    try:
        config = json.loads(path.read_text())
        stage = config["zero_optimization"]["stage"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"distribution.zero_config: {path} is no DeepSpeed JSON with zero_optimization.stage ({error}); "
            "start from configs/deepspeed/zero3_inference.json"
        ) from error
    if stage != ZERO_INFERENCE_STAGE or "optimizer" in config:
        raise ConfigError(f"distribution.zero_config: {path} needs zero_optimization.stage 3 and no optimizer: the T5 is frozen")
    return dict(config)


def _partition_with_deepspeed(backbone: Backbone, zero_config: dict[str, Any] | None) -> nn.Module:
    """Partition the T5 with ZeRO stage 3 and return the module to call.

    `engine.module` is called, never `engine(...)`: without an optimizer the engine refuses every backward, while the hooks that
    gather and release sit on the sub-modules and work either way.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed
    from deepspeed.utils import set_z3_leaf_modules

    # The shared-memory operator would be compiled at start-up, needs a compiler and leaves a file in /dev/shm; it serves
    # `inference_all_reduce` only, which is never called here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Without this entry the partitions would be float32 whatever the weights are.
    config = {**(zero_config or ZERO_INFERENCE), "bf16": {"enabled": backbone.model.dtype == torch.bfloat16}}
    # One gather a block instead of one a layer: 3-5 times fewer, larger messages.
    set_z3_leaf_modules(backbone.core, [backbone.block_class])
    # DeepSpeed calls collectives by names this torch has renamed: nothing a user could mend, once a rank and stage.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    engine, *_ = deepspeed.initialize(model=backbone.core, config=config)
    return engine.module


def _partition_with_fsdp2(backbone: Backbone, world: World) -> None:
    """Partition the T5 with PyTorch's FSDP2, block by block: the cross-check of ZeRO, and the fallback without DeepSpeed."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    ranks = init_device_mesh(world.device.type, (world.size,))
    for block in backbone.blocks:
        fully_shard(block, mesh=ranks)
    # By default the root stays gathered between forward and backward.
    fully_shard(backbone.core, mesh=ranks, reshard_after_forward=True)


class Updater:
    """The optimizer of one stage over what this rank trains: schedule, clipping and resumable state."""

    def __init__(self, method: Method, stage: Stage) -> None:
        self.method, self.stage = method, stage
        self.names = {parameter: name for name, parameter in method.named_parameters() if parameter.requires_grad}
        # A stage without steps, an untrained prompt, needs no rate.
        groups = [{**group, "lr": group["lr"] or 0.0} for group in method.param_groups(stage)]
        listed = [parameter for group in groups for parameter in group["params"]]
        assert {id(p) for p in listed} == {id(p) for p in self.names}, "param_groups() must list every trainable tensor once"
        self.rates = [group["lr"] for group in groups]
        self.optimizer = OPTIMIZERS[stage.optimizer](groups, stage)

    def step(self, step: int) -> None:
        """Clip, set the learning rates of `step` (counted from 0), update, and forget the gradients."""
        if self.stage.clip is not None:
            self._clip(self.stage.clip)
        factor = schedule(step, self.stage.steps, self.stage.warmup, self.stage.schedule)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _clip(self, limit: float) -> None:
        """Scale gradients to norm <= limit: each particle's tensors together, the remaining tensors together.

        Particles are separate optimisation problems; one norm over all would also depend on how many of them this rank owns.
        """
        trained = [(parameter, parameter.grad) for parameter in self.names if parameter.grad is not None]
        rows = [grad for parameter, grad in trained if self.names[parameter] in self.method.particle_tensors]
        nn.utils.clip_grad_norm_([p for p, _ in trained if self.names[p] not in self.method.particle_tensors], limit)
        if rows:
            norms = torch.stack([grad.flatten(1).norm(dim=1) for grad in rows]).norm(dim=0)
            for grad in rows:
                grad.mul_((limit / norms.clamp_min(limit)).view(-1, *[1] * (grad.dim() - 1)))

    def tensors(self, mesh: Mesh) -> dict[str, Tensor]:
        """Return trainable tensors and optimizer state with all particles (collective: every rank)."""
        state = {}
        for parameter, name in self.names.items():
            for key, value in {"value": parameter.detach(), **self.optimizer.state[parameter]}.items():
                whole = name in self.method.particle_tensors and value.shape == parameter.shape
                state[f"{name}/{key}"] = mesh.gather_particles(value) if whole else value
        return state

    @torch.no_grad()
    def load(self, state: dict[str, Tensor], mesh: Mesh) -> None:
        """Take over what `tensors` returned, also on another number of ranks."""
        for parameter, name in self.names.items():
            entries = {key.removeprefix(f"{name}/"): value for key, value in state.items() if key.rsplit("/", 1)[0] == name}
            whole = entries["value"].shape
            for key, value in entries.items():
                own = value
                if name in self.method.particle_tensors and value.shape == whole:
                    own = value[mesh.rows(whole[0])]
                if key == "value":
                    parameter.copy_(own)
                else:
                    # Optimizers keep their step counters on the CPU, whatever the device of the parameter.
                    self.optimizer.state[parameter][key] = own.clone().to(parameter.device if own.dim() else "cpu")


def schedule(step: int, steps: int, warmup: float, kind: str) -> float:
    """Return the factor of the learning rate at `step`: linear warm-up over `warmup * steps`, then constant or linear to zero."""
    rising = max(1, round(warmup * steps)) if warmup > 0 else 0
    if step < rising:
        return (step + 1) / (rising + 1)
    return 1.0 if kind == "constant" else max(0.0, (steps - step) / max(1, steps - rising))


def _adamw(groups: list[dict[str, Any]], stage: Stage) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, weight_decay=stage.weight_decay)


def _sgd(groups: list[dict[str, Any]], stage: Stage) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, weight_decay=stage.weight_decay)


def _rmsprop(groups: list[dict[str, Any]], stage: Stage) -> torch.optim.Optimizer:
    # alpha 0.9 and eps 1e-6 are those of the SVGD authors' "AdaGrad with momentum".
    return torch.optim.RMSprop(groups, alpha=0.9, eps=1e-6, weight_decay=stage.weight_decay)


OPTIMIZERS = {"adamw": _adamw, "sgd": _sgd, "rmsprop": _rmsprop}
