"""What all trials need, looked at once before any is started: the T5, the stored posterior, the rows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from bpt_dist.config import Config


def check_inputs(configs: Sequence[Config]) -> None:
    """Load each T5, posterior and data set of the trials once, which also prepares the data for all of them.

    Raises ConfigError for a posterior that is missing, belongs to another T5 or does not fit the method; DataError for bad rows.
    """
    from bpt_dist.data.prepared import prepare
    from bpt_dist.mesh import World
    from bpt_dist.methods import base as methods
    from bpt_dist.opening import load_backbone
    from bpt_dist.posterior import Posterior

    by_backbone: dict[str, list[Config]] = {}
    for config in configs:
        by_backbone.setdefault(config.backbone.model_dump_json(), []).append(config)
    for group in by_backbone.values():
        alone = group[0].distribution.model_copy(update={"shard": "none", "scope": "world", "offload": "none"})
        backbone = load_backbone(group[0].model_copy(update={"distribution": alone}), World())
        for config in _distinct(group, lambda one: f"{one.method.name} {one.source.posterior}"):
            if config.source.posterior is not None:
                posterior = Posterior.load(config.source.posterior, backbone)
                posterior.require(config.method.name, methods.load(config, backbone).source_tensors, backbone.width)
        for config in _distinct(group, lambda one: f"{one.seed} {one.data.model_dump_json()}"):
            wanted = dict.fromkeys(("train", "validation", *config.evaluation.splits))
            prepare(config.data.target_tasks, config.data, backbone.tokenizer, splits=tuple(wanted), seed=config.seed)


def _distinct(configs: Sequence[Config], key: Callable[[Config], str]) -> Collection[Config]:
    return {key(config): config for config in configs}.values()
