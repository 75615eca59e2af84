"""`sweep.json`: what is searched and how every trial stands, read anew from the run directories, which are the truth."""

from __future__ import annotations

import math
import statistics
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from bpt_dist.config import Config
from bpt_dist.errors import ConfigError, NonFinite
from bpt_dist.files import read_json, write_json_atomic
from bpt_dist.sweep_scores import history, reported
from bpt_dist.sweep_settings import TRIAL, Sweep, Trial, changed, fingerprint
from bpt_dist.sweep_space import Values
from bpt_dist.sweep_work import PRUNED

FILE, FORMAT = "sweep.json", 1
ENDED = ("finished", "pruned")


@dataclass(frozen=True)
class Standing:
    """How a trial stands: `score` is percent on validation rows, `reported` the same on the reported split of a finished run."""

    number: int
    name: str
    seed: int
    values: Values
    state: str
    reason: str | None
    step: int
    score: float | None
    reported: float | None

    @property
    def diverged(self) -> bool:
        """Whether it ended because its numbers were not finite; it would do so again."""
        return self.state == "failed" and NonFinite.__name__ in (self.reason or "")


@dataclass(frozen=True)
class Mean:
    """A setting over its seeds."""

    number: int
    values: Values
    scores: tuple[float, ...]
    reported: float | None

    @property
    def mean(self) -> float:
        """Return the mean validation score."""
        return statistics.fmean(self.scores)

    @property
    def spread(self) -> float:
        """Return the standard deviation over the seeds, 0 for one."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else 0.0


def state_of(config: Config) -> tuple[str, str | None]:
    """Return how a trial's run stands and why: a state of `status.json`, or `waiting` or `pruned`."""
    from bpt_dist.run import read_status

    folder = config.directory
    if not (folder / "status.json").is_file():
        return "waiting", None
    status = read_status(folder)
    state, reason = status["state"], status.get("reason")
    if state == "stopped" and (folder / PRUNED).is_file():
        return "pruned", reason
    if state == "failed" and (folder / "bad_step.json").is_file():
        reason = f"{NonFinite.__name__}: {reason}"
    return state, reason


def standing(trial: Trial) -> Standing:
    """Return how a trial stands, from its run directory."""
    from bpt_dist.journal import read_records

    state, reason = state_of(trial.config)
    records = read_records(trial.config.directory / "metrics.jsonl", limit=1 << 30)[0]
    points = history(trial.config, records)
    last = points[-1] if points else None
    score = last.score if last is not None and math.isfinite(last.score) else None
    done = reported(records) if state == "finished" else None
    return Standing(trial.number, trial.name, trial.seed, trial.values, state, reason, last.step if last else 0, score, done)


def means(standings: Iterable[Standing], num_seeds: int) -> list[Mean]:
    """Return the settings that finished with every seed, best mean first; ties keep the order of the trials."""
    by_number: dict[int, list[Standing]] = {}
    for one in standings:
        if one.state == "finished" and one.score is not None:
            by_number.setdefault(one.number, []).append(one)
    found = []
    for number, ones in by_number.items():
        if len(ones) == num_seeds:
            shown = [one.reported for one in ones if one.reported is not None]
            mean = statistics.fmean(shown) if len(shown) == num_seeds else None
            found.append(Mean(number, ones[0].values, tuple(one.score for one in ones if one.score is not None), mean))
    return sorted(found, key=lambda one: (-one.mean, one.number))


