"""A process that trains the runs it is told, one after another: torch and transformers are imported once for all of them.

`python -m bpt_dist.table_worker DESCRIPTOR [ARGUMENT ...]` writes a line of JSON to DESCRIPTOR when it is ready, reads the file of
a run's configuration from each line of its standard input, writes a line when that run has ended, and leaves when the input does.
The arguments are the command that started it: a run writes them down as how to go on.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from bpt_dist import config as configuration
from bpt_dist.config import Config


def train_run(run: Config) -> tuple[int, str | None]:
    """Train one run in this process and return its exit code and, if it did not finish, the reason."""
    from bpt_dist.mesh import World
    from bpt_dist.mirror import shutdown
    from bpt_dist.opening import opened
    from bpt_dist.run import exit_code, reason_of
    from bpt_dist.train import train

    try:
        world = World.start(run.distribution.startup_timeout, run.distribution.expect_world_size)
        with opened(run, world, fresh=False) as session:
            if session is not None:
                train(session)
    except (Exception, KeyboardInterrupt) as error:
        return exit_code(error), reason_of(error)
    finally:
        shutdown()
    return 0, None


def main() -> None:
    """Train what the input names."""
    answers = int(sys.argv[1])
    os.set_inheritable(answers, False)  # a child that lives on must not keep it open when this process dies
    sys.argv = sys.argv[2:] or sys.argv[:1]
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    import bpt_dist.train  # noqa: F401 - seconds that belong to no run

    _say(answers, ready=True)
    for line in sys.stdin:
        code, reason = train_run(configuration.load(Path(line.rstrip("\n"))))
        _say(answers, code=code, reason=reason)


def _say(answers: int, **news: Any) -> None:
    os.write(answers, json.dumps(news).encode() + b"\n")


if __name__ == "__main__":
    main()
