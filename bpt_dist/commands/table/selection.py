"""Choose among the trials of each method: the row with the best validation score, and nobody gets more trials than another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import yaml

from bpt_dist.artifacts.results import Result
from bpt_dist.config import RunConfig
from bpt_dist.config.loading import row_label
from bpt_dist.errors import ConfigError

SPLIT = "validation"


class Group(NamedTuple):
    """What trials compete for: the row of one method, adapted to each target alone or to all together."""

    method: str
    joint: bool


@dataclass(frozen=True)
class Trial:
    """One row of a search: its label, the settings the file gives it, and its mean validation score in percent."""

    label: str
    settings: dict[str, Any]
    score: float
    num_seeds: int


def check_equal_trials(config: RunConfig, runs: Sequence[RunConfig]) -> int:
    """Return how many trials each method has; raises ConfigError unless all have as many, judged on validation rows alone."""
    if config.evaluation.splits != (SPLIT,):
        raise ConfigError(
            f"evaluation.splits: is {list(config.evaluation.splits)}, a search looks at {SPLIT} rows only; set [{SPLIT}]"
        )
    trials: dict[Group, set[str]] = {}
    for run in runs:
        trials.setdefault(Group(run.method.name, run.target.joint), set()).add(row_label(run))
    counts = {len(labels) for labels in trials.values()}
    if len(counts) != 1:
        listed = ", ".join(f"{_title(group)} {len(labels)}" for group, labels in trials.items())
        raise ConfigError(f"rows: give every method the same number of trials (got {listed})")
    return counts.pop()


def select_best(config: RunConfig, runs: Sequence[RunConfig], results: Sequence[Result]) -> dict[Group, list[Trial]]:
    """Return the trials of each group, best first: the mean of the headline metrics over targets and seeds; ties keep the first.

    Raises ConfigError when a trial has not been finished.
    """
    given = _rows_by_group(config)
    by_group: dict[Group, list[Trial]] = {}
    for label in dict.fromkeys(row_label(run) for run in runs):
        mine = [run for run in runs if row_label(run) == label]
        names = {run.name for run in mine}
        scores = [r.value for r in results if r.run in names and r.headline and r.predict == "map" and r.split == SPLIT]
        if len(scores) != sum(len(run.data.target_tasks) for run in mine):
            raise ConfigError(f"rows: trial {label} is not finished; rerun the same command")
        trial = Trial(label, given[label], sum(scores) / len(scores), len(mine))
        by_group.setdefault(Group(mine[0].method.name, mine[0].target.joint), []).append(trial)
    return {group: sorted(trials, key=lambda trial: -trial.score) for group, trials in by_group.items()}


def chosen_yaml(config: RunConfig, by_group: dict[Group, list[Trial]], command: str) -> str:
    """Return a configuration that trains the chosen rows, with the scores of all trials as comments.

    It is the search's own without `evaluation.splits` and `seeds`: its table shows test rows, of the seeds it is given.
    """
    num_trials = len(next(iter(by_group.values())))
    plain = config.model_dump(mode="json", exclude_unset=True)
    plain = {"name": f"{config.name}-chosen"} | {key: plain[key] for key in plain if key not in ("name", "rows", "seeds", "quick")}
    plain["evaluation"] = {key: value for key, value in plain.get("evaluation", {}).items() if key != "splits"}
    shared = {key: value for key, value in plain.items() if value != {}}
    lines = [
        f"# Chosen by `{command}`:",
        f"# best mean score on {SPLIT} rows, {num_trials} trials for every row; their scores are above each row.",
        _yaml(shared),
        "rows:",
    ]
    for group, trials in by_group.items():
        label = {"label": f"{group.method}-joint"} if group.joint else {}
        lines += ["# " + ", ".join(f"{trial.label} {trial.score:.1f}" for trial in trials)]
        lines += [_yaml([label | trials[0].settings])]
    return "\n".join(lines) + "\n"


def _yaml(plain: Any) -> str:
    return yaml.safe_dump(plain, sort_keys=False, default_flow_style=None, width=120).rstrip()


def _rows_by_group(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Return the settings of each row without its label, which named the trial."""
    rows = config.rows or ({},)
    labels = [row.get("label") or _method_of(row) or config.method.name for row in rows]
    return {label: {key: value for key, value in row.items() if key != "label"} for label, row in zip(labels, rows, strict=True)}


def _method_of(row: dict[str, Any]) -> str | None:
    section = row.get("method")
    return section.get("name") if isinstance(section, dict) else section


def _title(group: Group) -> str:
    return group.method + "*" * group.joint
