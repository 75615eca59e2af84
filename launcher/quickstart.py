"""`make quickstart`: the rows of a small table on the miniature world, then the table and what can be seen in it.

Rows whose backbone is whole are trained side by side, each in one process. Rows that shard it are trained through the deepspeed
launcher on all processes together. What is finished is not trained again.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bpt_dist import config as configuration
from bpt_dist.artifacts.stored_run import is_finished
from bpt_dist.config import RunConfig
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
        code = train_side_by_side([run for run in waiting if run.distribution.shard == "none"])
        if not code and not all(is_finished(run) for run in runs):
            code = launch()
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


def train_side_by_side(runs: Sequence[RunConfig]) -> int:
    """Train each run in one process, PROCESSES of them at a time, as `bpt-dist run-table --workers` does; return the exit code."""
    if not runs:
        return 0
    from bpt_dist.commands.table.command import JOBS, Screen
    from bpt_dist.commands.table.jobs import Jobs
    from bpt_dist.commands.table.trainers import WorkerTrainer

    folder = runs[0].directory.parent / JOBS
    folder.mkdir(parents=True, exist_ok=True)
    with Screen(len(runs)) as screen:
        jobs = Jobs(runs, screen)
        workers = [WorkerTrainer(number, PROCESSES, folder, screen.say) for number in range(min(PROCESSES, len(runs)))]
        screen.opened(jobs, workers)
        return jobs.train(workers)


def launch() -> int:
    """Run the deepspeed launcher in a session of its own and pass signals on to all of it."""
    launcher = [str(BIN / "deepspeed"), "--num_gpus", str(PROCESSES), "--master_port", str(free_port())]
    command = [*launcher, "launcher/train.py", "--config", str(CONFIG)]
    say(shlex.join(["deepspeed", *command[1:]]))
    if num_gpus() < PROCESSES:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # two ranks cannot share one GPU; the miniature world needs none
    environment = child_environment(PROCESSES)
    # Its own session: the launcher ends alone on SIGTERM and leaves its ranks behind; the group can be told as a whole.
    job = subprocess.Popen(command, env=environment, start_new_session=True)

    def forward(number: int, _frame: object) -> None:
        os.killpg(job.pid, number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
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
