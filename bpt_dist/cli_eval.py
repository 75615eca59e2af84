"""`bpt-dist eval`: a stored prompt on the rows of a task, through the evaluation that ends every run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bpt_dist import config as configuration
from bpt_dist.cli_export import StoredRun
from bpt_dist.cli_output import print_list
from bpt_dist.config import Config, Distribution
from bpt_dist.errors import ConfigError

if TYPE_CHECKING:
    from bpt_dist.evaluate import Evaluated


def print_evaluation(
    prompt: Path, overrides: Sequence[str], task: str | None, split: str, config: Path | None, task_id: int | None
) -> None:
    """Evaluate and print every metric. Raises ConfigError, DataError before the backbone runs."""
    if not prompt.exists():
        raise ConfigError(f"{prompt}: no such run or prompt; give a run, a PEFT folder, a .npy or a .safetensors file")
    if (prompt / "status.json").is_file():
        run = StoredRun.open(prompt)
        task = task or _only_target(run)
        settings = configuration.load(config or prompt / "config.yaml", overrides)
        # A task the run was not adapted to is judged with its only prompt.
        prompt = run.adapter(task if task in run.targets else _only_target(run))
    else:
        settings = configuration.load(config or _config_around(prompt), overrides)
        task = task or _last_folder_with_adapter(prompt)
    found, num_rows = evaluate_prompt(prompt, settings, task, split, task_id)
    rows = [(name, f"{value:.4f}" if name == "nll" else f"{value:.2f} %") for name, value in found.metrics.items()]
    print_list((f"{task}, {split}, {num_rows} rows, {found.decode}", "value"), rows, right=(1,))


def evaluate_prompt(prompt: Path, config: Config, task: str, split: str, task_id: int | None = None) -> tuple[Evaluated, int]:
    """Return what a stored prompt scores on one task, and the number of rows, in this process and with the whole T5."""
    import torch

    from bpt_dist.data.prepared import prepare
    from bpt_dist.evaluate import evaluate
    from bpt_dist.mesh import World
    from bpt_dist.methods.prompt_tuning import Config as Options
    from bpt_dist.methods.prompt_tuning import PromptTuning
    from bpt_dist.opening import load_backbone
    from bpt_dist.prompt_files import read_prompt

    world = World(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    backbone = load_backbone(config.model_copy(update={"distribution": Distribution()}), world)
    tensor = read_prompt(prompt, backbone.width, task=task_id)
    settings = config.evaluation.model_copy(update={"predict": "map", "num_samples": None})
    method = PromptTuning(Options.model_validate({}), backbone, seed=config.seed, reduction=config.reduction, evaluation=settings)
    method.own(tensor[None])
    (data,) = prepare([task], config.data, backbone.tokenizer, splits=(split,), seed=config.seed)
    found = evaluate(method, [data], 0, split, "map", settings, world, lambda _: None)
    return found, len(data.splits[split].examples)


def _only_target(run: StoredRun) -> str:
    if len(run.targets) == 1:
        return run.targets[0]
    raise ConfigError(
        f"--task: {run.folder} has prompts for {', '.join(run.targets)}; name one of them, or evaluate one of its "
        "target/*/adapter folders on another task"
    )


def _config_around(prompt: Path) -> Path:
    """Return the configuration of the run that holds `prompt`."""
    for folder in prompt.resolve().parents:
        if (folder / "config.yaml").is_file() and (folder / "status.json").is_file():
            return folder / "config.yaml"
    raise ConfigError(f"{prompt}: lies in no run; give --config FILE, which names the backbone and where the data are")


def _last_folder_with_adapter(prompt: Path) -> str:
    if prompt.resolve().name == "adapter":
        return prompt.resolve().parent.name
    raise ConfigError("--task: is missing; name the task to evaluate on (`bpt-dist tasks` lists them)")
