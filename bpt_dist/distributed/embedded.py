"""What watches a training inside a program that is not ours, such as a notebook: it asks for a stop and never ends the process."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType
from typing import Self

from bpt_dist.distributed.watchdog import Watchdog

log = logging.getLogger(__name__)


class EmbeddedWatchdog(Watchdog):
    """A `Watchdog` without its thread, its timeouts and its exits.

    The first SIGINT (Ctrl-C, or the stop button of a notebook) ends the training after its step with a checkpoint; the next one
    raises KeyboardInterrupt at once. Other signals, hangs and the launcher are the business of the program around us. Outside the
    main thread Python gives nobody a signal, and nothing is installed.
    """

    def start(self) -> Self:
        """Take SIGINT until `close`."""
        if threading.current_thread() is threading.main_thread():
            self._old_handlers = {signal.SIGINT: signal.signal(signal.SIGINT, self._interrupted)}
        return self

    def close(self) -> None:
        """Give SIGINT back."""
        for number, handler in self._old_handlers.items():
            # None is a handler that was not installed from Python, which cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._old_handlers = {}
        self._reader.close()
        self._writer.close()

    def _interrupted(self, _number: int, _frame: FrameType | None) -> None:
        if self.stop_requested:
            raise KeyboardInterrupt
        self.request_stop("SIGINT")
        log.warning("interrupted: the training stops after this step with a checkpoint; interrupt it again to stop at once")

    def _wake(self) -> None:
        """Do nothing: there is no thread that waits."""
