"""What starts and ends around flows: services that are announced answer, and none is left behind."""

import contextlib
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
from processes import ask

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
    ("flows.recalibrate", "data"),
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


@pytest.mark.parametrize("option", ["PREFECT_PORT", "MLFLOW_PORT"])
def test_a_port_that_is_taken_is_one_line_before_anything_starts(option, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        chosen = {"PREFECT_PORT": ports(1)[0], "MLFLOW_PORT": ports(1)[0]} | {option: port}
        arguments = ("--prefect-port", str(chosen["PREFECT_PORT"]), "--mlflow-port", str(chosen["MLFLOW_PORT"]))
        done, _ = command("flows.serve", *arguments, PREFECT_HOME=str(tmp_path / "home"))
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith(f"error: {option}: {port} is taken; is `make serve` running already?")
    assert not list((tmp_path / "home").glob("*.db"))  # no server has been there


# At which a run is caught. At work is in a stage of DVC's, which is a process below the flow's.
MOMENTS = {"pending": signal.SIGTERM, "its process starts": signal.SIGINT, "at work": signal.SIGHUP}


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "sent"), MOMENTS.items(), ids=lambda each: str(each).replace(" ", "-"))
def test_in_a_path_with_a_space_all_answers_and_ctrl_c_leaves_no_run_behind(moment, sent, tmp_path):
    clone = make_clone(tmp_path / "my project")
    clone.change(never_end, "data/benchmarks/digits.yaml")
    prefect, ui = ports(2)
    log = tmp_path / "log"
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.serve", "--prefect-port", str(prefect), "--mlflow-port", str(ui)],
        cwd=clone.root,
        env=clone.environment,
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    api = f"http://127.0.0.1:{prefect}/api"

    def wait_until(met):
        until = time.monotonic() + 240
        while not met():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.1)

    wait_until(lambda: "Ctrl-C stops all of it" in log.read_text())
    for url in (f"http://127.0.0.1:{ui}", f"http://127.0.0.1:{prefect}"):
        assert urllib.request.urlopen(url, timeout=30).status == 200
    evaluate = ("-m", "prefect", "deployment", "run", "diffguard/evaluate")
    options = ("--flow-run-name", "later", "--start-in", "1 hour")
    done = clone.run(sys.executable, *evaluate, *options, PREFECT_API_URL=api)
    assert done.returncode == 0, done.stdout + done.stderr
    # Not by a command, which may take longer to end than the run to start.
    deployment = ask(f"{api}/flow_runs/filter")[0]["deployment_id"]
    ask(f"{api}/deployments/{deployment}/create_flow_run", name="now")
    if moment == "pending":
        wait_until(lambda: states(api)["now"] == "PENDING")
    elif moment == "its process starts":
        wait_until(lambda: begun(process, "prefect.runner._workspace_supervisor"))
    else:
        wait_until(lambda: begun(process, "tasks.train denoiser"))
    assert states(api) == {"later": "SCHEDULED", "now": "RUNNING" if moment == "at work" else "PENDING"}
    children = psutil.Process(process.pid).children(recursive=True)
    sent_at = time.monotonic()
    process.send_signal(sent)
    process.wait(120)
    assert time.monotonic() - sent_at < 20, log.read_text()  # below 10 on a machine that does nothing else
    if moment == "at work":  # Prefect itself prints one of a run that it has not prepared yet
        assert "Traceback" not in log.read_text().split("ending: runs at work first")[-1]
    _, left = psutil.wait_procs(children, timeout=10)
    assert left == []
    assert "ending: runs at work first" in log.read_text()
    # Nobody answers any more; what the server knew is in its store.
    with served_again(clone, prefect):
        assert states(api) == {"later": "SCHEDULED", "now": "CRASHED"}
        assert {task["state"]["type"] for task in ask(f"{api}/task_runs/filter")} <= {"COMPLETED", "CRASHED", "FAILED"}


def never_end(benchmark):
    benchmark["denoiser"]["iterations"] = 10**7


def begun(process, command):
    """What a process has started, and what that has, by a part of its command."""
    found = []
    for each in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [each] if command in " ".join(each.cmdline()) else []
    return found


def states(api):
    """The state of each flow run."""
    return {run["name"]: run["state"]["type"] for run in ask(f"{api}/flow_runs/filter")}


@contextlib.contextmanager
def served_again(clone, port):
    """A server that is started once more, without a worker."""
    server = subprocess.Popen(
        [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)],
        cwd=clone.root,
        env=clone.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api/health", timeout=5)
                break
            assert time.monotonic() < until, "no server"
            time.sleep(0.5)
        yield
    finally:
        server.terminate()
        server.wait(60)
