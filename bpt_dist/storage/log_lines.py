"""What a line of the log begins with: which run of how many, and which stage; and the handler that shows lines on the screen.

There is one place for the whole process: the threads of a run, such as its watchdog, log for the same run.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TextIO

SEPARATOR = " | "
ELSEWHERE = {"reported_by_exit": True}  # `extra` of a line that the end of the job repeats on the screen


@dataclass
class _Place:
    run: str = ""
    stage: str = ""


_now = _Place()


@contextmanager
def lines_of_run(run: str) -> Iterator[None]:
    """Let every line begin with `run` until the end of the block."""
    before = _now.run, _now.stage
    _now.run, _now.stage = run, ""
    try:
        yield
    finally:
        _now.run, _now.stage = before


def enter_stage(stage: str) -> None:
    """Let every line name `stage` behind the run; "" names none."""
    _now.stage = stage


def place() -> str:
    """Return what lines begin with now."""
    return SEPARATOR.join(part for part in (_now.run, _now.stage) if part)


def add_place(record: logging.LogRecord) -> bool:
    """Give a record the field `place`, which a format puts before its message; to be used as a filter."""
    begin = place()
    record.place = begin + SEPARATOR if begin else ""
    return True


class ScreenHandler(logging.StreamHandler[TextIO]):
    """Writes to what is standard error now: while a progress bar is drawn, lines then appear above it and do not tear it.

    `prefix` names the rank. With `ends_reported`, the job itself prints why it ends, and the line about that is left out.
    """

    def __init__(self, prefix: str = "", *, ends_reported: bool = False) -> None:
        logging.Handler.__init__(self)
        self.ends_reported = ends_reported
        self.setFormatter(logging.Formatter(f"{prefix}%(place)s%(message)s"))
        self.addFilter(add_place)
        self.addFilter(self._is_shown)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        """Standard error as it is now."""
        return sys.stderr

    def _is_shown(self, record: logging.LogRecord) -> bool:
        return not (self.ends_reported and getattr(record, "reported_by_exit", False))
