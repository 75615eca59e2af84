"""`make quickstart`: three methods, two seeds, on the miniature world, through the deepspeed launcher; then the table.

What is finished is not trained again. Every command is printed, so that each can be given by hand.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
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
    """Print the table and where everything is."""
    folder, table = config.directory, config.directory / "table.md"
    bpt_dist = BIN / "bpt-dist"
    written = subprocess.run([bpt_dist, "table", folder, "--format", "markdown", "--out", table], check=False).returncode
    shown = subprocess.run([bpt_dist, "table", folder], check=False).returncode
    say(f"table      {table}")
    say(f"results    {folder}/<run>/results.json, predictions in target/<task>/predictions.jsonl")
    say(f"pictures   {folder}/bpt-s0/figures/panel.png")
    say(f"prompts    {folder}/<run>/target/<task>/adapter  (PEFT folders)")
    say(f"MLflow     {shlex.join([str(bpt_dist), 'ui', '--uri', store_uri(config)])}")
    return written or shown


def say(text: str) -> None:
    """Print one line at once, between the lines of the processes."""
    sys.stdout.write(f"quickstart: {text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
