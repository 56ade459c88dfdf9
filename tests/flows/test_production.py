"""Prefect as a team runs it: a server, and a worker in another folder that clones a git repository.

One server and one worker for all; each test is a drill of what goes wrong.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from clone import Clone, make_clone
from processes import ask, free_port
from small_project import write_benchmark

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

PREFECT = (sys.executable, "-m", "prefect")


@dataclass
class Place:
    """The server, the worker, and where the worker has its clone."""

    repository: Clone
    api: str
    folder: Path
    stack: contextlib.ExitStack
    environment: dict[str, str]
    worker: subprocess.Popen | None = None

    @property
    def home(self) -> Path:
        return self.folder / "runs" / "diffguard" / "data" / "digits"

    @property
    def log(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob("*.log")))

    def start(self, name: str, *command: str) -> subprocess.Popen:
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        with (self.folder / f"{name}.log").open("a") as log:
            process = subprocess.Popen(
                command, cwd=folder, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        self.stack.callback(end_group, process)
        return process

    def start_worker(self) -> None:
        self.worker = self.start("worker", *PREFECT, "worker", "start", "--pool", "diffguard", "--type", "process")

    def run(self, name: str, **parameters: object) -> str:
        """Start a run of the deployment evaluate; returns its id."""
        deployment = ask(f"{self.api}/deployments/filter", deployments={"name": {"any_": ["evaluate"]}})[0]["id"]
        run = ask(f"{self.api}/deployments/{deployment}/create_flow_run", name=name, parameters=parameters)
        return run["id"]

    def state(self, run: str) -> dict:
        [found] = ask(f"{self.api}/flow_runs/filter", flow_runs={"id": {"any_": [run]}})
        return {**found["state"], "run_count": found["run_count"]}

    def wait(self, met, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not met():
            assert time.monotonic() < until, self.log[-8000:]
            time.sleep(0.2)

    def shards(self) -> dict[str, int]:
        """When each was written: those of variants, which are last."""
        made_by = [
            path for path in self.home.glob("scores/*/made_by.json") if "variant" in json.loads(path.read_text())
        ]
        return {str(path): path.stat().st_mtime_ns for note in made_by for path in note.parent.glob("*.parquet")}

    def partial(self) -> list[Path]:
        return [path for path in self.home.glob("scores/*/.*")]

    def engines(self) -> list[psutil.Process]:
        """Processes in the clone."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                found += [process] if Path(process.cwd()) == self.home.parents[1] else []
        return found


def end_group(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def slow_scores(params) -> None:
    """Shards of two images, which take about a second: long enough to be caught at."""
    params["score"] |= {"shard_size": 2, "slots": 1}
    params["score"]["variants"] = {"cfg-w1": params["score"]["variants"]["cfg-w1"]}
    params["combine"] = {"fused": {"kind": "z-sum", "of": ["cfg-w1", "msp"]}}
    params["classifiers"] = ["ordinary"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("production")
    repository = make_clone(folder / "repository")
    write_benchmark(repository.root)
    repository.change(slow_scores)
    repository.run("git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qam", "small")
    api = f"http://127.0.0.1:{free_port()}/api"
    environment = {
        **repository.environment,
        "PREFECT_HOME": str(folder / "home"),
        "PREFECT_API_URL": api,
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}",
        "OMP_NUM_THREADS": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    }
    environment.pop("PYTHONPATH", None)
    with contextlib.ExitStack() as stack:
        place = Place(repository, api, folder, stack, environment)
        port = api.split(":")[-1].removesuffix("/api")
        place.start("server", *PREFECT, "server", "start", "--host", "127.0.0.1", "--port", port)

        def answers():
            with contextlib.suppress(OSError):
                return bool(ask(f"{api}/flow_runs/count") == 0)

        place.wait(answers, 240)
        place.start_worker()
        for command in (
            ("flows.deploy", "--repository", f"file://{repository.root}", "--working-dir", str(folder / "runs")),
            ("flows.resume",),
        ):
            place.wait(lambda: ask(f"{api}/work_pools/filter"), 120)  # the worker has made its pool
            done = repository.run(sys.executable, "-m", *command, **environment)
            assert done.returncode == 0, done.stdout + done.stderr
        (folder / "runs").mkdir(exist_ok=True)
        yield place


def test_a_worker_elsewhere_clones_the_revision_and_evaluates(place):
    [monitor] = ask(f"{place.api}/deployments/filter", deployments={"name": {"any_": ["monitor"]}})
    [schedule] = monitor["schedules"]
    assert (schedule["active"], schedule["schedule"]["cron"]) == (False, "0 6 * * *")
    run = place.run("whole", limit=1)
    place.wait(lambda: place.state(run)["type"] not in ("SCHEDULED", "PENDING", "RUNNING"), 400)
    assert place.state(run)["type"] == "COMPLETED", place.state(run)["message"] + place.log[-8000:]
    [metrics] = place.home.glob("other/runs/*/metrics.json")
    assert list(json.loads(metrics.read_text())) == ["ordinary"]
    assert not (place.repository.root / "data/digits/models/seed-0/denoiser").exists()


def test_a_cancelled_run_ends_at_once_and_the_next_one_has_waited_for_it(place):
    run = place.run("to be cancelled")
    place.wait(place.shards, 400)
    second = place.run("second")
    place.wait(lambda: place.state(second)["name"] == "AwaitingConcurrencySlot", 60)
    ask(f"{place.api}/flow_runs/{run}/set_state", state={"type": "CANCELLING"})
    started = time.monotonic()
    place.wait(lambda: "'to be cancelled' - Flow run was cancelled." in place.log, 20)
    assert time.monotonic() - started < 20, place.log[-8000:]  # 2.6 on two cores with a load of 20
    # The worker reports it once the process is gone, which first tidies up all that it has imported.
    place.wait(lambda: place.state(run)["type"] == "CANCELLED", 120)
    ask(f"{place.api}/flow_runs/{second}/set_state", state={"type": "CANCELLED"}, force=True)
    place.wait(lambda: not place.engines(), 10)
    assert place.partial() == []
    total = len(place.shards())
    assert total > 0
    assert "Traceback" not in (place.folder / "worker.log").read_text()


def test_a_run_whose_machine_died_goes_on_with_what_it_had(place):
    shutil.rmtree(place.home / "scores", ignore_errors=True)
    run = place.run("to die")
    place.wait(place.shards, 400)
    assert place.worker is not None
    place.worker.kill()  # with all that it has started, as when a machine or a container dies
    for process in place.engines():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    before = place.shards()
    place.worker.wait()
    assert place.state(run)["type"] == "RUNNING"
    place.start_worker()
    place.wait(lambda: place.state(run)["run_count"] == 2 and len(place.shards()) > len(before), 400)
    after = place.shards()
    assert {path: after[path] for path in before} == before
    ask(f"{place.api}/flow_runs/{run}/set_state", state={"type": "CANCELLING"})
    place.wait(lambda: place.state(run)["type"] == "CANCELLED", 120)
