"""`bpt-dist predict`: rows of one or many tasks in, answers out, each under its own prompt on one frozen model."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from bpt_dist.errors import ConfigError, Stopped, StorageError

SHOWN = 10  # bad rows named on the screen; all of them are in the answers
ON_TERMINAL, ELSEWHERE = 0.2, 30.0  # seconds between two messages about the progress


def predict(
    places: Sequence[Path],
    named: Sequence[str],
    rows: Path | None,
    out: Path | None,
    *,
    backbone: str | None,
    ensemble: bool,
    best: bool,
    window: int,
    prefix_bytes: int | None = None,
) -> None:
    """Answer every row.

    Raises ConfigError before anything is answered where prompts or files cannot be used, and after the last row where some rows
    have no answer; Stopped at SIGINT or SIGTERM, with whole lines written.
    """
    from bpt_dist.artifacts.inference.exports import read_given

    exports = read_given(places, named, ensemble=ensemble, best=best)
    if rows is not None and out is not None and out.exists() and rows.exists() and rows.samefile(out):
        raise ConfigError(f"--out {out}: is the file of the rows; give another one")
    with ExitStack() as stack:
        if rows is None and sys.stdin.isatty():
            sys.stderr.write("reading rows from the terminal, one JSON object a line; end with Ctrl-D\n")
        source, target = stack.enter_context(_opened(rows, "rb")), stack.enter_context(_opened(out, "wb"))
        signals = stack.enter_context(_Signals.caught())
        # Once the cheap mistakes are out: the backbone takes seconds.
        from bpt_dist.artifacts.inference.backbone import load_backbone
        from bpt_dist.artifacts.inference.predictor import Predictor

        predictor = Predictor(load_backbone(exports[0], backbone), exports, prefix_bytes=prefix_bytes)
        num_rows, complaints = _answer_all(predictor, source, target, signals, window)
    if num_rows == 0:
        raise ConfigError(f"{rows or 'standard input'}: has no rows; write one JSON object a line")
    if complaints.count:
        rest = [f"... and {complaints.count - SHOWN} more"] if complaints.count > SHOWN else []
        lines = "\n  ".join([*complaints.first, *rest])
        raise ConfigError(f"{complaints.count:,} of {num_rows:,} rows have no answer; fix them and predict them again:\n  {lines}")


class _Complaints:
    """How many rows have no answer, and why the first of them have none."""

    def __init__(self) -> None:
        self.count, self.first = 0, list[str]()

    def add(self, some: Sequence[str]) -> None:
        self.first += some[: SHOWN - len(self.first)]
        self.count += len(some)


def _answer_all(predictor: object, source: BinaryIO, target: BinaryIO, signals: _Signals, window: int) -> tuple[int, _Complaints]:
    """Answer the rows window by window and return how many there were; what was answered is written before the next is read."""
    from bpt_dist.artifacts.inference.lines import answer_lines
    from bpt_dist.artifacts.inference.predictor import Predictor
    from bpt_dist.data.row_checks import numbered_lines

    assert isinstance(predictor, Predictor)
    num_rows, complaints, progress = 0, _Complaints(), _Progress()
    try:
        for answered in answer_lines(predictor, numbered_lines(source), window=window):
            with signals.deferred():
                target.write(b"".join(answered.lines))
                target.flush()
            num_rows += len(answered.lines)
            complaints.add(answered.complaints)
            progress.show(num_rows)
    except Stopped as error:
        raise Stopped(f"{error} after {num_rows:,} rows; give the rows from {num_rows + 1:,} on to continue") from None
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        raise StorageError(
            f"row {num_rows + 1:,} or later: cannot be read or answered ({error.strerror}); fix this and go on"
        ) from error
    finally:
        progress.end()
    return num_rows, complaints


class _Signals:
    """SIGINT and SIGTERM as an exception, but never in the middle of a line that is written."""

    def __init__(self) -> None:
        self.writing, self.pending = False, False

    @classmethod
    @contextmanager
    def caught(cls) -> Iterator[_Signals]:
        """Catch both signals for as long as rows are answered."""
        signals = cls()
        before = {number: signal.signal(number, signals._caught) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield signals
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Let a signal wait until what is inside is done."""
        self.writing = True
        try:
            yield
        finally:
            self.writing = False
        if self.pending:
            raise Stopped("stopped on request")

    def _caught(self, _number: int, _frame: FrameType | None) -> None:
        self.pending = True
        if not self.writing:
            raise Stopped("stopped on request")


class _Progress:
    """How many rows are answered, on standard error: all the time on a terminal, seldom elsewhere."""

    def __init__(self) -> None:
        self.began = self.last = time.monotonic()
        self.on_terminal, self.shown = sys.stderr.isatty(), False

    def show(self, num_rows: int) -> None:
        """Say how many there are, unless that was said a moment ago."""
        now = time.monotonic()
        if now - self.last < (ON_TERMINAL if self.on_terminal else ELSEWHERE):
            return
        text = f"{num_rows:,} rows answered, {num_rows / (now - self.began):,.0f} a second"
        sys.stderr.write(f"\r{text}\x1b[K" if self.on_terminal else f"{text}\n")
        sys.stderr.flush()
        self.last, self.shown = now, True

    def end(self) -> None:
        """Leave the line of the terminal."""
        if self.on_terminal and self.shown:
            sys.stderr.write("\n")


@contextmanager
def _opened(file: Path | None, mode: str) -> Iterator[BinaryIO]:
    """Open a file, or take standard input or output in its place."""
    if file is None:
        yield sys.stdin.buffer if mode == "rb" else sys.stdout.buffer
        return
    try:
        opened: BinaryIO = file.open(mode)  # type: ignore[assignment]
    except OSError as error:
        what = "read" if mode == "rb" else "written"
        raise ConfigError(f"{file}: cannot be {what} ({error.strerror}); give another file") from error
    with opened:
        yield opened
