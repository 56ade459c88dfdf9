"""Rows that reconstruct nothing: a variant that scores inversion paths, and the complexity of images."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from own_project import own_benchmark, write_own
from small_project import write_params

from diffguard.detectors.complexity import HighFrequency
from diffguard.diffusion.path_statistics import fit_path, path_score
from diffguard.diffusion.reference import invert
from diffguard.diffusion.sampler import Sampler
from diffguard.errors import SettingError
from tasks.calibrate import calibrate
from tasks.common.files import read_images
from tasks.config.project import ROOT
from tasks.config.run import open_run
from tasks.evaluate.stage import evaluate
from tasks.log import log
from tasks.models.loaded import load_models
from tasks.score.plan import plan
from tasks.score.stage import score, score_shards
from tasks.services.tracking import open_tracking

RECORDED = yaml.safe_load((ROOT / "params.yaml").read_text())["score"]


def with_paths(params, **changes):
    score = params["score"]
    score["variants"] = {
        "cfg-w1": score["variants"]["cfg-w1"],
        "path": RECORDED["variants"]["path"],
        "path-mixture": {**RECORDED["variants"]["path-mixture"], "path_components": 3},
        # The stop comes from calibration images, the Gaussian from the split train.
        "path-early-stop": {**RECORDED["variants"]["cfg-early-stop"], "guidance": {"kind": "none"}, "distance": "path"},
    }
    score["baselines"] = {"msp": score["baselines"]["msp"], "complexity": RECORDED["baselines"]["complexity"]}
    score |= changes
    params["combine"] = {}  # its members are not all here


@pytest.fixture(scope="module")
def scored(project):
    write_params(project, with_paths)
    run = open_run()
    yield run, score(run)
    write_params(project)


def table_of(items, name, classifier="ordinary"):
    [item] = [each for each in items if (each.name, each.classifier) == (name, classifier)]
    return item.read()


@pytest.mark.parametrize("name", ["path", "path-mixture"])
def test_a_path_is_scored_under_what_the_train_split_is_fitted_to(name, scored):
    run, items = scored
    models = load_models(run, 0, "cpu")
    variant = run.params.score.variants[name]
    sampler = Sampler.of(variant, models.denoiser, 8)

    def statistics(rows):
        latents = sampler.encode(read_images(run.home, rows))
        [end] = invert(models.denoiser, latents, sampler.schedule, [4], clip=True)
        return end.path

    density = fit_path(statistics(run.manifest[run.manifest["split"] == "train"]), variant.path_components)
    expected = path_score(density, statistics(run.scored)).numpy()
    for classifier in ("ordinary", "strong"):
        table = table_of(items, name, classifier)
        assert np.allclose(table["score"], expected, rtol=1e-3, atol=1e-3)
        assert set(table["steps"]) == {4}
    assert table_of(items, "path-early-stop")["steps"].nunique() > 1


def test_complexity_sees_whole_images(scored):
    run, items = scored
    expected = HighFrequency().predict(read_images(run.home, run.scored)).numpy()
    assert np.allclose(table_of(items, "complexity")["score"], expected, rtol=1e-5)


def test_only_a_paths_scores_are_named_by_the_train_split(scored):
    _, items = scored
    named = {item.name for item in items if "train_images" in item.folder.made_by}
    assert named == {"path", "path-mixture", "path-early-stop", "msp", "complexity"}
    cfg = next(item for item in items if item.name == "cfg-w1")
    assert "path" not in cfg.folder.made_by["variant"]


def test_it_keeps_no_pictures_and_others_beside_it_do(scored):
    _, items = scored
    kept = {item.name for item in items if item.folder.samples() is not None}
    assert kept == {"cfg-w1"}


def test_a_lost_shard_is_made_again_alike(project, scored):
    _, items = scored
    before = table_of(items, "path")
    [item] = [each for each in items if (each.name, each.classifier) == ("path", "ordinary")]
    lost = item.folder.path / "shard-00001.parquet"
    others = {each: each.stat().st_mtime_ns for each in lost.parent.glob("shard-*") if each != lost}
    lost.unlink()
    assert item.folder.missing() == [1]
    load_models(open_run(seeds=[0, 1]), 0, "cpu")  # other models in their place: what was fitted is fitted again
    score(open_run())
    assert {each: each.stat().st_mtime_ns for each in others} == others
    again = item.read()
    assert again.drop(columns="score").equals(before.drop(columns="score"))
    assert np.allclose(again["score"], before["score"], rtol=1e-3)


def test_its_scores_do_not_depend_on_batch_and_shard(project, scored):
    _, items = scored
    try:
        write_params(project, lambda params: with_paths(params, slots=5, shard_size=31))
        run = open_run()
        again = plan(run)
        score_shards(run, again, range(run.shards)[::-1], "cpu")
        for name in ("path", "path-mixture", "path-early-stop"):
            one, other = table_of(items, name), table_of(again, name)
            assert one["steps"].equals(other["steps"])
            assert np.allclose(one["score"], other["score"], rtol=1e-3, atol=1e-3), name
    finally:
        write_params(project, with_paths)


def test_it_is_evaluated_and_logged_though_it_is_the_default(project, scored):
    write_params(project, lambda params: [with_paths(params), params["evaluate"].update(default="path")])
    try:
        run = open_run()
        items = score(run)
        thresholds, metrics = calibrate(run, items), evaluate(run, items)
        parent = log(run, items, metrics, thresholds)
    finally:
        write_params(project, with_paths)
    assert 0 <= json.loads((run.results / "summary.json").read_text())["strong"]["near auroc"] <= 1
    client = open_tracking()
    [experiment] = [each for each in client.search_experiments() if each.name == "diffguard"]
    children = client.search_runs([experiment.experiment_id], f"tags.mlflow.parentRunId = '{parent}'", max_results=100)
    assert {child.info.status for child in children} == {"FINISHED"}
    [child] = [each for each in children if each.info.run_name == "path · strong"]
    assert child.data.params["distance"] == "path"
    found = json.loads(Path(client.download_artifacts(child.info.run_id, "metrics.json")).read_text())
    assert found["mean_steps"]["digits-6-8"] == 4
    artifacts = {each.path for each in client.list_artifacts(child.info.run_id)}
    assert artifacts == {"curves.png", "scores-seed-0.csv", "metrics.json"}


def test_without_a_train_split_a_run_leaves_it_out(tmp_path, monkeypatch):
    benchmark = own_benchmark()
    del benchmark["ind"]["animals"]["splits"]["train"], benchmark["detectors"]
    write_own(monkeypatch, tmp_path, benchmark)
    write_params(tmp_path, with_paths)
    chosen = {"benchmark": "mine", "root": str(tmp_path)}
    names = open_run(**chosen).params.score.names
    assert {"cfg-w1", "msp", "complexity", "cam"} <= set(names)
    assert not {"path", "path-mixture", "path-early-stop"} & set(names)
    assert open_run(**chosen, variants=["complexity"]).params.score.names == ["complexity"]
    with pytest.raises(SettingError, match="variants: path is fitted on a split train, which ind does not have"):
        open_run(**chosen, variants=["cfg-w1", "path"])
