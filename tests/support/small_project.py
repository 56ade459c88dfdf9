"""A project that is small enough for a test: its settings, and working in it."""

from pathlib import Path

import pytest
import yaml

import tasks.config.project
from tasks.config.benchmark import load_benchmark
from tasks.config.project import ROOT
from tasks.config.run import open_run
from tasks.prepare.stage import prepare
from tasks.train.stage import train


def write_params(root: Path, change=lambda params: None) -> None:
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    score = params["score"]
    score |= {"slots": 16, "shard_size": 24, "samples": 2}
    score["variants"] = {name: score["variants"][name] for name in ("cfg-w1", "cfg-early-stop", "paper-cg")}
    score["baselines"] = {name: score["baselines"][name] for name in ("msp", "knn", "mahalanobis", "pixel-knn")}
    params["combine"] = {
        "fused": {"kind": "z-sum", "of": ["cfg-w1", "knn", "msp"]},
        "cascade": {"kind": "cascade", "of": ["pixel-knn", "fused"], "loss": 0.6, "confidence": 0.5},
        "best": {"kind": "best", "of": ["cfg-w1", "knn", "pixel-knn"]},
    }
    params["evaluate"]["draws"] = 100
    change(params)
    (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))


def write_benchmark(root: Path, change=lambda benchmark: None) -> None:
    """data/benchmarks/digits.yaml with few images and small models."""
    digits = yaml.safe_load((ROOT / "data" / "benchmarks" / "digits.yaml").read_text())
    digits["ind"]["digits-0-5"]["splits"] = {"train": 60, "calibration": 24, "validation": 12, "test": 18}
    for dataset in (*digits["near"].values(), *digits["far"].values()):
        dataset["splits"] = dict.fromkeys(dataset["splits"], 6)
    digits["denoiser"] |= {"channels": [8, 16], "norm_groups": 4, "iterations": 30, "batch_size": 16}
    for settings in digits["classifiers"].values():
        settings |= {"width": 4, "epochs": 4, "batch_size": 8}
    change(digits)
    path = root / "data" / "benchmarks" / "digits.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(digits))


def make_project(patch: pytest.MonkeyPatch, root: Path) -> None:
    """A project folder with prepared images and the models of seed 0, taken for the project's."""
    work_in(patch, root)
    write_benchmark(root)
    write_params(root)
    prepare(load_benchmark("digits"), root / "data" / "digits", seed=0)
    for model in ("denoiser", "ordinary", "strong"):
        train(open_run(), model, 0)


def work_in(patch: pytest.MonkeyPatch, root: Path) -> None:
    """Take a folder for the project's."""
    patch.setattr(tasks.config.project, "ROOT", root)
    patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root / 'mlflow.db'}")
    patch.chdir(root)
