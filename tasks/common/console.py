"""How a stage ends at the command line: one line for an error that the user can mend."""

import errno
import sys
from collections.abc import Callable

from diffguard.errors import DiffGuardError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Of the system's errors: the disk is full, or nothing can be written."""


def run_stage(main: Callable[[], object]) -> None:
    """Call main; a DiffGuardError, or a disk that is full, becomes one line on stderr and exit code 1."""
    try:
        main()
    except DiffGuardError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if error.errno not in FULL:
            raise
        sys.exit(f"error: {error.filename or 'a temporary file'}: cannot be written ({error.strerror}); make room")
