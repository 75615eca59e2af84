"""`bpt-dist run-table`: every row, target and seed of a configuration in one command that can be given again, and the table."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from bpt_dist import config as configuration
from bpt_dist.cli_output import console
from bpt_dist.config import Config
from bpt_dist.errors import ConfigError, Stopped
from bpt_dist.files import write_atomic, write_json_atomic
from bpt_dist.plan_text import duration
from bpt_dist.results import collect
from bpt_dist.table_choice import check_search, choose, chosen_yaml
from bpt_dist.table_jobs import Jobs, Outcome, Trainer, is_finished
from bpt_dist.table_trainers import Here, Launched, Worker, cores, num_gpus

JOBS = "jobs"
MOST_WORKERS = 4  # by default, where no GPU says otherwise: every worker loads its own T5
FORMATS = ("md", "csv", "json")


def run_table(file: Path, overrides: Sequence[str], workers: int | None, processes: int | None, chosen: Path | None) -> int:
    """Train what is not finished, write the table, and return the exit code.

    Raises ConfigError for a configuration that cannot be run, before anything is started.
    """
    if workers is not None and processes is not None:
        raise ConfigError("--workers, --processes: runs go side by side or each over several processes; give one of them")
    config = configuration.load(file, overrides)
    runs = configuration.expand(config)
    if chosen is not None:
        check_search(config, runs)
    if config.rows is None and config.seeds is None:
        raise ConfigError("rows: is missing, a table has rows or seeds; train a single run with launcher/train.py")
    folder = config.directory
    with Screen(len(runs)) as screen:
        jobs = Jobs(runs, screen)
        trainers = _trainers(jobs.num_waiting, workers, processes, folder / JOBS)
        screen.opened(jobs, trainers)
        code = jobs.train(trainers) if trainers else 0
    _write_table(runs, jobs, folder, config.evaluation.splits[-1])
    if chosen is not None and code == 0:
        _write_choice(config, runs, chosen, shlex.join(["bpt-dist", "run-table", str(file), *overrides]))
    return code


def _trainers(num_waiting: int, workers: int | None, processes: int | None, folder: Path) -> list[Trainer]:
    if not num_waiting:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    if processes is not None:
        return [Launched(processes, folder)]
    wanted = min(num_waiting, workers or num_gpus() or min(cores(), MOST_WORKERS))
    return [Here()] if wanted == 1 else [Worker(number, wanted, folder) for number in range(wanted)]


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
        if isinstance(trainers[0], Launched):
            where = f"{trainers[0].num_processes} processes each"
        else:
            where = "in this process" if len(trainers) == 1 else f"{len(trainers)} side by side"
        self.say(f"{jobs.num_waiting} of {self.num_runs} runs to train, {where}")

    def started(self, jobs: Jobs, run: Config, trainer: int) -> None:
        """Say that a run began."""
        self.say(f"{run.name} starts" + (f" on worker {trainer}" if len(jobs.runs) > 1 else ""))

    def ended(self, jobs: Jobs, run: Config, outcome: Outcome, *, again: bool) -> None:
        """Say how a run ended and how much is left."""
        done = self.num_runs - len(jobs.waiting) - len(jobs.running)
        how, reason = f"FAILED ({outcome.code})", f": {outcome.reason}"
        if again:
            how = "died and is tried once more"
        elif outcome.code == Stopped.exit_code:
            how = "stopped with a checkpoint"
        elif outcome.code == 0:
            how, reason = "finished", ""
        seconds = jobs.seconds_left()
        left = f"about {duration(seconds)} left" if seconds else ""
        self.bar.update(self.task, completed=done, left=left)
        ending = f", {left}" if left else ""
        self.say(f"[{done}/{self.num_runs}] {run.name} {how} after {duration(outcome.seconds)}{ending}{reason}")

    def say(self, text: str) -> None:
        """Print one line above the bar."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def _write_table(runs: Sequence[Config], jobs: Jobs, folder: Path, split: str) -> None:
    """Write the table of the finished runs as Markdown, CSV and JSON and print it; what is missing is named in its notes."""
    finished = [run.directory for run in runs if is_finished(run)]
    missing = _missing(runs, jobs)
    if not finished:
        typer.echo("\n".join(["no run is finished, there is no table yet", *_missing_notes(missing)]))
        return
    found = collect(finished)
    from bpt_dist.report import Table  # brings scipy

    table = Table.build(found.results, split=split, notes=[*found.notes, *_missing_notes(missing)])
    write_atomic(folder / "table.md", table.to_markdown().encode())
    write_atomic(folder / "table.csv", table.to_csv().encode())
    write_json_atomic(folder / "table.json", {**table.to_json(), "missing": missing})
    if sys.stdout.isatty():
        console().print(table.to_rich())
    else:
        typer.echo(table.to_markdown(), nl=False)
    for form in FORMATS:
        typer.echo(folder / f"table.{form}")


def _missing(runs: Sequence[Config], jobs: Jobs) -> list[dict[str, Any]]:
    """Return the runs that are not finished, with their target tasks and, where one failed, the reason."""
    found = []
    for run in runs:
        if not is_finished(run):
            outcome = jobs.outcomes.get(run.name)
            failed = outcome is not None and outcome.code not in (0, Stopped.exit_code)
            reason = outcome.reason if outcome is not None and failed else None
            found.append({"run": run.name, "tasks": list(run.data.target_tasks), "reason": reason})
    return found


def _missing_notes(missing: Sequence[dict[str, Any]]) -> list[str]:
    notes = [f"Missing: {each['run']} ({', '.join(each['tasks'])}): {each['reason']}" for each in missing if each["reason"]]
    waiting = [each["run"] for each in missing if not each["reason"]]
    return notes + ([f"Missing, not trained yet: {', '.join(waiting)}"] if waiting else [])


def _write_choice(config: Config, runs: Sequence[Config], file: Path, command: str) -> None:
    """Write the best trial of each method as rows of a configuration and print how close the others were."""
    found = choose(config, runs, collect([run.directory for run in runs]).results)
    for trials in found.values():
        typer.echo(f"{trials[0].label}: " + ", ".join(f"{trial.label} {trial.score:.1f}" for trial in trials))
    typer.echo(write_atomic(file, chosen_yaml(found, command).encode()))
