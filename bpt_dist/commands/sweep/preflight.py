"""What all trials need, checked once before any is started: the backbone, the stored posterior, the method, the rows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bpt_dist.config import RunConfig
from bpt_dist.config.processes import check_processes

if TYPE_CHECKING:
    from bpt_dist.backbones.base import Backbone

log = logging.getLogger(__name__)


def check_inputs(configs: Sequence[RunConfig], workers: int = 1) -> None:
    """Load each backbone, method, posterior and data set of the trials once, which also prepares the data for all of them.

    `workers` are the processes of a trial. Raises ConfigError for a posterior that is missing, of another backbone or made for
    other prompts or texts, and for what a method refuses; DataError for bad rows.
    """
    from bpt_dist.distributed.mesh import World
    from bpt_dist.training.microbatches import idle_ranks_warning
    from bpt_dist.training.sharding.placement import load_backbone

    check_processes(configs, workers, launched=workers > 1)
    by_backbone: dict[str, list[RunConfig]] = {}
    warnings: list[str | None] = []
    for config in configs:
        num_tasks = len(config.data.target_tasks) if config.target.joint else 1
        warnings.append(idle_ranks_warning("target", num_tasks * config.target.batch_size, 1, (1, workers)))
        by_backbone.setdefault(config.backbone.model_dump_json(), []).append(config)
    for warning in dict.fromkeys(warnings):
        if warning is not None:
            log.warning("%s", warning)
    for group in by_backbone.values():
        alone = group[0].distribution.model_copy(update={"shard": "none", "scope": "world", "offload": "none"})
        backbone = load_backbone(group[0].model_copy(update={"distribution": alone}), World())
        _check_methods(group, backbone)
        for config in _distinct(group, lambda run: f"{run.seed} {run.data.model_dump_json()} {run.source.posterior}"):
            _check_rows(config, backbone)


def _check_methods(configs: Sequence[RunConfig], backbone: Backbone) -> None:
    """Load every method once, whatever its rates, and check it against the posterior it starts from."""
    from bpt_dist.artifacts.hub import with_local_prompt
    from bpt_dist.artifacts.posterior import Posterior
    from bpt_dist.methods import base as methods

    posteriors: dict[Path, Posterior] = {}
    for config in _distinct(configs, lambda run: f"{_without_floats(run.method)} {run.data.protocol} {run.source.posterior}"):
        method, place = methods.load(with_local_prompt(config), backbone), config.source.posterior
        if place is not None:
            posterior = posteriors.get(place) or Posterior.load(place, backbone)
            posterior.require(config.method.name, method.source_tensors, backbone.width)
            posterior.agree(config, method.source_tensors)
            posteriors[place] = posterior
        method.end()


def _check_rows(config: RunConfig, backbone: Backbone) -> None:
    """Prepare the rows of a trial as the trial will."""
    from bpt_dist.data.prepare import data_of_run, prepare

    for needed in data_of_run(config):
        prepare(needed.names, needed.options, backbone.tokenizer, splits=needed.splits, seed=config.seed,
                form=backbone.text_form)  # fmt: skip


def _without_floats(options: Any) -> dict[str, Any]:
    return {key: value for key, value in options.model_dump().items() if not isinstance(value, float)}


def _distinct(configs: Sequence[RunConfig], key: Callable[[RunConfig], str]) -> Collection[RunConfig]:
    return {key(config): config for config in configs}.values()
