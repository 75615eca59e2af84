"""`bpt-dist run-table`: every row, target and seed of a configuration in one command that can be given again, and the table."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from bpt_dist import config as configuration
from bpt_dist.cli_output import console
from bpt_dist.config import Config
from bpt_dist.errors import ConfigError, Stopped
from bpt_dist.files import write_atomic, write_json_atomic
from bpt_dist.lock import Holder
from bpt_dist.plan_text import duration
from bpt_dist.results import collect
from bpt_dist.table_choice import check_search, choose, chosen_yaml
from bpt_dist.table_jobs import Jobs, Outcome, Trainer, is_finished, row_label
from bpt_dist.table_notes import missing_notes, missing_runs, mixture_notes
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
    split = _split_of(config, runs)
    folder = config.directory
    with Screen(len(runs)) as screen:
        jobs = Jobs(runs, screen)
        trainers = _trainers(jobs.num_waiting, workers, processes, folder / JOBS)
        screen.opened(jobs, trainers)
        code = jobs.train(trainers) if trainers else 0
    _write_table(runs, jobs, folder, split)
    if chosen is not None and code == 0:
        _write_choice(config, runs, chosen, shlex.join(["bpt-dist", "run-table", str(file), *overrides]))
    return code


def _split_of(config: Config, runs: Sequence[Config]) -> str:
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

    def elsewhere(self, jobs: Jobs, run: Config, holder: Holder | None) -> None:
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


def _write_table(runs: Sequence[Config], jobs: Jobs, folder: Path, split: str) -> None:
    """Write the table of the finished runs as Markdown, CSV and JSON and print it; what is missing is named in its notes."""
    finished = [run for run in runs if is_finished(run)]
    missing = missing_runs(runs, jobs)
    if not finished:
        typer.echo("\n".join(["no run is finished, there is no table yet", *missing_notes(missing)]))
        return
    found = collect([run.directory for run in finished])
    from bpt_dist.report import Table  # brings scipy

    notes = [*found.notes, *mixture_notes(finished), *missing_notes(missing)]
    table = Table.build(found.results, split=split, notes=notes, by_label=True)
    write_atomic(folder / "table.md", table.to_markdown().encode())
    write_atomic(folder / "table.csv", table.to_csv().encode())
    write_json_atomic(folder / "table.json", {**table.to_json(), "missing": missing})
    if sys.stdout.isatty():
        console().print(table.to_rich())
    else:
        typer.echo(table.to_markdown(), nl=False)
    for form in FORMATS:
        typer.echo(folder / f"table.{form}")


def _write_choice(config: Config, runs: Sequence[Config], file: Path, command: str) -> None:
    """Write the best trial of each method as rows of a configuration and print how close the others were."""
    found = choose(config, runs, collect([run.directory for run in runs]).results)
    for trials in found.values():
        typer.echo(f"{trials[0].label}: " + ", ".join(f"{trial.label} {trial.score:.1f}" for trial in trials))
    typer.echo(write_atomic(file, chosen_yaml(config, found, command).encode()))
