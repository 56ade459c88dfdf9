"""Scoring through an fsspec URL, as a worker on another machine does."""

import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from own_project import CLASSES, own_benchmark, save_own, write_own
from safetensors.torch import save_file
from small_project import work_in, write_params
from tiny_models import save_stable_diffusion

from diffguard.errors import SettingError
from tasks.common.files import fetched, is_local, place
from tasks.config.benchmark import DENOISER
from tasks.config.run import open_run
from tasks.prepare.stage import prepare_if_changed
from tasks.score.plan import missing, plan
from tasks.score.share import collect, publish
from tasks.score.stage import score_shards
from tasks.train.stage import train


@pytest.fixture
def url():
    place = "memory://diffguard-test"
    yield place
    import fsspec

    fsspec.filesystem("memory").rm("/diffguard-test", recursive=True)


def test_scores_made_behind_a_url_are_those_made_here(project, url, tmp_path):
    choices = {"variants": ["cfg-w1", "cfg-early-stop", "knn"], "classifier": "ordinary", "limit": 4}
    run, shared = open_run(**choices), open_run(**choices, data=url)
    items = plan(run)
    score_shards(run, items, [0], "cpu")  # goes along, and is not scored again
    publish(run, items, shared)
    there = plan(shared)
    assert not any(is_local(item.folder.path) for item in there)
    assert missing(shared, there) == list(range(1, run.shards))
    assert score_shards(shared, there, range(run.shards), "cpu") == len(there) * (run.shards - 1)

    collect(items, there)
    assert not missing(run, items)
    made = [item.read() for item in items]
    samples = items[0].folder.samples()
    for item in items:
        for path in item.folder.path.glob("shard-*"):
            path.unlink()
    score_shards(run, items, range(run.shards), "cpu")
    for item, table in zip(items, made, strict=True):
        here = item.read()
        assert table["id"].tolist() == here["id"].tolist()
        assert np.allclose(table["score"], here["score"], atol=1e-5)
    assert np.abs(samples.reconstruction.astype(int) - items[0].folder.samples().reconstruction).max() <= 1


def test_publishing_again_copies_only_what_changed(project, url):
    import fsspec

    choices = {"variants": ["msp"], "classifier": "ordinary", "limit": 2}
    run, shared = open_run(**choices), open_run(**choices, data=url)
    publish(run, plan(run), shared)
    files = fsspec.filesystem("memory")
    before = {path: files.modified(path) for path in files.find("/diffguard-test")}
    model = shared.model(0, "ordinary") / "model.safetensors"
    model.write_bytes(b"an older one")
    publish(run, plan(run), shared)
    after = {path: files.modified(path) for path in files.find("/diffguard-test")}
    assert [path for path in after if after[path] != before.get(path)] == [model.path]
    assert fetched(model).read_bytes() == (run.model(0, "ordinary") / "model.safetensors").read_bytes()


DENOISERS = {
    "class-conditional": {"kind": "pretrained", "path": "{root}/denoiser"},
    "under other labels": {"kind": "pretrained", "path": "{root}/denoiser", "labels": [3, 2, 1, 0]},
    "prompted": {"kind": "pretrained", "path": "{root}/stable-diffusion", "prompt": "{}, a drawing"},
}


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Someone's folder of models and pictures, and a benchmark of them with scores made elsewhere."""
    import timm

    root = tmp_path / "own"
    save_own(root)
    save_stable_diffusion(root / "stable-diffusion")
    torch.manual_seed(0)
    save_file(timm.create_model("test_resnet", num_classes=len(CLASSES)).state_dict(), root / "timm.safetensors")
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "nearby").symlink_to(root)
    benchmark = own_benchmark()
    benchmark["classifiers"] = {
        "mine": {"kind": "timm", "name": "test_resnet", "weights": "{root}/timm.safetensors"},
        "saved": {"kind": "file", "path": "nearby/classifier.safetensors"},
    }
    benchmark["detectors"] = ["cam", "msp"]
    return tmp_path, root, benchmark


def write_project(patch, project, benchmark, *, imported):
    write_own(patch, project, benchmark)

    def add(params):
        params["score"]["imported"] = {"theirs": {"file": "{root}/theirs.parquet"}}

    write_params(project, add if imported else lambda params: None)


@pytest.mark.parametrize("denoiser", DENOISERS)
def test_models_and_scores_from_elsewhere_go_along(denoiser, own, url, monkeypatch):
    """The other machine has neither the folder that they came from nor the project in the same place."""
    here, root, benchmark = own
    benchmark["denoiser"] = DENOISERS[denoiser]
    write_project(monkeypatch, here / "project", benchmark, imported=False)
    run = open_run("mine", root=str(root))
    prepare_if_changed(run.benchmark, run.home, seed=0)
    ids = open_run("mine", root=str(root)).scored["id"]
    pd.DataFrame({"id": ids, "score": np.arange(len(ids)) / 7}).to_parquet(root / "theirs.parquet")
    benchmark["detectors"].append("theirs")
    write_project(monkeypatch, here / "project", benchmark, imported=True)
    choices = {"benchmark": "mine", "root": str(root)}
    run = open_run(**choices)
    for model in (DENOISER, "mine", "saved"):
        train(run, model, 0)
    items = plan(run)
    publish(run, items, open_run(**choices, data=url))

    worker = here / "elsewhere"
    (worker / "data").mkdir(parents=True)
    shutil.copytree(here / "project" / "data" / "benchmarks", worker / "data" / "benchmarks")
    shutil.copy(here / "project" / "params.yaml", worker)
    root.rename(here / "gone")
    work_in(monkeypatch, worker)
    shared = open_run(**choices, data=url)
    assert score_shards(shared, plan(shared), range(shared.shards), "cpu") == len(items) * shared.shards

    (here / "gone").rename(root)
    work_in(monkeypatch, here / "project")
    collect(items, plan(open_run(**choices, data=url)))
    assert not missing(run, items)
    found = [item.read() for item in items]
    shutil.rmtree(run.other / "scores")
    items = plan(run)
    score_shards(run, items, range(run.shards), "cpu")
    for item, table in zip(items, found, strict=True):
        assert np.allclose(table["score"], item.read()["score"], atol=1e-4), item.title


def test_a_model_from_elsewhere_that_was_replaced_is_published_anew(own, url, monkeypatch):
    here, root, benchmark = own
    write_project(monkeypatch, here / "project", benchmark, imported=False)
    choices = {"benchmark": "mine", "root": str(root)}
    run = open_run(**choices)
    prepare_if_changed(run.benchmark, run.home, seed=0)
    run, hashes = open_run(**choices), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        import timm

        save_file(timm.create_model("test_resnet", num_classes=4).state_dict(), root / "timm.safetensors")
        for model in (DENOISER, "mine", "saved"):
            train(run, model, 0)
        shared = open_run(**choices, data=url)
        publish(run, plan(run), shared)
        hashes.append(plan(shared)[0].folder.made_by["classifier"])
        assert plan(run)[0].folder.made_by == plan(shared)[0].folder.made_by
        score_shards(shared, plan(shared), [0], "cpu")
    assert hashes[0] != hashes[1]


def test_a_place_that_fsspec_does_not_know_is_named():
    with pytest.raises(SettingError, match="nowhere://bucket: not a place that fsspec knows"):
        place("nowhere://bucket")
