"""How a stage ends at the command line: one line for an error that the user can mend."""

import sys
from collections.abc import Callable

from diffguard.errors import DiffGuardError


def run_stage(main: Callable[[], object]) -> None:
    """Call main; a DiffGuardError becomes one line on stderr and exit code 1."""
    try:
        main()
    except DiffGuardError as error:
        sys.exit(f"error: {error}")
