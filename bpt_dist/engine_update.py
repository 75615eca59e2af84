"""The optimizer of one stage: schedule, clipping, state that resumes on any number of ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bpt_dist.config import Stage
from bpt_dist.mesh import Mesh
from bpt_dist.methods.base import Method


class Updater:
    """Updates tensors that lie whole on this rank: prompts and other additions, or a T5 that is not partitioned.

    `engine_zero` and `engine_fsdp` derive from it for a T5 that is trained in parts.
    """

    def __init__(self, method: Method, stage: Stage) -> None:
        self.method, self.stage = method, stage
        self.names = {parameter: name for name, parameter in method.named_parameters() if parameter.requires_grad}
        # A stage without steps, an untrained prompt, needs no rate.
        groups = [{**group, "lr": group["lr"] or 0.0} for group in method.param_groups(stage)]
        listed = [parameter for group in groups for parameter in group["params"]]
        assert {id(p) for p in listed} == {id(p) for p in self.names}, "param_groups() must list every trainable tensor once"
        self.rates = [group["lr"] for group in groups]
        self.optimizer: Any = OPTIMIZERS[stage.optimizer](groups, stage)

    # --- one step -----------------------------------------------------------------------------------------------------

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`, the sum over this rank's texts, to those of the step (collective for a partitioned T5)."""
        loss.backward()

    def gradients(self) -> list[Tensor]:
        """Return what this rank holds of the step's gradients; changing them in place changes the step."""
        return [parameter.grad for parameter in self.names if parameter.grad is not None]

    @property
    def replicated(self) -> list[nn.Parameter]:
        """The parameters every replica holds whole: after `backward` their gradients have yet to be summed over the data axis."""
        return list(self.names)

    def step(self, step: int) -> None:
        """Clip, set the learning rates of `step` (counted from 0), update, and forget the gradients."""
        if self.stage.clip is not None:
            self._clip(self.stage.clip)
        self._set_rates(step)
        self.optimizer.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        """Forget the gradients, also of a step that is left out."""
        for parameter in self.names:
            parameter.grad = None

    def _set_rates(self, step: int) -> None:
        factor = schedule(step, self.stage.steps, self.stage.warmup, self.stage.schedule)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor

    def _clip(self, limit: float) -> None:
        """Scale gradients to norm <= limit: each particle's tensors together, the remaining tensors together.

        Particles are separate optimisation problems; one norm over all would also depend on how many of them this rank owns.
        """
        by_row = self.method.particle_tensors | self.method.independent_rows
        trained = [(parameter, parameter.grad) for parameter in self.names if parameter.grad is not None]
        rows = [grad for parameter, grad in trained if self.names[parameter] in by_row]
        nn.utils.clip_grad_norm_([p for p, _ in trained if self.names[p] not in by_row], limit)
        if rows:
            norms = torch.stack([grad.flatten(1).norm(dim=1) for grad in rows]).norm(dim=0)
            for grad in rows:
                grad.mul_((limit / norms.clamp_min(limit)).view(-1, *[1] * (grad.dim() - 1)))

    # --- what is kept -------------------------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, Tensor]:
        """Return copies of what this rank holds of the trained tensors."""
        return self.method.snapshot()

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `snapshot` returned (collective for a partitioned T5)."""
        with torch.no_grad():
            self.method.restore(tensors)

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the whole tensors of a snapshot, for a checkpoint (collective: every rank; only rank 0 needs the values)."""
        return dict(tensors)

    def own(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return this rank's snapshot from what `whole` returned, also on another number of ranks."""
        return dict(tensors)

    def tensors(self, mesh: Mesh) -> dict[str, Tensor]:
        """Return trainable tensors and optimizer state with all particles (collective: every rank; rank 0 keeps them)."""
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
            entries = entries_of(name, state)
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


def entries_of(name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the entries of one trained tensor: its `value` and what the optimizer keeps for it."""
    return {key.removeprefix(f"{name}/"): value for key, value in state.items() if key.rsplit("/", 1)[0] == name}


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
