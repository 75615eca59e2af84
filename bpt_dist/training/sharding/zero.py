"""DeepSpeed's ZeRO stage 3: a frozen backbone without an optimizer, or one in training with the optimizer of its stage."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bpt_dist.backbones.base import Backbone, local_shard
from bpt_dist.config import DistributionConfig, StageConfig
from bpt_dist.distributed.mesh import Mesh, World
from bpt_dist.errors import ConfigError
from bpt_dist.methods.base import Method
from bpt_dist.training.optimizer import StageOptimizer, entries_of
from bpt_dist.training.sharding.rows import send_rows, tables
from bpt_dist.training.sharding.zero_gather import gather_in_place

ZERO_STAGE = 3
# The leanest settings: T5-large has fewer parameters than the default of `stage3_max_live_parameters` (1e9), so with the defaults
# nothing would ever be released between forward and backward. `distribution.zero_config` replaces them.
ZERO_INFERENCE: dict[str, Any] = {
    "zero_optimization": {
        "stage": 3,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
        "stage3_param_persistence_threshold": 1000,
    },
}
# Gradients of a backbone in training are reduced in buffers of so many elements; the default would take 2 GB on every rank.
GRADIENT_BUCKET = 20_000_000
# What such a file must leave to the sections that name it, and where those are.
NAMED_ELSEWHERE = {
    "optimizer": "the stage's optimizer",
    "scheduler": "the stage's schedule and warmup",
    "gradient_clipping": "the stage's clip",
    "gradient_accumulation_steps": "the stage's pass_size",
    "train_batch_size": "the stage's batch_size",
    "fp16": "backbone.dtype",
    "amp": "backbone.dtype",
}
LEAF_KEYS = ("leaf_module", "stage3_module_granularity_threshold")


def partition_with_deepspeed(
    backbone: Backbone, distribution: DistributionConfig, world: World, group: Any, *, trained: bool
) -> None:
    """Partition the backbone over `group` (None: all ranks) and let `backbone.call` run the partitioned module.

    Collective over the group. A frozen backbone is called as `engine.module`, never `engine(...)`: without an optimizer the engine
    refuses every backward, while the hooks that gather and release are on the sub-modules and work either way. A backbone that will
    be `trained` gets its engine with the optimizer, from `ZeroPartition.make_optimizer`.

    Raises ConfigError for settings that DeepSpeed cannot use here.
    """
    given = distribution.zero_config
    settings = ZERO_INFERENCE if given is None else read_zero_config(given)
    if given is None and not trained:
        settings = {"zero_optimization": settings["zero_optimization"] | prefetch_of(backbone)}
    config = _completed(settings, distribution, is_bf16=backbone.dtype == torch.bfloat16, trained=trained)
    deepspeed = import_deepspeed()
    if given is not None:
        _check_with_deepspeed(config, given)
    # Before `initialize`, which would first move the whole backbone to the device.
    deepspeed.zero.Init(module=backbone.core, data_parallel_group=group, config_dict_or_path=config)
    gather_in_place(backbone.core.parameters(), group, world.hosts, config["zero_optimization"], trained=trained)
    partition = backbone.partition = ZeroPartition(backbone, config)
    if trained:
        # Without leaves: for the weights of a leaf ZeRO takes zeros where a gradient has not arrived when its inputs' have.
        return
    # One gather a block instead of one a layer: 3-5 times fewer, larger messages. A leaf inside what is recomputed would be
    # gathered by the second pass and stay so until the whole backward pass is over; a block contains what it recomputes.
    from deepspeed.utils import set_z3_leaf_modules

    set_z3_leaf_modules(backbone.core, [backbone.block_class])
    partition.engine, *_ = deepspeed.initialize(model=backbone.core, config=config)
    backbone.call = partition.call
    for table in (looked_up := tables(backbone)):
        # The hooks of ZeRO, which would make the table whole.
        table._forward_pre_hooks.clear()
        table._forward_hooks.clear()
    send_rows(looked_up, group)
    backbone.word_embeddings.register_forward_hook(_require_grad)


def prefetch_of(backbone: Backbone) -> dict[str, int]:
    """Return the settings by which ZeRO gathers the next block while one computes, and holds no more than two blocks and the head.

    As many numbers as the smallest block has: with more ZeRO would be further ahead after every block. The head is gathered while
    the last block computes, and kept until its own backward pass, which is the next thing to happen.
    """
    least = ZERO_INFERENCE["zero_optimization"]["stage3_param_persistence_threshold"]
    blocks = [sum(weight.numel() for weight in block.parameters() if weight.numel() > least) for block in backbone.blocks]
    head = backbone.model.get_output_embeddings().weight.numel()
    return {"stage3_prefetch_bucket_size": min(blocks), "stage3_max_live_parameters": 2 * max(blocks) + head}


def read_zero_config(path: Path) -> dict[str, Any]:
    """Return a DeepSpeed JSON file as `ZERO_INFERENCE` is; only ZeRO stage 3 makes sense, and what other sections name stays there.

    Raises ConfigError that names the key and its place.
    """
    try:
        config = json.loads(path.read_text())
        stage = config["zero_optimization"]["stage"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"distribution.zero_config: {path} is no DeepSpeed JSON with zero_optimization.stage ({error}); "
            "start from configs/deepspeed/zero3_inference.json"
        ) from error
    if stage != ZERO_STAGE:
        raise ConfigError(f"distribution.zero_config: {path} has zero_optimization.stage {stage}; only 3 partitions weights")
    for key, place in NAMED_ELSEWHERE.items():
        if key in config:
            raise ConfigError(f"distribution.zero_config: {path} sets {key}; remove it, that is {place}")
    return dict(config)


def _completed(config: dict[str, Any], distribution: DistributionConfig, *, is_bf16: bool, trained: bool) -> dict[str, Any]:
    """Return DeepSpeed's settings with what the run says about dtype, offload and recomputing."""
    zero = dict(config["zero_optimization"])
    leaves = [key for key in LEAF_KEYS if zero.get(key)]
    if leaves and distribution.activation_checkpointing:
        raise ConfigError(
            f"distribution.zero_config: {distribution.zero_config} sets {leaves[0]}; leaf modules that are recomputed stay "
            "gathered through the backward pass, so remove it or set distribution.activation_checkpointing=false"
        )
    if "offload_param" in zero and distribution.offload == "none":
        raise ConfigError(f"distribution.zero_config: {distribution.zero_config} sets offload_param; use distribution.offload")
    if distribution.offload == "cpu":
        zero.setdefault("offload_param", {"device": "cpu", "pin_memory": torch.cuda.is_available()})
    if trained:
        zero.setdefault("reduce_bucket_size", GRADIENT_BUCKET)
    # Without the entry bf16 the partitions would be float32 whatever the weights are.
    # The batch is the stage's; DeepSpeed requires a number.
    settings = {**config, "train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "bf16": {"enabled": is_bf16}}
    if trained:
        # Gradients are summed over ranks and passes in float32; both defaults are the type of the weights.
        settings |= {"communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "fp32"}}
    return settings


def _check_with_deepspeed(config: dict[str, Any], path: Path) -> None:
    """Raise ConfigError for what DeepSpeed does not understand."""
    from deepspeed.runtime.config import DeepSpeedConfig

    try:
        DeepSpeedConfig(config)
    except (ValueError, TypeError, AssertionError) as error:  # pydantic's errors are ValueErrors
        problem = " ".join(str(error).split())
        raise ConfigError(f"distribution.zero_config: DeepSpeed refuses {path}: {problem}; compare it with "
                          "configs/deepspeed/zero3_inference.json") from error  # fmt: skip


def import_deepspeed() -> Any:
    """Import DeepSpeed without the operators it would probe for and compile at start-up."""
    # Where torch computes, DeepSpeed must: what was set before torch was imported can be wrong.
    os.environ["DS_ACCELERATOR"] = "cuda" if torch.cuda.is_available() else "cpu"
    import deepspeed

    # Read for the shared-memory operator only, which needs a compiler, leaves a file in /dev/shm and serves `inference_all_reduce`,
    # never called here. Read first, this would run the compiler on every rank to see which operators could be built.
    deepspeed.ops.__compatible_ops__ = {}
    # DeepSpeed calls collectives by names this torch has renamed: nothing a user could fix, once a rank and stage.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    return deepspeed


def _require_grad(_module: nn.Module, _args: Any, output: Tensor) -> None:
    """Let word embeddings ask for a gradient: a block none of whose inputs does is gathered for the backward pass and stays so.

    That is the case where a method adds nothing to the inputs but trains tensors inside the blocks.
    """
    if torch.is_grad_enabled():
        output.requires_grad_()


@dataclass
class ZeroPartition:
    """A backbone in ZeRO partitions with the settings its engines are made of."""

    backbone: Backbone
    config: dict[str, Any]
    engine: Any = None

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module, and leave nothing gathered for a backward pass that will not follow."""
        if not self.engine.optimizer.get_param_coordinator().is_complete_trace():
            # What ZeRO releases after a module it remembers from another order of modules: passes with and without a gradient.
            _clear_caches()
        found = self.engine.module(*args, **kwargs)
        if not torch.is_grad_enabled():
            self.engine.optimizer.empty_partition_cache()
        return found

    def make_optimizer(self, method: Method, stage: StageConfig) -> StageOptimizer:
        """Return the optimizer of a method that trains the backbone (collective: every rank)."""
        return ZeroOptimizer(method, stage, self)

    def close(self) -> None:
        """End the engine, which DeepSpeed would keep, with its weights, as long as the process lives."""
        if self.engine is not None:
            _forget(self.engine)
            self.engine, self.backbone.call = None, self.backbone.core


class ZeroOptimizer(StageOptimizer):
    """ZeRO with its optimizer: every rank updates its partition of the weights, in float32, and keeps the state belonging to it."""

    def __init__(self, method: Method, stage: StageConfig, partition: ZeroPartition) -> None:
        super().__init__(method, stage)
        if partition.engine is not None:
            _forget(partition.engine)
        config = {
            **partition.config,
            "zero_allow_untested_optimizer": True,  # DeepSpeed has tested AdamW; SGD and RMSprop are elementwise as well
            "zero_force_ds_cpu_optimizer": False,
            "gradient_clipping": stage.clip or 0.0,
        }
        self.engine, *_ = import_deepspeed().initialize(model=partition.backbone.core, optimizer=self.optimizer, config=config)
        partition.engine, partition.backbone.call = self.engine, self.engine
        self.zero = self.engine.optimizer
        self.num_ranks = torch.distributed.get_world_size()

    @property
    def replicated(self) -> list[nn.Parameter]:
        """No gradient is left to be summed: ZeRO sums and scatters them in the backward pass."""
        return []

    def _updated(self, parameter: nn.Parameter) -> nn.Parameter:
        """Return the tensor itself: ZeRO keeps float32 partitions of its own."""
        return parameter

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss` to this rank's partition of the step's (collective: every rank)."""
        # Begins another pass of the same step; the engine would do it in its forward, where evaluations do not belong to a step.
        self.zero.clear_backward_seen_flag()
        # ZeRO takes the mean over the ranks; the loss is a sum over texts, wherever they are.
        self.engine.backward(loss * self.num_ranks)

    def gradients(self) -> list[Tensor]:
        """Return this rank's partitions of the step's gradients."""
        from deepspeed.utils import safe_get_local_grad

        return [safe_get_local_grad(parameter) for parameter in self.names]

    def step(self, step: int) -> None:
        """Set the learning rates of `step`, clip by the norm over all weights, update (collective: every rank)."""
        self._set_rates(step)
        self.engine.step()
        if self.measures(step):
            self._norm = torch.as_tensor(self.engine.get_global_grad_norm())

    def zero_grad(self) -> None:
        """Forget the gradients, also of a step that is left out."""
        super().zero_grad()
        self.zero.zero_grad()

    # --- what is kept: float32, flat parts of ceil(numel / ranks) numbers, the last one padded ----------------------------

    def snapshot(self) -> dict[str, Tensor]:
        """Return copies of this rank's float32 partitions."""
        return {name: self._local(parameter).clone() for parameter, name in self.names.items()}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put this rank's float32 partitions back, and the weights the backbone computes with (collective: every rank)."""
        for parameter, name in self.names.items():
            self._local(parameter).copy_(tensors[name])
        for group in range(len(self.zero.fp16_groups)):
            self.zero._reassign_or_swap_out_partitioned_parameters(group)
        # Small tensors are kept whole on every rank; dropped here, they are gathered again when they are next needed.
        self.zero.empty_partition_cache()

    def gather_full(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the whole tensors of a snapshot on rank 0 (collective: every rank)."""
        gathered = {name: self._gather(parameter, tensors[name]) for parameter, name in self.names.items() if name in tensors}
        return {name: tensor for name, tensor in gathered.items() if tensor is not None}

    def take_shard(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return this rank's partitions of whole tensors."""
        return {name: self._part(parameter, tensors[name]) for parameter, name in self.names.items() if name in tensors}

    def state_dict(self, mesh: Mesh) -> dict[str, Tensor]:
        """Return weights and optimizer state, whole, on rank 0 (collective: every rank)."""
        state = {}
        for parameter, name in self.names.items():
            kept = self.zero.optimizer.state[self._flat(parameter)]
            for key in ("value", *kept):
                part = key == "value" or kept[key].dim() > 0
                whole = self._gather(parameter, self._local(parameter, key)) if part else kept[key].clone()
                if whole is not None:
                    state[f"{name}/{key}"] = whole
        return state

    @torch.no_grad()
    def load(self, state: dict[str, Tensor], mesh: Mesh) -> None:
        """Take over what `state_dict` returned, also on another number of ranks."""
        values = {}
        for parameter, name in self.names.items():
            flat = self._flat(parameter)
            for key, value in entries_of(name, state).items():
                if key == "value":
                    values[name] = self._part(parameter, value)
                elif value.dim():
                    self.zero.optimizer.state[flat].setdefault(key, torch.zeros_like(flat))
                    self._local(parameter, key).copy_(self._part(parameter, value))
                else:
                    self.zero.optimizer.state[flat][key] = value.clone()
        self.restore(values)

    def _flat(self, parameter: nn.Parameter) -> Tensor:
        """Return the float32 tensor in which ZeRO keeps this rank's part of this and other parameters."""
        group, *_ = self.zero.grad_position[self.zero.get_param_id(parameter)]
        flat: Tensor = self.zero.fp32_partitioned_groups_flat[group]
        return flat

    def _local(self, parameter: nn.Parameter, key: str = "value") -> Tensor:
        """Return this rank's part of a weight or of what the optimizer keeps for it, not copied."""
        _, offset, size = self.zero.grad_position[self.zero.get_param_id(parameter)]
        flat = self._flat(parameter)
        return (flat if key == "value" else self.zero.optimizer.state[flat][key]).detach().narrow(0, offset, size)

    def _gather(self, parameter: Any, part: Tensor) -> Tensor | None:
        """Return the whole tensor in the backbone's shape on rank 0's CPU, None elsewhere (collective: every rank)."""
        parts = [torch.empty_like(part) for _ in range(self.num_ranks)]
        torch.distributed.all_gather(parts, part.contiguous())
        if torch.distributed.get_rank():
            return None
        return torch.cat(parts)[: parameter.ds_numel].view(parameter.ds_shape).cpu()

    def _part(self, parameter: Any, whole: Tensor) -> Tensor:
        """Return this rank's part of a whole tensor, padded with zeros."""
        size = local_shard(parameter).numel()
        first = torch.distributed.get_rank() * size
        part = whole.flatten()[first : first + size].to(parameter.device, torch.float32)
        return nn.functional.pad(part, (0, size - part.numel()))


def _forget(engine: Any) -> None:
    """Take an engine's hooks off the backbone, so that the engine of the next stage may put its own there."""
    module = engine.module
    engine.destroy()
    _forget_globally(module)
    for submodule in module.modules():
        # Closures over the old engine, which DeepSpeed would keep.
        for name in ("pre_bwd_fn", "post_bwd_fn", "applied_pre_backward_ref_cnt"):
            submodule.__dict__.pop(name, None)


def _forget_globally(module: nn.Module) -> None:
    """Take a model out of DeepSpeed's stack of modules and caches of methods, which would keep it as long as the process lives."""
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

    FWD_MODULE_STACK[:] = [entered for entered in FWD_MODULE_STACK if entered is not module]
    _clear_caches()


def _clear_caches() -> None:
    """Empty the caches of ZeRO's methods."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    for method in vars(PartitionedParameterCoordinator).values():
        # Caches are inside wrappers; their keys hold the coordinator and sub-modules.
        for cell in getattr(method, "__closure__", None) or ():
            clear = getattr(cell.cell_contents, "cache_clear", None)
            if clear is not None:
                clear()
