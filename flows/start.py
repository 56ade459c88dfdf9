"""Before a flow starts: that Prefect can be reached, or can start a server of its own. In one line, and at once."""

import os
import tempfile
import urllib.request
from pathlib import Path

from prefect.settings import PREFECT_API_URL, PREFECT_HOME

from diffguard.errors import ServiceError, SettingError
from diffguard.utils.text import first_line


def check_prefect() -> None:
    """Check that the server of PREFECT_API_URL answers, or, without one, that Prefect's home can be written.

    Raises:
        ServiceError: the server does not answer. SettingError: nothing can be written in the home.
    """
    home = Path(PREFECT_HOME.value())
    try:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=home):
            pass
    except OSError as error:
        raise SettingError(
            f"{home}: Prefect cannot write there ({error.strerror}); set PREFECT_HOME to a folder that can be written"
        ) from None
    if (url := PREFECT_API_URL.value()) is None:
        return
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=10):
            pass
    except (OSError, ValueError) as error:
        unset = "" if "PREFECT_API_URL" in os.environ else " in its profile"
        raise ServiceError(
            f"PREFECT_API_URL: no Prefect server answers at {url} ({first_line(error)}); start it (make serve), or "
            f"unset the variable{unset} to run with a server of this run's own"
        ) from None
