"""The errors that a user can mend. Each message is one line: what is wrong, where, and what to do."""


class DiffGuardError(Exception):
    """Base of the errors that the command line prints without a traceback."""


class SettingError(DiffGuardError):
    """A setting is unknown, of the wrong type, or out of range."""


class DataError(DiffGuardError):
    """A file is missing, unreadable, or not what it should be."""


class ServiceError(DiffGuardError):
    """A service (tracking server, workflow server) cannot be reached."""
