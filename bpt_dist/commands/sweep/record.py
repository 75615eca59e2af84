"""`sweep.json`: what is searched and the status of every trial, which is always read from its run directory."""

from __future__ import annotations

import math
import statistics
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from bpt_dist.commands.sweep.settings import TRIAL, Sweep, Trial, changed, fingerprint
from bpt_dist.commands.sweep.space import Values
from bpt_dist.commands.sweep.trial import PRUNED, Scores
from bpt_dist.config import RunConfig
from bpt_dist.errors import ConfigError, NonFinite
from bpt_dist.storage import layout
from bpt_dist.storage.files import encode_json, read_json, write_atomic
from bpt_dist.storage.metrics_log import facts_of

FILE, FORMAT = layout.SWEEP, 1
ENDED = ("finished", "pruned")


@dataclass(frozen=True)
class TrialStatus:
    """Status of a trial: `score` is percent on validation rows, `reported` the same on the reported split of a finished run."""

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


def state_of(config: RunConfig) -> tuple[str, str | None]:
    """Return the state of a trial's run and the reason: a state of `status.json`, or `waiting` or `pruned`."""
    from bpt_dist.storage.run_directory import read_status

    folder = config.directory
    status = read_status(folder)
    if status is None:
        return "waiting", None
    state, reason = status.state, status.reason
    if state == "stopped" and (folder / PRUNED).is_file():
        return "pruned", reason
    if state == "failed" and (folder / layout.BAD_STEP).is_file():
        reason = f"{NonFinite.__name__}: {reason}"
    return state, reason


class TrialReader:
    """Reads the status of one trial from its run directory; what has not changed since the last look is not read again."""

    def __init__(self, trial: Trial) -> None:
        self.trial, self.scores = trial, Scores(trial.config)
        # Files that decide the state.
        self._files = [trial.config.directory / name for name in (layout.STATUS, PRUNED, layout.BAD_STEP)]
        self._seen: tuple[object, ...] | None = None
        self._status: TrialStatus | None = None

    def look(self) -> TrialStatus:
        """Return the status of the trial now."""
        ended = self._status is not None and self._status.state in ENDED
        seen = tuple(map(facts_of, self._files[:1] if ended else self._files))
        # Others are looked at each time: of a process that was killed the file still says "running", and only the lock tells.
        if self._status is not None and ended and seen == self._seen:
            return self._status
        state, reason = state_of(self.trial.config)
        points, trial = self.scores.look(), self.trial
        last = points[-1] if points else None
        score = last.score if last is not None and math.isfinite(last.score) else None
        done = self.scores.reported if state == "finished" else None
        step = last.step if last else 0
        self._seen = seen[:1]
        self._status = TrialStatus(trial.number, trial.name, trial.seed, trial.values, state, reason, step, score, done)
        return self._status


def standing(trial: Trial) -> TrialStatus:
    """Return the status of a trial, from its run directory."""
    return TrialReader(trial).look()


def means(standings: Iterable[TrialStatus], num_seeds: int) -> list[Mean]:
    """Return the settings that finished with every seed, best mean first; ties keep the order of the trials."""
    by_number: dict[int, list[TrialStatus]] = {}
    for status in standings:
        if status.state == "finished" and status.score is not None:
            by_number.setdefault(status.number, []).append(status)
    complete = []
    for number, statuses in by_number.items():
        if len(statuses) == num_seeds:
            reported_scores = [status.reported for status in statuses if status.reported is not None]
            reported_mean = statistics.fmean(reported_scores) if len(reported_scores) == num_seeds else None
            scores = tuple(status.score for status in statuses if status.score is not None)
            complete.append(Mean(number, statuses[0].values, scores, reported_mean))
    return sorted(complete, key=lambda setting: (-setting.mean, setting.number))


