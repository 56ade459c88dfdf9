"""Real servers as processes of their own, and a plain HTTP client."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bad_requests import JSON

ROOT = Path(__file__).parents[2]


@dataclass
class Server:
    """A server that answers; `log` is what it has printed."""

    process: subprocess.Popen
    port: int
    log_file: Path

    def ask(self, method: str, path: str, value: object = None, timeout: float = 120) -> tuple[int, object]:
        """The status and the JSON of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            body = None if value is None else json.dumps(value).encode()
            connection.request(method, path, body, JSON if body else {})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read().strip() or b"null")
        finally:
            connection.close()

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    @property
    def resident_mib(self) -> float:
        """Memory of the process."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@contextmanager
def started(command: list[str], port: int, log_file: Path, seconds: float = 300) -> Iterator[Server]:
    """A server, once its /health says 200; it is killed at the end if it still runs."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with log_file.open("w") as log:
        # A session of its own, so that what it starts itself can be stopped too.
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    server = Server(process, port, log_file)
    try:
        until = time.monotonic() + seconds
        while not _is_well(server):
            assert process.poll() is None, server.log
            assert time.monotonic() < until, server.log
            time.sleep(0.2)
        yield server
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _is_well(server: Server) -> bool:
    try:
        return server.ask("GET", "/health", timeout=60)[0] == 200
    except OSError:
        return False


def ask(url, **body):
    """What a server answers to JSON, as Prefect's API does."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    for _ in range(10):
        try:
            return json.load(urllib.request.urlopen(request, timeout=30))
        except urllib.error.HTTPError as error:
            if error.code != 503:  # its database is busy for a moment; Prefect's own client tries again, too
                raise
            time.sleep(0.5)
    raise AssertionError(f"{url}: always busy")
