"""`bpt-dist run-table`: every row, target and seed of a configuration in one command that can be given again, and the table."""

from __future__ import annotations

import json
import shlex
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from bpt_dist import config as configuration
from bpt_dist.artifacts.results import Collected, collect
from bpt_dist.artifacts.stored_run import is_finished
from bpt_dist.commands.output import console, duration
from bpt_dist.commands.table.costs import cost_sheet
from bpt_dist.commands.table.jobs import Jobs, Outcome, Trainer
from bpt_dist.commands.table.layout import latex, markdown
from bpt_dist.commands.table.narrow import WIDTH
from bpt_dist.commands.table.selection import check_equal_trials, chosen_yaml, select_best
from bpt_dist.commands.table.trainers import DeepSpeedTrainer, InProcessTrainer, WorkerTrainer
from bpt_dist.config import RunConfig
from bpt_dist.config.loading import row_label
from bpt_dist.config.mlflow_environment import experiment_of
from bpt_dist.config.processes import check_processes
from bpt_dist.distributed.environment import cores, num_gpus
from bpt_dist.errors import ConfigError, DataError, Stopped
from bpt_dist.storage import layout
from bpt_dist.storage.files import read_json, write_atomic, write_json_atomic
from bpt_dist.storage.lock import Holder
from bpt_dist.tracking.answer import warn_of_refusals
from bpt_dist.tracking.places import store_uri

JOBS = "jobs"
MOST_WORKERS = 4  # by default on a machine without GPUs: every worker loads its own backbone
FORMATS = ("md", "csv", "json")
SO_FAR = "table_so_far"
SUFFIXES = {".tex": "latex", ".csv": "csv", ".json": "json"}


def run_table(
    file: Path,
    overrides: Sequence[str],
    workers: int | None,
    processes: int | None,
    chosen: Path | None,
    *,
    quick: bool = False,
    only: Sequence[str] = (),
) -> int:
    """Train what is not finished, write the table, and return the exit code.

    `quick`: the smaller version of the file. `only`: rows to train; the table has all rows that are finished.
    Raises ConfigError for a configuration that cannot be run, before anything is started.
    """
    if workers is not None and processes is not None:
        raise ConfigError("--workers, --processes: runs go side by side or each over several processes; give one of them")
    if chosen is not None and only:
        raise ConfigError("--choose, --row: a choice needs every row; leave one of them out")
    config = configuration.load(file, overrides, quick=quick)
    runs = configuration.expand(config)
    if chosen is not None:
        check_equal_trials(config, runs)
    asked = configuration.expand(config, only)
    if config.rows is None and config.seeds is None:
        raise ConfigError("rows: is missing, a table has rows or seeds; train a single run with launcher/train.py")
    check_processes(asked, processes or 1, launched=processes is not None)
    split = _split_of(config, runs)
    folder = config.directory
    if not all(is_finished(run) for run in asked):
        warn_of_refusals(asked)
    with Screen(len(asked)) as screen:
        jobs = Jobs(asked, screen)
        trainers = _trainers(jobs.num_waiting, workers, processes, folder / JOBS)
        screen.opened(jobs, trainers)
        code = jobs.train(trainers) if trainers else 0
    _write_table(runs, jobs, folder, split, config.comparisons)
    if chosen is not None and code == 0:
        _write_choice(config, runs, chosen, shlex.join(["bpt-dist", "run-table", str(file), *overrides, *["--quick"] * quick]))
    return code


def _split_of(config: RunConfig, runs: Sequence[RunConfig]) -> str:
    """Return the split that the table shows; raises ConfigError for a row that is not evaluated on it."""
    split = config.evaluation.splits[-1]
    for run in runs:
        if split not in run.evaluation.splits:
            raise ConfigError(
                f"rows: {row_label(run)} is evaluated on {list(run.evaluation.splits)} and the table shows {split} rows, the last "
                f"split of the file; add {split} to the row's evaluation.splits or remove the key"
            )
    return split


def _trainers(num_waiting: int, workers: int | None, processes: int | None, folder: Path) -> list[Trainer]:
    if not num_waiting:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    if processes is not None:
        return [DeepSpeedTrainer(processes, folder)]
    wanted = min(num_waiting, workers or num_gpus() or min(cores(), MOST_WORKERS))
    return [InProcessTrainer()] if wanted == 1 else [WorkerTrainer(number, wanted, folder) for number in range(wanted)]


