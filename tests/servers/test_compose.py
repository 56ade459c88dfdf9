"""compose.yaml: its commands are ones that the programs take, and what it mounts and scrapes is what there is."""

import re
import subprocess
import sys

import pytest
import yaml
from dockerfile import command_of, stages_of

from tasks.config.project import ROOT

COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
SERVICES = COMPOSE["services"]


def test_services_and_what_they_need():
    assert SERVICES.keys() == {"postgres", "mlflow", "prefect", "worker", "endpoint", "prometheus"}
    for name, service in SERVICES.items():
        assert ("image" in service) != ("build" in service), name
        assert service.get("depends_on", {}).keys() <= SERVICES.keys()
        for each, condition in service.get("depends_on", {}).items():
            if condition["condition"] == "service_healthy":
                assert "healthcheck" in SERVICES[each], each
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), name
        for volume in service.get("volumes", ()):
            source = volume.partition(":")[0]
            named = source in COMPOSE["volumes"]
            assert named or re.match(r"\$\{PWD|\./data/\$", source) or (ROOT / source).is_dir(), volume
    assert (ROOT / SERVICES["mlflow"]["env_file"]).is_file()
    assert SERVICES["worker"]["build"]["target"] in stages_of(ROOT / "Dockerfile")
    endpoint = SERVICES["endpoint"]
    assert (endpoint["read_only"], endpoint["tmpfs"], endpoint["cap_drop"]) == (True, ["/tmp"], ["ALL"])


def test_passwords_come_from_the_environment():
    for service in SERVICES.values():
        for name, value in (service.get("environment") or {}).items():
            if re.search("PASSWORD|KEY|CONNECTION|STORE_URI", name) and value:
                assert "${POSTGRES_PASSWORD" in value, name


@pytest.mark.parametrize(
    "command",
    [
        SERVICES["mlflow"]["command"].split(),
        SERVICES["prefect"]["command"].split(),
        command_of(stages_of(ROOT / "Dockerfile")["worker"].all("CMD")[-1]),
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_commands_are_taken(command):
    program, *options = command
    given = {option for option in options if option.startswith("--")}
    words = [word for word in options if not word.startswith("-")][: 2 if program == "prefect" else 1]
    done = subprocess.run(
        [sys.executable, "-m", program, *words, "--help"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert all(re.search(rf"{option}\b", done.stdout) for option in given)


def test_prefects_server_has_the_settings_of_make_serve():
    from flows.serve import PREFECT_SETTINGS

    assert PREFECT_SETTINGS.items() <= SERVICES["prefect"]["environment"].items()


def test_settings_are_ones_that_prefect_and_mlflow_know():
    import mlflow.environment_variables
    import prefect.settings

    environments = [service.get("environment") or {} for service in SERVICES.values()]
    for name in (name for environment in environments for name in environment):
        if name.startswith("PREFECT_"):
            assert hasattr(prefect.settings, name), name
        if name.startswith("MLFLOW_") and name not in OPTIONS:
            assert hasattr(mlflow.environment_variables, name), name


OPTIONS = ("MLFLOW_BACKEND_STORE_URI", "MLFLOW_ARTIFACTS_DESTINATION", "MLFLOW_HOST", "MLFLOW_WORKERS")
"""Of `mlflow server`, which reads them from the environment."""


def test_prometheus_alerts_as_the_page_says():
    settings = yaml.safe_load((ROOT / "prometheus" / "prometheus.yml").read_text(encoding="utf-8"))
    [target] = settings["scrape_configs"][0]["static_configs"][0]["targets"]
    assert target == f"endpoint:{stages_of(ROOT / 'Dockerfile')['endpoint'].all('EXPOSE')[-1]}"
    [rules] = [yaml.safe_load((ROOT / "prometheus" / name).read_text()) for name in settings["rule_files"]]
    page = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
    shown = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)]
    assert rules in shown
