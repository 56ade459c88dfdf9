"""MLflow's and Prefect's servers on a real Postgres, by the settings of compose.yaml, with an evaluation on both."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from clone import Clone, make_clone
from processes import free_port

from tasks.config.project import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

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


class Postgres:
    """A server with the databases of compose.yaml on loopback, in a folder that another user may enter."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, str(free_port())
        self.user = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"] if os.geteuid() == 0 else []
        self.at = ("-h", "127.0.0.1", "-p", self.port, "-U", "diffguard")
        if self.user:
            shutil.chown(folder, "nobody")
        self.run("initdb", "-D", str(folder / "data"), "-U", "diffguard", "-A", "trust", who=self.user)
        self.control("start")
        for database in ("mlflow", "prefect"):
            self.run("createdb", *self.at, database)

    def run(self, name, *options, who=()):
        command = [*who, str(PROGRAMS / name), *options]
        # To files: a server that is started keeps what it was given open.
        with (self.folder.parent / f"{name}.out").open("w+") as out:
            subprocess.run(command, cwd=self.folder, check=True, stdout=out, stderr=out, timeout=120)
            out.seek(0)
            return out.read()

    def control(self, what):
        options = f"-k '' -c listen_addresses=127.0.0.1 -p {self.port}"
        given = ("-D", str(self.folder / "data"), "-l", str(self.folder / "log"), "-o", options, "-m", "fast", "-w")
        self.run("pg_ctl", what, *given, who=self.user)

    def ask(self, database, query):
        return self.run("psql", *self.at, "-At", "-c", query, database).split()


@dataclass
class Servers:
    """What an evaluation logs to."""

    postgres: Postgres
    folder: Path
    urls: dict[str, str]

    @property
    def used(self) -> dict[str, str]:
        return {"PREFECT_API_URL": self.urls["prefect"], "MLFLOW_TRACKING_URI": self.urls["mlflow"]}

    def states(self, since: str) -> set[str]:
        """Of flow runs."""
        return set(self.postgres.ask("prefect", f"select state_type from flow_run where created > '{since}'"))

    def parents(self, since: int) -> list[str]:
        """How evaluations ended, by MLflow."""
        of_children = "select run_uuid from tags where key = 'mlflow.parentRunId'"
        query = f"select status from runs where start_time > {since} and run_uuid not in ({of_children})"
        experiment = "(select experiment_id from experiments where name = 'diffguard')"
        return self.postgres.ask("mlflow", f"{query} and experiment_id = {experiment} order by start_time")


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    pytest.importorskip("psycopg2", reason="MLflow's driver is not installed: pip install psycopg2-binary")
    if PROGRAMS is None:
        pytest.skip("Postgres is not installed: apt-get install postgresql")
    tmp_path = tmp_path_factory.mktemp("servers")
    with ExitStack() as stack:
        # Another user runs Postgres, who cannot enter pytest's folders.
        root = Path("/var/tmp") / f"diffguard-postgres-{os.getpid()}"
        (root / "postgres").mkdir(parents=True)
        stack.callback(shutil.rmtree, root)
        postgres = Postgres(root / "postgres")
        stack.callback(postgres.control, "stop")

        def database(setting):
            return re.sub(r":\$\{\w+\}@postgres", f"@127.0.0.1:{postgres.port}", setting)

        ports = {name: str(free_port()) for name in ("mlflow", "prefect")}
        store = database(SERVICES["mlflow"]["environment"]["MLFLOW_BACKEND_STORE_URI"])
        mlflow = ["mlflow", "server", "--host", "127.0.0.1", "--port", ports["mlflow"], "--workers", "1"]
        (tmp_path / "artifacts").mkdir()
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
        yield Servers(postgres, tmp_path, urls)


def server_settings():
    lines = (ROOT / SERVICES["mlflow"]["env_file"]).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if "=" in line and not line.startswith(("#", "MLFLOW_WORKERS"))]


