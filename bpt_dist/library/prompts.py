"""Stored prompts and posteriors as tensors, the predictors that answer with them, and the bridge to PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from bpt_dist import objective
from bpt_dist.artifacts.hub import local_folder
from bpt_dist.artifacts.inference.exports import read_exports, refuse_duplicates, refuse_several_backbones
from bpt_dist.artifacts.inference.predictor import Predictor
from bpt_dist.artifacts.posterior import Posterior as StoredPosterior
from bpt_dist.artifacts.stored_run import StoredRun
from bpt_dist.backbones.checkpoint import Checkpoint
from bpt_dist.backbones.prompts import read_prompt, read_stored
from bpt_dist.errors import ConfigError
from bpt_dist.library.bridge import add_prompt, prompt_of
from bpt_dist.library.page import facts_html
from bpt_dist.storage import layout
from bpt_dist.storage.digest import SHORT


class Posterior:
    """What a source stage has learnt: M particles, their mean, and what they belong to."""

    def __init__(self, stored: StoredPosterior, place: Path) -> None:
        self._stored, self.place = stored, place

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in sorted(self.tensors.items()))
        return f"<Posterior of {self.facts['method']} in {self.place}: {shapes}>"

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Everything the method handed over, by name."""
        return self._stored.tensors

    @property
    def facts(self) -> Mapping[str, Any]:
        """Method, source tasks, steps, seed, and the hashes of backbone and tokenizer."""
        return self._stored.facts

    @property
    def particles(self) -> Float[Tensor, "M P D"]:
        """The particles. Raises ConfigError for a method that has none."""
        return self._named("particles")

    @property
    def mean(self) -> Float[Tensor, "P D"]:
        """The mean of the particles. Raises ConfigError for a method that has none."""
        return self._named("mean")

    def init_peft(self, model: Any, *, particle: int | None = None) -> Any:
        """Return `model` as a PEFT prompt-tuning model whose prompt starts at the mean, or at one particle.

        `model` is a language model of transformers, which PEFT freezes, or a model that PEFT has given a prompt of the same length
        already. Raises ConfigError for another width or length, and for a model that was loaded from a folder with other weights
        than the posterior belongs to.
        """
        if particle is not None and not 0 <= particle < len(self.particles):
            raise ConfigError(f"particle: there is no number {particle}; the posterior has 0 to {len(self.particles) - 1}")
        self._refuse_another_backbone(model)
        return add_prompt(model, self.mean if particle is None else self.particles[particle])

    def _named(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise ConfigError(
                f"{self.place}: was made by method {self.facts['method']} and holds no {name} but {', '.join(self.tensors)}"
            )
        return self.tensors[name]

    def _refuse_another_backbone(self, model: Any) -> None:
        """Compare the files that a model was loaded from, where it says a folder, with those the posterior belongs to."""
        name = str(getattr(getattr(model, "config", None), "_name_or_path", ""))
        if not name or not Path(name).is_dir():
            return
        here, made_with = Checkpoint(name).weights().identity, self.facts["backbone_hash"]
        if here != made_with:
            raise ConfigError(
                f"{self.place}: belongs to another backbone ({self.facts['backbone']}, hash {made_with[:SHORT]}; {name} has "
                f"{here[:SHORT]}); load that one"
            )

    def _repr_html_(self) -> str:
        shown = {name: str(self.facts[name]) for name in ("method", "backbone", "steps", "seed") if name in self.facts}
        shown["source tasks"] = ", ".join(self.facts.get("source_tasks", ()))
        shown |= {name: " x ".join(map(str, tensor.shape)) for name, tensor in sorted(self.tensors.items())}
        return facts_html(shown)


class Prompt:
    """One stored prompt [P, D]."""

    def __init__(self, tensor: Float[Tensor, "P D"], place: Path) -> None:
        self.tensor, self.place = tensor, place

    def __repr__(self) -> str:
        return f"<Prompt {list(self.tensor.shape)} from {self.place}>"

    def init_peft(self, model: Any) -> Any:
        """Return `model` as a PEFT prompt-tuning model that starts at this prompt. Raises ConfigError as `Posterior.init_peft`."""
        return add_prompt(model, self.tensor)

    def predictor(self, *, backbone: str | None = None) -> Predictor:
        """Return what answers rows with this prompt. Raises ConfigError for one that was exported without `task.json`."""
        return predictor_of(self.place, None, ensemble=False, backbone=backbone)


def load_posterior(place: str | Path) -> Posterior:
    """Read a posterior from a run, its folder or its file. Raises ConfigError where there is none."""
    return Posterior(StoredPosterior.read(Path(place)), Path(place))


def load_prompt(place: str | Path, task: str | None = None) -> Prompt:
    """Read a prompt from a run, a PEFT folder, a `.npy` or a `.safetensors` file, or from the hub by `owner/name@revision`.

    `task` names the target task of a run, and may be left out where it has one. Raises ConfigError where there is no such prompt.
    """
    place = local_folder(Path(place))
    if (place / layout.STATUS).is_file():
        run = StoredRun.open(place)
        if task is None and len(run.targets) > 1:
            raise ConfigError(f"{place}: has prompts of {', '.join(run.targets)}; name a task")
        if task is not None and task not in run.targets:
            raise ConfigError(f"{place}: has no target task {task!r}; it has {', '.join(run.targets)}")
        place = run.adapter(task or run.targets[0])
    elif task is not None:
        raise ConfigError(f"{place}: is no run, so it has one prompt; leave the task {task!r} out")
    return Prompt(read_prompt(place, read_stored(place).shape[-1]), place)


def predictor_of(place: Path, task: str | None, *, ensemble: bool, backbone: str | None) -> Predictor:
    """Return a predictor for the prompts of a run or an export, or for one task of them; the frozen model is loaded for it."""
    from bpt_dist.artifacts.inference.backbone import load_backbone

    exports = read_exports(place, ensemble=ensemble)
    if task is not None:
        names = [export.name for export in exports]
        exports = [export for export in exports if export.name == task]
        if not exports:
            raise ConfigError(f"{place}: has no prompt of task {task!r}; it has {', '.join(names)}")
    refuse_duplicates(exports)
    refuse_several_backbones(exports)
    return Predictor(load_backbone(exports[0], backbone), exports)


def gaussian_penalty(
    prompt: Any,
    mean: Posterior | Prompt | Tensor,
    *,
    num_examples: int,
    sigma: float | None = None,
    sigma_relative: float | None = None,
) -> Float[Tensor, ""]:
    """Return what the Gaussian prior adds to the loss of one step: |theta - mean|^2 / (2 sigma^2 |D|), differentiable.

    `prompt` is the prompt [P, D], or the PEFT model that trains it. It belongs to a loss that is a mean over the texts of a batch,
    |D| = `num_examples` being those of the whole training split: the sum is J/|D| of the target stage. Give `sigma`, or
    `sigma_relative` in units of the root mean square of the mean. Raises ConfigError for both or neither, for numbers that are not
    positive, and for shapes that differ.
    """
    centre = mean.mean if isinstance(mean, Posterior) else mean.tensor if isinstance(mean, Prompt) else mean
    theta = prompt if isinstance(prompt, Tensor) else prompt_of(prompt)
    if (sigma is None) == (sigma_relative is None):
        raise ConfigError("gaussian_penalty: give either sigma or sigma_relative")
    for name, value in (("sigma", sigma), ("sigma_relative", sigma_relative), ("num_examples", num_examples)):
        if value is not None and not value > 0:
            raise ConfigError(f"gaussian_penalty: {name} should be positive (got {value!r})")
    if theta.shape != centre.shape:
        raise ConfigError(
            f"gaussian_penalty: the prompt is {list(theta.shape)}, the mean {list(centre.shape)}; give those of one length"
        )
    centre = centre.to(theta.device, theta.dtype)
    width = objective.sigma_from_relative(centre, sigma_relative) if sigma_relative is not None else sigma
    assert width is not None
    return objective.gaussian_penalty(theta, centre, width, num_examples)
