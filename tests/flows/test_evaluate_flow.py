"""The product as its user runs it: the flow, then DVC, in a clone with settings small enough for a test."""

import contextlib
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
from clone import Clone, make_clone
from mlflow import MlflowClient

from diffguard.deploy.bundle import check_bundle
from diffguard.utils.hashing import hash_file
from flows.evaluate import does_register
from tasks.config.run import open_run


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    return make_clone(tmp_path_factory.mktemp("clone"))


@pytest.fixture(scope="module")
def evaluated(clone):
    done = clone.flow(OMP_NUM_THREADS="2")  # with two cores, on a processor trainings go side by side
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_the_flow_prints_the_table_and_logs_every_row(clone, evaluated):
    metrics = json.loads((clone.root / "data/digits/metrics.json").read_text())
    assert list(metrics) == ["ordinary", "strong"]
    for name, rows in metrics.items():
        assert list(rows) == ["cfg-w1", "unconditional", "msp", "fused"]
        assert f"| {name} | fused − msp |" in evaluated.stdout
        for row in rows:
            assert f"| {name} | {row} |" in evaluated.stdout
    client = MlflowClient(f"sqlite:///{clone.root / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("diffguard")
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 1 + 2 * 4
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert all(run.data.tags["dvc.manifest.parquet"] for run in runs)
    assert (clone.root / "data/digits/other/docs/manifest/index.html").is_file()


def test_the_flow_deploys_a_champion(clone, evaluated):
    folder = clone.root / "data/digits/detector"
    assert check_bundle(folder).detector == "cfg-w1"
    client = MlflowClient(f"sqlite:///{clone.root / 'mlflow.db'}")
    version = client.get_model_version_by_alias("diffguard-digits", "champion")
    assert version.tags["champion_decision"].startswith("version 1 is champion: there was no champion; on 63 InD and")
    assert "diffguard-digits: version 1 is champion" in evaluated.stdout + evaluated.stderr
    assert ".venv/bin/diffguard score --detector data/digits/detector IMAGES\n" in evaluated.stdout
    assert "a version of diffguard-digits; the champion is models:/diffguard-digits@champion." in evaluated.stdout
    code = (
        "from diffguard.loading import open_detector\n"
        "detector = open_detector('models:/diffguard-digits@champion', 'cpu')\n"
        "print(detector.bundle_hash, detector.decide(detector.prepare(detector.example)[None])[0].p_value)"
    )
    done = clone.run(sys.executable, "-c", code, MLFLOW_TRACKING_URI=f"sqlite:///{clone.root / 'mlflow.db'}")
    assert done.returncode == 0, done.stderr
    bundle_hash, p_value = done.stdout.split()[-2:]
    assert bundle_hash == hash_file(folder / "detector.json")
    assert float(p_value) > 0.05  # of a usual calibration image


def test_the_detector_of_a_whole_run_of_any_benchmark_is_registered():
    whole = open_run(benchmark="folder", root="/mine")
    assert (whole.whole, whole.own) == (True, False)
    assert does_register(whole, None)
    assert not does_register(whole, False)
    for choices in ({"limit": 5}, {"variants": ["msp"]}, {"seeds": [1]}):
        part = open_run(benchmark="folder", root="/mine", **choices)
        assert not part.whole
        assert not does_register(part, None)
        assert does_register(part, True)


RESULTS = ("metrics.json", "validation.json", "calibration.json", "rows.json", "verdicts.png", "summary.json")


def test_git_sees_a_summary_and_dvcs_lock_and_the_rest_is_in_dvcs_cache(clone, evaluated, tmp_path):
    """A second clone pulls it; in this one nothing was committed, so that all changes show."""
    changed = clone.run("git", "status", "--porcelain", "--untracked-files=all").stdout.splitlines()
    # The clone leaves out the folder of models, which has a .gitignore in git.
    files = {"dvc.lock", "data/digits/summary.json", "data/digits/models/seed-0/.gitignore"}
    assert {line[3:] for line in changed} == files
    assert (clone.root / "data/digits/summary.json").stat().st_size < 1000

    store, other = tmp_path / "store", Clone(tmp_path / "other")
    shutil.copytree(clone.root / ".git", other.root / ".git")
    shutil.copytree(clone.root / ".dvc", other.root / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp"))
    other.run("git", "reset", "-q", "--hard")
    for name in files:
        (other.root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(clone.root / name, other.root / name)
    for each in (clone, other):
        each.dvc("remote", "add", "--local", "--default", "store", str(store))
    clone.dvc("push")
    other.dvc("pull")
    for name in RESULTS:
        there, here = (each.root / "data/digits" / name for each in (other, clone))
        assert there.read_bytes() == here.read_bytes(), name
    assert "up to date" in other.dvc("status", "dvc.yaml")
    assert "up to date" in other.dvc("repro")
    clone.dvc("remote", "remove", "--local", "store")


def test_after_the_flow_dvc_has_nothing_to_do(clone, evaluated):
    assert "up to date" in clone.dvc("repro")
    assert "ordinary.near auroc" in clone.dvc("metrics", "show")


@pytest.mark.slow
def test_again_on_ray_it_scores_only_what_is_missing_though_a_worker_is_killed(clone, evaluated, tmp_path):
    """The same scores out of two Ray workers, one of them killed at work, and out of one process."""
    scores, before = clone.root / "data/digits/scores", clone.shards()
    made_by = {path.parent: json.loads(path.read_text()) for path in scores.glob("*/made_by.json")}
    taken = next(path for path, each in made_by.items() if "variant" in each)
    shutil.move(taken, tmp_path / taken.name)
    names = {path.name for path in (tmp_path / taken.name).glob("*.parquet")}
    finished: dict[Path, int] = {}
    command = (sys.executable, "-m", "flows.evaluate", "--runner", "ray", "--workers", "2")
    with (tmp_path / "log").open("w") as log:
        # A cluster that is named and gone is none of this run's.
        environment = {**clone.environment, "RAY_ADDRESS": "127.0.0.1:9"}
        flow = subprocess.Popen(command, cwd=clone.root, env=environment, stdout=log, stderr=log)
    while not finished and flow.poll() is None:
        time.sleep(0.02)
        if not any(taken.glob("shard-*.parquet")):
            continue
        for process in psutil.Process(flow.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if process.name().startswith("ray::score"):  # one that is at work; idle ones are ray::IDLE
                    process.kill()
                    process.wait()
                    finished = {path: path.stat().st_mtime_ns for path in taken.glob("shard-*.parquet")}
                    break
    assert flow.wait(300) == 0, (tmp_path / "log").read_text()
    # What the workers do is told, and that one of them was lost.
    told = (tmp_path / "log").read_text()
    assert "A worker died or was killed while executing a task" in told
    assert re.search(r"Task run 'score shards \d+ to \d+' - shards \d+ to \d+: \d+ of \d+ images", told)
    assert 0 < len(finished) < len(names)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    after = clone.shards()
    assert set(after) == set(before)
    assert {path.split("/")[0] for path in after if after[path] != before[path]} == {taken.name}
    for path in sorted((tmp_path / taken.name).glob("*.parquet")):
        expected, found = pd.read_parquet(path), pd.read_parquet(taken / path.name)
        assert found["id"].tolist() == expected["id"].tolist()
        assert np.allclose(found["score"], expected["score"], atol=1e-4)
    assert "up to date" in clone.dvc("status", "dvc.yaml")


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_ends_scoring_at_once_and_the_next_run_goes_on(clone, evaluated, number, tmp_path):
    made_by = {
        path.parent: json.loads(path.read_text()) for path in clone.root.glob("data/digits/scores/*/made_by.json")
    }
    taken = next(path for path, each in made_by.items() if "variant" in each)
    total = len(list(taken.glob("*.parquet")))
    shutil.rmtree(taken)
    with (tmp_path / "log").open("w") as log:
        environment = {**clone.environment, "OMP_NUM_THREADS": "2"}
        command = (sys.executable, "-m", "flows.evaluate")
        options = {"cwd": clone.root, "env": environment, "stdout": log, "stderr": log}
        # A shell's background job ignores SIGINT, and so does all that it starts.
        flow = subprocess.Popen(command, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **options)
    while not any(taken.glob("shard-*.parquet")):
        assert flow.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.02)
    below = psutil.Process(flow.pid).children(recursive=True)
    started = time.monotonic()
    flow.send_signal(number)
    assert flow.wait(120) == 128 + number
    seconds = time.monotonic() - started
    told = (tmp_path / "log").read_text()
    assert f"ended by {number.name}; run it again to go on where it was" in told.splitlines()
    assert "Traceback" not in told
    assert seconds < 40, told  # about 3, on a busy machine more; a scoring that is waited for takes minutes
    assert psutil.wait_procs(below, timeout=5)[1] == []
    finished = {path: path.stat().st_mtime_ns for path in taken.glob("*.parquet")}
    assert 0 < len(finished) < total
    assert not [path for path in taken.iterdir() if path.name.startswith(".")]
    again = clone.flow()
    assert again.returncode == 0, again.stdout + again.stderr
    assert len(list(taken.glob("*.parquet"))) == total
    assert {path: path.stat().st_mtime_ns for path in finished} == finished


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@pytest.fixture(scope="module")
def cluster(clone, tmp_path_factory):
    """A Prefect server, a Ray head without processors and a worker node, started apart: as on other machines."""
    api, head = free_ports(2)
    bin, here = Path(sys.executable).parent, "--node-ip-address=127.0.0.1"
    apart = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    commands = [
        [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(api)],
        [
            bin / "ray",
            "start",
            "--head",
            here,
            f"--port={head}",
            "--include-dashboard=false",
            "--num-cpus=0",
            "--block",
        ],
        [bin / "ray", "start", here, f"--address=127.0.0.1:{head}", "--num-cpus=2", "--block"],
    ]
    folder = tmp_path_factory.mktemp("cluster")
    with contextlib.ExitStack() as stack:
        log = stack.enter_context((folder / "cluster.log").open("w"))
        for command in commands:
            options = {"cwd": folder, "env": {**clone.environment, **apart}, "stdout": log, "stderr": log}
            stack.callback(end, subprocess.Popen(list(map(str, command)), **options))
            if command is commands[1]:
                wait_for_port(head)  # the worker node asks the head only for a while
        wait_for(f"http://127.0.0.1:{api}/api/health")
        wait_for_text(folder / "cluster.log", "Ray runtime started", 2)  # of head and worker
        environment = {"PREFECT_API_URL": f"http://127.0.0.1:{api}/api", **apart}
        yield f"127.0.0.1:{head}", environment, folder / "cluster.log"


def wait_for_port(port: int) -> None:
    for _ in range(600):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.1)
    raise AssertionError(f"nobody listens on port {port}")


def wait_for_text(log: Path, text: str, times: int) -> None:
    for _ in range(600):
        if log.read_text(errors="replace").count(text) >= times:
            return
        time.sleep(0.1)
    raise AssertionError(log.read_text(errors="replace")[-3000:])


def end(process: subprocess.Popen) -> None:
    """Stop a process and all that it started."""
    with contextlib.suppress(psutil.Error):
        for each in (*psutil.Process(process.pid).children(recursive=True), process):
            with contextlib.suppress(psutil.Error):
                each.kill()
    process.wait()


def wait_for(url: str) -> None:
    for _ in range(600):
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2) as answer:
            if answer.status == 200:
                return
        time.sleep(0.2)
    raise AssertionError(f"{url} does not answer")


def test_a_cluster_gets_the_code_by_ray_and_the_data_by_a_url(clone, evaluated, cluster, tmp_path):
    """Its worker has neither: the uploaded code has the clone's own settings, the share its images and models."""
    address, environment, log = cluster
    options = ("--runner", "ray", "--address", address, "--workers", "2", "--share", f"file://{tmp_path / 'share'}")
    done = clone.flow(*options, "--limit", "7", "--variants", "unconditional", "msp", **environment)
    assert done.returncode == 0, done.stdout + done.stderr + log.read_text()
    written = sorted((tmp_path / "share").rglob("shard-*.parquet"))
    assert len({path.parent for path in written}) == 4  # of two detectors and two classifiers
    every = pd.concat(pd.read_parquet(path) for path in (clone.root / "data/digits/scores").rglob("shard-*.parquet"))
    expected = every[every["variant"] == "unconditional"].groupby("id")["score"].first()
    found = pd.concat(pd.read_parquet(path) for path in written).query("variant == 'unconditional'")
    assert np.allclose(found["score"], expected[found["id"]], atol=1e-4)


@pytest.mark.slow
def test_a_cluster_that_mounts_the_project_needs_no_url(clone, evaluated, cluster, tmp_path):
    address, environment, log = cluster
    options = ("--runner", "ray", "--address", address, "--workers", "2")
    before = clone.shards()
    [taken, *_] = sorted((clone.root / "data/digits/scores").rglob("shard-*.parquet"))
    expected = pd.read_parquet(taken)
    taken.unlink()
    done = clone.flow(*options, **environment)
    assert done.returncode == 0, done.stdout + done.stderr + log.read_text()
    after = clone.shards()
    assert after.keys() == before.keys()
    assert {clone.root / "data/digits/scores" / path for path in after if after[path] != before[path]} >= {taken}
    assert np.allclose(pd.read_parquet(taken)["score"], expected["score"], atol=1e-4)
    assert "up to date" in clone.dvc("status", "dvc.yaml")


def test_a_cluster_without_the_project_is_told_of_before_anything_is_scored(clone, cluster):
    address, environment, _ = cluster
    code = (
        "from pathlib import Path\n"
        "from flows import runners\n"
        "runners.project.ROOT = Path('/nowhere/project')\n"
        f"with runners.scoring_runner('ray', None, '{address}'):\n"
        "    print('it scores')"
    )
    done = clone.run(sys.executable, "-c", code, **environment)
    assert "has no folder /nowhere/project; mount the project there, or give share" in done.stderr
    assert "it scores" not in done.stdout


def test_another_run_leaves_dvcs_outputs_alone(clone, evaluated):
    before, lock = clone.shards(), (clone.root / "dvc.lock").read_bytes()
    runs = clone.root / "data/digits/other/runs"
    earlier = set(runs.glob("*"))
    done = clone.flow("--limit", "5", "--variants", "cfg-w1", "--classifier", "strong")
    assert done.returncode == 0, done.stdout + done.stderr
    [results] = set(runs.iterdir()) - earlier
    metrics = json.loads((results / "metrics.json").read_text())
    assert metrics["strong"]["cfg-w1"]["near"]["n_ood"] == 5
    assert check_bundle(results / "detector").classifier == "strong"
    client = MlflowClient(f"sqlite:///{clone.root / 'mlflow.db'}")
    versions = client.search_model_versions("name = 'diffguard-digits'")
    assert all(each.tags["classifier"] == "ordinary" for each in versions)
    assert f"--detector {results.relative_to(clone.root)}/detector IMAGES\n" in done.stdout
    assert "It is no version of diffguard-digits in MLflow; with --register it becomes one." in done.stdout
    assert (clone.shards(), (clone.root / "dvc.lock").read_bytes()) == (before, lock)
    assert "up to date" in clone.dvc("status", "dvc.yaml")


def test_one_changed_variant_rescores_that_one_by_dvc(clone, evaluated):
    before = clone.shards()
    clone.change(lambda params: params["score"]["variants"]["unconditional"].update(stop=3))
    clone.dvc("repro")
    after = clone.shards()
    kept = {path for path, at in after.items() if before.get(path) == at}
    assert len({path.split("/")[0] for path in after.keys() - kept}) == 2  # one for each classifier
    assert len({path.split("/")[0] for path in kept}) == 4
    assert "up to date" in clone.dvc("repro")


@pytest.mark.parametrize(
    ("options", "environment", "message"),
    [
        (["--variants", "cfg-w9"], {}, "variants: 'cfg-w9' is not one of cfg-w1"),
        ([], {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}, "MLflow at http://127.0.0.1:9 cannot be reached"),
    ],
)
def test_what_is_wrong_is_one_line_at_the_end(clone, evaluated, options, environment, message):
    done = clone.flow(*options, **environment)
    assert done.returncode == 1
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert message in line
    assert "Traceback" not in done.stdout + done.stderr


def test_a_wrong_type_in_params_stops_flow_and_dvc(clone, evaluated):
    clone.change(lambda params: params["score"]["variants"]["cfg-w1"].update(stop="four"))
    try:
        for done in (clone.flow(), clone.run(sys.executable, "-m", "dvc", "repro")):
            assert done.returncode != 0
            assert "error: params.yaml: score.variants.cfg-w1.stop" in done.stdout + done.stderr
            assert "Traceback" not in done.stdout + done.stderr
    finally:
        clone.change(lambda params: params["score"]["variants"]["cfg-w1"].update(stop=4))


def test_an_experiment_of_dvcs_is_a_run_in_mlflow_and_every_row_a_metric(clone, evaluated):
    """In a copy of the workspace too (--temp): it goes to the project's own store, with the experiment's name."""
    clone.run("git", "add", "-A")
    clone.run("git", "-c", "user.name=test", "-c", "user.email=test@example.org", "commit", "-qm", "evaluated")
    clone.dvc("exp", "run", "--temp", "-n", "stronger", "-S", "score.variants.cfg-w1.guidance.scale=3")
    client = MlflowClient(f"sqlite:///{clone.root / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("diffguard")
    found = client.search_runs([experiment.experiment_id], "tags.`dvc.experiment` = 'stronger'")
    rows = {run.data.params["detector"]: run for run in found if "detector" in run.data.params}
    assert {"cfg-w1", "unconditional", "msp", "fused"} <= set(rows)
    assert rows["cfg-w1"].data.params["settings.guidance.scale"] == "3.0"
    assert all(run.info.status == "FINISHED" for run in found)
    assert {path.path for path in client.list_artifacts(rows["cfg-w1"].info.run_id)} >= {"curves.png", "samples"}
    changed = json.loads(clone.dvc("metrics", "diff", "HEAD", "stronger", "--json"))
    [file] = [name for name in changed if name.endswith("rows.json")]
    # The row that was changed, and what is made of it; the others are as they were.
    assert {key.split(".")[1] for key in changed[file]} == {"cfg-w1", "fused"}
