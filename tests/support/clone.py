"""A clone of the project with settings small enough for a test, and commands in it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from tasks.config.project import ROOT


class Clone:
    """A clone of the project, and commands in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "MLFLOW_"))},
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PREFECT_HOME": str(root / ".prefect"),
            "DVC_NO_ANALYTICS": "1",
            "DO_NOT_TRACK": "1",
        }

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        environment = {**self.environment, **environment}
        return subprocess.run(command, cwd=self.root, env=environment, capture_output=True, text=True, timeout=400)

    def flow(self, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, "-m", "flows.evaluate", *options, **environment)

    def dvc(self, *arguments: str) -> str:
        done = self.run(sys.executable, "-m", "dvc", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def change(self, change, name: str = "params.yaml") -> None:
        path = self.root / name
        params = yaml.safe_load(path.read_text())
        change(params)
        path.write_text(yaml.safe_dump(params, sort_keys=False))

    def shards(self) -> dict[str, int]:
        scores = self.root / "data/digits/scores"
        return {str(path.relative_to(scores)): path.stat().st_mtime_ns for path in scores.rglob("shard-*")}


def shrink_models(benchmark) -> None:
    benchmark["denoiser"] |= {"channels": [8, 16], "norm_groups": 4, "iterations": 20}
    for settings in benchmark["classifiers"].values():
        settings |= {"width": 4, "epochs": 2}


def shrink(params) -> None:
    params["evaluate"]["draws"] = 100
    params["score"]["shard_size"] = 100  # many, so that a worker can be killed among them
    variants = params["score"]["variants"]
    params["score"]["variants"] = {name: variants[name] for name in ("cfg-w1", "unconditional")}
    params["score"]["baselines"] = {"msp": params["score"]["baselines"]["msp"]}
    params["combine"] = {"fused": {"kind": "z-sum", "of": ["cfg-w1", "msp"]}}


def make_clone(root: Path) -> Clone:
    """Copy the project, without what was made in it, and make it a repository of its own."""
    never = shutil.ignore_patterns(".venv", ".git", "cache", "tmp", "mlruns", "mlflow.db*")
    made_here = shutil.ignore_patterns("other", "images", "scores", "plots", "models", "detector", "*.json", "*.png")

    def ignore(folder, names):
        return never(folder, names) | (made_here(folder, names) if "data" in Path(folder).parts else set())

    shutil.copytree(ROOT, root, ignore=ignore, dirs_exist_ok=True)
    made = Clone(root)
    made.change(shrink)
    made.change(shrink_models, "data/benchmarks/digits.yaml")
    made.run("git", "init", "-q")
    made.run("git", "add", "-A")
    made.run("git", "-c", "user.name=test", "-c", "user.email=test@example.org", "commit", "-qm", "clone")
    return made
