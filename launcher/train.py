"""Train: `deepspeed launcher/train.py --config FILE [key=value ...]`; the same command resumes.

One process, or as many as deepspeed, torchrun or srun start on one host or several: the program is the same. The options are
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
from bpt_dist import rank_variables
from bpt_dist.config import Config
from bpt_dist.errors import ConfigError, UserError


def parser() -> argparse.ArgumentParser:
    """Return the closed command line."""
    parsed = argparse.ArgumentParser(
        prog="launcher/train.py", description="Train as a configuration says; the same command resumes.", allow_abbrev=False
    )
    parsed.add_argument("--config", type=Path, required=True, metavar="FILE", help="a YAML file, see configs/")
    parsed.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of the file")
    parsed.add_argument("--fresh", action="store_true", help="start anew; refuses a run directory that is not empty")
    parsed.add_argument("--plan", action="store_true", help="print what would be computed, sent and stored, and stop")
    parsed.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    parsed.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # appended by the deepspeed launcher
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    first = is_first()
    with redirect_stderr(sys.stderr if first else StringIO()):  # every rank has the same command line
        options = parser().parse_args(arguments)
    try:
        rank_variables.adopt(os.environ)
        config = configuration.load(options.config, options.overrides)
        if options.print_config:
            sys.stdout.write(configuration.resolved_yaml(config) if first else "")
            return 0
        if options.plan:
            from bpt_dist.plan import plan

            sys.stdout.write(plan(config, rank_variables.world_size(os.environ)) if first else "")
            return 0
        check_world_size(config)
    except UserError as error:
        # Every rank reads the same configuration and fails the same way: one of them says so, unless only its host lacks the file.
        alone = not options.config.is_file() and os.environ.get("LOCAL_RANK", "0") == "0"
        sys.stderr.write(f"{error}\n" if first or alone else "")
        return error.exit_code
    prepare_process(first)
    from bpt_dist.train import run_all

    return run_all(config, fresh=options.fresh)


def is_first() -> bool:
    """Return whether this process speaks for all; known before the variables are known to be right."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def check_world_size(config: Config) -> None:
    """Refuse a job of another size than intended: a hostfile that is not found makes the launcher start on this host alone."""
    expected, size = config.distribution.expect_world_size, rank_variables.world_size(os.environ)
    if expected is not None and size != expected:
        raise ConfigError(
            f"distribution.expect_world_size is {expected}, but {size} process(es) were started; "
            "is the hostfile found, and does it list all slots?"
        )


def prepare_process(first: bool) -> None:
    """Set what must stand before torch is imported, and let the first rank speak; every rank writes its own log file."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not Path("/dev/nvidia0").exists():
        # Said here, because DeepSpeed otherwise warns on every rank that it found no accelerator.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Otherwise every connection between hosts without reverse DNS is a line on the screen; what fails is raised anyway.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))
    if ranks_here > 1:
        # Otherwise every rank takes every core, and the ranks wait for each other's threads.
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks_here)))
    prefix = "" if first else f"rank {os.environ.get('RANK', '?')}: "
    logging.basicConfig(level=logging.WARNING, format=f"{prefix}%(message)s", stream=sys.stderr)
    logging.getLogger().handlers[0].setLevel(logging.INFO if first else logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
