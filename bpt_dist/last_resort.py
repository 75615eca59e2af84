"""End this process from C: while a call keeps the interpreter lock, no Python thread can."""

from __future__ import annotations

import ctypes

CLOCK_MONOTONIC, SIGEV_THREAD = 1, 2


class _Event(ctypes.Structure):
    """`struct sigevent` of the C library for SIGEV_THREAD: call `function(value)` in a thread of its own."""

    _fields_ = (
        ("value", ctypes.c_long),
        ("signo", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("padding", ctypes.c_char * 32),
    )


class _Times(ctypes.Structure):
    """`struct itimerspec`: interval, then time to the first expiry, each in seconds and nanoseconds."""

    _fields_ = (("interval", ctypes.c_long * 2), ("value", ctypes.c_long * 2))


class LastResort:
    """A POSIX timer that calls `_exit(code)`; raises OSError where the C library has none."""

    def __init__(self, code: int) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._timer = ctypes.c_void_p()
        try:
            end = ctypes.cast(self._libc._exit, ctypes.c_void_p).value
            event = _Event(value=code, notify=SIGEV_THREAD, function=end)
            failed = self._libc.timer_create(CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(self._timer))
        except AttributeError as error:
            raise OSError("this C library has no timers") from error
        if failed:
            raise OSError(ctypes.get_errno(), "timer_create")

    def end_after(self, seconds: float) -> None:
        """End the process `seconds` from now unless told otherwise until then; 0 calls it off."""
        whole = int(seconds)
        times = _Times(value=(whole, int((seconds - whole) * 1e9)))
        self._libc.timer_settime(self._timer, 0, ctypes.byref(times), None)

    def close(self) -> None:
        """Give the timer back."""
        self._libc.timer_delete(self._timer)
