"""The server of the endpoint: its connections, its logging and its end."""

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
from diffguard.serving.limits import Limits
from diffguard.serving.service import LOG


def serve(
    source: Callable[[], DeployedDetector],
    host: str,
    port: int,
    limits: Limits,
    seconds: float = 60.0,
    api_key: str | None = None,
) -> int:
    """Run the server until SIGTERM or SIGINT; what is in flight then is still answered. Returns the exit code.

    Args:
        source: opens the detector, while /health says 503 already.
        port: 0: any that is free; the log names it.
        seconds, api_key: see `create_app`.

    Raises:
        ServiceError: nothing can listen at that address.
        DiffGuardError: the detector cannot be opened.
    """
    listener = listen(host, port)
    failures: list[BaseException] = []

    def stop(error: BaseException) -> None:
        failures.append(error)
        server.should_exit = True

    app = create_app(source, limits, seconds=seconds, body_seconds=min(30.0, seconds), on_failure=stop, api_key=api_key)
    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        log_config=_LOGGING,
        server_header=False,
        timeout_graceful_shutdown=int(seconds) + 1,
    )
    if api_key is None and not is_loopback(host):
        LOG.warning("everybody who reaches %s is answered: no key is asked for; set %s to ask for one", host, VARIABLE)
    server = uvicorn.Server(config)
    # uvicorn hands the signal on when it is done; to have been told to stop is no failure.
    before = {each: signal.signal(each, lambda *_: sys.exit(0)) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run(sockets=[listener])
    finally:
        listener.close()
        for each, handler in before.items():
            signal.signal(each, handler)
    if failures and isinstance(failures[0], DiffGuardError):
        raise failures[0]
    return 1 if failures else 0


_LOGGING = copy.deepcopy(LOGGING_CONFIG)
_LOGGING["loggers"]["diffguard"] = {"handlers": ["default"], "level": "INFO", "propagate": False}
