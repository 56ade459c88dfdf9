"""The stages on a benchmark that is small enough for a test, with real models, in a folder of its own."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from small_project import write_params

import tasks.run
from diffguard.errors import DataError, ServiceError
from diffguard.hashing import hash_file
from tasks.calibrate import calibrate
from tasks.evaluate import evaluate, result_table
from tasks.log import log, open_tracking
from tasks.run import open_run
from tasks.score import plan, score
from tasks.train import train
from tasks.validate import validate_manifest, validate_scores


@pytest.fixture(scope="module")
def scored(project):
    run = open_run()
    return run, score(run)


def written(root):
    return {path: path.stat().st_mtime_ns for path in (root / "data/digits/scores").rglob("shard-*")}


def test_tables_are_complete_and_keep_their_rules(scored, tmp_path):
    run, items = scored
    tables = {item.title: item.folder.read() for item in items}
    assert len(tables) == 2 * 7
    for table in tables.values():
        assert table["id"].tolist() == run.scored["id"].tolist()
        assert np.isfinite(table["score"]).all()
    validate_scores(tables, run.scored["id"], tmp_path / "docs")
    assert (tmp_path / "docs" / "index.html").is_file()


@pytest.mark.parametrize(
    ("breaking", "rule"),
    [
        (lambda t: t.drop(index=3), "every image has a row"),
        (lambda t: pd.concat([t, t.iloc[3:4]]), "no image has two rows"),
        (lambda t: t.assign(score=t["score"].where(t.index != 3)), "scores are finite"),
        (lambda t: t.assign(id=t["id"].where(t.index != 3, "stranger")), "rows are of the run's images"),
    ],
)
def test_a_broken_score_table_names_rule_and_row(scored, breaking, rule):
    run, [first, *_] = scored
    table = first.folder.read()
    with pytest.raises(DataError, match=rule) as error:
        validate_scores({"scores of x": breaking(table)}, run.scored["id"])
    assert table["id"][3] in str(error.value) or "stranger" in str(error.value)


@pytest.mark.parametrize(
    ("breaking", "rule"),
    [
        (lambda m: m.assign(id=m["id"].where(m.index != 1, m["id"][0])), "ids are unique"),
        (lambda m: m.assign(path=m["path"].where(m.index != 1, "images/nowhere.png")), "files can be read"),
        (lambda m: m.assign(path=m["path"].where(m.index != 1, m["path"][0])), "files are as recorded"),
        (lambda m: m.assign(content_hash=m["content_hash"][0]), "no image is in two splits"),
        (lambda m: m.assign(content_hash=m["content_hash"][0]), "no image is both InD and OOD"),
        (lambda m: m[(m["split"] != "validation") | (m["label"] != 2)], "every split has every InD class"),
        (lambda m: m.assign(label=m["label"].where(m.index != 1, 6)), "labels are 0..5 of InD, -1 of OOD"),
        (lambda m: m.assign(split=m["split"].where(m["dataset"] != "noise", "train")), "OOD is only in"),
        (lambda m: m.assign(split=m["split"].where(m.index != m.index[-1], "test")), "in one split only"),
    ],
)
def test_a_broken_manifest_names_its_rule(project, breaking, rule):
    run = open_run()
    validate_manifest(run.manifest, run.home, 8, "L", 6)
    with pytest.raises(DataError, match=rule):
        validate_manifest(breaking(run.manifest), run.home, 8, "L", 6)


@pytest.mark.parametrize(("size", "mode", "rule"), [(9, "L", "images are 9x9"), (8, "RGB", "of mode RGB")])
def test_images_of_another_format_break_a_rule(project, size, mode, rule):
    run = open_run()
    with pytest.raises(DataError, match=rule):
        validate_manifest(run.manifest, run.home, size, mode, 6)


def test_scoring_again_repeats_nothing(project, scored):
    before = written(project)
    score(open_run())
    assert written(project) == before


def test_a_lost_shard_is_made_again_alone_and_alike(project, scored):
    _, [first, *_] = scored
    before, table = written(project), first.folder.read()
    lost = first.folder.path / "shard-00001.parquet"
    lost.unlink()
    score(open_run())
    changed = {path for path, at in written(project).items() if before[path] != at}
    assert lost in changed
    assert {path.parent for path in changed} == {first.folder.path}
    again = first.folder.read()
    assert again.drop(columns="score").equals(table.drop(columns="score"))
    assert np.allclose(again["score"], table["score"], atol=1e-4)


def test_one_changed_variant_rescores_that_one(project, scored):
    before = written(project)
    try:
        write_params(project, lambda params: params["score"]["variants"]["cfg-w1"].update(stop=3))
        items = score(open_run())
        after = written(project)
        new = {path.parent for path in after if path not in before}
        assert new == {item.folder.path for item in items if item.name == "cfg-w1"}
        assert all(after[path] == at for path, at in before.items() if path in after)
    finally:
        write_params(project)
        score(open_run())
    assert {path.parent.name for path in written(project)} == {path.parent.name for path in before}


def test_scores_do_not_depend_on_the_batch(project, scored, monkeypatch):
    size, (_, items) = 7, scored
    write_params(project, lambda params: params["score"].update(slots=size))
    try:
        small = open_run()
        monkeypatch.setattr(tasks.run.Run, "home", property(lambda self: project / "data" / f"batch-{size}"))
        (project / "data" / f"batch-{size}").mkdir()
        for name in ("images", "models", "manifest.parquet"):
            (project / "data" / f"batch-{size}" / name).symlink_to(project / "data" / "digits" / name)
        again = score(small)
    finally:
        write_params(project)
    for one, other in zip(items, again, strict=True):
        assert np.allclose(one.folder.read()["score"], other.folder.read()["score"], atol=1e-4), one.title
        assert one.folder.path != other.folder.path


def test_an_unreadable_image_stops_scoring_and_leaves_no_shard(project, scored):
    run = open_run(limit=3)
    broken = run.home / run.scored["path"].iloc[-1]
    content = broken.read_bytes()
    broken.write_bytes(content[:30])
    try:
        with pytest.raises(DataError, match=broken.name):
            score(run)
        last = run.shards - 1
        assert all(last in item.folder.missing() for item in plan(run))
    finally:
        broken.write_bytes(content)
    before = written(project)
    assert all(not item.folder.missing() for item in score(run))
    assert written(project) == before


def test_results_have_every_row_with_intervals_and_counts(project, scored):
    run, items = scored
    thresholds, metrics = calibrate(run, items), evaluate(run, items)
    assert json.loads((project / "data/digits/metrics.json").read_text()) == metrics
    assert metrics.keys() == {"ordinary", "strong"}
    for classifier, rows in metrics.items():
        assert rows.keys() == {"cfg-w1", "cfg-early-stop", "paper-cg", "msp", "knn", "mahalanobis", "pixel-knn"}
        for name, row in rows.items():
            assert row.keys() == {"digits-6-8", "letters", "patches", "noise", "near", "far"}
            assert (row["near"]["n_ind"], row["near"]["n_ood"], row["far"]["n_ood"]) == (18, 6, 18)
            for metric in ("auroc", "fpr95", "aupr_in", "aupr_out"):
                assert 0 <= row["far"][metric]["low"] <= row["far"][metric]["high"] <= 1
            [entry] = thresholds[classifier][name]
            [item] = [each for each in items if (each.classifier, each.name) == (classifier, name)]
            table = item.folder.read()
            calibration = table.loc[table["split"] == "calibration", "score"]
            assert (calibration <= entry["threshold"]).mean() >= 0.95
    assert len(result_table(metrics).splitlines()) == 2 + 14
    assert {"digit-9", "symbols", "near", "far"} == json.loads((project / "data/digits/validation.json").read_text())[
        "strong"
    ]["knn"].keys()
    with Image.open(project / "data/digits/verdicts.png") as picture:
        assert picture.height > 5 * 2 * 84


def test_seeds_are_trained_apart_and_pooled(project, scored):
    run = open_run(seeds=[0, 1], variants=["cfg-w1", "msp"], classifier="ordinary")
    before = hash_file(project / "data/digits/models")
    for model in ("denoiser", "ordinary"):
        train(run, model, 1)
    metrics = evaluate(run, score(run))
    found = metrics["ordinary"]["cfg-w1"]["near"]["auroc"]
    assert len(found["per_seed"]) == 2
    assert found["value"] == pytest.approx(np.mean(found["per_seed"]))
    assert hash_file(project / "data/digits/models") == before
    assert (run.results / "metrics.json").is_file()


def test_an_oracle_variant_is_told_the_truth(project):
    def add(params):
        params["score"]["variants"]["told"] = {**params["score"]["variants"]["cfg-w1"], "label": "oracle-ind"}

    write_params(project, add)
    try:
        items = score(open_run(variants=["cfg-w1", "told"], classifier="ordinary", limit=10))
    finally:
        write_params(project)
    tables = {item.name: item.folder.read().set_index("id").sort_index() for item in items}
    plain, told = tables["cfg-w1"], tables["told"]
    wrong = (plain["role"] == "ind") & (plain["predicted"] != plain["label"])
    assert wrong.any()
    assert (plain["predicted"] == told["predicted"]).all()
    assert np.allclose(plain["score"][~wrong], told["score"][~wrong], atol=1e-6)
    assert not np.isclose(plain["score"][wrong], told["score"][wrong], atol=1e-6).any()


def test_mlflow_holds_the_whole_evaluation(project, scored):
    run, items = scored
    metrics, thresholds = evaluate(run, items), calibrate(run, items)
    parent = log(run, items, metrics, thresholds)
    client = open_tracking()
    [experiment] = [e for e in client.search_experiments() if e.name == "diffguard"]
    children = client.search_runs([experiment.experiment_id], f"tags.mlflow.parentRunId = '{parent}'", max_results=100)
    assert client.get_run(parent).info.status == "FINISHED"
    assert {child.info.status for child in children} == {"FINISHED"}
    assert {child.info.run_name for child in children} == {f"{i.name} · {i.classifier}" for i in items}
    [child] = [each for each in children if each.info.run_name == "cfg-early-stop · strong"]
    expected = metrics["strong"]["cfg-early-stop"]["far"]["auroc"]
    assert child.data.metrics["far/auroc"] == pytest.approx(expected["value"])
    assert child.data.metrics["far/auroc_low"] == pytest.approx(expected["low"])
    assert child.data.params["variant.guidance.scale"] == "2.0"
    assert child.data.metrics["images_per_second"] > 0
    assert child.inputs.dataset_inputs[0].dataset.name == "digits"
    names = {each.path for each in client.list_artifacts(child.info.run_id)}
    assert names == {"curves.png", "scores-seed-0.csv", "samples"}
    samples = {Path(each.path).name for each in client.list_artifacts(child.info.run_id, "samples")}
    assert samples == {f"{name}.png" for name in ("digits-0-5", "digits-6-8", "letters", "patches", "noise")}


def test_an_unreachable_mlflow_is_named(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(ServiceError, match=r"MLflow at http://127\.0\.0\.1:9 cannot be reached"):
        open_tracking()
