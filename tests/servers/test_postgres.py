"""MLflow's and Prefect's servers on a real Postgres, by the settings of compose.yaml, with an evaluation on both."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import yaml
from clone import make_clone
from processes import free_port

from tasks.config.project import ROOT

SERVICES = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))["services"]
PROGRAMS = next(
    (Path(found).resolve().parent for found in [shutil.which("postgres")] if found),
    next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"))), None),
)


@contextmanager
def running(command, environment, log, url=None):
    """A process in a session of its own, once it answers."""
    with log.open("w") as file:
        process = subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        until = time.monotonic() + 600
        while url is not None and not answers(url):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.5)
        yield
    finally:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def answers(url):
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status == 200
    except OSError:
        return False


@contextmanager
def postgres(folder):
    """A server with the databases of compose.yaml on loopback; yields its port and what asks it."""
    user = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"] if os.geteuid() == 0 else []
    folder.mkdir()
    if user:
        shutil.chown(folder, "nobody")

    def run(name, *options, who=()):
        command = [*who, str(PROGRAMS / name), *options]
        return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=120).stdout

    run("initdb", "-D", str(folder / "data"), "-U", "diffguard", "-A", "trust", who=user)
    port = str(free_port())
    at = ("-h", "127.0.0.1", "-p", port, "-U", "diffguard")
    options = ["-D", str(folder / "data"), "-k", "", "-c", "listen_addresses=127.0.0.1", "-p", port]
    with running([*user, str(PROGRAMS / "postgres"), *options], {}, folder.parent / "postgres.log"):
        until = time.monotonic() + 60
        while subprocess.run([PROGRAMS / "pg_isready", *at], capture_output=True).returncode:
            assert time.monotonic() < until, (folder.parent / "postgres.log").read_text()
            time.sleep(0.2)
        for database in ("mlflow", "prefect"):
            run("createdb", *at, database)
        yield port, lambda database, query: run("psql", *at, "-At", "-c", query, database).split()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(PROGRAMS is None, reason="Postgres is not installed: apt-get install postgresql")
def test_an_evaluation_is_kept_by_both_servers(tmp_path):
    pytest.importorskip("psycopg2", reason="MLflow's driver is not installed: pip install psycopg2-binary")
    with ExitStack() as stack:
        # Another user runs Postgres, who cannot enter pytest's folders.
        root = Path("/var/tmp") / f"diffguard-postgres-{os.getpid()}"
        root.mkdir()
        stack.callback(shutil.rmtree, root)
        port, ask = stack.enter_context(postgres(root / "postgres"))

        def database(setting):
            return re.sub(r":\$\{\w+\}@postgres", f"@127.0.0.1:{port}", setting)

        ports = {name: str(free_port()) for name in ("mlflow", "prefect")}
        store = database(SERVICES["mlflow"]["environment"]["MLFLOW_BACKEND_STORE_URI"])
        mlflow = ["mlflow", "server", "--host", "127.0.0.1", "--port", ports["mlflow"], "--workers", "1"]
        places = {"MLFLOW_BACKEND_STORE_URI": store, "MLFLOW_ARTIFACTS_DESTINATION": str(tmp_path / "artifacts")}
        quiet = dict(line.split("=", 1) for line in server_settings())
        kept = SERVICES["prefect"]["environment"]["PREFECT_SERVER_DATABASE_CONNECTION_URL"]
        prefect = ["prefect", "server", "start", "--host", "127.0.0.1", "--port", ports["prefect"]]
        own = {"PREFECT_SERVER_DATABASE_CONNECTION_URL": database(kept), "PREFECT_HOME": str(tmp_path / "home")}
        urls = {"mlflow": f"http://127.0.0.1:{ports['mlflow']}", "prefect": f"http://127.0.0.1:{ports['prefect']}/api"}
        for command, settings, health in (
            (mlflow, {**places, **quiet}, urls["mlflow"] + "/health"),
            (prefect, own, urls["prefect"] + "/health"),
        ):
            log = tmp_path / f"{command[0]}.log"
            stack.enter_context(running([sys.executable, "-m", *command], settings, log, health))
        clone = make_clone(tmp_path / "clone")
        used = {"PREFECT_API_URL": urls["prefect"], "MLFLOW_TRACKING_URI": urls["mlflow"]}
        done = clone.flow("--limit", "20", "--variants", "cfg-w1", "msp", **used)
        assert done.returncode == 0, done.stdout + done.stderr
        assert set(ask("mlflow", "select status from runs")) == {"FINISHED"}
        assert int(ask("mlflow", "select count(*) from metrics")[0]) > 100
        assert set(ask("prefect", "select state_type from flow_run")) == {"COMPLETED"}
        assert not (clone.root / "mlflow.db").exists()


def server_settings():
    lines = (ROOT / SERVICES["mlflow"]["env_file"]).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if "=" in line and not line.startswith(("#", "MLFLOW_WORKERS"))]
