"""Write what a method trained as plain tensors with the facts to use it again, and read it back without the training loop.

For every method that is no soft prompt: `weights.safetensors` holds the trained tensors (`trained/...`) and what the source stage
handed over to them (`source/...`); `weights.json` says of which method, with which options, for which backbone and tasks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bpt_dist.backbones.base import Backbone
from bpt_dist.config import EvaluationConfig, MethodConfig
from bpt_dist.config.method_source import method_names
from bpt_dist.config.own_method import digest
from bpt_dist.distributed.mesh import Mesh
from bpt_dist.errors import ConfigError, NonFinite
from bpt_dist.methods.base import Method, Tensors, class_of, method_class, options_class, own_digest
from bpt_dist.storage import layout
from bpt_dist.storage.checkpoint import read_tensors, write_tensors_atomic
from bpt_dist.storage.digest import SHORT
from bpt_dist.storage.files import read_json, write_json_atomic
from bpt_dist.tasks.spec import TaskSpec

WEIGHTS, FACTS = "weights.safetensors", layout.WEIGHTS_FACTS


def write_weights(
    method: Method, trained: Tensors, source: Tensors | None, tasks: Sequence[str], num_examples: Sequence[int], folder: Path
) -> Path:
    """Write the tensors of a finished target stage and return the folder; the facts come last and make the export exist (one rank).

    `trained` may be the float32 master copies; what is written has the type of the forward pass. Raises NonFinite, StorageError.
    """
    types = {name: parameter.dtype for name, parameter in method.named_parameters()}
    computed = {name: tensor.to(types.get(name, tensor.dtype)) for name, tensor in trained.items()}
    groups: Mapping[str, Tensors] = {"trained": computed, "source": source or {}}
    tensors = {f"{group}/{name}": _plain(tensor) for group, tensors_of in groups.items() for name, tensor in tensors_of.items()}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise NonFinite(f"export: {name} holds NaN or infinity; export an earlier checkpoint")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FACTS).unlink(missing_ok=True)
    write_tensors_atomic(folder / WEIGHTS, tensors)
    facts = {
        "method": method.config.name,
        "options": method.config.model_dump(mode="json"),
        "seed": method.seed,
        "reduction": method.reduction,
        "backbone": method.backbone.name,
        "backbone_hash": method.backbone.identity,
        "tokenizer_hash": method.backbone.tokenizer_hash,
        "target_tasks": list(tasks),
        "num_examples": list(num_examples),
        "source_tasks": list(method.source_tasks),
        "trainable_parameters": method.num_trainable(),
        "shapes": {name: list(tensor.shape) for name, tensor in tensors.items()},
    }
    own = own_digest(type(method))
    write_json_atomic(folder / FACTS, facts if own is None else {**facts, "method_file_hash": own})
    return folder


def is_weights(folder: Path) -> bool:
    """Return whether `folder` holds what `write_weights` wrote."""
    return (folder / FACTS).is_file() and (folder / WEIGHTS).is_file()


def read_facts(folder: Path) -> dict[str, Any]:
    """Return what `weights.json` says."""
    return dict(read_json(folder / FACTS))


def read_weights(
    folder: Path, backbone: Backbone, spec: TaskSpec, evaluation: EvaluationConfig, given: MethodConfig | None = None
) -> Method:
    """Return the method on `backbone` as it was after training; `spec` represents its target tasks, of which only names count.

    What a method outside the package left is read with the file that `given`, the method of a configuration, names; a folder never
    says which code is run. Raises ConfigError for another backbone, tokenizer or file, and for a method or options this version
    does not know.
    """
    facts = read_facts(folder)
    for what, own in (("backbone", backbone.identity), ("tokenizer", backbone.tokenizer_hash)):
        if facts[f"{what}_hash"] != own:
            raise ConfigError(
                f"{folder}: was made with another {what} ({facts['backbone']}, hash {facts[f'{what}_hash'][:12]}; "
                f"here {backbone.name}, {own[:12]}); set backbone.path to that one"
            )
    chosen = _class(folder, facts, given)
    tensors, _ = read_tensors(folder / WEIGHTS)
    trained = {name.removeprefix("trained/"): tensor for name, tensor in tensors.items() if name.startswith("trained/")}
    try:
        options = options_class(chosen).model_validate(chosen.options_of_stored(facts["options"], trained))
    except (ValueError, KeyError) as error:
        reason = f"options are not those of this version ({error}); evaluate with the version that wrote it"
        raise ConfigError(f"{folder / FACTS}: {reason}") from error
    method = chosen(options, backbone, seed=facts["seed"], reduction=facts["reduction"], evaluation=evaluation)
    _begin(method, tensors, facts, spec)
    return method


def _class(folder: Path, facts: Mapping[str, Any], given: MethodConfig | None) -> type[Method]:
    name, stored = facts["method"], facts.get("method_file_hash")
    if stored is None and name in method_names():
        return method_class(name)
    if stored is None:
        raise ConfigError(f"{folder}: is of method {name!r}; this version has {', '.join(method_names())}")
    own = None if given is None else digest(given)
    if given is None or given.name != name or own is None:
        raise ConfigError(f"{folder}: is of method {name!r}, a file outside the package; name that file, method.path={name}.py")
    if own != stored:
        hashes = f"hash {stored[:SHORT]}, here {own[:SHORT]}"
        raise ConfigError(f"method.path: is not the file that {folder} was trained with ({hashes}); give that one")
    return class_of(given)


def _begin(method: Method, tensors: Tensors, facts: Mapping[str, Any], spec: TaskSpec) -> None:
    """Set up the target stage as it was trained and put the trained tensors in."""
    parts = {part: {name.removeprefix(f"{part}/"): tensor for name, tensor in tensors.items() if name.startswith(f"{part}/")}
             for part in ("trained", "source")}  # fmt: skip
    method.source_tasks = tuple(facts["source_tasks"])
    specs = [dataclasses.replace(spec, name=name) for name in facts["target_tasks"]]
    method.begin_target(parts["source"] or None, specs, facts["num_examples"], Mesh())
    for _ in method.auxiliary_phases():
        method.end_auxiliary_phase(Mesh())
    with torch.no_grad():
        method.restore(parts["trained"])


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu").contiguous()
