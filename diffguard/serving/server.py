"""The server process of the endpoint: connections, logging, shutdown."""

import copy
import signal
import sys
from collections.abc import Callable

import uvicorn
from uvicorn.config import LOGGING_CONFIG

from diffguard.deploy.detector import DeployedDetector
from diffguard.errors import DiffGuardError
from diffguard.serving.api_key import VARIABLE, is_loopback
from diffguard.serving.app import create_app
from diffguard.serving.connections import Connection, listen
from diffguard.serving.limits import BODY_SECONDS, REQUEST_SECONDS, Limits
from diffguard.serving.service import LOG


def serve(
    source: Callable[[], DeployedDetector],
    host: str,
    port: int,
    limits: Limits,
    seconds: float = REQUEST_SECONDS,
    api_key: str | None = None,
) -> int:
    """Run the server until SIGTERM or SIGINT; requests in flight are still answered. Returns the exit code.

    Args:
        source: opens the detector; /health is 503 meanwhile.
        port: 0 for any free port, which the log names.
        seconds, api_key: see `create_app`.

    Raises:
        ServiceError: the address cannot be listened on.
        DiffGuardError: the detector cannot be opened.
    """
    listener = listen(host, port)
    failures: list[BaseException] = []

    def stop(error: BaseException) -> None:
        failures.append(error)
        server.should_exit = True

    app = create_app(
        source,
        limits,
        seconds=seconds,
        body_seconds=min(BODY_SECONDS, seconds),
        on_failure=stop,
        api_key=api_key,
    )
    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        log_config=_LOGGING,
        server_header=False,
        timeout_graceful_shutdown=int(seconds) + 1,
    )
    if api_key is None and not is_loopback(host):
        LOG.warning("%s can be reached by others, and no key is required; set %s to require one", host, VARIABLE)
    server = uvicorn.Server(config)
    # uvicorn raises the signal again once it has stopped: a requested stop is exit code 0, not a death by signal.
    handlers = {number: signal.signal(number, lambda *_: sys.exit(0)) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run(sockets=[listener])
    finally:
        listener.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if failures and isinstance(failures[0], DiffGuardError):
        raise failures[0]
    return 1 if failures else 0


_LOGGING = copy.deepcopy(LOGGING_CONFIG)
_LOGGING["loggers"]["diffguard"] = {"handlers": ["default"], "level": "INFO", "propagate": False}
