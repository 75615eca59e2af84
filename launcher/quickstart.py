"""`make quickstart`: the rows of a small table on the miniature world, then the table and what can be seen in it.

Two kinds of runs are trained at the same time. Those whose backbone is whole go side by side, each in one process. Those that
shard it go through the deepspeed launcher, each on all processes together: while these wait for one another, the others compute.
What is finished is not trained again.
"""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bpt_dist import config as configuration
from bpt_dist.artifacts.stored_run import is_finished
from bpt_dist.commands.table.command import JOBS, Screen
from bpt_dist.commands.table.jobs import Jobs
from bpt_dist.commands.table.trainers import LauncherJob, WorkerTrainer
from bpt_dist.config import RunConfig
from bpt_dist.config.loading import row_label
from bpt_dist.distributed.environment import child_environment, free_port, num_gpus
from bpt_dist.tracking.places import store_uri

CONFIG = Path("configs/quickstart.yaml")
PROCESSES = 2
BIN = Path(sys.executable).parent


def main() -> int:
    """Train what is not finished, then show the results; return the exit code of what failed first."""
    config = configuration.load(CONFIG)
    runs = configuration.expand(config)
    waiting = [run for run in runs if not is_finished(run)]
    if waiting:
        say(f"{len(waiting)} of {len(runs)} runs to train on {PROCESSES} processes: {', '.join(run.name for run in waiting)}")
        started = time.monotonic()
        code = train(waiting)
        # The launcher returns 0 even when it was killed itself: the status files decide.
        unfinished = [run for run in runs if not is_finished(run)]
        if code or unfinished:
            names = ", ".join(run.name for run in unfinished)
            say(f"not finished: {names}; see {config.directory}/*/logs, then `make quickstart` again")
            return code or 1
        say(f"trained in {time.monotonic() - started:.0f} s")
    else:
        say(f"all {len(runs)} runs are finished; remove {config.directory} to train again")
    return report(config)


def train(runs: Sequence[RunConfig]) -> int:
    """Train both kinds of runs at the same time, until all have ended, and return the first exit code that is not 0."""
    whole = [run for run in runs if run.distribution.shard == "none"]
    rows = list(dict.fromkeys(row_label(run) for run in runs if run.distribution.shard != "none"))
    folder = runs[0].directory.parent / JOBS
    folder.mkdir(parents=True, exist_ok=True)
    with Screen(len(whole)) as screen:
        launched = launch(rows, screen.say) if rows else None
        jobs = Jobs(whole, screen)
        workers = [WorkerTrainer(number, PROCESSES, folder, screen.say) for number in range(min(PROCESSES, len(whole)))]

        def stop(*_: object) -> None:
            jobs.stop()
            if launched is not None:
                launched.stop()

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)
        side_by_side = threading.Thread(target=train_side_by_side, args=(jobs, workers, screen))
        side_by_side.start()
        code = follow(launched, screen.say) if launched is not None else 0
        side_by_side.join()
    # The launcher answers a signal with a code of its own.
    return jobs.exit_code() if jobs.stopping else code or jobs.exit_code()


def train_side_by_side(jobs: Jobs, workers: Sequence[WorkerTrainer], screen: Screen) -> None:
    """Train each run in one process, as `bpt-dist run-table --workers` does."""
    if workers:
        screen.opened(jobs, workers)
        jobs.train(workers)


def launch(rows: Sequence[str], echo: Callable[[str], None]) -> LauncherJob:
    """Start a job of the deepspeed launcher for some rows; `echo` is called with its command."""
    chosen = [word for row in rows for word in ("--row", row)]
    launcher = [str(BIN / "deepspeed"), "--num_gpus", str(PROCESSES), "--master_port", str(free_port())]
    command = [*launcher, "launcher/train.py", "--config", str(CONFIG), *chosen]
    echo(f"quickstart: {shlex.join(['deepspeed', *command[1:]])}")
    environment = child_environment(PROCESSES)
    if num_gpus() < PROCESSES:
        environment["CUDA_VISIBLE_DEVICES"] = ""  # two ranks cannot share one GPU; the miniature world needs none
    return LauncherJob(command, environment, subprocess.PIPE)


def follow(job: LauncherJob, echo: Callable[[str], None]) -> int:
    """Call `echo` with every line of a job until it ends, and return its exit code."""
    assert job.process.stdout is not None
    for line in job.process.stdout:
        echo(line.decode(errors="replace").rstrip("\n"))
    return job.wait()


def report(config: RunConfig) -> int:
    """Print where everything is and the table, which ends with what can be seen in it and what cannot."""
    folder, table = config.directory, config.directory / "table.md"
    bpt_dist = BIN / "bpt-dist"
    command = [str(bpt_dist), "table", str(folder), *(word for text in config.comparisons for word in ("--compare", text))]
    written = subprocess.run([*command, "--format", "markdown", "--out", table], check=False, stdout=subprocess.DEVNULL).returncode
    say(f"table      {table}")
    say(f"results    {folder}/<run>/results.json, predictions in target/<task>/predictions.jsonl")
    say(f"pictures   {folder}/bpt-s0/figures/panel.png")
    say(f"prompts    {folder}/<run>/target/<task>/adapter  (PEFT folders)")
    say(f"MLflow     {shlex.join([str(bpt_dist), 'ui', '--uri', store_uri(config)])}")
    say(shlex.join(["bpt-dist", *command[1:]]))
    shown = subprocess.run(command, check=False).returncode
    return written or shown


def say(text: str) -> None:
    """Print one line at once, between the lines of the processes."""
    sys.stdout.write(f"quickstart: {text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
