"""How a flow that is called at the command line ends: with its message, or one line and exit code 1."""

import sys
from collections.abc import Callable
from typing import Any

from prefect import Flow

from diffguard.errors import DiffGuardError
from flows.start import check_prefect


def run_flow(flow: Flow[..., Any], check: Callable[[dict[str, Any]], object], options: dict[str, Any]) -> str:
    """Run a flow here.

    Args:
        flow: one that returns a state with a message.
        check: of the options, before any server starts.

    Returns:
        The message of its state. If that is a failure, or an option is wrong, the program ends.
    """
    try:
        check(options)
        check_prefect()
        state = flow(**options, return_state=True)
    except DiffGuardError as error:
        sys.exit(f"error: {error}")
    if state.is_completed():
        return str(state.message)
    error = state.result(raise_on_failure=False)
    if isinstance(error, BaseException) and not isinstance(error, DiffGuardError):
        raise error
    sys.exit(f"error: {error or state.message}")
