"""Prefect server, work pool, deployments, worker and the MLflow UI, on loopback, until Ctrl-C: `make serve`.

At the end runs at work are ended first, then the worker; states that they had no time to report are set on the
server before it ends too, so that no run stays PENDING or RUNNING. A process manager as honcho has no such order: it
sends all of them a signal at once, and whoever is still to report a state finds no server.
"""

import argparse
import errno
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import psutil
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    TaskRunFilter,
    TaskRunFilterState,
    TaskRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort, TaskRunSort
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelled, Crashed

from diffguard.errors import DiffGuardError, ServiceError, SettingError
from diffguard.utils.text import first_line
from flows.automations import server
from flows.resume import set_automations
from tasks.common.ending import end_processes
from tasks.config import project
from tasks.services.tracking import tracking_uri

POOL = "diffguard"
WORKER = f"{POOL} {os.getpid()}"
"""Its name: Prefect labels runs with it, and another `make serve` may share this one's database."""
PREFECT_SETTINGS = {
    # By default the server forgets at its end who has a place of a deployment, which then stays taken.
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    # So that `prefect deployment run --watch` shows what the run logs.
    "PREFECT_SERVER_LOGS_STREAM_OUT_ENABLED": "true",
    "PREFECT_SERVER_LOGS_STREAM_PUBLISHING_ENABLED": "true",
}
"""Of the server; compose.yaml has them too."""

START_SECONDS = 180.0
"""For a service to answer."""

ENDED = "`make serve` was ended."

RUN_END_SECONDS, END_SECONDS = 4.0, 2.0
"""For runs at work to end and report it, and for each kind of service; then they are killed. Ten seconds in all."""


class Services:
    """Processes that run beside each other, each in a session of its own: a terminal's Ctrl-C comes here alone.

    SIGINT, SIGTERM and SIGHUP are noted and looked at in `pause`, so that they come between two steps, not within
    one: no process is forgotten while it starts, and a second signal does not keep the others from being ended.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = dict(environment)
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.is_ending = False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, self._note)

    def _note(self, *_: Any) -> None:
        self.is_ending = True

    def pause(self) -> None:
        """Wait a little.

        Raises:
            KeyboardInterrupt: a signal has come.
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

    def wait_for(self, name: str, url: str) -> None:
        """Wait until a service answers.

        Raises:
            ServiceError: it ends before, or does not.
        """
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            if self.running[name].poll() is not None:
                raise ServiceError(f"{name} did not start; see above")
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
            end_processes(psutil.Process(self.running[name].pid).children(recursive=True), RUN_END_SECONDS)

    def stop(self, *names: str) -> None:
        """End processes and what they have started; all if none is named."""
        trees: list[psutil.Process] = []
        stopped = [self.running.pop(name) for name in names or tuple(self.running)]
        for process in stopped:
            with suppress(psutil.NoSuchProcess):
                parent = psutil.Process(process.pid)
                trees += [parent, *parent.children(recursive=True)]
        end_processes(trees, END_SECONDS)
        for process in stopped:
            process.wait()


def check_ports(**ports: int) -> None:
    """Check that nothing has taken these ports of 127.0.0.1.

    Args:
        ports: by the option that chooses it.

    Raises:
        SettingError: one is taken, or two are the same; the message names the option.
    """
    if len(set(ports.values())) < len(ports):
        raise SettingError(f"{' and '.join(ports)}: both are {next(iter(ports.values()))}")
    for option, port in ports.items():
        try:
            with socket.create_server(("127.0.0.1", port)):
                pass
        except (OSError, OverflowError) as error:
            reason = "is taken; is `make serve` running already?" if _is_taken(error) else f"is no port ({error})"
            raise SettingError(f"{option}: {port} {reason} Choose another: make serve {option}=PORT") from None


def _is_taken(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno == errno.EADDRINUSE


def serve(prefect_port: int, mlflow_port: int) -> None:
    """Run all of it until SIGINT, SIGTERM or SIGHUP.

    Raises:
        SettingError: a port is taken. ServiceError: something does not start, or ends by itself.
    """
    check_ports(PREFECT_PORT=prefect_port, MLFLOW_PORT=mlflow_port)
    api = f"http://127.0.0.1:{prefect_port}/api"
    addresses = {"PREFECT_API_URL": api, "PREFECT_UI_URL": api.removesuffix("/api")}
    services = Services({**os.environ, **_server_settings(), **PREFECT_SETTINGS, **addresses, "DO_NOT_TRACK": "1"})
    try:
        services.start("Prefect", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(prefect_port))
        store = ("--backend-store-uri", tracking_uri())
        services.start("MLflow", "mlflow", "ui", "--host", "127.0.0.1", "--port", str(mlflow_port), *store)
        services.wait_for("Prefect", f"{api}/health")
        services.call("prefect", "work-pool", "create", POOL, "--type", "process", "--overwrite")
        services.call("prefect", "--no-prompt", "deploy", "--all")
        with temporary_settings({PREFECT_API_URL: api}), server() as client:
            set_automations(client)
        services.start("worker", "prefect", "worker", "start", "--pool", POOL, "--type", "process", "--name", WORKER)
        services.wait_for("MLflow", f"http://127.0.0.1:{mlflow_port}/health")
        print(_instructions(api, prefect_port, mlflow_port), flush=True)
        raise ServiceError(f"{services.watch()} has ended by itself; see above")
    except KeyboardInterrupt:
        print("\nending: runs at work first", flush=True)
    finally:
        try:
            if "worker" in services.running:
                _end_runs(services, api)
        finally:
            services.stop()


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
    """Report as crashed, or as cancelled if that was asked for, what the worker's runs left without an end."""
    at_work = FlowRunFilterStateType(any_=[StateType.PENDING, StateType.RUNNING, StateType.CANCELLING])
    of_these = FlowRunFilter(state=FlowRunFilterState(type=at_work))
    # One page, the newest first: the database may hold other projects' forgotten runs.
    for run in client.read_flow_runs(flow_run_filter=of_these, sort=FlowRunSort.EXPECTED_START_TIME_DESC):
        if _is_ours(client, run):
            end = Cancelled if run.state and run.state.is_cancelling() else Crashed
            client.set_flow_run_state(run.id, end(message=ENDED), force=True)
    left = TaskRunFilterStateType(any_=[StateType.PENDING, StateType.RUNNING])
    tasks = client.read_task_runs(
        task_run_filter=TaskRunFilter(state=TaskRunFilterState(type=left)), sort=TaskRunSort.EXPECTED_START_TIME_DESC
    )
    flows = {task.flow_run_id for task in tasks} - {None}
    closed = {flow for flow in flows if flow is not None and _has_ended(client, flow)}
    for task in tasks:
        if task.flow_run_id in closed:
            client.set_task_run_state(task.id, Crashed(message=ENDED), force=True)


def _has_ended(client: SyncPrefectClient, flow_run: UUID) -> bool:
    """Whether a flow run is one of the worker's, and has ended."""
    try:
        run = client.read_flow_run(flow_run)
    except ObjectNotFound:  # somebody has deleted it
        return False
    return run.state is not None and run.state.is_final() and _is_ours(client, run)


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
