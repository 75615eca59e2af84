"""Search sigma, learning rates or anything else: `python launcher/sweep.py --config FILE [key=value ...]`.

The file names what all trials share, the space and the search; see configs/sweep/ and docs/sweeps.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bpt_dist.commands.sweep.run import sweep
from bpt_dist.distributed import environment
from bpt_dist.errors import UserError


def parser() -> argparse.ArgumentParser:
    """Return the closed command line."""
    parsed = argparse.ArgumentParser(
        prog="launcher/sweep.py", description="Search settings as a sweep file says.", allow_abbrev=False
    )
    parsed.add_argument("--config", type=Path, required=True, metavar="FILE", help="a YAML file, see configs/sweep/")
    parsed.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of the file")
    parsed.add_argument("--resume", action="store_true", help="continue a sweep that was stopped or killed")
    parsed.add_argument("--submit", metavar="ADDRESS", help="run it as a job of the Ray cluster at this address")
    parsed.add_argument("--follow", action="store_true", help="with --submit: show the job's output until it ends")
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    options = parser().parse_args(arguments)
    environment.prepare_process()
    try:
        return sweep(options.config, options.overrides, resume=options.resume, submit=options.submit, follow=options.follow)
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
