"""The flows monitor and calibrate as their user runs them, on a real Prefect server and a real MLflow store."""

import inspect
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import ClassVar

import pytest
import yaml
from mlflow import MlflowClient
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.flows import load_flow_from_entrypoint
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.utilities.schema_tools.validation import ValidationError, validate
from small_detector import Made, pictures, tiny_classifier, tiny_denoiser

from diffguard.deploy.bundle import load_bundle, save_bundle
from diffguard.errors import SettingError
from diffguard.images import to_picture
from flows.alert import alert
from flows.serve import PREFECT_SETTINGS
from tasks.config.project import ROOT

VERDICT = r"rejected 100 % \(9[\d.]+-100 %\) of 60 images, alpha 5 % \(by chance of 40 .* up to [\d.]+ %\)"


class Place:
    """A bundle, images, an MLflow store and a Prefect server, and commands that see them."""

    def __init__(self, root) -> None:
        self.root = root
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.api = f"http://127.0.0.1:{port}/api"
        self.store = f"sqlite:///{root / 'mlflow.db'}"
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "MLFLOW_"))},
            **PREFECT_SETTINGS,
            "PREFECT_HOME": str(root / ".prefect"),
            "PREFECT_API_URL": self.api,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "MLFLOW_TRACKING_URI": self.store,
            "DO_NOT_TRACK": "1",
        }
        command = (sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port))
        with (root / "server.log").open("w") as log:
            self.server = subprocess.Popen(command, cwd=root, env=self.environment, stdout=log, stderr=log)

    def wait(self) -> None:
        until = time.monotonic() + 300
        while self.server.poll() is None and time.monotonic() < until:
            try:
                urllib.request.urlopen(f"{self.api}/health", timeout=5)
                return
            except OSError:
                time.sleep(1)
        raise AssertionError((self.root / "server.log").read_text())

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        environment = {**self.environment, **environment}
        command = (sys.executable, "-m", *command)
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)

    def monitor(self, images: str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
        given = ("--detector", str(self.root / "bundle"), *options)
        return self.run("flows.monitor", str(self.root / images), *given, **environment)

    def ask(self, path: str) -> list[dict]:
        request = urllib.request.Request(
            f"{self.api}/{path}", b'{"sort": "START_TIME_DESC"}' if "flow_runs" in path else b"{}"
        )
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("monitor")
    made = Place(root)
    try:
        save_bundle(Made(tiny_classifier(), tiny_denoiser()).detector("pixel-knn"), root / "bundle")
        for name, images in {"ind": pictures(60, 11), "ood": (pictures(60, 12) > 0.5).float()}.items():
            (root / name).mkdir()
            for number, image in enumerate(images):
                to_picture(image).save(root / name / f"{number}.png")
        client = MlflowClient(made.store)
        for name in ("diffguard-monitor", "diffguard-calibrate"):
            client.create_experiment(name, (root / "artifacts").as_uri())
        made.wait()
        yield made
    finally:
        made.server.terminate()
        made.server.wait(30)


def test_a_broken_guarantee_is_a_failed_state_after_everything_was_logged(place):
    done = place.monitor("ood")
    assert done.returncode == 1, done.stdout + done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert re.fullmatch(f"error: {VERDICT}", line)
    assert "Traceback" not in done.stdout + done.stderr
    run = place.ask("flow_runs/filter")[0]
    assert (run["state"]["type"], run["state"]["name"]) == ("FAILED", "Failed")
    assert re.fullmatch(VERDICT, run["state"]["message"])
    artifacts = {each["key"]: each for each in place.ask("artifacts/filter") if each["flow_run_id"] == run["id"]}
    assert "**The guarantee is broken**" in artifacts["monitor"]["data"]
    assert len(json.loads(artifacts["monitor-most-ood"]["data"])) == 24
    assert {each["data"] for each in artifacts.values() if each["type"] == "progress"} == {100.0}
    client = MlflowClient(place.store)
    [logged] = client.search_runs([client.get_experiment_by_name("diffguard-monitor").experiment_id])
    assert logged.data.metrics["rejection_rate"] == 1
    assert "most-ood.png" in {each.path for each in client.list_artifacts(logged.info.run_id)}


def test_a_kept_guarantee_is_a_completed_state(place):
    done = place.monitor("ind")
    assert done.returncode == 0, done.stdout + done.stderr
    state = place.ask("flow_runs/filter")[0]["state"]
    assert state["type"] == "COMPLETED"
    assert re.match(r"rejected [\d.]+ % .* of 60 images, alpha 5 %", state["message"])
    assert state["message"] in done.stdout


def test_a_detector_is_recalibrated_by_the_flow(place):
    done = place.run(
        *("flows.recalibrate", str(place.root / "ood"), "--detector", str(place.root / "bundle")),
        *("--accept", "0.9", "--output", str(place.root / "new"), "--promote"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        f"pixel-knn, calibrated on 60 images: {place.root}/new, models:/diffguard-tiny/1, now champion" in done.stdout
    )
    assert load_bundle(place.root / "new").alpha == 0.1
    client = MlflowClient(place.store)
    assert str(client.get_model_version_by_alias("diffguard-tiny", "champion").version) == "1"


@pytest.mark.parametrize(
    ("options", "environment", "message"),
    [
        (["--at-least", "0"], {}, "monitor: at_least: Input should be greater than or equal to 1 (got 0)"),
        (["--column", "a"], {}, "column: "),
        ([], {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}, "MLflow at http://127.0.0.1:9 cannot be reached"),
    ],
)
def test_what_is_wrong_is_one_line_at_the_end(place, options, environment, message):
    done = place.monitor("ind", *options, **environment)
    assert done.returncode == 1
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert message in line
    assert "Traceback" not in done.stdout + done.stderr


@pytest.fixture(scope="module")
def deployed(place):
    """What the server has of prefect.yaml, by name, once it is deployed as `make serve` does."""
    for command in (
        ("work-pool", "create", "diffguard", "--type", "process", "--overwrite"),
        ("--no-prompt", "deploy", "--all"),
    ):
        done = place.run("prefect", *command)
        assert done.returncode == 0, done.stdout + done.stderr
    return {each["name"]: each for each in place.ask("deployments/filter")}


def test_deployments_are_flows_that_take_their_parameters(deployed):
    written = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    assert {each["name"] for each in written} == deployed.keys() >= {"evaluate", "study", "monitor", "recalibrate"}
    for each in written:
        made, parameters = deployed[each["name"]], each["parameters"]
        assert (made["entrypoint"], made["parameters"]) == (each["entrypoint"], parameters)
        flow = load_flow_from_entrypoint(str(ROOT / each["entrypoint"]))
        assert flow.name == "diffguard"
        flow.validate_parameters(parameters)
        schema = made["parameter_openapi_schema"]
        assert schema["properties"].keys() == inspect.signature(flow.fn).parameters.keys()
        validate(parameters, schema, raise_on_error=True)
        # What the server says to `prefect deployment run` with something else.
        with pytest.raises(ValidationError):
            validate({**parameters, "limit": "many"}, schema, raise_on_error=True)


def test_the_automation_watches_the_deployment_that_there_is(place, deployed):
    with temporary_settings({PREFECT_API_URL: place.api}):
        with pytest.raises(SettingError, match="block: there is no custom-webhook/nobody; make it in Prefect's UI"):
            alert("custom-webhook/nobody")
        CustomWebhookNotificationBlock(name="hook", url="http://127.0.0.1:9").save("nobody-listens")
        for _ in range(2):
            alert("custom-webhook/nobody-listens")
    [automation] = place.ask("automations/filter")
    trigger = automation["trigger"]
    assert set(trigger["expect"]) == {"prefect.flow-run.Failed", "prefect.flow-run.Crashed"}
    watched = {each["prefect.resource.role"]: each["prefect.resource.name"] for each in trigger["match_related"]}
    assert watched == {"flow": "diffguard", "deployment": deployed["monitor"]["name"]}


class _Told(BaseHTTPRequestHandler):
    messages: ClassVar[list[dict]] = []

    def do_POST(self):
        self.messages.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.mark.slow
def test_deployments_run_and_somebody_is_told_when_one_fails(place, deployed):
    """Server, work pool, worker, automation and webhook, as `make serve` and flows/alert.py set them up."""
    done = place.run("flows.alert", "custom-webhook/on-call")
    assert (done.returncode, "block: there is no custom-webhook/on-call" in done.stderr) == (1, True), done.stderr
    hook = HTTPServer(("127.0.0.1", 0), _Told)
    threading.Thread(target=hook.serve_forever, daemon=True).start()
    code = f"""if True:
        from prefect.blocks.notifications import CustomWebhookNotificationBlock
        url = "http://127.0.0.1:{hook.server_port}"
        block = CustomWebhookNotificationBlock(name="hook", url=url, json_data={{"text": "{{{{body}}}}"}})
        block.save("on-call")
    """
    made = subprocess.run([sys.executable, "-c", code], env=place.environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    for _ in range(2):
        done = place.run("flows.alert", "custom-webhook/on-call")
        assert done.returncode == 0, done.stderr
    assert len(place.ask("automations/filter")) == 1
    command = (sys.executable, "-m", "prefect", "worker", "start", "--pool", "diffguard", "--type", "process")
    with (place.root / "worker.log").open("w") as log:
        worker = subprocess.Popen(command, cwd=place.root, env=place.environment, stdout=log, stderr=log)
    try:
        given = (f"images={place.root / 'ood'}", f"detector={place.root / 'bundle'}")
        options = [part for each in given for part in ("-p", each)]
        done = place.run("prefect", "deployment", "run", "diffguard/monitor", *options, "--watch")
        assert "Failed" in done.stdout, done.stdout + (place.root / "worker.log").read_text()
        until = time.monotonic() + 60
        while not _Told.messages and time.monotonic() < until:
            time.sleep(0.5)
        [message] = _Told.messages
        [first, link] = message["text"].splitlines()
        assert re.search(f"^[a-z]+-[a-z]+: {VERDICT}$", first)
        assert re.fullmatch(f"{re.escape(place.api.removesuffix('/api'))}/runs/flow-run/[0-9a-f-]{{36}}", link)
        for said in (done.stdout, (place.root / "worker.log").read_text()):
            assert re.search(VERDICT.replace(" ", r"\s+"), said)  # in lines of the terminal's width
            assert "Traceback" not in said
        given = (f"images={place.root / 'ind'}", given[1], f"output={place.root / 'by-deployment'}", "accept=0.9")
        options = [part for each in given for part in ("-p", each)]
        done = place.run("prefect", "deployment", "run", "diffguard/recalibrate", *options, "--watch")
        assert "Completed" in done.stdout, done.stdout + (place.root / "worker.log").read_text()
        assert load_bundle(place.root / "by-deployment").alpha == 0.1
    finally:
        worker.kill()  # told to end, Prefect's worker may fall over its own cancellation, and stay
        worker.wait()
        hook.shutdown()
