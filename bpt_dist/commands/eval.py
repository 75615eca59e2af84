"""`bpt-dist eval`: what a method stored, on the rows of a task, through the evaluation that ends every run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from bpt_dist import config as configuration
from bpt_dist.artifacts.stored_run import StoredRun, stored_config
from bpt_dist.commands.output import print_list
from bpt_dist.config import DistributionConfig, RunConfig
from bpt_dist.errors import ConfigError
from bpt_dist.storage import layout

if TYPE_CHECKING:
    from bpt_dist.methods.base import Method
    from bpt_dist.training.evaluation import Evaluated


def print_evaluation(
    stored: Path,
    overrides: Sequence[str],
    task: str | None,
    split: str,
    config: Path | None,
    task_id: int | None,
    *,
    as_json: bool = False,
) -> None:
    """Evaluate and print every metric. Raises ConfigError, DataError before the backbone runs."""
    if not stored.exists():
        raise ConfigError(f"{stored}: no such run or prompt; give a run, an export, a .npy or a .safetensors file")
    if (stored / layout.STATUS).is_file():
        run = StoredRun.open(stored)
        task = task or _only_target(run)
        settings = _settings(stored, config, overrides)
        # A task the run was not adapted to is judged with its only prompt.
        adapted = task if task in run.targets else _only_target(run)
        stored = run.weights(adapted) or run.adapter(adapted)
    else:
        settings = _settings(_run_around(stored) if config is None else stored, config, overrides)
        task = task or _last_folder_with_export(stored)
    evaluated, num_rows = evaluate_stored(stored, settings, task, split, task_id)
    if as_json:
        facts = {"task": task, "split": split, "n": num_rows, "decode": evaluated.decode, "metrics": evaluated.metrics}
        typer.echo(json.dumps(facts, indent=1))
        return
    rows = [(name, f"{value:.4f}" if name == "nll" else f"{value:.2f} %") for name, value in evaluated.metrics.items()]
    print_list((f"{task}, {split}, {num_rows} rows, {evaluated.decode}", "value"), rows, right=(1,))


def evaluate_stored(stored: Path, config: RunConfig, task: str, split: str, task_id: int | None = None) -> tuple[Evaluated, int]:
    """Return what a stored prompt, or the stored tensors of another method, score on one task, and the number of rows.

    Runs in this process with the whole backbone.
    """
    import torch

    from bpt_dist.artifacts.peft_import import is_low_rank, read_low_rank
    from bpt_dist.artifacts.weights import is_weights, read_facts, read_weights
    from bpt_dist.backbones.prompts import read_prompt
    from bpt_dist.data.prepare import prepare
    from bpt_dist.distributed.mesh import World
    from bpt_dist.methods.prompt_tuning import Config as Options
    from bpt_dist.methods.prompt_tuning import PromptTuning
    from bpt_dist.training.evaluation import evaluate
    from bpt_dist.training.sharding.placement import load_backbone

    world = World(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    backbone = load_backbone(config.model_copy(update={"distribution": DistributionConfig()}), world)
    settings = config.evaluation.model_copy(update={"predict": "map", "num_samples": None})
    (data,) = prepare([task], config.data, backbone.tokenizer, splits=(split,), seed=config.seed, form=backbone.text_form)
    method: Method
    names = [task]
    if is_weights(stored):
        method, names = read_weights(stored, backbone, data.spec, settings, config.method), read_facts(stored)["target_tasks"]
    elif is_low_rank(stored):
        method = read_low_rank(stored, backbone, data.spec, settings, config.reduction)
    else:
        tensor = read_prompt(stored, backbone.width, task=task_id, task_type=backbone.task_type)
        method = PromptTuning(
            Options.model_validate({}), backbone, seed=config.seed, reduction=config.reduction, evaluation=settings
        )
        method.own(tensor[None])
    if task not in names and len(names) > 1:
        raise ConfigError(f"--task {task}: {stored} was trained on {', '.join(names)} together; name one of them")
    index = names.index(task) if task in names else 0
    evaluated = evaluate(method, [data] * len(names), index, split, "map", settings, world, lambda _: None)
    return evaluated, len(data.splits[split].examples)


def _only_target(run: StoredRun) -> str:
    if len(run.targets) == 1:
        return run.targets[0]
    raise ConfigError(
        f"--task: {run.folder} has prompts for {', '.join(run.targets)}; name one of them, or evaluate one of its "
        "target/*/adapter folders on another task"
    )


def _settings(run: Path, config: Path | None, overrides: Sequence[str]) -> RunConfig:
    """Return the settings of the run in a folder as it keeps them, or with overrides, or those of another file."""
    if config is None and not overrides:
        return stored_config(run)
    return configuration.load(config or run / layout.CONFIG, overrides)


def _run_around(stored: Path) -> Path:
    """Return the folder of the run that holds `stored`."""
    for folder in stored.resolve().parents:
        if (folder / layout.CONFIG).is_file() and (folder / layout.STATUS).is_file():
            return folder
    raise ConfigError(f"{stored}: is not inside a run; give --config FILE, which names the backbone and where the data are")


def _last_folder_with_export(stored: Path) -> str:
    place = stored.resolve()
    if place.name in (layout.ADAPTER, layout.WEIGHTS) and place.parent.name != layout.JOINT:
        return place.parent.name
    raise ConfigError("--task: is missing; name the task to evaluate on (`bpt-dist tasks` lists them)")
