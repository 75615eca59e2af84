"""A sweep as one frozen value: the settings all trials share, the space that is searched, and how. Never imports torch or ray."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from bpt_dist import config as configuration
from bpt_dist.commands.sweep import space as sweep_space
from bpt_dist.commands.sweep.space import Entry, Values
from bpt_dist.config import CHANGEABLE, RunConfig
from bpt_dist.config.base import NAME, Folder, Section, did_you_mean
from bpt_dist.config.keys import fields_by_key, leaves
from bpt_dist.config.method_source import METHODS
from bpt_dist.config.mlflow_environment import experiment_of_environment
from bpt_dist.config.overrides import OVERRIDE, apply, options_of, resolve_key, set_key, spell_out
from bpt_dist.config.strict_yaml import Document, Key, Problem, parse_value, read
from bpt_dist.config.validation import validate
from bpt_dist.errors import ConfigError

MOST_TRIALS, COMMAND_LINE = 1000, 2**31
TRIAL = "trial-"
OF_THE_SWEEP = ("name", "output", "run_dir", "seed", "seeds", "rows")
"""Keys of a run that the sweep sets for each trial."""
NOT_SEARCHED = ("seed", "evaluation", "distribution", "data.target_tasks", "data.protocol", "data.max_eval_rows", "data.split_seed")
"""Keys that would change what the score means, or where it is computed."""
CHANGEABLE_HERE = frozenset({"output", "max_failures", "concurrency", "cpus", "gpus", "workers", "time_budget"})


class Settings(Section):
    """The keys of a sweep file."""

    name: str = Field(pattern=NAME, description="Name of the sweep and of its folder below `output`.")
    output: Folder = Field(default=Path("runs"), description="Folder that holds sweeps and runs.")
    stage: Literal["adapt", "source"] = Field(
        default="adapt", description="`adapt`: target stages from one stored posterior; `source`: whole runs of several processes."
    )
    run: dict[str, Any] = Field(description="What all trials share: the keys of a run's configuration.")
    space: dict[str, Any] = Field(description="What is searched: a key of the run, and its values or range.")
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**31)], ...], Field(strict=False, min_length=1)] = Field(
        default=(0,), description="Every setting is tried with each seed; the best is chosen by the mean."
    )
    search: Literal["grid", "random", "optuna"] = Field(default="grid", description="Which settings of the space are tried.")
    num_settings: int | None = Field(default=None, ge=1, description="How many settings `random` and `optuna` try.")
    search_seed: int = Field(default=0, ge=0, lt=2**31, description="Seed of the search itself.")
    scheduler: Literal["asha", "none"] = Field(default="asha", description="`asha` ends trials that fall behind; or none does.")
    first_rung: int | None = Field(
        default=None, ge=1, description="Steps before the first trial may be ended; null is target.eval_every."
    )
    reduction: int = Field(default=3, ge=2, description="One trial in so many survives a rung; rungs grow by this factor.")
    max_failures: int = Field(default=2, ge=0, description="How often a trial that died is started again, from its checkpoint.")
    concurrency: int | None = Field(default=None, ge=1, description="Trials side by side; null is what the resources allow.")
    cpus: float = Field(default=1.0, gt=0, description="Cores of a process of a trial.")
    gpus: float | None = Field(
        default=None, ge=0, description="GPUs (or a fraction of one) of a process; null is 1 if there are any."
    )
    workers: int = Field(default=1, ge=1, description="Processes of a trial of a `source` sweep.")
    time_budget: float | None = Field(default=None, gt=0, description="Minutes after which running trials stop, resumable.")


@dataclass(frozen=True)
class Trial:
    """One setting with one seed: a run of its own."""

    number: int
    values: Values
    config: RunConfig

    @property
    def name(self) -> str:
        """Return the name of its run."""
        return self.config.name

    @property
    def seed(self) -> int:
        """Return the seed of its run."""
        return self.config.seed

    @property
    def title(self) -> str:
        """Return its values in short: `sigma_relative=0.1 lr_full=0.3 s0`."""
        return " ".join([*(f"{key.rpartition('.')[2]}={show(value)}" for key, value in self.values.items()), f"s{self.seed}"])


@dataclass(frozen=True)
class Sweep:
    """A checked sweep."""

    settings: Settings
    space: dict[str, Entry]
    document: Document = field(repr=False)
    written: dict[str, str] = field(default_factory=dict)  # full key -> the spelling of the file
    overridden: frozenset[Key] = frozenset()  # keys that the command line has set

    @property
    def directory(self) -> Path:
        """Return the folder of the sweep; its trials are runs inside it."""
        return self.settings.output / self.settings.name

    @property
    def keys(self) -> tuple[str, ...]:
        """Return the searched keys, dotted."""
        return tuple(self.space)

    @property
    def num_settings(self) -> int:
        """Return how many settings are tried."""
        if self.settings.search == "grid":
            return len(list(sweep_space.grid(self.space)))
        return self.settings.num_settings or 0

    def known_settings(self) -> list[Values] | None:
        """Return the settings in the order they are tried, None when each depends on the scores of those before."""
        if self.settings.search == "grid":
            return list(sweep_space.grid(self.space))
        if self.settings.search == "random":
            return [sweep_space.sample(self.space, self.settings.search_seed, number) for number in range(self.num_settings)]
        return None

    def trial(self, number: int, values: Values, seed: int) -> Trial:
        """Return one trial. Raises ConfigError for values that no run can have."""
        config, problems = self._validated(number, values, seed)
        if config is None:
            raise self.refusal(problems)
        return Trial(number, values, config)

    def trials(self, settings: Iterable[Values], first: int = 0) -> list[Trial]:
        """Return the trials of some settings: all seeds of one before the next."""
        return [self.trial(number, values, seed) for number, values in enumerate(settings, first) for seed in self.settings.seeds]

    def example(self) -> RunConfig:
        """Return the configuration of a trial before there is one."""
        return self.trial(0, next(sweep_space.corners(self.space)), self.settings.seeds[0]).config

    def refusal(self, problems: Iterable[Problem]) -> ConfigError:
        """Return the error that lists `problems` with their lines."""
        document = self.document
        messages = set()
        for problem in problems:
            is_override = any(problem.key[: len(key)] == key for key in self.overridden)
            line = COMMAND_LINE if is_override else problem.line or document.line_of(problem.key)
            messages.add((line, f"{problem.dotted}: {problem.text}" if problem.key else problem.text))
        places = {line: "command line" if line == COMMAND_LINE else f"{document.path}:{line}" for line, _ in messages}
        return ConfigError("\n".join(f"{places[line]}: {text}" for line, text in sorted(messages)))

    def resolved(self) -> dict[str, Any]:
        """Return every key of the sweep as plain data, the run's in the spelling of the file."""
        return self.settings.model_dump(mode="json")

    def problems(self) -> list[Problem]:
        """Return what is wrong with the trials: each value in its place, and what ASHA needs."""
        settings = self.known_settings() or list(sweep_space.corners(self.space))
        problems: list[Problem] = []
        first = None
        for values in settings:
            config, wrong = self._validated(0, values, self.settings.seeds[0])
            first = first or config
            problems += wrong
        problems = list(dict.fromkeys(problems))
        return problems or (self._problems_of_search(first) if first is not None else [])

    def _problems_of_search(self, config: RunConfig) -> list[Problem]:
        problems: list[Problem] = []
        separate = len(config.data.target_tasks) > 1 and not config.target.joint
        if config.tracking.register_as is not None:
            problems.append(
                Problem(("run", "tracking", "register_as"), "is for single runs; a sweep registers the prompts of its best setting")
            )
        if not config.data.target_tasks or not config.target.steps:
            problems.append(
                Problem(("run",), "has no target stage, and trials are compared by their validation there; name targets")
            )
        if self.settings.stage == "adapt" and config.method.HAS_SOURCE_STAGE and config.source.posterior is None:
            problems.append(
                Problem(("run", "source"), "posterior: is missing, an adapt sweep starts from a stored one; or stage: source")
            )
        if self.settings.scheduler == "asha":
            if config.target.eval_every is None:
                problems.append(
                    Problem(("run", "target"), "eval_every: is missing, asha compares trials at validations; or scheduler: none")
                )
            if separate and "target.steps" in self.space:
                place = ("space", self.written["target.steps"])
                problems.append(Problem(place, "makes asha compare one target with another; set target.joint, or scheduler: none"))
        return problems

    def _validated(self, number: int, values: Values, seed: int) -> tuple[RunConfig | None, list[Problem]]:
        data = copy.deepcopy(spell_out(self.settings.run))
        for key, value in values.items():
            set_key(data, tuple(key.split(".")), value)
        name = f"{TRIAL}{number:03d}-s{seed}"
        data |= {"name": name, "seed": seed, "output": str(self.settings.output), "run_dir": str(self.directory / name)}
        tracking = data.get("tracking", {})
        if isinstance(tracking, dict) and tracking.get("mlflow", True) and not tracking.get("experiment"):
            data["tracking"] = {**tracking, "experiment": experiment_of_environment() or self.settings.name}
        config, problems = validate(data, METHODS)
        return config, [Problem(self._place(problem.key), problem.text) for problem in problems]

    def _place(self, key: Key) -> Key:
        dotted = ".".join(map(str, key))
        return ("space", self.written[dotted]) if dotted in self.space else ("run", *key)


