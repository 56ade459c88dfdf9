"""The image of the endpoint: its file, and, without a builder, its steps in folders of their own as another user."""

import argparse
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
from dockerfile import command_of, environment_of, stages_of
from processes import Server, free_port
from small_detector import Made, tiny_classifier, tiny_denoiser

from diffguard.cli import serve
from diffguard.deploy.bundle import save_bundle
from diffguard.images import to_picture
from diffguard.serving.requests import encode_image
from tasks.config.project import ROOT

STAGES = stages_of(ROOT / "Dockerfile")
PYTHON = shutil.which("python3.11", path="/usr/local/bin:/usr/bin")
USER = STAGES["endpoint"].all("USER")[-1]


def sources(stage):
    """What a stage copies from the project."""
    copies = [line.split()[:-1] for line in stage.all("COPY") if not line.startswith("--from")]
    defaults = environment_of(stage)
    return [re.sub(r"\$\{(\w+)\}", lambda name: defaults[name[1]], name) for names in copies for name in names]


def test_the_last_stage_is_the_endpoint_of_a_user_without_rights():
    assert list(STAGES)[-1] == "mounted"
    assert {STAGES[name].base for name in ("mounted", "baked")} == {"endpoint"}
    for name in ("endpoint", "worker"):
        assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", STAGES[name].all("USER")[-1]), name
        assert STAGES[name].base == "base"


def test_its_command_is_one_that_the_program_takes_on_the_port_that_is_checked():
    program, name, *options = command_of(STAGES["endpoint"].all("CMD")[-1])
    assert (program, name) == ("diffguard", "serve")
    parser = argparse.ArgumentParser()
    serve.add(parser)
    taken = parser.parse_args(options)
    assert (taken.host, [str(taken.port)]) == ("0.0.0.0", STAGES["endpoint"].all("EXPOSE"))
    [check] = STAGES["endpoint"].all("HEALTHCHECK")
    *_, code = command_of(check)
    compile(code, "HEALTHCHECK", "exec")
    assert f":{taken.port}/health" in code


def test_it_installs_what_constraints_pin_and_nothing_for_developers():
    [install] = [line for line in STAGES["build"].all("RUN") if "uv venv" in line]
    assert "-c constraints.txt" in install
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    compose = (ROOT / "compose.yaml").read_text()
    chosen = [environment_of(STAGES["build"])["EXTRAS"], *re.findall(r'EXTRAS: "([\w,]+)"', compose)]
    named = {name for each in chosen for name in each.split(",")}
    assert named <= extras.keys() - {"dev", "docs"}
    for line in STAGES["build"].all("RUN"):
        assert all(re.search(r"[<=]", each) for each in re.findall(r'pip install .*"(uv[^"]*)"', line)), line


def test_no_secret_is_in_it():
    for stage in STAGES.values():
        for name in environment_of(stage):
            assert not re.search("KEY|TOKEN|SECRET|PASSWORD", name)


def test_what_it_copies_is_there_and_all_else_is_ignored():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[1] == "*"
    allowed = [line[1:] for line in lines if line.startswith("!")]
    for stage in STAGES.values():
        for name in sources(stage):
            assert any(fnmatch(name, each) for each in allowed), name
    assert all((ROOT / name).exists() for name in sources(STAGES["build"]))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="needs root and setpriv")
@pytest.mark.skipif(PYTHON is None, reason="needs a Python 3.11 that other users may run, such as Debian's")
def test_its_steps_make_an_endpoint_that_decides_as_another_user():
    """Where Docker has /build, /opt/diffguard, /detector and /tmp there are folders here; the libraries come from the
    package index of this machine, and torch as it has it."""
    root = Path(tempfile.mkdtemp(dir="/var/tmp", prefix="diffguard-image-"))
    try:
        root.chmod(0o755)
        _build(root)
        made = Made(tiny_classifier(), tiny_denoiser())
        save_bundle(made.detector("gated"), root / "detector")
        _serve_and_ask(root, made)
    finally:
        shutil.rmtree(root)


def _build(root):
    stage, build = STAGES["build"], root / "build"
    build.mkdir()
    for name in sources(stage):
        from_here = ROOT / name
        if from_here.is_dir():
            shutil.copytree(from_here, build / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(from_here, build / name)
    [install] = [line for line in stage.all("RUN") if "uv venv" in line]
    given = {key: value for key, value in environment_of(stage).items() if not key.startswith("UV_")}
    environment = {**os.environ, **given, "TORCH_BACKEND": "", "UV_PYTHON": PYTHON}
    environment.pop("PIP_FIND_LINKS", None)
    command = ["sh", "-c", install.replace("/opt/diffguard", str(root / "opt"))]
    done = subprocess.run(command, cwd=build, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    listed = {each.name.partition("-")[0] for each in (root / "opt").glob("lib/*/site-packages/*.dist-info")}
    assert "uvicorn" in listed
    assert not listed & {"pytest", "mypy", "ruff", "prefect", "mlflow", "dvc"}


def _serve_and_ask(root, made):
    temporary, port = root / "tmp", free_port()
    temporary.mkdir()
    user, _, group = USER.partition(":")
    os.chown(temporary, int(user), int(group))
    places = {"/opt/diffguard": str(root / "opt"), "/detector": str(root / "detector"), "/tmp": str(temporary)}
    environment = {
        name: re.sub(r"^(/opt/diffguard|/detector|/tmp)", lambda place: places[place[1]], value)
        for name, value in environment_of(STAGES["base"]).items()
    }
    environment["PATH"] = environment["PATH"].replace("$PATH", "/usr/local/bin:/usr/bin:/bin")

    def words(arguments):
        given = [word.replace("8000", str(port)).replace("0.0.0.0", "127.0.0.1") for word in command_of(arguments)]
        return ["setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups", "--no-new-privs", *given]

    endpoint = STAGES["endpoint"]
    log = root / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            words(endpoint.all("CMD")[-1]), cwd=temporary, env=environment, stdout=file, stderr=subprocess.STDOUT
        )
    try:
        check = words(endpoint.all("HEALTHCHECK")[0])
        until = time.monotonic() + 400
        while subprocess.run(check, cwd=temporary, env=environment, capture_output=True).returncode:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(1)
        server = Server(process, port, log)
        images = [encode_image(to_picture(image)) for image in made.new[:3]]
        status, answer = server.ask("POST", "/score", {"images": images})
        assert status == 200, answer
        scores = [each["score"] for each in answer["decisions"]]
        assert scores == pytest.approx(made.scores["new", ""]["gated"][:3], abs=1e-4)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
