"""`bpt-dist table --costs`: what training took, a row a method: steps, texts, tokens and seconds of its stages."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from bpt_dist.artifacts.results import Result
from bpt_dist.artifacts.stored_run import stored_config
from bpt_dist.commands.table.layout import MISSING, Block, Sheet, Text
from bpt_dist.config import RunConfig
from bpt_dist.config.loading import row_label
from bpt_dist.storage import layout
from bpt_dist.storage.metrics_log import COST, iter_records

HEADER = (
    "Method", "Seeds", "Source steps", "Particle-texts", "Source tokens (millions)", "Source seconds",
    "Target steps", "Target tokens (millions)", "Target seconds",
)  # fmt: skip
NOTES = (
    "Means over seeds; all target tasks of a run together. Validations, evaluations and checkpoints are not counted.",
    "Particle-texts: particles x texts of a step x steps of the source stage itself, each read forward and backward once.",
    "Tokens: of prompts, texts and targets, once for every particle that reads them; what comes before the source stage counts.",
    "Seconds are those of the machines that ran the steps, beside whatever else ran there.",
)


@dataclass
class StageCosts:
    """Steps, tokens and seconds of the stages whose name begins alike, added up."""

    steps: int = 0
    tokens: float = 0.0
    seconds: float = 0.0


@dataclass
class RunCosts:
    """What one run took; `particle_texts` is None where a method has no source stage or took a posterior from elsewhere."""

    particle_texts: int | None
    parts: dict[str, StageCosts] = field(default_factory=lambda: defaultdict(StageCosts))


def costs_of(folder: Path) -> RunCosts:
    """Read what a finished run took from its metrics log: the means of the steps between two records, times these steps."""
    config = stored_config(folder)
    found = RunCosts(_particle_texts(config))
    last: dict[str, int] = defaultdict(int)
    for record in iter_records(folder / layout.METRICS):
        stage, values = record["stage"], record.get("metrics", {})
        part = stage.partition("/")[0]
        seconds = values.get(f"{part}/{COST}/seconds_per_step")
        if seconds is None:
            continue
        steps, last[stage] = record["step"] - last[stage], record["step"]
        total = found.parts[part]
        total.steps += steps
        total.seconds += steps * seconds
        total.tokens += steps * values[f"{part}/{COST}/tokens_per_step"]
    return found


def cost_sheet(results: Sequence[Result]) -> Sheet:
    """Return the table of costs of the runs behind `results`: one row for all runs with the same label."""
    groups: dict[str, list[RunCosts]] = defaultdict(list)
    for folder in dict.fromkeys(result.folder for result in results):
        groups[row_label(stored_config(folder))].append(costs_of(folder))
    rows = tuple(tuple(map(Text, _texts(label, runs))) for label, runs in groups.items())
    return Sheet("What training took", HEADER, (Block("", rows),) if rows else (), NOTES)


def _particle_texts(config: RunConfig) -> int | None:
    if not config.method.HAS_SOURCE_STAGE or config.source.posterior is not None:
        return None
    tasks = config.source.tasks_per_step or len(config.data.source_tasks)
    return getattr(config.method, "num_particles", 1) * tasks * config.source.batch_size * config.source.steps


def _texts(label: str, runs: Sequence[RunCosts]) -> list[str]:
    source, target = (_part_texts([run.parts for run in runs], part) for part in ("source", "target"))
    counts = [run.particle_texts for run in runs if run.particle_texts is not None]
    return [label, str(len(runs)), source[0], f"{fmean(counts):,.0f}" if counts else MISSING, *source[1:], *target]


def _part_texts(runs: Sequence[Mapping[str, StageCosts]], part: str) -> list[str]:
    found = [run[part] for run in runs if part in run]
    if not found:
        return [MISSING] * 3
    steps, tokens, seconds = (fmean(getattr(each, name) for each in found) for name in ("steps", "tokens", "seconds"))
    return [f"{steps:,.0f}", f"{tokens / 1e6:.2f}", f"{seconds:,.1f}"]
