"""Errors a user can cause, each with the exit code the process ends with (the truth stays `status.json`)."""

from __future__ import annotations


class UserError(Exception):
    """Something a user can mend; the message names the place, the value and the remedy."""

    exit_code = 2


class ConfigError(UserError):
    """A configuration or command line that cannot be run."""


class DataError(UserError):
    """A row, a task or a data set that cannot be used."""

    exit_code = 65


class PeerLost(UserError):
    """Another rank or host is gone; the run resumes from its newest checkpoint. `spokesman` is the rank that says so, if known."""

    exit_code = 69

    def __init__(self, message: str, spokesman: int | None = 0) -> None:
        super().__init__(message)
        self.spokesman = spokesman


class OutOfMemory(UserError):
    """One rank has no memory left for a pass; smaller passes, or more ranks, mend it."""

    exit_code = 70


class StorageError(UserError):
    """Reading or writing a file of the run failed: disk full, torn checkpoint, occupied directory."""

    exit_code = 74


class Stopped(UserError):
    """The run stopped on request with a checkpoint; the same command resumes it."""

    exit_code = 75


class NonFinite(UserError):
    """A loss, gradient or particle is NaN or infinite."""

    exit_code = 77


INTERNAL_ERROR = 70
