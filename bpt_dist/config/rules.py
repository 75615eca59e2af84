"""Rules over several sections: what one key says about another. Each rule yields `dotted.key: problem; remedy`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

from bpt_dist.config.base import without_effect
from bpt_dist.config.sections import RunConfig

Rule = Callable[[RunConfig], Iterator[str]]


def _stage_with_steps_has_tasks(config: RunConfig) -> Iterator[str]:
    if config.target.steps and not config.data.target_tasks:
        yield f"data.target_tasks: is empty, target.steps is {config.target.steps}; name tasks or set target.steps=0"
    if not config.method.HAS_SOURCE_STAGE:
        return
    if config.source.posterior is None and not config.source.steps:
        yield f"source.steps: is 0, method {config.method.name} learns from source tasks; set steps or source.posterior"
    if config.source.posterior is None and not config.data.source_tasks:
        yield f"data.source_tasks: is empty, method {config.method.name} learns from source tasks; name some"


def _source_keys_need_source_stage(config: RunConfig) -> Iterator[str]:
    if config.method.HAS_SOURCE_STAGE:
        return
    reason = f"with method {config.method.name}, which has no source stage"
    for problem in without_effect(config.data, reason, "source_tasks"):
        yield f"data.{problem}"
    for problem in without_effect(config.source, reason, *type(config.source).model_fields):
        yield f"source.{problem}"


def _store_has_an_address(config: RunConfig) -> Iterator[str]:
    """The default store is a file of sqlite, and an address of sqlite ends at the first `?`."""
    given = config.tracking
    if given.mlflow and given.uri is None and "?" in str(config.output.absolute()):
        yield (
            f"output: {config.output.absolute()} contains '?', which no address of the tracking store may hold; choose another "
            "output=, set tracking.uri, or set tracking.mlflow=false"
        )


def _some_work(config: RunConfig) -> Iterator[str]:
    if not (config.source.steps or config.source.posterior or config.target.steps or config.data.target_tasks):
        yield "target.steps: is 0 and so is source.steps; set the steps of at least one stage"


def _learning_rates(config: RunConfig) -> Iterator[str]:
    source, target, name = config.source, config.target, config.method.name
    if source.steps and source.posterior is None and (source.lr, source.lr_relative) == (None, None):
        yield "source.lr: is missing; give a learning rate (published prompts use 0.3)"
    if config.method.OWN_TARGET_RATES:
        for problem in without_effect(target, f"with method {name}, which names its own rates", "lr", "lr_relative"):
            yield f"target.{problem}"
    elif target.steps and (target.lr, target.lr_relative) == (None, None):
        yield "target.lr: is missing; give a learning rate (published: prompts 0.3, other parameters 3e-4)"


def _relative_rates_are_of_prompts(config: RunConfig) -> Iterator[str]:
    if config.method.RATE_IS_OF_PROMPTS:
        return
    stages = {"source": config.source, "target": config.target} if config.method.HAS_SOURCE_STAGE else {"target": config.target}
    for key, stage in stages.items():
        if stage.lr_relative is not None:
            yield (
                f"{key}.lr_relative: is in units of the word embeddings, and what method {config.method.name} trains is no soft "
                f"prompt (got {stage.lr_relative}); give {key}.lr"
            )


def _tasks_of_a_step(config: RunConfig) -> Iterator[str]:
    num_tasks, drawn = len(config.data.source_tasks), config.source.tasks_per_step
    if drawn is not None and num_tasks and drawn > num_tasks:
        yield f"source.tasks_per_step: exceeds the {num_tasks} source tasks (got {drawn}); at most {num_tasks}"
    for name in config.source.task_weights or {}:
        if name not in config.data.source_tasks:
            yield f"source.task_weights.{name}: is not among data.source_tasks; remove it"


def _particles(config: RunConfig) -> Iterator[str]:
    if not config.method.HAS_PARTICLES:
        reason = f"with method {config.method.name}, which has no particles"
        for problem in without_effect(config.source, reason, "shared_texts"):
            yield f"source.{problem}"
        if config.evaluation.predict != "map":
            predict = config.evaluation.predict
            yield f"evaluation.predict: {predict} needs particles, method {config.method.name} has none; use map"
    elif config.evaluation.predict != "map" and getattr(config.method, "num_particles", 2) == 1:
        predict = config.evaluation.predict
        yield f"evaluation.predict: {predict} needs two particles, method.num_particles is 1; raise it or use map"


def _trained_backbone_is_partitioned(config: RunConfig) -> Iterator[str]:
    given, name = config.distribution, config.method.name
    if not config.method.TRAINS_BACKBONE or given.shard == "none":
        return
    if given.scope == "node":
        yield f"distribution.scope: node keeps a copy of the backbone on each host, and method {name} trains one; use world"
    if given.offload != "none":
        yield f"distribution.offload: {given.offload} is for frozen partitions, and method {name} trains the backbone; use none"
    if given.exact:
        yield f"distribution.exact: orders the sums of whole gradients, which shard {given.shard} partitions; use shard none"


def _mesh_divides_particles(config: RunConfig) -> Iterator[str]:
    mesh = config.distribution.mesh
    if isinstance(mesh, str):
        return
    num_particles = getattr(config.method, "num_particles", 1)
    if num_particles % mesh.particle:
        divisors = [str(n) for n in range(1, num_particles + 1) if num_particles % n == 0]
        yield (
            f"distribution.mesh.particle: does not divide the number of particles, {num_particles} (got {mesh.particle}); "
            f"use one of {', '.join(divisors)}"
        )


def _slices_of_prompts(config: RunConfig) -> Iterator[str]:
    given, mesh = config.distribution, config.distribution.mesh
    if given.exchange == "all_gather":
        return
    if not config.method.HAS_PARTICLES:
        reason = f"with method {config.method.name}, which has no particles"
        for problem in without_effect(given, reason, "exchange"):
            yield f"distribution.{problem}"
        return
    if given.exact:
        yield "distribution.exchange: coordinates adds up as many slices as there are ranks, which exact forbids; use all_gather"
    length = getattr(config.method, "prompt_length", None)
    if not isinstance(mesh, str) and length is not None and mesh.particle > length:
        yield (
            f"distribution.exchange: coordinates gives each of {mesh.particle} ranks a slice of {length} prompt position(s); use "
            "all_gather, fewer ranks along distribution.mesh.particle, or a longer method.length"
        )


def _exact_makes_its_own_passes(config: RunConfig) -> Iterator[str]:
    if not config.distribution.exact:
        return
    for section, key in ((config.source, "source.pass_size"), (config.target, "target.pass_size")):
        if section.pass_size is not None:
            yield f"{key}: has no effect with distribution.exact, where a pass is one particle and one text; remove it"


def _few_shot(config: RunConfig) -> Iterator[str]:
    if config.data.shots is not None and not config.data.target_tasks:
        yield f"data.shots: has no effect without target tasks (got {config.data.shots}); remove it"


def _registered(config: RunConfig) -> Iterator[str]:
    if config.tracking.register_as is not None and not config.data.target_tasks:
        yield f"tracking.register_as: has no effect without target tasks (got {config.tracking.register_as!r}); remove it"


def _one_or_many(config: RunConfig) -> Iterator[str]:
    if config.seeds is not None:
        if config.seed != type(config).model_fields["seed"].default:
            yield f"seed: has no effect beside seeds (got {config.seed}); remove one of them"
        if len(set(config.seeds)) < len(config.seeds):
            yield f"seeds: lists a seed twice (got {list(config.seeds)}); name each once"


RULES: tuple[tuple[Rule, str], ...] = (
    (_stage_with_steps_has_tasks, "method data.source_tasks data.target_tasks source.steps source.posterior target.steps"),
    (_source_keys_need_source_stage, "method data.source_tasks source"),
    (_some_work, "source.steps source.posterior target.steps data.target_tasks"),
    (_store_has_an_address, "output tracking.mlflow tracking.uri"),
    (
        _learning_rates,
        "method source.steps source.posterior source.lr source.lr_relative target.lr target.lr_relative target.steps",
    ),
    (_relative_rates_are_of_prompts, "method source.lr_relative target.lr_relative"),
    (_tasks_of_a_step, "data.source_tasks source.tasks_per_step source.task_weights"),
    (_particles, "method source.shared_texts evaluation.predict"),
    (_trained_backbone_is_partitioned, "method distribution"),
    (_mesh_divides_particles, "method distribution.mesh"),
    (_slices_of_prompts, "method distribution"),
    (_exact_makes_its_own_passes, "distribution source target"),
    (_few_shot, "data.shots data.target_tasks"),
    (_registered, "tracking.register_as data.target_tasks"),
    (_one_or_many, "seed seeds"),
)
"""Each rule with the keys or sections it reads: a rule that reads a broken key has nothing to say."""


def problems_between_sections(config: RunConfig, broken: Collection[str] = ()) -> list[str]:
    """Return every violated rule as `dotted.key: what is wrong; remedy`, leaving out rules that read a broken key."""
    problems: list[str] = []
    for rule, keys in RULES:
        if not any(_overlap(key, other) for key in keys.split() for other in broken):
            problems += rule(config)
    return problems


def _overlap(key: str, other: str) -> bool:
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")
