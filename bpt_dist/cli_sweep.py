"""`bpt-dist sweep` and `launcher/sweep.py`: search settings on this machine, or hand the search to a Ray cluster."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from bpt_dist.errors import ConfigError
from bpt_dist.sweep_settings import load


def sweep(file: Path, words: Sequence[str], *, resume: bool, submit: str | None, follow: bool) -> int:
    """Run or submit the sweep of a file with `key=value` words and return the exit code.

    Raises ConfigError for everything that can be known to be wrong before anything is started.
    """
    if follow and submit is None:
        raise ConfigError("--follow: has no effect without --submit; a sweep on this machine shows its progress itself")
    found = load(file, words)
    if submit is not None:
        from bpt_dist.sweep_submit import submit as hand_over

        return hand_over(found, file, words, submit, resume=resume, follow=follow)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    from bpt_dist.sweep import run_sweep

    return run_sweep(found, resume=resume)
