"""What starts and ends around flows: services that are announced answer, and none is left behind."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest
from clone import make_clone

ROOT = Path(__file__).parents[2]


def command(*arguments, **environment):
    started = time.monotonic()
    variables = {**os.environ, "DO_NOT_TRACK": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=120
    )
    return done, time.monotonic() - started


FLOWS = [
    ("flows.evaluate", "--limit", "5"),
    ("flows.monitor", "data"),
    ("flows.calibrate", "data"),
]


@pytest.mark.parametrize("flow", FLOWS, ids=lambda flow: flow[0])
def test_a_server_that_is_stopped_is_one_line_at_once(flow):
    done, seconds = command(*flow, PREFECT_API_URL="http://127.0.0.1:9/api")
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith("error: PREFECT_API_URL: no Prefect server answers at http://127.0.0.1:9/api (")
    assert seconds < 60


def test_a_home_that_cannot_be_written_is_one_line_at_once(tmp_path):
    (tmp_path / "home").write_text("a file")
    home = {key: "" for key in ("PREFECT_API_URL",)} | {"HOME": str(tmp_path / "home")}
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")} | home
    environment.pop("PREFECT_API_URL")
    done = subprocess.run(
        [sys.executable, "-m", *FLOWS[0]], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path / 'home' / '.prefect'}: Prefect cannot write there (")
    assert "set PREFECT_HOME" in line


def ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]


def test_a_port_that_is_taken_is_one_line_and_leaves_nothing(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.serve", "--prefect-port", str(port), "--mlflow-port", str(ports(1)[0])],
            cwd=ROOT,
            env={**os.environ, "PREFECT_HOME": str(tmp_path), "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/m.db"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        _, told = process.communicate(timeout=200)
    assert process.returncode == 1
    assert f"error: Prefect did not start; is port {port} (PREFECT_PORT) taken?" in told
    assert not [each for each in psutil.process_iter(["cmdline"]) if str(port) in (each.info["cmdline"] or [])]


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_in_a_path_with_a_space_all_answers_and_ctrl_c_leaves_no_run_behind(sent, tmp_path):
    clone = make_clone(tmp_path / "my project")
    prefect, ui = ports(2)
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.serve", "--prefect-port", str(prefect), "--mlflow-port", str(ui)],
        cwd=clone.root,
        env=clone.environment,
        stdout=(tmp_path / "log").open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    log, until = tmp_path / "log", time.monotonic() + 240
    while "Ctrl-C stops all of it" not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.5)
    api = f"http://127.0.0.1:{prefect}/api"
    for url in (f"http://127.0.0.1:{ui}", f"http://127.0.0.1:{prefect}"):
        assert urllib.request.urlopen(url, timeout=30).status == 200
    done = clone.run(sys.executable, "-m", "prefect", "deployment", "run", "diffguard/evaluate", PREFECT_API_URL=api)
    assert done.returncode == 0, done.stdout + done.stderr
    while not engines(process):
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.2)
    while not (clone.root / "data/digits/manifest.parquet").is_file():  # it is at work
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.2)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(sent)
    process.wait(120)
    _, left = psutil.wait_procs(children, timeout=10)
    assert left == []
    assert "ending: runs at work first" in log.read_text()
    # Nobody answers any more; what the server knew is in its store.
    states = states_of(clone, api)
    assert states
    assert not set(states) & {"RUNNING", "PENDING", "SCHEDULED"}, states


def engines(process):
    return [
        each
        for each in psutil.Process(process.pid).children(recursive=True)
        if any("engine" in part for part in each.cmdline())
    ]


def states_of(clone, api):
    """The states of all flow runs, by a server that is started once more."""
    port = int(api.split(":")[2].split("/")[0])
    server = subprocess.Popen(
        [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)],
        cwd=clone.root,
        env=clone.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(240):
            with contextlib.suppress(OSError):
                request = urllib.request.Request(
                    f"{api}/flow_runs/filter", b"{}", {"Content-Type": "application/json"}, method="POST"
                )
                return [run["state"]["type"] for run in json.load(urllib.request.urlopen(request, timeout=5))]
            time.sleep(0.5)
        raise AssertionError("no server")
    finally:
        server.terminate()
        server.wait(60)
