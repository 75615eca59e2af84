"""The optimizer of one stage: schedule, clipping, state that resumes on any number of ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bpt_dist.config import StageConfig
from bpt_dist.distributed.mesh import Mesh
from bpt_dist.methods.base import Method


class StageOptimizer:
    """Updates the tensors this rank holds whole: prompts and other additions, or a backbone that is not partitioned.

    What it updates is float32, whatever the backbone computes in. A trained tensor of another type gets a float32 master copy. The
    gradient of every pass is added to the master's, the optimizer's state belongs to the master, checkpoints and snapshots hold the
    master, and after each update the tensor of the forward pass is the master rounded. Without masters an update smaller than the
    last bit of a bf16 weight would be lost. `sharding.zero` and `sharding.fsdp` derive from this class for a partitioned backbone.

    `names` maps each updated float32 tensor to its name in the method; `masters` maps those that are master copies to the tensor of
    the forward pass.
    """

    def __init__(self, method: Method, stage: StageConfig) -> None:
        self.method, self.stage = method, stage
        trained = {parameter: name for name, parameter in method.named_parameters() if parameter.requires_grad}
        groups = method.param_groups(stage)
        assert not stage.steps or all(group["lr"] is not None for group in groups), "a group has no learning rate"
        # A stage without steps, an untrained prompt, needs no rate.
        groups = [{**group, "lr": group["lr"] or 0.0} for group in groups]
        listed = [parameter for group in groups for parameter in group["params"]]
        assert {id(p) for p in listed} == {id(p) for p in trained}, "param_groups() must list every trainable tensor once"
        updated = {parameter: self._updated(parameter) for parameter in trained}
        self.names = {updated[parameter]: name for parameter, name in trained.items()}
        self.masters = {master: parameter for parameter, master in updated.items() if master is not parameter}
        groups = [{**group, "params": [updated[parameter] for parameter in group["params"]]} for group in groups]
        self.rates = [group["lr"] for group in groups]
        self.group_names = [self.names[group["params"][0]] if group["params"] else "" for group in groups]
        self.optimizer: Any = OPTIMIZERS[stage.optimizer](groups, stage)
        self._norm: Tensor | None = None  # of the last step that `measures`, on the device

    # --- one step -----------------------------------------------------------------------------------------------------

    def _updated(self, parameter: nn.Parameter) -> nn.Parameter:
        """Return the float32 tensor that is updated for a trained one: the tensor itself, or a master copy."""
        return parameter if parameter.dtype == torch.float32 else nn.Parameter(parameter.detach().to(torch.float32))

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`, a sum over this rank's texts, to the step's (collective for a partitioned backbone)."""
        loss.backward()
        self._collect()

    def _collect(self) -> None:
        """Add what a backward pass left at the tensors of the forward pass to the float32 gradients of their masters."""
        for master, parameter in self.masters.items():
            if parameter.grad is None:
                continue
            gradient = parameter.grad.to(torch.float32)
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            parameter.grad = None

    @torch.no_grad()
    def _round_masters(self) -> None:
        """Let the forward pass compute with the masters as they are now, rounded to its type."""
        for master, parameter in self.masters.items():
            parameter.copy_(master)

    def gradients(self) -> list[Tensor]:
        """Return what this rank holds of the step's gradients; changing them in place changes the step."""
        return [parameter.grad for parameter in self.names if parameter.grad is not None]

    @property
    def replicated(self) -> list[nn.Parameter]:
        """The tensors every replica holds whole: after `backward` their gradients have yet to be summed over the data axis."""
        return list(self.names)

    def step(self, step: int) -> None:
        """Clip, set the learning rates of `step` (counted from 0), update, and forget the gradients."""
        self._collect()  # of a penalty
        if self.measures(step):
            self._norm = self._largest_norm()
        if self.stage.clip is not None:
            self._clip(self.stage.clip)
        self._set_rates(step)
        self.optimizer.step()
        self._round_masters()
        self.zero_grad()

    def zero_grad(self) -> None:
        """Forget the gradients, also of a step that is left out."""
        for parameter in (*self.names, *self.masters.values()):
            parameter.grad = None

    def measures(self, step: int) -> bool:
        """Return whether `step` (counted from 0) ends with a record, for which its gradient norm is kept.

        The first always does: what a record says of particles and losses is from before its update, so this one shows the start.
        """
        return step == 0 or (step + 1) % self.stage.log_every == 0 or step + 1 == self.stage.steps

    def learning_rates(self) -> dict[str, float]:
        """Return the rates of the last step: `learning_rate`, or one by group, called by the group's first tensor."""
        rates = {name: group["lr"] for name, group in zip(self.group_names, self.optimizer.param_groups, strict=True) if name}
        if len(set(rates.values())) <= 1:
            return dict.fromkeys(["learning_rate"] if rates else [], next(iter(rates.values()), 0.0))
        return {f"learning_rate/{name}": rate for name, rate in rates.items()}

    def gradient_norm(self) -> float:
        """Return the largest norm `clip` has to compare with its limit in the last step that `measures`; waits for the device."""
        return 0.0 if self._norm is None else float(self._norm)

    def _largest_norm(self) -> Tensor:
        """Return the largest norm of gradients that are clipped together, row by row: the same bits however rows are shared."""
        rows, rest = self._clipped_together()
        norms = [torch.stack([_norm_of(parameter.grad) for parameter in rest]).norm()] if rest else []
        if rows:
            by_row = torch.stack([torch.stack([_norm_of(row) for row in gradient]) for gradient in rows])
            norms += list(by_row.norm(dim=0))
        return torch.stack(norms).max() if norms else torch.zeros(())

    def _clipped_together(self) -> tuple[list[Tensor], list[nn.Parameter]]:
        """Return the gradients whose rows are separate problems, and the parameters of the others, which are one problem."""
        by_row = self.method.particle_tensors | self.method.independent_rows
        trained = [(parameter, parameter.grad) for parameter in self.names if parameter.grad is not None]
        rows = [grad for parameter, grad in trained if self.names[parameter] in by_row]
        return rows, [parameter for parameter, _ in trained if self.names[parameter] not in by_row]

    def _set_rates(self, step: int) -> None:
        factor = schedule(step, self.stage.steps, self.stage.warmup, self.stage.schedule)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor

    def _clip(self, limit: float) -> None:
        """Scale gradients to norm <= limit: each particle's tensors together, the remaining tensors together.

        Particles are separate optimisation problems; one norm over all would also depend on how many of them this rank owns.
        """
        rows, rest = self._clipped_together()
        nn.utils.clip_grad_norm_(rest, limit)
        if rows:
            norms = torch.stack([grad.flatten(1).norm(dim=1) for grad in rows]).norm(dim=0)
            for grad in rows:
                grad.mul_((limit / norms.clamp_min(limit)).view(-1, *[1] * (grad.dim() - 1)))

    # --- what is kept -------------------------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, Tensor]:
        """Return float32 copies of what this rank holds of the trained tensors."""
        masters = {self.names[master]: master.detach().clone() for master in self.masters}
        if len(masters) == len(self.names):
            return masters
        return self.method.snapshot() | masters

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `snapshot` returned (collective for a partitioned backbone)."""
        for master in self.masters:
            master.copy_(tensors[self.names[master]])
        # Copying rounds to the type of the forward pass.
        self.method.restore(tensors)

    def gather_full(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the whole tensors of a snapshot, for a checkpoint (collective: every rank; only rank 0 needs the values)."""
        return dict(tensors)

    def take_shard(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return this rank's snapshot from what `gather_full` returned, also on another number of ranks."""
        return dict(tensors)

    def state_dict(self, mesh: Mesh) -> dict[str, Tensor]:
        """Return trainable tensors and optimizer state with all particles (collective: every rank; rank 0 keeps them)."""
        state = {}
        for parameter, name in self.names.items():
            for key, value in {"value": parameter.detach(), **self.optimizer.state[parameter]}.items():
                whole = name in self.method.particle_tensors and value.shape == parameter.shape
                state[f"{name}/{key}"] = mesh.gather_particles(value) if whole else value
        return state

    @torch.no_grad()
    def load(self, state: dict[str, Tensor], mesh: Mesh) -> None:
        """Take over what `state_dict` returned, also on another number of ranks."""
        for parameter, name in self.names.items():
            entries = entries_of(name, state)
            whole = entries["value"].shape
            for key, value in entries.items():
                part = value
                if name in self.method.particle_tensors and value.shape == whole:
                    part = value[mesh.rows(whole[0])]
                if key == "value":
                    parameter.copy_(part)
                elif part.dim():
                    self.optimizer.state[parameter][key] = part.clone().to(parameter.device, parameter.dtype)
                else:
                    # Optimizers keep their step counters on the CPU, whatever the device of the parameter.
                    self.optimizer.state[parameter][key] = part.clone().to("cpu")
        self._round_masters()


def _norm_of(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return torch.linalg.vector_norm(gradient, dtype=torch.float64)


def entries_of(name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the entries of one trained tensor: its `value` and what the optimizer keeps for it."""
    return {key.removeprefix(f"{name}/"): value for key, value in state.items() if key.rsplit("/", 1)[0] == name}


def schedule(step: int, steps: int, warmup: float, kind: str) -> float:
    """Return the factor of the learning rate at `step`: linear warm-up over `warmup * steps`, then constant or linear to zero."""
    rising = max(1, round(warmup * steps)) if warmup > 0 else 0
    if step < rising:
        return (step + 1) / (rising + 1)
    return 1.0 if kind == "constant" else max(0.0, (steps - step) / max(1, steps - rising))


def _adamw(groups: list[dict[str, Any]], stage: StageConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, weight_decay=stage.weight_decay)


def _sgd(groups: list[dict[str, Any]], stage: StageConfig) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, weight_decay=stage.weight_decay)


def _rmsprop(groups: list[dict[str, Any]], stage: StageConfig) -> torch.optim.Optimizer:
    # alpha 0.9 and eps 1e-6 are those of the SVGD authors' "AdaGrad with momentum".
    return torch.optim.RMSprop(groups, alpha=0.9, eps=1e-6, weight_decay=stage.weight_decay)


OPTIMIZERS = {"adamw": _adamw, "sgd": _sgd, "rmsprop": _rmsprop}