class Record:
    """The open `sweep.json` of one sweep."""

    def __init__(self, sweep: Sweep, plain: dict[str, Any]) -> None:
        self.sweep, self.plain = sweep, plain
        self.reasons: dict[str, str] = {}  # why trials of this start failed, where they could not write it down
        # JSON has sorted the values; names and tables keep the order of the file.
        ordered = [{key: one["values"][key] for key in sweep.keys} for one in plain["trials"]]
        pairs = zip(plain["trials"], ordered, strict=True)
        self.trials = [sweep.trial(one["number"], values, one["seed"]) for one, values in pairs]

    @classmethod
    def open(cls, sweep: Sweep, *, resume: bool) -> Self:
        """Create the record, or go on with it. Raises ConfigError unless the folder is free, or `resume` and it is this sweep.

        A record whose trials have left nothing, because the sweep was refused before the first of them, stands in nobody's way.
        """
        file = sweep.directory / FILE
        if not file.is_file() or not (resume or _has_runs(sweep.directory)):
            if not file.is_file() and any(not child.name.startswith("run.lock") for child in sweep.directory.glob("*")):
                raise ConfigError(f"{sweep.directory}: is not empty and no sweep; choose another name=")
            plain: dict[str, Any] = {"format": FORMAT, "id": uuid.uuid4().hex, "trials": [], "created": _now(), "openings": []}
        else:
            plain = dict(read_json(file))
            _check(sweep, plain, file, resume=resume)
        plain |= {"settings": sweep.resolved(), "fingerprint": fingerprint(sweep.resolved())}
        plain["openings"] += [_now()]
        record = cls(sweep, plain)
        if (known := sweep.known_settings()) is not None and not record.trials:
            record.add(sweep.trials(known))
        record.save()
        return record

    @property
    def id(self) -> str:
        """Return what tells this sweep from others of its name."""
        return str(self.plain["id"])

    def add(self, trials: Sequence[Trial]) -> None:
        """Take over further trials."""
        self.trials += trials

    def named(self, name: str) -> Trial:
        """Return the trial with this name."""
        return next(trial for trial in self.trials if trial.name == name)

    def standings(self) -> list[Standing]:
        """Return how all trials stand."""
        found = [standing(trial) for trial in self.trials]
        return [replace(one, reason=self.reasons.get(one.name, one.reason)) if one.state == "failed" else one for one in found]

    def waiting(self) -> list[Trial]:
        """Return the trials that have not ended and would not end the same way again."""
        return [
            trial
            for trial, stands in zip(self.trials, self.standings(), strict=True)
            if stands.state not in ENDED and not stands.diverged
        ]

    def means(self) -> list[Mean]:
        """Return the settings that finished with every seed, best first."""
        return means(self.standings(), len(self.sweep.settings.seeds))

    def best(self) -> Mean | None:
        """Return the setting with the best mean validation score over all seeds, None before one is finished."""
        return next(iter(self.means()), None)

    def best_config(self) -> Config | None:
        """Return the best setting as a configuration that trains it with every seed, exactly as the trials were."""
        best = self.best()
        if best is None:
            return None
        trial = next(trial for trial in self.trials if trial.number == best.number)
        settings = self.sweep.settings
        update = {"name": f"{settings.name}-best", "run_dir": None, "seed": 0, "seeds": settings.seeds}
        return trial.config.model_copy(update=update)

    def save(self) -> Path:
        """Write `sweep.json`."""
        best = self.best()
        trials = [vars(one) for one in self.standings()]
        found = None if best is None else {**vars(best), "mean": best.mean, "spread": best.spread}
        write_json_atomic(self.sweep.directory / FILE, self.plain | {"trials": trials, "best": found})
        return self.sweep.directory / FILE


def _has_runs(folder: Path) -> bool:
    return any(folder.glob(f"{TRIAL}*"))


def _check(sweep: Sweep, plain: dict[str, Any], file: Path, *, resume: bool) -> None:
    if plain.get("format") != FORMAT:
        raise ConfigError(f"{file}: no record this version can read; choose another name=")
    differences = changed(plain["settings"], sweep.resolved())
    if differences:
        lines = "".join(f"\n  {line}" for line in differences)
        raise ConfigError(
            f"{sweep.directory}: holds a sweep that searches something else:{lines}\n"
            "scores of two spaces do not make one comparison: restore these values to resume, or choose another name="
        )
    if not resume:
        ended = sum(one["state"] in ENDED for one in plain["trials"])
        raise ConfigError(
            f"{sweep.directory}: holds this sweep, {ended} of {len(plain['trials'])} trials have ended; "
            "--resume goes on, or choose another name="
        )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