OPTIONS = ("--limit", "20", "--variants", "cfg-w1", "msp")


@pytest.fixture(scope="module")
def clone(tmp_path_factory, servers):
    """One whose images, models and scores are there, by an evaluation on both servers."""
    made = make_clone(tmp_path_factory.mktemp("clone"))
    done = made.flow(*OPTIONS, **servers.used)
    assert done.returncode == 0, done.stdout + done.stderr
    return made


def test_an_evaluation_is_kept_by_both_servers(clone, servers):
    ask = servers.postgres.ask
    assert set(ask("mlflow", "select status from runs")) == {"FINISHED"}
    assert int(ask("mlflow", "select count(*) from metrics")[0]) > 100
    assert set(ask("prefect", "select state_type from flow_run")) == {"COMPLETED"}
    assert not (clone.root / "mlflow.db").exists()


def test_two_evaluations_at_once_keep_apart(clone, servers, tmp_path):
    shutil.copytree(clone.root, tmp_path / "other", symlinks=True)
    other = Clone(tmp_path / "other")
    began, at = now_in(servers), int(1000 * time.time())
    with ThreadPoolExecutor(2) as pool:
        limits = {clone: "18", other: "16"}
        runs = [
            pool.submit(each.flow, "--limit", limit, *OPTIONS[2:], **servers.used) for each, limit in limits.items()
        ]
        for run in runs:
            assert run.result().returncode == 0, run.result().stdout + run.result().stderr
    assert servers.states(began) == {"COMPLETED"}
    assert servers.parents(at) == ["FINISHED"] * 2
    sizes = servers.postgres.ask("mlflow", "select distinct value from params where key = 'limit'")
    assert {"16", "18", "20"} <= set(sizes)


def now_in(servers) -> str:
    """The time by Postgres, as text that it reads."""
    [now] = servers.postgres.ask("prefect", "select replace(now()::text, ' ', 'T')")
    return now


@pytest.mark.parametrize("moment", ["while it scores", "while it logs"])
def test_a_database_that_restarts_loses_nothing(clone, servers, moment):
    began, at = now_in(servers), int(1000 * time.time())
    limit = {"while it scores": "14", "while it logs": "12"}[moment]
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(clone.flow, "--limit", limit, *OPTIONS[2:], **servers.used)

        def has_begun():
            if moment == "while it logs":
                return bool(servers.parents(at))
            tasks = f"select count(*) from task_run where name like 'score%' and created > '{began}'"
            return servers.postgres.ask("prefect", tasks) != ["0"]

        until = time.monotonic() + 300
        while not has_begun():
            assert not run.done(), run.result().stdout + run.result().stderr
            assert time.monotonic() < until
            time.sleep(0.1)
        servers.postgres.control("restart")
        done = run.result()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "COMPLETED" in servers.states(began)
    assert servers.parents(at)[-1] == "FINISHED"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a file system")
@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_a_store_of_artifacts_that_takes_nothing_is_one_line_and_nothing_is_lost(clone, servers, fault):
    place, at = servers.folder / "artifacts", int(1000 * time.time())
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr}")
    try:
        if fault == "full":
            with pytest.raises(OSError, match="No space left"):
                (place / "all").write_bytes(bytes(2**20))
        else:
            subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        limit = {"full": "10", "read-only": "8"}[fault]
        done = clone.flow("--limit", limit, *OPTIONS[2:], **servers.used)
    finally:
        subprocess.run(["umount", place], check=True)
    assert done.returncode == 1
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: MLflow at {servers.urls['mlflow']} does not take the run digits ("), line
    assert "what was computed is kept" in line
    assert "Traceback" not in done.stdout + done.stderr
    assert set(servers.parents(at)) == {"FAILED"}
    written = {path: path.stat().st_mtime_ns for path in clone.root.glob("data/digits/**/shard-*.parquet")}
    done = clone.flow("--limit", limit, *OPTIONS[2:], **servers.used)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert servers.parents(at)[-1] == "FINISHED"
