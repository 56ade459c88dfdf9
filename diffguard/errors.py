"""The errors that a user can mend. Each message is one line: what is wrong, where, and what to do."""

from collections.abc import Sequence


class DiffGuardError(Exception):
    """Base of the errors that the command line prints without a traceback."""


class SettingError(DiffGuardError):
    """A setting is unknown, of the wrong type, or out of range."""


class DataError(DiffGuardError):
    """A file is missing, unreadable, or not what it should be."""


class NotFiniteError(DataError):
    """Scores of some images of a batch are no numbers, which is no decision on them.

    Attributes:
        rows: the places of these images in the batch.
    """

    def __init__(self, message: str, rows: Sequence[int]) -> None:
        super().__init__(message)
        self.rows = tuple(rows)


class ServiceError(DiffGuardError):
    """A service (tracking server, workflow server) cannot be reached."""
