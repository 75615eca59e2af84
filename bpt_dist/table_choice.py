"""Choose among the trials of each method: the row with the best validation score, and nobody gets more trials than another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import yaml

from bpt_dist.config import Config
from bpt_dist.errors import ConfigError
from bpt_dist.results import Result
from bpt_dist.table_jobs import row_label

SPLIT = "validation"


class Contest(NamedTuple):
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


def check_search(config: Config, runs: Sequence[Config]) -> int:
    """Return how many trials each method has; raises ConfigError unless all have as many, judged on validation rows alone."""
    if config.evaluation.splits != (SPLIT,):
        raise ConfigError(
            f"evaluation.splits: is {list(config.evaluation.splits)}, a search looks at {SPLIT} rows only; set [{SPLIT}]"
        )
    trials: dict[Contest, set[str]] = {}
    for run in runs:
        trials.setdefault(Contest(run.method.name, run.target.joint), set()).add(row_label(run))
    counts = {len(labels) for labels in trials.values()}
    if len(counts) != 1:
        listed = ", ".join(f"{_title(contest)} {len(labels)}" for contest, labels in trials.items())
        raise ConfigError(f"rows: give every method the same number of trials (got {listed})")
    return counts.pop()


def choose(config: Config, runs: Sequence[Config], results: Sequence[Result]) -> dict[Contest, list[Trial]]:
    """Return the trials of each contest, best first: the mean of the headline metrics over targets and seeds; ties keep the first.

    Raises ConfigError when a trial has not been finished.
    """
    given = _rows_by_label(config)
    found: dict[Contest, list[Trial]] = {}
    for label in dict.fromkeys(row_label(run) for run in runs):
        mine = [run for run in runs if row_label(run) == label]
        names = {run.name for run in mine}
        scores = [r.value for r in results if r.run in names and r.headline and r.predict == "map" and r.split == SPLIT]
        if len(scores) != sum(len(run.data.target_tasks) for run in mine):
            raise ConfigError(f"rows: trial {label} is not finished; give the same command again")
        trial = Trial(label, given[label], sum(scores) / len(scores), len(mine))
        found.setdefault(Contest(mine[0].method.name, mine[0].target.joint), []).append(trial)
    return {contest: sorted(trials, key=lambda trial: -trial.score) for contest, trials in found.items()}


def chosen_yaml(config: Config, found: dict[Contest, list[Trial]], command: str) -> str:
    """Return a configuration that trains the chosen rows, with the scores of all trials as comments.

    It is the search's own without `evaluation.splits` and `seeds`: its table shows test rows, of the seeds it is given.
    """
    num_trials = len(next(iter(found.values())))
    plain = config.model_dump(mode="json", exclude_unset=True)
    plain = {"name": f"{config.name}-chosen"} | {key: plain[key] for key in plain if key not in ("name", "rows", "seeds")}
    plain["evaluation"] = {key: value for key, value in plain.get("evaluation", {}).items() if key != "splits"}
    shared = {key: value for key, value in plain.items() if value != {}}
    lines = [
        f"# Chosen by `{command}`:",
        f"# best mean score on {SPLIT} rows, {num_trials} trials for every row; their scores stand above each.",
        _yaml(shared),
        "rows:",
    ]
    for contest, trials in found.items():
        label = {"label": f"{contest.method}-joint"} if contest.joint else {}
        lines += ["# " + ", ".join(f"{trial.label} {trial.score:.1f}" for trial in trials)]
        lines += [_yaml([label | trials[0].settings])]
    return "\n".join(lines) + "\n"


def _yaml(plain: Any) -> str:
    return yaml.safe_dump(plain, sort_keys=False, default_flow_style=None, width=120).rstrip()


def _rows_by_label(config: Config) -> dict[str, dict[str, Any]]:
    """Return the settings of each row without its label, which named the trial."""
    rows = config.rows or ({},)
    labels = [row.get("label") or _method_of(row) or config.method.name for row in rows]
    return {label: {key: value for key, value in row.items() if key != "label"} for label, row in zip(labels, rows, strict=True)}


def _method_of(row: dict[str, Any]) -> str | None:
    section = row.get("method")
    return section.get("name") if isinstance(section, dict) else section


def _title(contest: Contest) -> str:
    return contest.method + "*" * contest.joint
