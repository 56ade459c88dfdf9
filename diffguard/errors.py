"""Errors that a user can correct. Each message is one line: where it is wrong, what is wrong, and what to do."""

from collections.abc import Sequence


class DiffGuardError(Exception):
    """Base of the errors that the command line prints without a traceback."""


class SettingError(DiffGuardError):
    """A setting is unknown, of the wrong type, or out of range."""


class DataError(DiffGuardError):
    """A file is missing, unreadable, or not what it should be."""


class NotFiniteError(DataError):
    """Scores of a batch are NaN or infinite, so that there is no decision on these images.

    Attributes:
        rows: indices of these images in the batch.
    """

    def __init__(self, message: str, rows: Sequence[int]) -> None:
        super().__init__(message)
        self.rows = tuple(rows)


class ServiceError(DiffGuardError):
    """A service (tracking server, workflow server) cannot be reached."""
