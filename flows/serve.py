"""Prefect server, work pool, deployments, worker and the MLflow UI, on loopback, until Ctrl-C: `make serve`.

At the end runs at work are ended first, then the worker; states that they had no time to report are set on the
server before it ends too, so that no run stays PENDING or RUNNING.
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

import httpx
import psutil
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelled, Crashed

from diffguard.errors import DiffGuardError, ServiceError
from diffguard.utils.text import first_line
from tasks.config import project
from tasks.services.tracking import tracking_uri

POOL = "diffguard"
WORKER = f"{POOL} {os.getpid()}"
"""Its name: Prefect labels runs with it, and another `make serve` may share this one's database."""
START_SECONDS, END_SECONDS = 180.0, 30.0
"""For a service to answer, and for what runs to end."""


class Services:
    """Processes that run beside each other, each in a session of its own: a terminal's Ctrl-C comes here alone.

    SIGINT and SIGTERM are noted and looked at in `pause`, so that they come between two steps, not within one: no
    process is forgotten while it starts, and a second signal does not keep the others from being ended.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = dict(environment)
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.is_ending = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, *_: Any) -> None:
        self.is_ending = True

    def pause(self) -> None:
        """Wait a little.

        Raises:
            KeyboardInterrupt: SIGINT or SIGTERM has come.
        """
        time.sleep(0.5)
        if self.is_ending:
            raise KeyboardInterrupt

    def start(self, name: str, *command: str) -> None:
        """Start a process in the project's folder."""
        self.running[name] = subprocess.Popen(
            [sys.executable, "-m", *command], cwd=project.ROOT, env=self.environment, start_new_session=True
        )

    def call(self, *command: str) -> None:
        """Run a command to its end.

        Raises:
            ServiceError: it failed.
        """
        self.start("command", *command)
        while (code := self.running["command"].poll()) is None:
            self.pause()
        del self.running["command"]
        if code:
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
            self.pause()
        raise ServiceError(f"{name} has not answered at {url} for {START_SECONDS:.0f} seconds")

    def watch(self) -> str:
        """Wait until one of them ends; returns its name."""
        while True:
            for name, process in self.running.items():
                if process.poll() is not None:
                    return name
            self.pause()

    def stop_children(self, name: str) -> None:
        """End what a process has started."""
        with suppress(psutil.NoSuchProcess):
            _end(psutil.Process(self.running[name].pid).children(recursive=True))

    def stop(self, name: str) -> None:
        """End a process and what it has started."""
        process = self.running.pop(name)
        with suppress(psutil.NoSuchProcess):
            parent = psutil.Process(process.pid)
            _end([parent, *parent.children(recursive=True)])
        process.wait()

    def stop_all(self) -> None:
        """End them all, the last one first."""
        for name in reversed(list(self.running)):
            self.stop(name)


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
    try:
        services.start("Prefect", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(prefect_port))
        store = ("--backend-store-uri", tracking_uri())
        services.start("MLflow", "mlflow", "ui", "--host", "127.0.0.1", "--port", str(mlflow_port), *store)
        services.wait_for("Prefect", f"{api}/health", f"port {prefect_port} (PREFECT_PORT)")
        services.call("prefect", "work-pool", "create", POOL, "--type", "process", "--overwrite")
        services.call("prefect", "--no-prompt", "deploy", "--all")
        services.start("worker", "prefect", "worker", "start", "--pool", POOL, "--type", "process", "--name", WORKER)
        services.wait_for("MLflow", f"http://127.0.0.1:{mlflow_port}/health", f"port {mlflow_port} (MLFLOW_PORT)")
        print(_instructions(api, prefect_port, mlflow_port), flush=True)
        raise ServiceError(f"{services.watch()} has ended by itself; see above")
    except KeyboardInterrupt:
        print("\nending: runs at work first", flush=True)
    finally:
        try:
            if "worker" in services.running:
                _end_runs(services, api)
        finally:
            services.stop_all()


def _end_runs(services: Services, api: str) -> None:
    """End the worker's runs, then the worker, then close the runs that neither could report."""
    services.stop_children("worker")
    services.stop("worker")
    try:
        with temporary_settings({PREFECT_API_URL: api}), get_client(sync_client=True) as client:
            _close_runs(client)
    except httpx.HTTPError as error:
        print(f"warning: runs may be left PENDING or RUNNING: Prefect does not answer ({first_line(error)})")


def _close_runs(client: SyncPrefectClient) -> None:
    """Report as crashed, or as cancelled if that was asked for, the worker's runs that have no end yet."""
    at_work = FlowRunFilterStateType(any_=[StateType.PENDING, StateType.RUNNING, StateType.CANCELLING])
    of_these = FlowRunFilter(state=FlowRunFilterState(type=at_work))
    # One page, the newest first: the database may hold other projects' forgotten runs.
    for run in client.read_flow_runs(flow_run_filter=of_these, sort=FlowRunSort.EXPECTED_START_TIME_DESC):
        if _is_ours(client, run):
            end = Cancelled if run.state and run.state.is_cancelling() else Crashed
            client.set_flow_run_state(run.id, end(message="`make serve` was ended."))


def _is_ours(client: SyncPrefectClient, run: FlowRun) -> bool:
    """Whether the worker has taken a run, or the one that it is a part of."""
    try:
        while run.parent_task_run_id is not None:
            task = client.read_task_run(run.parent_task_run_id)
            if task.flow_run_id is None:
                return False
            run = client.read_flow_run(task.flow_run_id)
    except ObjectNotFound:  # somebody has deleted it
        return False
    # The label comes a moment after the run has become PENDING.
    return run.work_pool_name == POOL and run.labels.get("prefect.worker.name", WORKER) == WORKER


def _server_settings() -> dict[str, str]:
    """Those of mlflow/server.env."""
    lines = (project.ROOT / "mlflow" / "server.env").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("=", 1) for line in lines if line and not line.startswith("#"))
    return {name: value for name, value in pairs}


def _instructions(api: str, prefect_port: int, mlflow_port: int) -> str:
    root = project.ROOT
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
