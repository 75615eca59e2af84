"""A process that trains the runs it is given, one after another: torch and transformers are imported once for all of them.

`python -m bpt_dist.commands.table.worker DESCRIPTOR [ARGUMENT ...]` writes a line of JSON to DESCRIPTOR when it is ready. It reads
the path of a configuration from each line of its standard input, trains it, and writes a line when the run has ended. It exits at
the end of its input. The arguments are the command that started it, which a run records as the way to resume.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from bpt_dist import config as configuration
from bpt_dist.config import RunConfig
from bpt_dist.storage.log_lines import ScreenHandler


def train_here(config: RunConfig) -> tuple[int, str | None]:
    """Train one run in this process and return its exit code and, if it did not finish, the reason."""
    from bpt_dist.errors import exit_code, reason_of
    from bpt_dist.train import train_run
    from bpt_dist.training.startup import start_world

    try:
        train_run(config, start_world(config))
    except (Exception, KeyboardInterrupt) as error:
        return exit_code(error), reason_of(error)
    return 0, None


def close() -> None:
    """Wait until the tracking store has all runs of this process: one process mirrors them, because importing mlflow takes long."""
    from bpt_dist.tracking.mirror import shutdown

    shutdown()


def main() -> None:
    """Train what the input names."""
    answers = int(sys.argv[1])
    os.set_inheritable(answers, False)  # a child that lives on must not keep it open when this process dies
    sys.argv = sys.argv[2:] or sys.argv[:1]
    logging.basicConfig(level=logging.INFO, handlers=[ScreenHandler()])
    import bpt_dist.train  # noqa: F401 - seconds that belong to no run

    _say(answers, ready=True)
    for line in sys.stdin:
        code, reason = train_here(configuration.load(Path(line.rstrip("\n"))))
        _say(answers, code=code, reason=reason)
    close()


def _say(answers: int, **news: Any) -> None:
    os.write(answers, json.dumps(news).encode() + b"\n")


if __name__ == "__main__":
    main()
