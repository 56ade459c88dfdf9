"""What a score folder is named by: whatever changes a score, and nothing that does not."""

import pandas as pd
import pytest
import yaml
from own_project import own_benchmark, save_own, with_code, write_own
from small_project import write_params

import tasks.score.plan
from diffguard.utils.hashing import hash_values
from tasks.config.benchmark import DENOISER
from tasks.config.params import load_params
from tasks.config.run import open_run
from tasks.evaluate.stage import evaluate
from tasks.prepare.stage import prepare_if_changed
from tasks.score.plan import missing, plan
from tasks.score.stage import score_shards
from tasks.train.stage import train

CODE = """
from pytorch_ood.detector import MaxSoftmax
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 4)

    def forward(self, x):
        return self.head(self.convolution(x).relu().mean(dim=(2, 3)))


def network():
    import torch

    torch.manual_seed(0)
    return Net()
"""
DISTANCE = "def darker(images, others, classifier):\n    return (images - others).mean(dim=(1, 2, 3))\n"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    save_own(folder)
    with with_code(folder, named_models=CODE, named_distance=DISTANCE):
        yield folder


@pytest.fixture
def opened(root, tmp_path, monkeypatch):
    """A run of the benchmark file as a test has it, prepared, with its models."""

    def open_it(benchmark):
        write_own(monkeypatch, tmp_path, benchmark)
        prepare_if_changed(open_run(benchmark="mine", root=str(root)).benchmark, tmp_path / "data" / "mine", seed=0)
        run = open_run(benchmark="mine", root=str(root))
        for model in (DENOISER, *run.params.classifiers):
            train(run, model, 0)
        return run

    return open_it


NAMED_BY = {
    "cfg-w1": "98ecdc2585bf",
    "cfg-fast": "0e47254acf10",
    "cfg-w2": "0d06c3ed337a",
    "cfg-early-stop": "e27a6bef3e1a",
    "paper-cfg": "cb8dcba427d2",
    "paper-cg": "940321c968b2",
    "unconditional": "e2eeb6ab5458",
    "min-over-labels": "354564aa7728",
    "path": "69d31759f959",
}
"""Hashes of what the variants of params.yaml put into the names of their score folders; only those that are changed
there on purpose get another."""


def test_settings_that_came_later_do_not_rename_the_scores_of_variants():
    variants = load_params().score.variants
    assert {name: hash_values(variants[name].model_dump(mode="json"))[:12] for name in NAMED_BY} == NAMED_BY


def folders(run):
    return {item.name: item.folder.path for item in plan(run)}


def test_a_dataset_moved_from_far_to_near_counts_there_and_is_not_scored_again(opened):
    benchmark = own_benchmark()
    benchmark["far"] = {"z": benchmark["far"].pop("far")}
    run = opened(benchmark)
    items = plan(run)
    score_shards(run, items, range(run.shards), "cpu")
    assert evaluate(run, items)["mine"]["cam"]["near"]["n_ood"] == 6
    benchmark["near"]["z"] = benchmark["far"].pop("z")
    run = opened(benchmark)
    items = plan(run)
    assert not missing(run, items)
    for item in items:
        assert item.read()["role"].tolist() == run.scored["role"].tolist()
    found = evaluate(run, items)["mine"]["cam"]
    assert found["near"]["n_ood"] == 12
    assert "far" not in found


def test_other_labels_have_other_scores(opened):
    run = opened(own_benchmark())
    before = folders(run)
    manifest = pd.read_parquet(run.home / "manifest.parquet")
    manifest["label"] = manifest["label"].replace({0: 1, 1: 0})
    manifest.to_parquet(run.home / "manifest.parquet")
    run = open_run(benchmark="mine", root=run.params.root)
    for model in (DENOISER, "mine"):
        train(run, model, 0)
    assert not set(before.values()) & set(folders(run).values())


def test_a_raised_method_version_has_other_scores_of_every_row(opened, monkeypatch):
    run = opened(own_benchmark())
    before = folders(run)
    monkeypatch.setattr(tasks.score.plan, "METHOD_VERSION", tasks.score.plan.METHOD_VERSION + 1)
    assert not set(before.values()) & set(folders(run).values())


def test_changed_code_of_ones_own_has_other_scores(opened, root, tmp_path):
    benchmark = own_benchmark()
    benchmark["variants"]["cam"]["distance"] = "named_distance:darker"
    benchmark["classifiers"] = {
        "mine": {"kind": "file", "path": "{root}/classifier.safetensors"},
        "net": {"kind": "object", "object": "named_models:network", "cam_layer": "convolution"},
    }
    benchmark["detectors"] = ["cam", "unconditional", "own", "msp"]

    def by_row():
        def add(params):
            params["score"]["baselines"]["own"] = {"detector": "named_models:MaxSoftmax", "sees": "logits"}

        write_params(tmp_path, add)
        return {(item.classifier, item.name): item.folder.path for item in plan(open_run("mine", root=str(root)))}

    detectors = benchmark.pop("detectors")
    opened(benchmark)
    path = tmp_path / "data" / "benchmarks" / "mine.yaml"
    path.write_text(yaml.safe_dump(benchmark | {"detectors": detectors}))
    first = by_row()
    (root / "named_distance.py").write_text(DISTANCE.replace("images - others", "others - images"))
    second = by_row()
    assert {key for key in first if first[key] != second[key]} == {("mine", "cam"), ("net", "cam")}
    (root / "named_models.py").write_text(CODE.replace("relu", "tanh"))
    third = by_row()
    assert {key for key in first if second[key] == third[key]} == {("mine", n) for n in ("cam", "unconditional", "msp")}
