"""Prefect server, work pool, deployments, worker and the MLflow UI, on loopback, until Ctrl-C: `make serve`.

At the end runs at work are ended first, while the server can still be told of it, so that none stays RUNNING.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from diffguard.errors import DiffGuardError, ServiceError
from tasks import settings
from tasks.log import tracking_uri

POOL = "diffguard"
START_SECONDS, END_SECONDS = 180.0, 30.0
"""For a service to answer, and for what runs to end."""


class Services:
    """Processes that run beside each other, each in a session of its own: a terminal's Ctrl-C comes here alone."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = dict(environment)
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *command: str) -> None:
        """Start a process in the project's folder."""
        self.running[name] = subprocess.Popen(
            [sys.executable, "-m", *command], cwd=settings.ROOT, env=self.environment, start_new_session=True
        )

    def call(self, *command: str) -> None:
        """Run a command to its end.

        Raises:
            ServiceError: it failed.
        """
        done = subprocess.run([sys.executable, "-m", *command], cwd=settings.ROOT, env=self.environment, check=False)
        if done.returncode:
            raise ServiceError(f"{' '.join(command)} failed; see above")

    def wait_for(self, name: str, url: str, option: str) -> None:
        """Wait until a service answers.

        Raises:
            ServiceError: it ends before, or does not.
        """
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            if self.running[name].poll() is not None:
                raise ServiceError(f"{name} did not start; is {option} taken?")
            with suppress(OSError, urllib.error.URLError), urllib.request.urlopen(url, timeout=2):
                return
            time.sleep(0.5)
        raise ServiceError(f"{name} has not answered at {url} for {START_SECONDS:.0f} seconds")

    def watch(self) -> str:
        """Wait until one of them ends; returns its name."""
        while True:
            for name, process in self.running.items():
                if process.poll() is not None:
                    return name
            time.sleep(0.5)

    def stop(self) -> None:
        """End what the worker runs, then the worker, then the others."""
        if (worker := self.running.get("worker")) is not None and worker.poll() is None:
            _end(psutil.Process(worker.pid).children(recursive=True))
        for process in reversed(self.running.values()):
            with suppress(psutil.NoSuchProcess):
                parent = psutil.Process(process.pid)
                _end([parent, *parent.children(recursive=True)])
            process.wait()


def _end(processes: Sequence[psutil.Process]) -> None:
    """End processes: they are asked to, and after a while killed."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    _, left = psutil.wait_procs(processes, timeout=END_SECONDS)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=5)


def serve(prefect_port: int, mlflow_port: int) -> None:
    """Run all of it until SIGINT or SIGTERM.

    Raises:
        ServiceError: something does not start, or ends by itself.
    """
    api = f"http://127.0.0.1:{prefect_port}/api"
    services = Services({**os.environ, **_server_settings(), "PREFECT_API_URL": api, "DO_NOT_TRACK": "1"})
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, _stop)
    try:
        services.start("Prefect", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(prefect_port))
        store = ("--backend-store-uri", tracking_uri())
        services.start("MLflow", "mlflow", "ui", "--host", "127.0.0.1", "--port", str(mlflow_port), *store)
        services.wait_for("Prefect", f"{api}/health", f"port {prefect_port} (PREFECT_PORT)")
        services.call("prefect", "work-pool", "create", POOL, "--type", "process", "--overwrite")
        services.call("prefect", "--no-prompt", "deploy", "--all")
        services.start("worker", "prefect", "worker", "start", "--pool", POOL, "--type", "process")
        services.wait_for("MLflow", f"http://127.0.0.1:{mlflow_port}/health", f"port {mlflow_port} (MLFLOW_PORT)")
        print(_told(api, prefect_port, mlflow_port), flush=True)
        raise ServiceError(f"{services.watch()} has ended by itself; see above")
    except KeyboardInterrupt:
        print("\nending: runs at work first", flush=True)
    finally:
        # A second Ctrl-C does not leave processes behind.
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        services.stop()


def _stop(*_: Any) -> None:
    raise KeyboardInterrupt


def _server_settings() -> dict[str, str]:
    """Those of mlflow/server.env."""
    lines = (settings.ROOT / "mlflow" / "server.env").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("=", 1) for line in lines if line and not line.startswith("#"))
    return {name: value for name, value in pairs}


def _told(api: str, prefect_port: int, mlflow_port: int) -> str:
    root = settings.ROOT
    activate = Path(sys.prefix) / "bin" / "activate"
    return f"""
Prefect UI  http://127.0.0.1:{prefect_port}
MLflow UI   http://127.0.0.1:{mlflow_port}
In another shell:
  cd {shlex.quote(str(root))} && . {shlex.quote(str(activate))}
  export PREFECT_API_URL={api}
  prefect deployment run diffguard/evaluate --watch
  prefect deployment run diffguard/monitor -p images={shlex.quote(f"{root}/FOLDER")} --watch
Ctrl-C stops all of it."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m flows.serve", description=__doc__)
    parser.add_argument("--prefect-port", type=int, default=4200)
    parser.add_argument("--mlflow-port", type=int, default=5000)
    options = parser.parse_args()
    try:
        serve(options.prefect_port, options.mlflow_port)
    except DiffGuardError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