class Record:
    """The open `sweep.json` of one sweep."""

    def __init__(self, sweep: Sweep, plain: dict[str, Any]) -> None:
        self.sweep, self.plain = sweep, plain
        self.reasons: dict[str, str] = {}  # why trials of this start failed, where they could not write it down
        self.last_best = _last_best(plain)
        self._readers: dict[str, TrialReader] = {}
        self._lines: dict[str, tuple[TrialStatus, bytes]] = {}
        # JSON has sorted the values; names and tables keep the order of the file.
        ordered = [{key: entry["values"][key] for key in sweep.keys} for entry in plain["trials"]]
        pairs = zip(plain["trials"], ordered, strict=True)
        self.trials = [sweep.trial(entry["number"], values, entry["seed"]) for entry, values in pairs]

    @classmethod
    def open(cls, sweep: Sweep, *, resume: bool) -> Self:
        """Create the record, or resume it. Raises ConfigError unless the folder is free, or `resume` is set and it is this sweep.

        A sweep that was rejected before its first trial does not block a new one.
        """
        file = sweep.directory / FILE
        if not file.is_file() or not (resume or _has_runs(sweep.directory)):
            if not file.is_file() and any(not child.name.startswith(layout.LOCK) for child in sweep.directory.glob("*")):
                raise ConfigError(f"{sweep.directory}: is not empty and no sweep; choose another name=")
            plain: dict[str, Any] = {"format": FORMAT, "id": uuid.uuid4().hex, "trials": [], "created": _now(), "openings": []}
        else:
            plain = dict(read_json(file))
            _check(sweep, plain, file, resume=resume)
        plain |= {"settings": sweep.resolved(), "fingerprint": fingerprint(sweep.resolved())}
        plain["openings"] += [_now()]
        record = cls(sweep, plain)
        if (settings := sweep.known_settings()) is not None and not record.trials:
            record.add(sweep.trials(settings))
        record.save()
        return record

    @property
    def id(self) -> str:
        """Return the identifier that distinguishes this sweep from others of its name."""
        return str(self.plain["id"])

    def add(self, trials: Sequence[Trial]) -> None:
        """Append trials."""
        self.trials += trials

    def named(self, name: str) -> Trial:
        """Return the trial with this name."""
        return next(trial for trial in self.trials if trial.name == name)

    def standings(self) -> list[TrialStatus]:
        """Return the status of all trials."""
        for trial in self.trials:
            self._readers.setdefault(trial.name, TrialReader(trial))
        statuses = [self._readers[trial.name].look() for trial in self.trials]
        return [
            replace(status, reason=self.reasons.get(status.name, status.reason)) if status.state == "failed" else status
            for status in statuses
        ]

    def waiting(self) -> list[Trial]:
        """Return the trials that have not ended and would not end the same way again."""
        statuses = zip(self.trials, self.standings(), strict=True)
        return [trial for trial, status in statuses if status.state not in ENDED and not status.diverged]

    def has_work(self) -> bool:
        """Return whether a resume would train something: then the best setting is only the best so far."""
        return not self._is_complete(self.standings())

    def _is_complete(self, statuses: Sequence[TrialStatus]) -> bool:
        tried = len({trial.number for trial in self.trials})
        return tried >= self.sweep.num_settings and all(status.state in ENDED or status.diverged for status in statuses)

    def means(self) -> list[Mean]:
        """Return the settings that finished with every seed, best first."""
        return means(self.standings(), len(self.sweep.settings.seeds))

    def best(self) -> Mean | None:
        """Return the setting with the best mean validation score over all seeds, None before one is finished."""
        return next(iter(self.means()), None)

    def best_config(self) -> RunConfig | None:
        """Return the best setting as a configuration that trains it with every seed, exactly as the trials were."""
        best = self.best()
        if best is None:
            return None
        trial = next(trial for trial in self.trials if trial.number == best.number)
        settings = self.sweep.settings
        update = {"name": f"{settings.name}-best", "run_dir": None, "seed": 0, "seeds": settings.seeds}
        return trial.config.model_copy(update=update)

    def _line(self, status: TrialStatus) -> bytes:
        """Return a status as JSON, encoded once."""
        known = self._lines.get(status.name)
        if known is None or known[0] is not status:
            known = self._lines[status.name] = status, encode_json(vars(status))[:-1]
        return known[1]

    def save(self) -> Path:
        """Write `sweep.json`; `best` is the result of a complete sweep and stays while more settings are tried."""
        statuses = self.standings()
        complete = self._is_complete(statuses)
        mean = next(iter(means(statuses, len(self.sweep.settings.seeds))), None)
        best = None if mean is None else {**vars(mean), "mean": mean.mean, "spread": mean.spread}
        results = {"complete": complete, "best": best if complete else self.last_best, "best_so_far": None if complete else best}
        if complete:
            self.last_best = best
        lines = [self._line(status) for status in statuses]
        write_atomic(self.sweep.directory / FILE, _encoded(self.plain | results, lines))
        return self.sweep.directory / FILE


def _encoded(record: Mapping[str, Any], trials: Sequence[bytes]) -> bytes:
    """Return JSON with a line for each key and each trial; the encoder of indented JSON takes ten times as long."""
    whole = b"[\n  " + b",\n  ".join(trials) + b"\n ]" if trials else b"[]"
    lines = []
    for key, value in sorted(record.items()):
        text = whole if key == "trials" else encode_json(value)[:-1]
        lines.append(encode_json(key)[:-1] + b": " + text)
    return b"{\n " + b",\n ".join(lines) + b"\n}\n"


def _last_best(plain: dict[str, Any]) -> Any:
    """Return the best setting of the last time the sweep was complete; earlier versions wrote that of any time."""
    ended = bool(plain["trials"]) and all(trial.get("state") in ENDED for trial in plain["trials"])
    return plain.get("best") if "complete" in plain or ended else None


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
        ended = sum(trial["state"] in ENDED for trial in plain["trials"])
        raise ConfigError(
            f"{sweep.directory}: holds this sweep, {ended} of {len(plain['trials'])} trials have ended; "
            "add --resume to continue, or choose another name="
        )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