class Screen:
    """Says how far a table is: lines, and on a terminal a bar below them."""

    def __init__(self, num_runs: int) -> None:
        self.console = console()
        columns = (TextColumn("runs"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}"))
        self.bar = Progress(*columns, console=self.console, transient=True, disable=not sys.stdout.isatty())
        self.task = self.bar.add_task("runs", total=num_runs, left="")
        self.num_runs = num_runs

    def __enter__(self) -> Screen:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def opened(self, jobs: Jobs, trainers: Sequence[Trainer]) -> None:
        """Say what there is to do."""
        self.bar.update(self.task, completed=self.num_runs - jobs.num_waiting)
        if not trainers:
            self.say(f"all {self.num_runs} runs are finished")
            return
        if isinstance(trainers[0], DeepSpeedTrainer):
            where = f"{trainers[0].num_processes} processes each"
        else:
            where = "in this process" if len(trainers) == 1 else f"{len(trainers)} side by side"
        self.say(f"{jobs.num_waiting} of {self.num_runs} runs to train, {where}")

    def started(self, jobs: Jobs, run: RunConfig, trainer: int) -> None:
        """Say that a run began."""
        self.say(f"{run.name} starts" + (f" on worker {trainer}" if len(jobs.runs) > 1 else ""))

    def ended(self, jobs: Jobs, run: RunConfig, outcome: Outcome, *, again: bool) -> None:
        """Say how a run ended and how much is left."""
        done = self.num_runs - len(jobs.waiting) - len(jobs.running)
        how, reason = f"FAILED ({outcome.code})", f": {outcome.reason}"
        if again:
            how = f"{'died' if outcome.died else 'failed before its first step'} and is tried once more"
        elif outcome.code == Stopped.exit_code:
            how = "stopped with a checkpoint"
        elif outcome.code == 0:
            how, reason = "finished", ""
        seconds = jobs.seconds_left()
        left = f"about {duration(seconds)} left" if seconds else ""
        self.bar.update(self.task, completed=done, left=left)
        ending = f", {left}" if left else ""
        self.say(f"[{done}/{self.num_runs}] {run.name} {how} after {duration(outcome.seconds)}{ending}{reason}")

    def elsewhere(self, jobs: Jobs, run: RunConfig, holder: Holder | None) -> None:
        """Say that another command trains or has trained a run."""
        if holder is not None:
            self.say(f"{run.name} is trained elsewhere ({holder}), this command waits for it")
            return
        self.bar.update(self.task, completed=self.num_runs - len(jobs.waiting) - len(jobs.running))
        self.say(f"{run.name} was trained elsewhere")

    def retired(self, jobs: Jobs, trainer: int) -> None:
        """Say that a trainer is given up."""
        self.say(f"worker {trainer} takes no more runs: it has never reached a first step")

    def say(self, text: str) -> None:
        """Print one line above the bar."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def _write_table(runs: Sequence[RunConfig], jobs: Jobs, folder: Path, split: str, compared: Sequence[str] = ()) -> None:
    """Write the table of the finished runs as Markdown, CSV and JSON and print it; what is missing is named in its notes.

    The sentences of what is `compared` are its last lines but for the names of the files.

    A complete table is never replaced by one with missing runs: that one is written beside it, as `table_so_far`.
    """
    finished = [run for run in runs if is_finished(run)]
    missing = missing_runs(runs, jobs)
    if not finished:
        typer.echo("\n".join(["no run is finished, there is no table yet", *missing_notes(missing)]))
        return
    collected = collect([run.directory for run in finished])
    from bpt_dist.commands.table.table import Table  # brings scipy

    notes = [*collected.notes, *mixture_notes(finished), *missing_notes(missing)]
    table = Table.build(collected.results, split=split, notes=notes, by_label=True, compared=compared, planned=True)
    stem = SO_FAR if missing and _is_complete(folder / "table.json") else "table"
    write_atomic(folder / f"{stem}.md", table.to_markdown().encode())
    write_atomic(folder / f"{stem}.csv", table.to_csv().encode())
    write_json_atomic(folder / f"{stem}.json", {**table.to_json(), "missing": missing})
    if sys.stdout.isatty():
        console().print(table.to_rich())
    else:
        typer.echo(table.to_markdown(), nl=False)
    for uri, experiment in {(store_uri(run), experiment_of(run)) for run in finished if run.tracking.mlflow}:
        from bpt_dist.tracking.ui import publish_table

        publish_table(uri, experiment, table.to_markdown())
    for form in FORMATS:
        typer.echo(folder / f"{stem}.{form}")
        if not missing:
            (folder / f"{SO_FAR}.{form}").unlink(missing_ok=True)
    if stem == SO_FAR:
        typer.echo(f"{folder / 'table.md'} is complete and stays as it is: {len(missing)} run(s) of the new table are not finished")


def _is_complete(file: Path) -> bool:
    """Whether a table without missing runs was written to `file`."""
    return file.is_file() and read_json(file).get("missing") == []


def _write_choice(config: RunConfig, runs: Sequence[RunConfig], file: Path, command: str) -> None:
    """Write the best trial of each method as rows of a configuration and print how close the others were."""
    chosen = select_best(config, runs, collect([run.directory for run in runs]).results)
    for trials in chosen.values():
        typer.echo(f"{trials[0].label}: " + ", ".join(f"{trial.label} {trial.score:.1f}" for trial in trials))
    typer.echo(write_atomic(file, chosen_yaml(config, chosen, command).encode()))


def missing_runs(runs: Sequence[RunConfig], jobs: Jobs) -> list[dict[str, Any]]:
    """Return the runs that are not finished, with their target tasks and, where one failed, the reason."""
    missing = []
    for run in runs:
        if not is_finished(run):
            outcome = jobs.outcomes.get(run.name)
            failed = outcome is not None and outcome.code not in (0, Stopped.exit_code)
            reason = outcome.reason if outcome is not None and failed else None
            missing.append({"run": run.name, "tasks": list(run.data.target_tasks), "reason": reason})
    return missing


def missing_notes(missing: Sequence[dict[str, Any]]) -> list[str]:
    """Return a sentence for every failed run and one for all that were not trained yet."""
    notes = [f"Missing: {entry['run']} ({', '.join(entry['tasks'])}): {entry['reason']}" for entry in missing if entry["reason"]]
    waiting = [entry["run"] for entry in missing if not entry["reason"]]
    return notes + ([f"Missing, not trained yet: {', '.join(waiting)}"] if waiting else [])


def mixture_notes(finished: Sequence[RunConfig]) -> list[str]:
    """Return a sentence for runs that had another backbone, tokenizer or other rows under the names that the other runs used.

    A configuration holds names only: what they stood for is in each run's backbone.json and data.json.
    """
    holders: dict[tuple[str, ...], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for run in finished:
        for name, value in _contents(run):
            holders[name][value].append(run.name)
    others: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name, by_value in holders.items():
        if len(by_value) > 1:
            usual = Counter({value: len(names) for value, names in by_value.items()}).most_common(1)[0][0]
            odd = sorted(run for value, names in by_value.items() if value != usual for run in names)
            others[tuple(odd)].append(name[-1])
    return [
        f"Not comparable: {', '.join(runs)} had another content of {', '.join(what)} than the other runs; move their folders "
        "away and rerun the command to train them again."
        for runs, what in others.items()
    ]


def _contents(run: RunConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield what this run was trained on: under which names, and its hash."""
    asked = (run.backbone.model_dump_json(),)
    # Few-shot rows are drawn by the seed; which other tasks a row uses does not matter.
    data = run.data.model_dump_json(exclude={"source_tasks", "target_tasks"})
    asked_of_data = (*asked, data, str(run.seed) if run.data.shots else "")
    of_method = (getattr(run.method, key, None) for key in ("init_file", "path"))
    paths = (run.source.posterior, *of_method, *run.data.task_files)
    asked_of_inputs = (*asked, *map(str, paths), str(run.distribution.zero_config))
    places = ((layout.BACKBONE, asked), (layout.DATA, asked_of_data), (layout.INPUTS, asked_of_inputs))
    for file, names in ((run.directory / name, names) for name, names in places):
        if file.is_file():
            yield from (((*names, name.removesuffix("_hash")), value) for name, value in read_json(file).items())


def print_table(
    runs: Sequence[Path],
    form: str | None,
    out: Path | None,
    *,
    published: bool,
    split: str,
    by: str,
    metrics: Sequence[str],
    compared: Sequence[str],
    costs: bool = False,
) -> None:
    """Print the results table, or write it to `out`. `by`: what its rows are, `method` or `task`; `compared`: `--compare`.

    `costs`: print the table of what training took in its place.

    Raises ConfigError for a form that has no such rows and for a comparison of what is not there, DataError without results.
    """
    collected = collect(runs)
    if not collected.results:
        raise DataError("\n".join([f"{', '.join(map(str, runs))}: no finished run has results", *collected.notes]))
    if costs:
        _print_costs(collected, form, out)
        return
    from bpt_dist.commands.table.table import Table  # brings scipy, which an error above does not need

    notes = collected.notes
    table = Table.build(collected.results, split=split, published=published, notes=notes, metrics=metrics, compared=compared)
    is_screen = form is None and out is None and sys.stdout.isatty()
    if is_screen and by == "method":
        console().print(table.to_rich())
        return
    chosen = form or (SUFFIXES.get(out.suffix, "markdown") if out is not None else "markdown")
    if by == "task" and chosen not in ("markdown", "page"):
        raise ConfigError(f"--by task: is for Markdown and for --format page, not for {chosen}; leave one of the two out")
    width = console().width if is_screen else WIDTH
    forms = {
        "markdown": table.to_markdown if by == "method" else lambda: table.to_narrow(width),
        "latex": table.to_latex,
        "page": table.to_page,
        "csv": table.to_csv,
        "json": lambda: json.dumps(table.to_json(), indent=1) + "\n",
    }
    text = forms[chosen]()
    if out is None:
        typer.echo(text, nl=False)
        return
    typer.echo(write_atomic(out, text.encode()))
    for note in collected.notes:
        typer.echo(note, err=True)


def _print_costs(collected: Collected, form: str | None, out: Path | None) -> None:
    chosen = form or (SUFFIXES.get(out.suffix, "markdown") if out is not None else "markdown")
    if chosen not in ("markdown", "latex"):
        raise ConfigError(f"--costs: has no form {chosen}; use markdown or latex")
    text = {"markdown": markdown, "latex": latex}[chosen](cost_sheet(collected.results))
    if out is None:
        typer.echo("\n".join([text, *collected.notes]), nl=not text.endswith("\n") or bool(collected.notes))
        return
    typer.echo(write_atomic(out, text.encode()))
