"""What all trials need, looked at once before any is started: the T5, the stored posterior, the method, the rows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bpt_dist.config import Config

if TYPE_CHECKING:
    from bpt_dist.backbone import Backbone


def check_inputs(configs: Sequence[Config], workers: int = 1) -> None:
    """Load each T5, method, posterior and data set of the trials once, which also prepares the data for all of them.

    `workers` are the processes of a trial. Raises ConfigError for a posterior that is missing, of another T5 or made for
    other prompts or texts, and for what a method refuses; DataError for bad rows.
    """
    from bpt_dist.mesh import World
    from bpt_dist.opening import load_backbone
    from bpt_dist.stage import check_sequences

    by_backbone: dict[str, list[Config]] = {}
    for config in configs:
        num_tasks = len(config.data.target_tasks) if config.target.joint else 1
        check_sequences("target", config.target.batch_size, num_tasks * config.target.batch_size, workers)
        by_backbone.setdefault(config.backbone.model_dump_json(), []).append(config)
    for group in by_backbone.values():
        alone = group[0].distribution.model_copy(update={"shard": "none", "scope": "world", "offload": "none"})
        backbone = load_backbone(group[0].model_copy(update={"distribution": alone}), World())
        _check_methods(group, backbone)
        for config in _distinct(group, lambda one: f"{one.seed} {one.data.model_dump_json()} {one.source.posterior}"):
            _check_rows(config, backbone)


def _check_methods(configs: Sequence[Config], backbone: Backbone) -> None:
    """Load every method once, whatever its rates, and hold it against the posterior it starts from."""
    from bpt_dist.methods import base as methods
    from bpt_dist.posterior import Posterior

    posteriors: dict[Path, Posterior] = {}
    for config in _distinct(configs, lambda one: f"{_without_floats(one.method)} {one.data.protocol} {one.source.posterior}"):
        method, place = methods.load(config, backbone), config.source.posterior
        if place is not None:
            posterior = posteriors.get(place) or Posterior.load(place, backbone)
            posterior.require(config.method.name, method.source_tensors, backbone.width)
            posterior.agree(config, method.source_tensors)
            posteriors[place] = posterior
        method.end()


def _check_rows(config: Config, backbone: Backbone) -> None:
    """Prepare the rows of a trial as its session does."""
    from bpt_dist.data.prepared import prepare

    if config.method.HAS_SOURCE_STAGE and config.source.posterior is None:
        everything = config.data.model_copy(update={"shots": None})
        prepare(config.data.source_tasks, everything, backbone.tokenizer, splits=("train",), seed=config.seed)
    wanted = dict.fromkeys(("train", "validation", *config.evaluation.splits))
    prepare(config.data.target_tasks, config.data, backbone.tokenizer, splits=tuple(wanted), seed=config.seed)


def _without_floats(options: Any) -> dict[str, Any]:
    return {key: value for key, value in options.model_dump().items() if not isinstance(value, float)}


def _distinct(configs: Sequence[Config], key: Callable[[Config], str]) -> Collection[Config]:
    return {key(config): config for config in configs}.values()
