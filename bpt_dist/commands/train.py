"""Train: `deepspeed launcher/train.py --config FILE [key=value ...]`, or `bpt-dist train`; the same command resumes.

One process, or as many as deepspeed, torchrun or srun start on one host or several: the program is the same, by file or by module
(`torchrun -m bpt_dist.commands.train`, `deepspeed --module bpt_dist.commands.train`). The options are
closed; everything else is `key=value` with a dotted key or a unique last name (`sigma=0.1`). Nothing heavier than the configuration
is imported before the configuration is known to be right.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

from bpt_dist import config as configuration
from bpt_dist.config.processes import check_processes
from bpt_dist.config.shell_words import check_words
from bpt_dist.distributed import environment
from bpt_dist.errors import UserError
from bpt_dist.storage.log_lines import ScreenHandler


def parser(program: str = "launcher/train.py") -> argparse.ArgumentParser:
    """Return the closed command line."""
    parsed = argparse.ArgumentParser(
        prog=program, description="Train as a configuration says; the same command resumes.", allow_abbrev=False
    )
    parsed.add_argument("--config", "-c", type=Path, required=True, metavar="FILE", help="a YAML file, see configs/")
    parsed.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of the file")
    parsed.add_argument("--row", action="append", default=[], metavar="LABEL", help="only this row of the file; may be repeated")
    parsed.add_argument("--fresh", action="store_true", help="start from scratch; refuses a run directory that is not empty")
    parsed.add_argument("--plan", action="store_true", help="print what would be computed, sent and stored, and stop")
    parsed.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    parsed.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # appended by the deepspeed launcher
    return parsed


def main(arguments: Sequence[str] | None = None, program: str = "launcher/train.py") -> int:
    """Run the command line and return its exit code; `program` is its name in the usage."""
    first = environment.is_first_rank(os.environ)
    with redirect_stderr(sys.stderr if first else StringIO()):  # every rank has the same command line
        options = parser(program).parse_args(arguments)
    try:
        environment.adopt(os.environ)
        if environment.passed_through_shells(os.environ):
            check_words([("configuration", str(options.config))], options.overrides)
        config = configuration.load(options.config, options.overrides)
        if options.print_config:
            sys.stdout.write(configuration.resolved_yaml(config) if first else "")
            return 0
        if options.plan:
            from bpt_dist.commands.plan.text import plan

            sys.stdout.write(plan(config, environment.world_size(os.environ)) if first else "")
            return 0
        num_ranks = environment.world_size(os.environ)
        check_processes(configuration.expand(config, options.row), num_ranks, launched=environment.is_launched(os.environ))
    except UserError as error:
        # Every rank reads the same configuration and fails the same way: one reports it, unless only its host lacks the file.
        alone = not options.config.is_file() and os.environ.get("LOCAL_RANK", "0") == "0"
        sys.stderr.write(f"{error}\n" if first or alone else "")
        return error.exit_code
    show_log(first)
    environment.prepare_process()
    from bpt_dist.commands.plan.comparison import compared_with_plan
    from bpt_dist.train import run_all

    return run_all(config, rows=options.row, fresh=options.fresh, around=compared_with_plan)


def show_log(first: bool) -> None:
    """Show the log of the first rank and errors of the others; every rank also writes its own log file."""
    prefix = "" if first else f"rank {os.environ.get('RANK', '?')}: "
    handler = ScreenHandler(prefix, ends_reported=True)
    handler.setLevel(logging.INFO if first else logging.ERROR)
    logging.basicConfig(level=logging.WARNING, handlers=[handler])


if __name__ == "__main__":
    sys.exit(main())