def show(value: object) -> str:
    """Return a value as it is shown in names and tables."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def load(path: Path, overrides: Sequence[str] = ()) -> Sweep:
    """Return the sweep at `path` with `key=value` overrides applied, to its own keys first, then to those of its run.

    Raises ConfigError whose lines name every problem: `file:line: key: what is wrong (got VALUE); remedy`.
    """
    document = read(path)
    data, problems = dict(document.data), list(document.problems)
    of_sweep = [text for text in overrides if "=" in text and text.partition("=")[0] in Settings.model_fields]
    keys: set[Key] = {(text.partition("=")[0],) for text in of_sweep}
    for text in of_sweep:
        problems += _set_own(data, text)
    if isinstance(data.get("run"), dict):
        overridden = apply(data["run"], [text for text in overrides if text not in of_sweep], METHODS)
        data["run"] = overridden.data
        keys |= {("run", *key) for key in overridden.keys}
        problems += [_of_an_override(problem) for problem in overridden.problems]
    settings, wrong = _settings(data)
    sweep = Sweep(settings or Settings.model_construct(), {}, document, overridden=frozenset(keys))
    problems += wrong
    if settings is not None:
        problems += _shared_keys(settings)
        space, written, wrong = _space(settings)
        sweep = Sweep(settings, space, document, written, frozenset(keys))
        problems += wrong or _problems_of_size(sweep)
        problems += [] if problems else sweep.problems()
    if problems:
        raise sweep.refusal(problems)
    return sweep


def _of_an_override(problem: Problem) -> Problem:
    """Return a problem with an override that is no key of a run: it may have been meant for the sweep."""
    unknown = problem.text.startswith("unknown key;") and "did you mean" not in problem.text
    near = did_you_mean(problem.dotted, Settings.model_fields) if unknown else ""
    return Problem(problem.key, f"unknown key{near}" if near else problem.text, COMMAND_LINE)


def _set_own(data: dict[str, Any], override: str) -> list[Problem]:
    match = OVERRIDE.fullmatch(override)
    if match is None:
        return [Problem((override.partition("=")[0],), f"holds a character with a meaning to shells (got {override!r})")]
    key, text = match.groups()
    value = parse_value(f"[{text}]" if "," in text and not text.startswith("[") else text)
    data[key] = [value] if key == "seeds" and not isinstance(value, list) else value
    return []


def _settings(data: dict[str, Any]) -> tuple[Settings | None, list[Problem]]:
    try:
        return Settings.model_validate(data), []
    except ValidationError as error:
        return None, [_problem(detail["type"], detail["loc"], detail["msg"], detail["input"]) for detail in error.errors()]


def _problem(kind: str, key: Key, message: str, value: object) -> Problem:
    if kind == "extra_forbidden":
        in_run = str(key[-1]) in fields_by_key(None)
        near = "; it belongs below run" if in_run else did_you_mean(str(key[-1]), Settings.model_fields)
        return Problem(key, f"unknown key{near}")
    if kind == "missing":
        return Problem(key, "is missing; give a value")
    text = message.removeprefix("Input ")
    return Problem(key, f"{text[0].lower()}{text[1:]} (got {value!r})")


def _shared_keys(settings: Settings) -> list[Problem]:
    problems = [
        Problem(("run", key), "is set by the sweep for each trial; remove it") for key in OF_THE_SWEEP if key in settings.run
    ]
    repeated = sorted({seed for seed in settings.seeds if settings.seeds.count(seed) > 1})
    problems += [Problem(("seeds",), f"lists {seed} twice; name each once") for seed in repeated]
    if settings.stage == "adapt" and settings.workers > 1:
        problems.append(
            Problem(("workers",), f"has no effect in an adapt sweep (got {settings.workers}); remove it or set stage: source")
        )
    if settings.search == "grid" and settings.num_settings is not None:
        problems.append(
            Problem(("num_settings",), f"has no effect with search grid, which tries all (got {settings.num_settings})")
        )
    if settings.search != "grid" and settings.num_settings is None:
        problems.append(Problem(("num_settings",), f"is missing, search {settings.search} needs it; say how many settings to try"))
    return problems


def _space(settings: Settings) -> tuple[dict[str, Entry], dict[str, str], list[Problem]]:
    space: dict[str, Entry] = {}
    written: dict[str, str] = {}
    if not settings.space:
        return space, written, [Problem(("space",), "is empty, so there is nothing to search; name keys and values")]
    problems = []
    run = spell_out(settings.run)
    known = fields_by_key(options_of(run, METHODS))
    for name, value in settings.space.items():
        place: Key = ("space", name)
        dotted, problem = resolve_key(name, known)
        problem = problem or _problem_with_key(str(dotted), run)
        if dotted in written:
            problem = f"is the same key as {written[dotted]!r}; keep one"
        if problem or dotted is None:
            problems.append(Problem(place, problem))
            continue
        written[dotted] = name
        try:
            space[dotted] = sweep_space.parse(value)
        except ValueError as error:
            problems.append(Problem(place, str(error)))
            continue
        entry = space[dotted]
        if settings.search == "grid" and isinstance(entry, sweep_space.Range) and entry.points is None:
            problems.append(
                Problem(place, "is a range, and search grid needs to know how many `points`; add them, or search: random")
            )
    return space, written, problems


def _problem_with_key(dotted: str, run: dict[str, Any]) -> str:
    if dotted in CHANGEABLE or dotted.startswith("tracking."):
        return "does not shape the result, so there is nothing to find; remove it"
    if any(dotted == key or dotted.startswith(f"{key}.") for key in NOT_SEARCHED):
        return "would change what the score means; set it below run" if dotted != "seed" else "is what `seeds` is for; use that"
    if dotted in leaves(run):
        return f"is given below run as well (got {leaves(run)[dotted]!r}); keep one of them"
    return ""


def _problems_of_size(sweep: Sweep) -> list[Problem]:
    num_trials = sweep.num_settings * len(sweep.settings.seeds)
    if num_trials > MOST_TRIALS:
        return [Problem(("space",), f"makes {num_trials} trials; at most {MOST_TRIALS}")]
    return []


def fingerprint(plain: dict[str, Any]) -> str:
    """Return the SHA-256 of what shapes the trials of a sweep, from `Sweep.resolved`."""
    return hashlib.sha256(json.dumps(shaping(plain), sort_keys=True).encode()).hexdigest()


def shaping(plain: dict[str, Any]) -> dict[str, Any]:
    """Return the dotted keys that may not change when a sweep is resumed."""
    keys = leaves(plain)
    return {
        key: value
        for key, value in keys.items()
        if key not in CHANGEABLE_HERE and key.removeprefix("run.") not in (CHANGEABLE if key.startswith("run.") else ())
    }


def changed(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return `key: old -> new` for every difference that makes two sweeps different ones."""
    then, now = shaping(old), shaping(new)
    return [
        f"{key}: {then.get(key, 'absent')} -> {now.get(key, 'absent')}"
        for key in sorted(then | now)
        if then.get(key) != now.get(key)
    ]


def runnable_yaml(config: RunConfig) -> str:
    """Return a configuration that `launcher/train.py` runs as the trial was run."""
    return configuration.resolved_yaml(config)
