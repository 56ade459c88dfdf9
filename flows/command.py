"""How a flow that is called at the command line ends: with its message, or one line and an exit code that says why."""

import logging
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from prefect import Flow, get_run_logger
from prefect.exceptions import TerminationSignal
from prefect.runtime import deployment

from diffguard.errors import DiffGuardError
from flows import ended_with
from flows.start import check_prefect


@contextmanager
def one_line() -> Iterator[None]:
    """End the program with one line: after an error of ours with exit code 1, after a signal with 128 and its number.

    Inside of a flow a signal first ends the flow's work, and its run is reported as crashed.
    """
    signal.signal(signal.SIGTERM, _end_with)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # nohup ignores it
        signal.signal(signal.SIGHUP, _crash)
    try:
        yield
    except DiffGuardError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        _end_with(signal.SIGINT)
    except TerminationSignal as error:
        _end_with(error.signal)


def _crash(number: int, frame: object) -> NoReturn:
    """As Prefect does at SIGTERM; it then sends the signal once more, to who handled it before the flow."""
    signal.signal(number, _end_with)
    raise TerminationSignal(number)


def _end_with(number: int, *_: object) -> NoReturn:
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)  # the end takes a moment, and is not helped by a second one
    print(f"ended by {signal.Signals(number).name}; run it again to go on where it was", file=sys.stderr, flush=True)
    ended_with.append(128 + number)
    sys.exit(128 + number)


def tell_watcher(text: Callable[[], str], *, fails: bool = False) -> None:
    """Log what a deployment's run has found, for who watches it: Prefect does not show a state's message there."""
    if deployment.id:
        get_run_logger().log(logging.ERROR if fails else logging.INFO, text())


def run_flow(flow: Flow[..., Any], check: Callable[[dict[str, Any]], object], options: dict[str, Any]) -> str:
    """Run a flow here.

    Args:
        flow: one that returns a state with a message.
        check: of the options, before any server starts.

    Returns:
        The message of its state. If that is a failure, or an option is wrong, the program ends.
    """
    with one_line():
        check(options)
        check_prefect()
        state = flow(**options, return_state=True)
    if state.is_completed():
        return str(state.message)
    error = state.result(raise_on_failure=False)
    if isinstance(error, BaseException) and not isinstance(error, DiffGuardError):
        raise error
    sys.exit(f"error: {error or state.message}")
