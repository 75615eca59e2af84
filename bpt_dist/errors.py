"""Errors a user can cause, each with the exit code the process ends with (`status.json` has the state in full)."""

from __future__ import annotations

import errno

INTERNAL_ERROR = 70


class UserError(Exception):
    """Something a user can fix; the message names the place, the value and the remedy."""

    exit_code = 2


class ConfigError(UserError):
    """A configuration or command line that cannot be run."""


class DataError(UserError):
    """A row, a task or a data set that cannot be used."""

    exit_code = 65


class PeerLost(UserError):
    """Another rank or host is gone; the run resumes from its newest checkpoint. `reporting_rank`, if known, reports it."""

    exit_code = 69

    def __init__(self, message: str, reporting_rank: int | None = 0) -> None:
        super().__init__(message)
        self.reporting_rank = reporting_rank


class OutOfMemory(UserError):
    """One rank has no memory left for a pass; smaller passes or more ranks help."""

    exit_code = 70


class BackboneChanged(UserError):
    """A method wrote to the frozen model: an error in that method's code, which invalidates the run."""

    exit_code = INTERNAL_ERROR


class StorageError(UserError):
    """Reading or writing a file of the run failed: disk full, torn checkpoint, occupied directory."""

    exit_code = 74


class Stopped(UserError):
    """The run stopped on request with a checkpoint; rerun the same command to resume."""

    exit_code = 75


class NonFinite(UserError):
    """A loss, gradient or particle is NaN or infinite."""

    exit_code = 77


def exit_code(error: BaseException | None) -> int:
    """Return the code a process ends with after `error`: 0, 2, 65, 69, 70 (internal), 74, 75 or 77."""
    if error is None:
        return 0
    if isinstance(error, UserError):
        return error.exit_code
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 2 if error.code else 0
    if isinstance(error, KeyboardInterrupt):
        return Stopped.exit_code
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS):
        return StorageError.exit_code
    return INTERNAL_ERROR


def reason_of(error: BaseException) -> str:
    """Return the sentence of a user error, or kind and text of an internal one."""
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
